"""Log records that say which task they were logged in: `%(task_name)s`, `%(task_queue)s` and `%(task_attempt)d`.

They are set on every record of every logger, outside of tasks to `''`, `''` and 0, so that one format fits all. The first
task that runs in a process sees to it; `install` does so before, for a format that is in use before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from deferlib.context import running

__all__ = ["install"]

Factory: TypeAlias = Callable[..., logging.LogRecord]

_NAMES = frozenset({"task_name", "task_queue", "task_attempt"})
_PROBE = ("deferlib", logging.DEBUG, __file__, 0, "", (), None)
_known: Factory | None = None  # the last factory that was found to set them


def install() -> None:
    """Set the fields on every record from now on. May be called again, and any number of times.

    A record factory that was set before is kept, and called. One that is set later, and doesn't call the one before it, is
    wrapped when the next task runs.
    """
    global _known
    # Without a lock: two threads at once wrap the same factory, and the last one's wrapping counts.
    factory = logging.getLogRecordFactory()
    if factory is _known:  # nearly always: 0.1 µs of an attempt
        return
    if not _sets_them(factory):
        factory = _wrapped(factory)
        logging.setLogRecordFactory(factory)
    _known = factory


def _sets_them(factory: Factory) -> bool:
    try:
        return factory(*_PROBE).__dict__.keys() >= _NAMES
    except Exception:  # an app's factory that can't do without what a real record has
        return False


def _wrapped(factory: Factory) -> Factory:
    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        task = running.get()
        fields = record.__dict__ = _Fields(record.__dict__)
        if task is None:
            fields["task_name"] = fields["task_queue"] = ""
            fields["task_attempt"] = 0
        else:
            fields["task_name"], fields["task_queue"], fields["task_attempt"] = task.name, task.queue, task.attempt
        return record

    return make


class _Fields(dict[str, Any]):
    """A record's fields, of which ours don't seem to be there.

    A logger refuses an `extra` with the name of a field that is there: `extra={"task_name": …}` in an app would fail the
    call that logs it. This way it takes the place of ours.
    """

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return name not in _NAMES and super().__contains__(name)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # a record that is sent away needs no deferlib where it arrives
