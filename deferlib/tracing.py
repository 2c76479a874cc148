"""Traces across the queue: the W3C trace context of whoever adds a task goes with it, and its run is a span of that trace.

OpenTelemetry is used if the app has imported it, and is never imported here. Without it a task that runs hands the context
that it came with on to the tasks it adds, so that a service without OpenTelemetry breaks no trace.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from deferlib.context import TaskContext

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context

log = logging.getLogger("deferlib.handler")

P = ParamSpec("P")
T = TypeVar("T")

PARENT, STATE = "traceparent", "tracestate"
# Compiled on first use: that takes 0.3 ms, and most processes trace nothing.
_PARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
_STATE = r"[ -~]{1,512}"


class Carried(NamedTuple):
    """A trace context as its two headers have it."""

    parent: str
    state: str  # '' for none

    @property
    def size(self) -> int:
        """How many bytes the headers take in a request."""
        return len(PARENT) + len(self.parent) + 4 + (len(STATE) + len(self.state) + 4 if self.state else 0)


_received: ContextVar[Carried | None] = ContextVar("deferlib_trace", default=None)
_running: ContextVar[Run | None] = ContextVar("deferlib_span", default=None)
_told = False


# --- where a task is made ---------------------------------------------------------------------------------------------


def current() -> Carried | None:
    """Return the trace context for a task that is made here; None outside of any trace."""
    api = sys.modules.get("opentelemetry.trace")
    if api is not None:
        carried = _guarded(_of_current_span, api)
        if carried is not None:
            return carried
    return _received.get()


def _of_current_span(api: Any) -> Carried | None:
    span = api.get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return _carried(f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}", span.trace_state.to_header())


def _carried(parent: str, state: str) -> Carried | None:
    """Return what two headers say, without a state that isn't one; None if the first isn't a trace context."""
    if not re.fullmatch(_PARENT, parent):
        return None
    return Carried(parent, state if re.fullmatch(_STATE, state) else "")


# --- where it runs ----------------------------------------------------------------------------------------------------


class Run:
    """The span of an attempt while it runs, and the current one of its context."""

    __slots__ = ("_api", "_failed", "_outer", "_span", "_token", "task")

    def __init__(self, api: Any, task: TaskContext, carried: Carried | None) -> None:
        self._api = api
        self.task = task
        self._failed = False
        here = api.get_current_span().get_span_context()
        came = None if carried is None else _remote(api, carried)
        context: Context | None = None
        links = []
        if not here.is_valid:
            context = came and api.set_span_in_context(api.NonRecordingSpan(came))
        elif came is not None and here.trace_id != came.trace_id:  # the server began a trace of its own
            links.append(api.Link(came))
        self._span: otel.Span = api.get_tracer("deferlib").start_span(
            "deferlib.run", context, kind=api.SpanKind.CONSUMER, attributes=_attributes(task), links=links
        )
        self._token: Any = _contexts().attach(api.set_span_in_context(self._span, context))
        self._outer = _running.set(self)

    def name(self, label: str) -> None:
        """Say which function is called."""
        self._span.set_attribute("code.function.name", label)

    def failed(self, error: BaseException | None, text: str = "") -> None:
        """Say that the attempt failed, with *error* or for another reason; the first one counts."""
        if self._failed:
            return
        self._failed = True
        if error is not None:
            self._span.record_exception(error)
            self._span.set_attribute("error.type", type(error).__qualname__)
        self._span.set_status(self._api.StatusCode.ERROR, text or type(error).__name__)

    def end(self) -> None:
        _running.reset(self._outer)
        _contexts().detach(self._token)
        self._span.end()


def receive(parent: object, state: object) -> None:
    """Take what the headers of a task's request say; in a context of its own, or there it stays."""
    _received.set(_carried(parent, state if isinstance(state, str) else "") if isinstance(parent, str) else None)


def begin(task: TaskContext) -> Run | None:
    """Begin the span of an attempt; None without OpenTelemetry, or where the attempt's has begun (in a view)."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    outer = _running.get()
    if outer is not None and (outer.task.id, outer.task.fence) == (task.id, task.fence):
        return None
    return _guarded(Run, api, task, _received.get())


@contextmanager
def run(task: TaskContext) -> Iterator[None]:
    """Make the block the span of an attempt; what it raises comes through, and is recorded."""
    span = begin(task)
    try:
        yield
    except Exception as error:
        failed(error)
        raise
    finally:
        end(span)


def answered(status: str) -> None:
    """Take the status of a view's answer, which decides whether its attempt has failed."""
    if not status.startswith("2"):
        failed(None, f"HTTP {status[:3]}")


def is_running() -> bool:
    """Tell whether an attempt's span has begun."""
    return _running.get() is not None


def name(label: str) -> None:
    """Say which function the running attempt calls."""
    run = _running.get()
    if run is not None:
        _guarded(run.name, label)


def failed(error: BaseException | None, text: str = "") -> None:
    """Say that the running attempt failed."""
    run = _running.get()
    if run is not None:
        _guarded(run.failed, error, text)


def end(run: Run | None) -> None:
    """End what `begin` returned, in the context in which it began."""
    if run is not None:
        _guarded(run.end)


def _attributes(task: TaskContext) -> dict[str, str | int]:
    """Return the attributes by OpenTelemetry's conventions for messaging, which have none for an attempt."""
    return {
        "messaging.system": "deferlib",
        "messaging.operation.name": "run",
        "messaging.operation.type": "process",
        "messaging.destination.name": task.queue,
        "messaging.message.id": task.name,
        "deferlib.task.attempt": task.attempt,
    }


def _remote(api: Any, carried: Carried) -> Any:
    match = re.fullmatch(_PARENT, carried.parent)
    assert match is not None  # it was made of one
    return api.SpanContext(
        int(match["trace"], 16),
        int(match["span"], 16),
        is_remote=True,
        trace_flags=api.TraceFlags(int(match["flags"], 16)),
        trace_state=api.TraceState.from_header([carried.state]) if carried.state else None,
    )


def _contexts() -> ModuleType:
    return sys.modules["opentelemetry.context"]  # which opentelemetry.trace imports


def _guarded(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Do *work*, which is OpenTelemetry's and its processors': what it raises, the first time told, fails no task."""
    global _told
    try:
        return work(*args, **kwargs)
    except Exception as error:
        if not _told:
            _told = True
            log.warning("a task isn't traced, because OpenTelemetry failed: %r", error)
        return None
