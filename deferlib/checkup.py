"""What the process that serves an app says of itself to `deferlib doctor`.

The question is a GET of the handler's URL with a dispatch token for attempt 0, which no task ever has: whoever gets an
answer has the app's key.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

from deferlib import config, context
from deferlib.context import Dispatch, TaskContext

ATTEMPT = 0


def question(url: str, now: int, deadline: int) -> Dispatch:
    """Return what stands in a task's place when the handler at *url* is asked how it is."""
    task = TaskContext(0, "", "", ATTEMPT, 0, now, now + deadline, 0, "", url, context.SYSTEM_CLOCK)
    return Dispatch(task, {})


def is_question(dispatch: Dispatch | None) -> bool:
    """Tell whether a GET of the handler with this token asks how it is."""
    return dispatch is not None and dispatch.context.attempt == ATTEMPT


def answer(server: str, *, threads: bool, processes: bool) -> str:
    """Return as JSON what matters to an engine that pushes here; no secrets."""
    runtime = config.runtime()
    return json.dumps(
        {
            "deferlib": _version(),
            "python": platform.python_version(),
            "pid": os.getpid(),
            "folder": _folder(),
            "store": runtime.store_name,
            "server": server,
            "threads": threads,
            "processes": processes,
            "gunicorn": _gunicorn(),
        }
    )


def _version() -> str:
    from deferlib import __version__

    return __version__


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed
        return ""


def _gunicorn() -> dict[str, Any] | None:
    """Return the settings of the gunicorn worker that is calling us; None under any other server.

    Found among the callers: gunicorn has no other way to tell, and its command line is not all of its configuration.
    """
    base = sys.modules.get("gunicorn.workers.base")
    frame = sys._getframe() if base is not None else None
    while frame is not None:
        worker = frame.f_locals.get("self")
        if isinstance(worker, base.Worker):  # type: ignore[union-attr]  # not None if there is a frame
            settings = worker.cfg
            return {
                "kind": str(settings.worker_class_str),
                "workers": int(settings.workers),
                "threads": int(settings.threads),
                "timeout": float(settings.timeout),
            }
        frame = frame.f_back
    return None
