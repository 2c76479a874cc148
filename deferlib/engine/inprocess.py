"""An engine in the app's own process: for tests, scripts and small apps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from deferlib import config, deferred
from deferlib.core.model import SECOND
from deferlib.engine.build import build
from deferlib.engine.engine import Engine
from deferlib.engine.local import WsgiApp
from deferlib.server.wsgi import wrap_wsgi_app


@contextmanager
def running(app: WsgiApp | None = None) -> Iterator[Engine]:
    """Run an engine in a thread of this process while the `with` block lasts; deferred calls run in a pool of threads.

    *app* is the WSGI app that tasks with a URL of their own are for; without one, only deferred calls run. At the end of
    the block, what runs is finished (for up to the `grace` setting), and what hasn't started stays in the store.
    """
    runtime = config.runtime()
    engine = build(runtime, deferred.application if app is None else wrap_wsgi_app(app))
    thread = threading.Thread(target=engine.run, name="deferlib-engine", daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.stop(round(runtime.settings["grace"] * SECOND))
        thread.join()
        engine.close()
