"""App Engine's `deferred`: run a Python call later.

`defer(fn, *args)` pickles the call into a task; the handler mounted at `/_ah/queue/deferred` unpickles and runs it.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import copy_context
from datetime import datetime
from http import HTTPStatus
from typing import Any, NamedTuple, ParamSpec

from deferlib import config, context, inbound, namespaces, payload, token
from deferlib.context import Dispatch
from deferlib.errors import (
    DeadlineExceededError,
    DeferredError,
    NotAvailableError,
    PayloadError,
    PayloadKeyUnknownError,
    PayloadNewerError,
    PayloadUndecodableError,
    PermanentTaskFailure,
    SingularTaskFailure,
    TokenError,
)
from deferlib.taskqueue import Queue, Task, TaskRetryOptions

__all__ = [
    "DEFAULT_URL",
    "Error",
    "Handler",
    "PermanentTaskFailure",
    "SingularTaskFailure",
    "application",
    "defer",
    "run",
    "serialize",
    "using",
]

Error = DeferredError
DEFAULT_URL = "/_ah/queue/deferred"
_BODY_TYPE = "application/octet-stream"
_RESERVED = (
    "_countdown", "_eta", "_headers", "_name", "_queue", "_retry_options", "_target", "_transactional", "_url"
)  # fmt: skip

P = ParamSpec("P")
log = logging.getLogger("deferlib.handler")


# --- deferring ------------------------------------------------------------------------------------------------------


def defer(
    fn: Callable[..., Any],
    /,
    *args: Any,
    _countdown: float | None = None,
    _eta: datetime | None = None,
    _headers: Mapping[str, str] | None = None,
    _name: str | None = None,
    _queue: str = "default",
    _retry_options: TaskRetryOptions | None = None,
    _target: str | None = None,
    _transactional: bool = False,
    _url: str | None = DEFAULT_URL,
    **kwargs: Any,
) -> Task:
    """Run ``fn(*args, **kwargs)`` later, at least once, until it returns without raising. Return its task.

    When this returns, the call is on disk: it survives the death of every process. Underscore arguments say how:
    *_countdown* in seconds from now or *_eta* as a datetime (naive: local time), *_queue*, *_name* (a name is taken
    once), *_retry_options*, *_target*, *_headers*, *_url* of another handler.

    Raises ValueError if *fn* isn't callable, `UnpicklableCallError` naming the argument that can't be pickled, the
    errors of `Queue.add`, and a `StoreError` if the store can't take it.

    >>> defer(send_mail, user.id, subject="Welcome", _countdown=60)  # doctest: +SKIP
    """
    _check_underscores(fn, kwargs)
    options = _Options(_queue, _countdown, _eta, _headers, _name, _retry_options, _target, _url, None)
    if _transactional:
        raise NotAvailableError("_transactional=True isn't available in this version; call defer() after the commit")
    return _enqueue(options, fn, args, kwargs)


async def adefer(fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Task:
    """Do what `defer` does from asyncio code, without blocking the event loop while the disk writes."""
    return await _in_thread(_enqueue, _Options(), fn, args, kwargs)


def using(
    queue: str = "default",
    countdown: float | None = None,
    eta: datetime | None = None,
    headers: Mapping[str, str] | None = None,
    name: str | None = None,
    retry_options: TaskRetryOptions | None = None,
    target: str | None = None,
    url: str | None = DEFAULT_URL,
    connection: object = None,
    deadline: float | None = None,
) -> Deferrer:
    """Return an object whose `defer` and `adefer` use these options; it can be kept and used again.

    *deadline* is how many seconds an attempt may take (15 s to 24 h). The rest is as for `defer`, but typed:
    ``using(queue="mail").defer(fn, …)`` checks the arguments against *fn*'s signature.
    """
    if connection is not None:
        raise NotAvailableError("using(connection=…) isn't available in this version; call defer() after the commit")
    return Deferrer(_Options(queue, countdown, eta, headers, name, retry_options, target, url, deadline))


class Deferrer:
    """What `using` returns: defers calls with the options it was made with."""

    __slots__ = ("_options",)

    def __init__(self, options: _Options) -> None:
        self._options = options

    def defer(self, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Do what the module's `defer` does."""
        return _enqueue(self._options, fn, args, kwargs)

    async def adefer(self, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Do what the module's `adefer` does."""
        return await _in_thread(_enqueue, self._options, fn, args, kwargs)


class _Options(NamedTuple):
    queue: str = "default"
    countdown: float | None = None
    eta: datetime | None = None
    headers: Mapping[str, str] | None = None
    name: str | None = None
    retry_options: TaskRetryOptions | None = None
    target: str | None = None
    url: str | None = DEFAULT_URL
    deadline: float | None = None


def _enqueue(options: _Options, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Task:
    if not callable(fn):
        raise ValueError(f"a callable is needed to defer, not {fn!r}")
    queue = Queue(options.queue)
    call = payload.dump_call(fn, args, kwargs)
    headers = {"Content-Type": _BODY_TYPE}
    if options.headers:
        given = {name.lower() for name in options.headers}
        headers = {**({} if "content-type" in given else headers), **options.headers}
    task = Task.of_call(
        call,
        name=options.name,
        url=DEFAULT_URL if options.url is None else options.url,
        headers=headers,
        countdown=options.countdown,
        eta=options.eta,
        retry_options=options.retry_options,
        target=options.target,
        dispatch_deadline_usec=None if options.deadline is None else round(options.deadline * 1e6),
    )
    queue.add(task)
    return task


async def _in_thread(fn: Callable[..., Task], *args: Any) -> Task:
    import asyncio

    return await asyncio.to_thread(fn, *args)


def _check_underscores(fn: object, kwargs: Iterable[str]) -> None:
    """Refuse a misspelled option: it would be passed to *fn*, hours later, in another process."""
    for key in kwargs:
        if not key.startswith("_") or not callable(fn):
            continue
        try:
            parameters = inspect.signature(fn).parameters
        except (TypeError, ValueError):
            continue  # a builtin that doesn't tell
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if key not in parameters and not takes_any:
            close = difflib.get_close_matches(key, _RESERVED, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; options are {', '.join(_RESERVED)}"
            raise TypeError(f"{payload.describe_callable(fn)} takes no argument {key!r}{hint}")


# --- running --------------------------------------------------------------------------------------------------------


def serialize(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> bytes:
    """Return the call as a signed payload for a hand-made `Task` to a handler of deferred calls."""
    if not callable(fn):
        raise ValueError(f"a callable is needed to serialize, not {fn!r}")
    return payload.seal(payload.dump_call(fn, args, kwargs), config.runtime().ring.signing, None)


def run(data: bytes) -> Any:
    """Run the call in the signed payload *data* and return its value.

    A payload that can't be verified or decoded raises a `PayloadError`, before anything of it is run; what the call
    raises comes through.
    """
    envelope = payload.verify(data, config.runtime().ring, None)
    fn, args, kwargs = payload.load_call(envelope)
    return _finish(fn(*args, **kwargs))


class Loaded(NamedTuple):
    """A verified, unpickled call on its way to run."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str

    def __call__(self) -> Any:
        """Start the call: its value, or an awaitable of it."""
        return self.fn(*self.args, **self.kwargs)


class Answer(NamedTuple):
    """What the handler says to the engine."""

    status: HTTPStatus
    outcome: str
    body: str

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(self.body.encode()))),
            (token.OUTCOME, self.outcome),
        ]


SUCCESS = Answer(HTTPStatus.OK, "ok", "Success")
FORBIDDEN = Answer(HTTPStatus.FORBIDDEN, "untrusted", "Only the engine may call this; its dispatch token is missing.")
WRONG_METHOD = Answer(HTTPStatus.METHOD_NOT_ALLOWED, "retry", "Deferred calls come by POST.")


def load(dispatch: Dispatch, data: bytes) -> Loaded:
    """Verify and unpickle the call that *dispatch* delivers; a `PayloadError` says what is wrong with it."""
    task = dispatch.context
    binding = payload.Binding(task.id, task.user_name, task.queue, task.url, task.namespace)
    envelope = payload.verify(data, config.runtime().ring, binding)
    return Loaded(*payload.load_call(envelope), envelope.label)


def refuse(error: TokenError) -> Answer:
    """Return the answer to a request whose token isn't valid: the engine's or this process's keys are at fault."""
    log.error("a request with an invalid dispatch token was refused: %s", error)
    return Answer(HTTPStatus.FORBIDDEN, "untrusted", f"The dispatch token is refused: {error}.")


def judge(error: BaseException, task: context.TaskContext, label: str) -> Answer:
    """Return the answer that *error*, raised by loading or running a call, amounts to; log it."""
    who = (label or "a call", task.queue, task.name, task.attempt)
    text = f"{type(error).__name__}: {error}"[:500]
    match error:
        case PermanentTaskFailure():
            log.error("%s failed for good (queue %s, task %s, attempt %d)", *who, exc_info=error)
            return Answer(HTTPStatus.OK, "permanent", text)
        case SingularTaskFailure():
            log.debug("%s asks to be run again (queue %s, task %s, attempt %d)", *who)
            return Answer(HTTPStatus.REQUEST_TIMEOUT, "retry", text)
        case PayloadError():
            log.error("%s can't be run (queue %s, task %s, attempt %d): %s", *who, error)
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, _payload_outcome(error), text)
    log.error("%s failed (queue %s, task %s, attempt %d)", *who, exc_info=error)
    return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "retry", text)


def _payload_outcome(error: PayloadError) -> str:
    match error:
        case PayloadKeyUnknownError():
            return "key-unknown"
        case PayloadNewerError():
            return "newer"
        case PayloadUndecodableError():
            return "undecodable"
    return "unverified"


def perform(dispatch: Dispatch, data: bytes) -> Answer:
    """Load and run the call of *dispatch*, and say how it went. Coroutine functions run to completion."""
    task, label = dispatch.context, ""
    task_token = context.running.set(task)
    try:
        namespaces.set_namespace(task.namespace)
        loaded = load(dispatch, data)
        label = loaded.label
        _finish(loaded())
    except (Exception, DeadlineExceededError) as error:  # a user's call may raise anything
        return judge(error, task, label)
    finally:
        context.running.reset(task_token)
    return SUCCESS


def _finish(value: Any) -> Any:
    """Run an awaitable to its end; return anything else as it is."""
    if not inspect.isawaitable(value):
        return value
    import asyncio

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    return asyncio.run(wait(value))


class Handler:
    """The WSGI application at `/_ah/queue/deferred`: runs the call that an engine delivers, and nothing else.

    For a handler at another URL, call `post(environ)` in a view of that URL.
    """

    def post(self, environ: dict[str, Any]) -> tuple[str, HTTPStatus, list[tuple[str, str]]]:
        """Run the request's call; return the body, the status and the headers of the answer."""
        answer = self.answer(environ)
        return answer.body, answer.status, answer.headers

    def answer(self, environ: dict[str, Any]) -> Answer:
        """Run the request's call and return the `Answer`."""
        if environ["REQUEST_METHOD"] != "POST":
            return WRONG_METHOD
        try:
            dispatch = inbound.identify(environ, config.runtime())
            if dispatch is None:
                return FORBIDDEN
            data = inbound.read_body(environ)
        except TokenError as error:
            return refuse(error)
        return copy_context().run(perform, dispatch, data)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]
    ) -> Iterable[bytes]:
        body, status, headers = self.post(environ)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers = [*headers, ("Allow", "POST")]
        start_response(f"{status.value} {status.phrase}", headers)
        return [body.encode()]


application = Handler()
