"""A warning, once, when tasks are added and no engine has served the store for a minute: the likeliest mistake of all."""

from __future__ import annotations

import logging
import threading
import time

from deferlib import config
from deferlib.config import Runtime
from deferlib.context import SYSTEM_CLOCK
from deferlib.core.model import Micros, Mode
from deferlib.errors import Error
from deferlib.store import Tx

log = logging.getLogger("deferlib.client")

PATIENCE = 60.0  # seconds
_NEVER = float("inf")


def oldest_due(tx: Tx, now: Micros) -> Micros | None:
    """Return since when a task has been due that an engine would deliver; None if there is none."""
    queues = [row.name for row in tx.queues() if not row.held and row.config.mode is Mode.PUSH]
    dues = [each.oldest_due for each in tx.stats(now, queues) if each.oldest_due is not None]
    return min((due for due in dues if due <= now), default=None)


def look(runtime: Runtime) -> None:
    """Find out whether an engine serves the store; if none does, look again in a minute, from a thread, and warn then.

    For whoever adds tasks, whenever `runtime.look_at` has passed (by the monotonic clock): once a minute, 30 µs.
    """
    in_memory = getattr(runtime.store, "path", None) == ":memory:"
    if in_memory or runtime.clock is not SYSTEM_CLOCK:  # which no engine of another process shares
        runtime.look_at = _NEVER
        return
    runtime.look_at = time.monotonic() + PATIENCE
    if not runtime.store.served():
        timer = threading.Timer(PATIENCE, _warn, [runtime])
        timer.daemon = True
        timer.name = "deferlib-unserved"
        timer.start()


def _warn(runtime: Runtime) -> None:
    if not config.is_current(runtime) or runtime.look_at == _NEVER:  # replaced meanwhile, or warned
        return
    try:
        if runtime.store.served():
            return
        now = runtime.clock.now()
        with runtime.store.read() as tx:
            due = oldest_due(tx, now)
    except Error:  # whoever uses the store next is told
        return
    if due is not None:
        runtime.look_at = _NEVER
        log.warning(
            "nothing has served %s for a minute, and tasks wait: start `deferlib engine`, or `deferlib dev` while you "
            "work; `deferlib doctor` looks further",
            runtime.store_name,
        )
