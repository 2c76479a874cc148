"""One run of a delivered call: loaded, called in its context, and judged into the answer that its engine gets."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from http import HTTPStatus
from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from deferlib import config, context, deadline, namespaces, payload, task_logs, token, tracing
from deferlib.context import Dispatch, TaskContext
from deferlib.errors import (
    BodyTooLongError,
    CallMismatchError,
    DeadlineExceededError,
    PayloadError,
    PayloadKeyUnknownError,
    PayloadNewerError,
    PayloadUndecodableError,
    PermanentTaskFailure,
    SingularTaskFailure,
    TokenError,
    TokenMismatchError,
)

log = logging.getLogger("deferlib.handler")

P = ParamSpec("P")
T = TypeVar("T")

_ANSWER_BYTES = 300
_QUIET = 10.0  # seconds between two lines in the log about requests that are refused for the same reason
_refused: dict[object, tuple[float, int]] = {}  # of each kind: when it was logged, and how many there were since
# What ends an attempt, as its failure. sys.exit() in a call is meant for a script, not for the server that runs it.
_FAILURES = (Exception, DeadlineExceededError, SystemExit)


class Loaded(NamedTuple):
    """A verified, unpickled call on its way to run."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Start the call: its value, or an awaitable of it."""
        try:
            return self.fn(*self.args, **self.kwargs)
        except TypeError as error:
            self._check_fit(error)
            raise
        except BaseException as error:
            asyncio = sys.modules.get("asyncio")  # if it isn't loaded, nothing of it was raised
            if asyncio is not None and isinstance(error, asyncio.CancelledError):
                raise RuntimeError("the call was cancelled from inside") from error  # our own caller wasn't
            raise

    def _check_fit(self, error: TypeError) -> None:
        """Raise `CallMismatchError` if *error* says that the callable doesn't take its arguments: nothing of it has run."""
        traceback = error.__traceback__
        frames = 0
        while traceback is not None:
            frames, traceback = frames + 1, traceback.tb_next
        if frames > 1:  # it was raised inside
            return
        import inspect  # 6 ms: only where it is needed

        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):
            return  # a builtin that doesn't tell
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError:
            name = payload.describe_callable(self.fn)
            raise CallMismatchError(f"{name} doesn't take the arguments that were deferred: {error}") from error


class Answer(NamedTuple):
    """What the handler says to the engine."""

    status: HTTPStatus
    outcome: str
    body: str

    @property
    def headers(self) -> list[tuple[str, str]]:
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(self.body.encode()))),
            (token.OUTCOME, self.outcome),
        ]
        if self.status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "POST"))
        return headers

    @property
    def response(self) -> tuple[str, HTTPStatus, list[tuple[str, str]]]:
        """Body, status and headers, as App Engine's handler returns them."""
        return self.body, self.status, self.headers

    def respond(self, start_response: Callable[[str, list[tuple[str, str]]], Any]) -> list[bytes]:
        """Answer a WSGI request."""
        start_response(f"{self.status.value} {self.status.phrase}", self.headers)
        return [self.body.encode()]


SUCCESS = Answer(HTTPStatus.OK, "ok", "Success")
_SUCCESS_HEADERS = SUCCESS.headers
FORBIDDEN = Answer(HTTPStatus.FORBIDDEN, "untrusted", "Only the engine may call this; its dispatch token is missing.")
TASKS_ONLY = Answer(HTTPStatus.FORBIDDEN, "untrusted", "Only tasks and admins may call this.")
WRONG_METHOD = Answer(HTTPStatus.METHOD_NOT_ALLOWED, "retry", "Deferred calls come by POST.")


def success() -> tuple[str, HTTPStatus, list[tuple[str, str]]]:
    """Return the response of a success, which is made for nearly every call (0.1 µs, 0.8 anew)."""
    return "Success", HTTPStatus.OK, _SUCCESS_HEADERS.copy()


