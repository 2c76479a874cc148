"""Run Python calls later, reliably: `defer(fn, *args)`, in any Python web app, with no broker to install."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deferlib import deferred, namespaces, taskqueue
from deferlib.config import configure
from deferlib.context import TaskContext, current_task
from deferlib.deferred import adefer, defer, using
from deferlib.deferred import application as handler
from deferlib.errors import (
    DeadlineExceededError,
    Error,
    NotAvailableError,
    PermanentTaskFailure,
    SingularTaskFailure,
)
from deferlib.moved import formerly
from deferlib.server.wsgi import task_only, wrap_wsgi_app

if TYPE_CHECKING:
    from deferlib.engine.inprocess import running as running

__version__ = "0.1.0"

__all__ = [
    "DeadlineExceededError",
    "Error",
    "NotAvailableError",
    "PermanentTaskFailure",
    "SingularTaskFailure",
    "TaskContext",
    "adefer",
    "configure",
    "current_task",
    "defer",
    "deferred",
    "formerly",
    "handler",
    "namespaces",
    "running",
    "task_only",
    "taskqueue",
    "using",
    "wrap_wsgi_app",
]

_LATER = {
    "joined": "call defer() after the commit",
    "pull": "use a push queue",
}


def __getattr__(name: str) -> Any:
    if name == "running":  # brings the engine, which an app that only defers never needs
        from deferlib.engine.inprocess import running

        return running
    if name in _LATER:
        raise NotAvailableError(f"deferlib.{name} isn't available in this version; {_LATER[name]}")
    raise AttributeError(f"module 'deferlib' has no attribute {name!r}")
