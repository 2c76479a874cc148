"""App Engine's `deferred`: run a Python call later.

`defer(fn, *args)` pickles the call into a task; the handler mounted at `/_ah/queue/deferred` unpickles and runs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from datetime import datetime
from http import HTTPStatus
from time import perf_counter_ns
from typing import Any, NamedTuple, ParamSpec, TypeAlias

from deferlib import attempt, batch, config, context, inbound, payload, token, tracing
from deferlib.context import Dispatch
from deferlib.core.model import repr_without
from deferlib.errors import (
    ConfigError,
    DeferredError,
    InvalidDispatchDeadlineError,
    NotAvailableError,
    PayloadUnverifiedError,
    PermanentTaskFailure,
    SingularTaskFailure,
    TokenError,
)
from deferlib.series import Relay, Series
from deferlib.taskqueue import Queue, Task, TaskRetryOptions

__all__ = [
    "DEFAULT_URL",
    "Error",
    "Handler",
    "PermanentTaskFailure",
    "SingularTaskFailure",
    "adefer",
    "application",
    "defer",
    "invoke_member",
    "run",
    "serialize",
    "set_log_level",
    "using",
]

Error = DeferredError
DEFAULT_URL = "/_ah/queue/deferred"
_RESERVED = (
    "_countdown", "_eta", "_headers", "_name", "_queue", "_retry_options", "_target", "_transactional", "_url"
)  # fmt: skip


_headers_log = logging.getLogger("deferlib.handler.headers")
_ATTEMPT_KEY = "deferlib.attempt"
_log_level = logging.INFO

P = ParamSpec("P")
Response: TypeAlias = tuple[str, HTTPStatus, list[tuple[str, str]]]  # body, status, headers


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
    once), *_retry_options*, *_target*, *_headers*, *_url* of another handler (None: the queue's default URL,
    `/_ah/queue/` and its name).

    Raises ValueError if *fn* isn't callable, `UnpicklableCallError` naming the argument that can't be pickled, the
    errors of `Queue.add`, and a `StoreError` if the store can't take it.

    >>> defer(send_mail, user.id, subject="Welcome", _countdown=60)  # doctest: +SKIP
    """
    options = _Options(_queue, _countdown, _eta, _headers, _name, _retry_options, _target, _url, None)
    if _transactional:
        raise NotAvailableError("_transactional=True isn't available in this version; call defer() after the commit")
    return _enqueue(options, fn, args, kwargs)


