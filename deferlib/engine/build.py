"""An engine of the runtime's settings."""

from __future__ import annotations

import os
import random
import secrets
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from deferlib.config import Runtime
from deferlib.core.model import SECOND, Micros
from deferlib.core.rules import Rules, home_only
from deferlib.core.scheduler import Scheduler
from deferlib.engine.engine import Engine, no_step
from deferlib.engine.local import LocalTransport, WsgiApp
from deferlib.engine.observer import UNMONITORED, Monitor, Observer
from deferlib.engine.transport import Transport
from deferlib.outbound import NOWHERE
from deferlib.targets import Targets

if TYPE_CHECKING:
    from deferlib.contrib.asgi import AsgiApp

CONCURRENCY = 32  # deliveries at once to one target
GATHER: Micros = SECOND // 200  # how long what finished may wait for more to be settled with it


def build(
    runtime: Runtime,
    app: WsgiApp | AsgiApp | None = None,
    *,
    observer: Observer | None = None,
    monitor: Monitor = UNMONITORED,
    around: Callable[[Transport], Transport] | None = None,
    take_over: bool | None = None,
    step: Callable[[str], None] | None = None,
) -> Engine:
    """Return an engine on the runtime's store that calls *app* in this process, or, without one, pushes over HTTP.

    A WSGI app is called as it is; an ASGI app gets the deferred handler, a loop, and its lifespan until the process exits.

    Applies the configured queues to the store. *observer*, *monitor*, *take_over* and *step* are the engine's (by default
    an engine that calls the app itself takes over); *around* may put another transport in front of the one that is made.
    """
    runtime.apply_queues()
    lease: Micros = round(runtime.settings["lease"] * SECOND)
    node = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    rules = Rules(
        node=node,
        lease=lease,
        in_process=app is not None,
        base="" if app is not None else runtime.settings["app"],
        target=(Targets() if app is not None else runtime.targets).get,
        quarantine_after=round(runtime.settings["quarantine_after"] * SECOND),
        concurrency=runtime.settings["concurrency"] or CONCURRENCY,
        origin=home_only if app is not None else (runtime.settings["allow_urls"] or NOWHERE).origin,
    )
    scheduler = Scheduler(rules, random.Random())
    transport = _transport(runtime, app)
    return Engine(
        runtime.store,
        transport if around is None else around(transport),
        scheduler,
        runtime.clock,
        node=node,
        lease=lease,
        observer=observer,
        monitor=monitor,
        take_over=app is not None if take_over is None else take_over,
        gather=GATHER,
        step=step or no_step,
    )


def _transport(runtime: Runtime, app: WsgiApp | AsgiApp | None) -> Transport:
    concurrency = runtime.settings["concurrency"]
    if app is not None:
        from deferlib.contrib.asgi import is_asgi  # brings asyncio
        from deferlib.engine.bridge import as_wsgi

        if is_asgi(app):
            bridge = as_wsgi(cast("AsgiApp", app))
            bridge.start()
            app = bridge
        return LocalTransport(cast("WsgiApp", app), runtime.clock, threads=concurrency)
    from deferlib.engine.dispatch import batch_signer, signer
    from deferlib.engine.http import HttpTransport

    return HttpTransport(
        signer(runtime.ring, runtime.clock),
        runtime.clock,
        concurrency=concurrency or CONCURRENCY,
        covers=(runtime.settings["allow_urls"] or NOWHERE).covers,
        prepare_batch=batch_signer(runtime.ring),
        batch=runtime.settings["batch"],
    )
