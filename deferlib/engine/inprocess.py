"""An engine in the app's own process: for tests, scripts and small apps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

from deferlib import config, deferred
from deferlib.core.model import SECOND
from deferlib.engine.build import build
from deferlib.engine.engine import Engine
from deferlib.engine.local import WsgiApp
from deferlib.server.wsgi import wrap_wsgi_app
from deferlib.taskqueue.unserved import oldest_due

if TYPE_CHECKING:
    from deferlib.contrib.asgi import AsgiApp


_LOOK_SECONDS = 0.005


@contextmanager
def running(app: WsgiApp | AsgiApp | None = None) -> Iterator[Engine]:
    """Run an engine in a thread of this process while the `with` block lasts; deferred calls run in a pool of threads.

    *app* is the WSGI or ASGI app that tasks with a URL of their own are for; without one, only deferred calls run. An
    ASGI app gets a loop in a thread of its own, and its lifespan. At the end of the block, what is due then is finished,
    for up to the `grace` setting; what isn't due stays in the store. If the block raises, only what runs is finished.
    """
    runtime = config.runtime()
    with ExitStack() as stack:
        engine = build(runtime, served(app, stack))
        thread = threading.Thread(target=engine.run, name="deferlib-engine", daemon=True)
        thread.start()
        grace: float = runtime.settings["grace"]
        try:
            yield engine
            grace = _finish(engine, runtime, thread, grace)
        finally:
            engine.stop(round(grace * SECOND))
            thread.join()
            engine.close()


def _finish(engine: Engine, runtime: config.Runtime, thread: threading.Thread, grace: float) -> float:
    """Wait until nothing is due and nothing runs, for up to *grace* seconds; return how many of them are left."""
    until = time.monotonic() + grace
    while (left := until - time.monotonic()) > 0 and thread.is_alive():
        with runtime.store.read() as tx:
            due = oldest_due(tx, runtime.clock.now())
        if due is None and not engine.busy:
            break
        thread.join(_LOOK_SECONDS)
    return max(left, 0.0)


def served(app: WsgiApp | AsgiApp | None, stack: ExitStack) -> WsgiApp:
    """Return *app* as an engine in this process calls it, with the deferred handler in it; None is the handler alone.

    An ASGI app's loop and lifespan end with *stack*.
    """
    if app is None:
        return deferred.application
    from deferlib.contrib.asgi import is_asgi  # brings asyncio
    from deferlib.engine.bridge import as_wsgi

    if not is_asgi(app):
        return wrap_wsgi_app(cast("WsgiApp", app))
    bridge = as_wsgi(cast("AsgiApp", app))
    stack.callback(bridge.close)
    bridge.start()
    return bridge