async def adefer(fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Task:
    """Do what `defer` does from asyncio code, without blocking the event loop while the disk writes."""
    return await _aenqueue(_Options(), fn, args, kwargs)


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
        return await _aenqueue(self._options, fn, args, kwargs)


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

    def __repr__(self) -> str:
        return repr_without(self._replace(headers=self.headers or {}), "headers")


def _enqueue(options: _Options, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Task:
    queue, task = _prepare(options, fn, args, kwargs)
    queue.add(task)
    return task


async def _aenqueue(options: _Options, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Task:
    """Pickle here, where nobody else changes the arguments meanwhile; let a thread wait for the disk."""
    import asyncio

    queue, task = _prepare(options, fn, args, kwargs)
    await asyncio.to_thread(queue.add, task)
    return task


def _prepare(
    options: _Options, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Queue, Task]:
    """Return the queue and the task of a call: 9 µs with its signature and row, the commit takes 100 and more."""
    if not callable(fn):
        raise ValueError(f"a callable is needed to defer, not {fn!r}; say defer(fn, argument), not defer(fn(argument))")
    _check_underscores(fn, kwargs)
    task = Task.of_call(
        payload.dump_call(fn, args, kwargs),
        name=options.name,
        url=options.url or "",
        headers=options.headers,
        countdown=options.countdown,
        eta=options.eta,
        retry_options=options.retry_options,
        target=options.target,
        dispatch_deadline_usec=None if options.deadline is None else _micros(options.deadline),
    )
    return Queue(options.queue), task


def _micros(seconds: float) -> int:
    try:
        return round(seconds * 1e6)
    except (ValueError, OverflowError):  # NaN, infinite
        raise InvalidDispatchDeadlineError(f"deadline is {seconds!r}: a number of seconds is needed") from None


def _check_underscores(fn: Callable[..., Any], kwargs: Iterable[str]) -> None:
    """Refuse a misspelled option, also one without its underscore: it would be passed to *fn*, hours later, elsewhere."""
    for key in kwargs:
        if not key.startswith("_") and f"_{key}" not in _RESERVED:
            continue
        import inspect  # 6 ms: only where it is needed

        try:
            parameters = inspect.signature(fn).parameters.values()
        except (TypeError, ValueError):
            continue  # a builtin that doesn't tell
        named = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
        if key not in named and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            raise TypeError(f"{payload.describe_callable(fn)} takes no argument {key!r}{_suggestion(key)}")


def _suggestion(key: str) -> str:
    if key in _RESERVED:  # after using(…), which has its own way to say it
        return f"; it is an option of deferlib.defer(), with using() say using({key[1:]}=…)"
    import difflib  # 1 ms: only where it is needed

    close = difflib.get_close_matches(key if key.startswith("_") else f"_{key}", _RESERVED, n=1)
    return f"; did you mean {close[0]}?" if close else f"; options are {', '.join(_RESERVED)}"


# --- running --------------------------------------------------------------------------------------------------------


def serialize(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> bytes:
    """Return the call as a signed payload for a hand-made `Task` to a handler of deferred calls.

    It is bound to no task: whoever holds it can have it run, again and again, unless the setting `accept_unbound` is false.
    `ConfigError` where it is.
    """
    if not callable(fn):
        raise ValueError(f"a callable is needed to serialize, not {fn!r}")
    runtime = config.runtime()
    if not runtime.settings["accept_unbound"]:
        raise ConfigError("the setting 'accept_unbound' is false: payloads are for one task each; use defer() instead")
    return payload.seal(payload.dump_call(fn, args, kwargs), runtime.ring.signing, None)


def run(data: bytes) -> Any:
    """Run the call in the signed payload *data* and return its value.

    A payload that can't be verified or decoded raises a `PayloadError`, before anything of it is run: within a task's
    request also one that `defer` made for another task. What the call raises comes through.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise PayloadUnverifiedError(f"a payload is bytes, as serialize() returns them, not {type(data).__name__}")
    _take()
    envelope = attempt.verify(bytes(data), context.current_task())
    fn, args, kwargs = payload.load_call(envelope)
    return attempt.finished(fn(*args, **kwargs))


def invoke_member(obj: object, membername: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method by its name and return its value. App Engine pickled methods by this; deferlib needs it no more."""
    return getattr(obj, membername)(*args, **kwargs)


def set_log_level(log_level: int) -> None:
    """Set the level at which each call's `X-AppEngine-*` headers are logged, on one line; INFO unless it is set.

    The logger is `deferlib.handler.headers`.
    """
    global _log_level
    _log_level = logging._checkLevel(log_level)  # type: ignore[attr-defined]  # as Logger.setLevel does


class Handler:
    """The WSGI application at `/_ah/queue/deferred`: runs the call that an engine delivers, and nothing else.

    For a handler at another URL, call `post(environ)` in a view of that URL. To do something around every call, override
    `run_from_request`, call the original in it, and mount an instance.
    """

    def run_from_request(self, environ: dict[str, Any]) -> Response:
        """Run the request's call, discard its value, and return the answer of a success: body, status, headers.

        A request that isn't an engine's gets 403. What the call raises comes through; `PayloadError` for a call that can't
        be run here.
        """
        current = environ.get(_ATTEMPT_KEY)
        if not isinstance(current, attempt.Attempt):  # by a view of its own, outside of post()
            dispatch = _received(environ)
            if isinstance(dispatch, attempt.Answer):
                return dispatch.response
            current = attempt.Attempt(dispatch)
        _take()
        attempt.finished(current.load(inbound.read_body(environ))())
        return attempt.success()

    def post(self, environ: dict[str, Any]) -> Response:
        """Run the request's call; return the body, the status and the headers of the answer."""
        if environ["REQUEST_METHOD"] != "POST":
            return self._checkup(environ).response
        dispatch = _received(environ)
        if isinstance(dispatch, attempt.Answer):
            return dispatch.response
        return copy_context().run(self._attempt, dispatch, environ)

    def _attempt(self, dispatch: Dispatch, environ: dict[str, Any]) -> Response:
        response: Response | None = None
        context.request_host.set(environ.get("HTTP_HOST"))  # in a context of its own
        tracing.receive(environ.get("HTTP_TRACEPARENT"), environ.get("HTTP_TRACESTATE"))
        _take()
        with attempt.Attempt(dispatch) as current:
            environ[_ATTEMPT_KEY] = current
            if _headers_log.isEnabledFor(_log_level):
                _headers_log.log(_log_level, ", ".join(f"{name}:{value}" for name, value in dispatch.headers.items()))
            response = current.run(self.run_from_request, environ)
        return response or current.answer.response  # of a failure; or an override says nothing of a success

    def _checkup(self, environ: dict[str, Any]) -> attempt.Answer:
        """Tell `deferlib doctor` about this process, and anybody else that calls come by POST."""
        if environ["REQUEST_METHOD"] != "GET":
            return attempt.WRONG_METHOD
        from deferlib import checkup

        try:
            dispatch = inbound.recognise(environ, config.runtime())
        except TokenError as error:
            return attempt.refuse(error)
        if not checkup.is_question(dispatch):
            return attempt.WRONG_METHOD
        threads, processes = bool(environ.get("wsgi.multithread")), bool(environ.get("wsgi.multiprocess"))
        text = checkup.answer(environ.get("SERVER_SOFTWARE") or "", threads=threads, processes=processes)
        return attempt.Answer(HTTPStatus.OK, "ok", text)

    def _batch(self, environ: dict[str, Any]) -> Response:
        """Run the calls of a request that carries several; each as if it had come alone."""
        runtime = config.runtime()
        try:
            calls = inbound.recognise_batch(environ, runtime)
        except TokenError as error:
            return attempt.refuse(error).response

        def perform(part: batch.Part, dispatch: Dispatch) -> tuple[int, str, str]:
            body, status, headers = self._attempt(dispatch, inbound.alone(environ, part, dispatch))
            return status, _outcome(headers), body

        relay = Relay(Series(calls, runtime.clock), perform)
        answers = relay.run(threads=bool(environ.get("wsgi.multithread")))
        return attempt.Answer(HTTPStatus.OK, batch.OUTCOME, batch.tell(answers)).response

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]
    ) -> Iterable[bytes]:
        # Not where something that has looked at the request stands around the handler, or an override around each call.
        mounted = context.ENVIRON_KEY not in environ and type(self).post is Handler.post
        if mounted and environ["REQUEST_METHOD"] == "POST" and inbound.is_batch(environ):
            body, status, headers = self._batch(environ)
        else:
            began = perf_counter_ns()
            body, status, headers = self.post(environ)
            if mounted and context.ENVIRON_KEY in environ:  # an engine's, as its token has proved
                headers = [*headers, (token.TOOK, str((perf_counter_ns() - began) // 1000))]
        start_response("200 OK" if status == 200 else f"{status:d} {HTTPStatus(status).phrase}", headers)
        return [body.encode()]


def _outcome(headers: Iterable[tuple[str, str]]) -> str:
    return next((value for name, value in headers if name.lower() == "x-deferlib-outcome"), "")


def _take() -> None:
    taken = context.call_taken.get()
    if taken is not None:
        taken.append(True)


def is_at_queues_url(dispatch: Dispatch) -> bool:
    """Tell whether a task goes to its queue's default URL: it may be a call (`_url=None`), and few apps have a view."""
    return dispatch.context.url == f"/_ah/queue/{dispatch.context.queue}"


def _received(environ: dict[str, Any]) -> Dispatch | attempt.Answer:
    """Return what the request is part of, its body read; the answer to it if an engine didn't make it."""
    try:
        known = environ.get(context.ENVIRON_KEY)
        dispatch = known if isinstance(known, Dispatch) else inbound.recognise(environ, config.runtime())
        if dispatch is None:
            return attempt.FORBIDDEN
        inbound.read_body(environ)
    except TokenError as error:
        return attempt.refuse(error)
    return dispatch


application = Handler()
