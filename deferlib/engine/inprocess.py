"""An engine in the app's own process: for tests, scripts and small apps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

from deferlib import config, deferred
from deferlib.core.model import SECOND
from deferlib.engine.build import build
from deferlib.engine.engine import Engine
from deferlib.engine.local import WsgiApp
from deferlib.server.wsgi import wrap_wsgi_app

if TYPE_CHECKING:
    from deferlib.contrib.asgi import AsgiApp


@contextmanager
def running(app: WsgiApp | AsgiApp | None = None) -> Iterator[Engine]:
    """Run an engine in a thread of this process while the `with` block lasts; deferred calls run in a pool of threads.

    *app* is the WSGI or ASGI app that tasks with a URL of their own are for; without one, only deferred calls run. An
    ASGI app gets a loop in a thread of its own, and its lifespan. At the end of the block, what runs is finished (for up
    to the `grace` setting), and what hasn't started stays in the store.
    """
    runtime = config.runtime()
    with ExitStack() as stack:
        engine = build(runtime, _served(app, stack))
        thread = threading.Thread(target=engine.run, name="deferlib-engine", daemon=True)
        thread.start()
        try:
            yield engine
        finally:
            engine.stop(round(runtime.settings["grace"] * SECOND))
            thread.join()
            engine.close()


def _served(app: WsgiApp | AsgiApp | None, stack: ExitStack) -> WsgiApp:
    """Return *app* as the engine calls it, with the deferred handler in it."""
    if app is None:
        return deferred.application
    from deferlib.contrib.asgi import as_wsgi, is_asgi  # brings asyncio

    if not is_asgi(app):
        return wrap_wsgi_app(cast("WsgiApp", app))
    bridge = as_wsgi(cast("AsgiApp", app))
    stack.callback(bridge.close)
    bridge.start()
    return bridge