def refuse(error: TokenError) -> Answer:
    """Return the answer to a request whose token isn't valid: the engine's or this process's keys are at fault."""
    text = payload.one_line(str(error), _ANSWER_BYTES)
    if isinstance(error, BodyTooLongError):  # whoever sent it; a task's is charged for it
        _log_refusal(error, "a request was refused", text)
        return Answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "retry", text)
    _log_refusal(error, "a request with an invalid dispatch token was refused", text)
    outcome = "mismatched" if isinstance(error, TokenMismatchError) else "untrusted"
    return Answer(HTTPStatus.FORBIDDEN, outcome, f"The dispatch token is refused: {text}")


def _log_refusal(error: TokenError, what: str, why: str) -> None:
    """Log the first of its kind in ten seconds, and how many were left out since the one before: anybody can send them.

    A kind is the place in the code that found it, whatever the request holds, so there are only so many.
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    kind = (type(error), place and (place.tb_frame.f_code, place.tb_lineno))
    now = monotonic()
    since, left_out = _refused.get(kind, (-math.inf, 0))
    if now - since < _QUIET:
        _refused[kind] = (since, left_out + 1)  # two threads at once may count as one
        return
    _refused[kind] = (now, 0)
    log.error("%s: %s%s", what, why, f" ({left_out} more like it weren't logged)" if left_out else "")


def stopped(task: TaskContext, error: DeadlineExceededError) -> Answer:
    """Return the answer of a view that let its task's `DeadlineExceededError` pass, and log it."""
    text = _deadline_text(task, error)
    url = payload.one_line(task.url, _ANSWER_BYTES)
    line = "%s was stopped at its deadline (queue %s, task %s, attempt %d)"
    log.error(line, url, task.queue, task.name, task.attempt, exc_info=_of_the_call(error))
    return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "retry", text)


class Attempt:
    """One run of a delivered call: inside the `with` block its task is the current one, in its namespace.

    Whatever the block raises ends there and becomes the `answer`, but KeyboardInterrupt and its like come through. Only
    what `run` runs is told of its deadline.

    >>> with Attempt(dispatch) as attempt:  # doctest: +SKIP
    ...     finished(attempt.run(lambda: attempt.load(data)()))
    >>> attempt.answer.status  # doctest: +SKIP
    """

    __slots__ = ("_default", "_dispatch", "_envelope", "_loading", "_namespace", "_running", "_span", "_task", "answer")

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._task = dispatch.context
        self._envelope: payload.Envelope | None = None
        self._loading = False
        self.answer = SUCCESS

    def __enter__(self) -> Attempt:
        self._namespace = namespaces.current_namespace.set(self._task.namespace)  # checked when the task was made
        self._running = context.running.set(self._task)
        self._default = namespaces.default_namespace.set(self._dispatch.default_namespace)
        task_logs.install()
        self._span = tracing.begin(self._task)
        return self

    def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *fn*, with a `DeadlineExceededError` in it shortly before the task's deadline; none comes after it ends.

        A function, because the end of a `with` block is Python too: an exception could come there, and reach its caller.
        """
        return deadline.call(self._task, fn, *args, **kwargs)

    def load(self, data: bytes) -> Loaded:
        """Verify and unpickle the call; a `PayloadError` says what is wrong with it."""
        task = self._task
        self._loading = True
        envelope = verify(data, task)
        self._envelope = envelope
        if tracing.is_running():
            tracing.name(envelope.label)
        loaded = Loaded(*payload.load_call(envelope))
        self._loading = False
        return loaded

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            if not isinstance(error, _FAILURES):
                return False
            self.answer = self._judge(error)
            if not isinstance(error, SingularTaskFailure):  # that one only asks to be run again
                tracing.failed(error)
            return True
        finally:
            tracing.end(self._span)
            namespaces.default_namespace.reset(self._default)
            context.running.reset(self._running)
            namespaces.current_namespace.reset(self._namespace)

    def _judge(self, error: BaseException) -> Answer:
        """Return the answer that *error* amounts to, and log it."""
        task = self._task
        label = "" if self._envelope is None else self._envelope.label
        who = (label or "a call", task.queue, task.name, task.attempt)
        text = payload.describe_error(error)
        if isinstance(error, SystemExit) and error.code == 1 and "gunicorn" in sys.modules:  # how it ends a worker
            text += " (the call took longer than gunicorn's --timeout, by default 30 s, or called sys.exit)"
        match error:
            # Of a call that raises one by itself, it is an error like any other.
            case PayloadError() if self._loading or isinstance(error, CallMismatchError):
                log.error("%s can't be run (queue %s, task %s, attempt %d): %s", *who, text)
                return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, _payload_outcome(error), text)
            case PermanentTaskFailure() if not isinstance(error, PayloadError):
                log.error("%s failed for good (queue %s, task %s, attempt %d)", *who, exc_info=_of_the_call(error))
                return Answer(HTTPStatus.OK, "permanent", text)
            case SingularTaskFailure():
                log.debug("%s asks to be run again (queue %s, task %s, attempt %d)", *who)
                return Answer(HTTPStatus.REQUEST_TIMEOUT, "retry", text)
            case DeadlineExceededError():
                log.error(
                    "%s was stopped at its deadline (queue %s, task %s, attempt %d)", *who, exc_info=_of_the_call(error)
                )
                return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "retry", _deadline_text(task, error))
        log.error("%s failed (queue %s, task %s, attempt %d)", *who, exc_info=_of_the_call(error))
        return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "retry", text)


def _deadline_text(task: TaskContext, error: DeadlineExceededError) -> str:
    """Return what *error* says; one that the watchdog raised says nothing by itself."""
    return payload.describe_error(error if error.args else DeadlineExceededError(deadline.describe(task)))


def _of_the_call(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return *error* for a log, its traceback from where the call's own code begins; whole if none of it is the call's."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("deferlib."):
        traceback = traceback.tb_next
    return type(error), error, traceback or error.__traceback__


def _payload_outcome(error: PayloadError) -> str:
    match error:
        case PayloadKeyUnknownError():
            return "key-unknown"
        case PayloadNewerError():
            return "newer"
        case PayloadUndecodableError():
            return "undecodable"
    return "unverified"


def verify(data: bytes, task: TaskContext | None) -> payload.Envelope:
    """Return the verified envelope of a call that *task* carries (None: any task may), or raise its `PayloadError`."""
    runtime = config.runtime()
    binding = task and payload.Binding(task.id, task.user_name, task.queue, task.url, task.namespace)
    return payload.verify(data, runtime.ring, binding, unbound=runtime.settings["accept_unbound"])


def perform(dispatch: Dispatch, data: bytes, finish: Callable[[Any], Any] | None = None) -> Answer:
    """Load and run the call of *dispatch*, and say how it went.

    *finish* waits for what a coroutine function returns; by default a loop is made for it.
    """
    with Attempt(dispatch) as attempt:
        (finish or finished)(attempt.run(lambda: attempt.load(data)()))
    return attempt.answer


def finished(value: Any) -> Any:
    """Run an awaitable to its end, or its task's deadline, on a loop of its own; return anything else as it is."""
    if not hasattr(value, "__await__"):
        return value
    return deadline.unguarded(_run_loop, value)  # the loop is told by its own clock, not by an exception inside it


def _run_loop(value: Awaitable[Any]) -> Any:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    try:
        asyncio.get_running_loop()
        busy = True
    except RuntimeError:
        busy = False
    if not busy:
        return asyncio.run(uncancelled(value))
    with ThreadPoolExecutor(1) as pool:  # this thread's loop is busy calling us; another thread has none
        return pool.submit(copy_context().run, asyncio.run, uncancelled(value)).result()


async def uncancelled(awaitable: Awaitable[Any]) -> Any:
    """Wait for *awaitable* until its task's deadline; it is cancelled then, which is a `DeadlineExceededError`.

    If it cancels itself that is a failure like any other, and not an end of whoever waits.
    """
    import asyncio

    try:
        return await deadline.limited(awaitable)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("the call was cancelled from inside") from error
