"""App Engine's `deferred`: run a Python call later.

`defer(fn, *args)` pickles the call into a task; the handler mounted at `/_ah/queue/deferred` unpickles and runs it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import copy_context
from datetime import datetime
from http import HTTPStatus
from types import TracebackType
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
    "adefer",
    "application",
    "defer",
    "run",
    "serialize",
    "using",
]

Error = DeferredError
DEFAULT_URL = "/_ah/queue/deferred"
_HEADERS = {"Content-Type": "application/octet-stream"}
_RESERVED = (
    "_countdown", "_eta", "_headers", "_name", "_queue", "_retry_options", "_target", "_transactional", "_url"
)  # fmt: skip

_ANSWER_BYTES = 300
# What ends an attempt, as its failure. sys.exit() in a call is meant for a script, not for the server that runs it.
_FAILURES = (Exception, DeadlineExceededError, SystemExit)

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
        raise ValueError(f"a callable is needed to defer, not {fn!r}")
    _check_underscores(fn, kwargs)
    queue = Queue(options.queue)
    task = Task.of_call(
        payload.dump_call(fn, args, kwargs),
        name=options.name,
        url=DEFAULT_URL if options.url is None else options.url,
        headers=_headers(options.headers) if options.headers else _HEADERS,
        countdown=options.countdown,
        eta=options.eta,
        retry_options=options.retry_options,
        target=options.target,
        dispatch_deadline_usec=None if options.deadline is None else round(options.deadline * 1e6),
    )
    return queue, task


def _headers(given: Mapping[str, str]) -> dict[str, str]:
    if any(name.lower() == "content-type" for name in given):
        return dict(given)
    return {**_HEADERS, **given}


def _check_underscores(fn: Callable[..., Any], kwargs: Iterable[str]) -> None:
    """Refuse a misspelled option: it would be passed to *fn*, hours later, in another process."""
    for key in kwargs:
        if not key.startswith("_"):
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

    close = difflib.get_close_matches(key, _RESERVED, n=1)
    return f"; did you mean {close[0]}?" if close else f"; options are {', '.join(_RESERVED)}"


# --- running --------------------------------------------------------------------------------------------------------


def serialize(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> bytes:
    """Return the call as a signed payload for a hand-made `Task` to a handler of deferred calls.

    It is bound to no task: whoever holds it can have it run, again and again.
    """
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

    def __call__(self) -> Any:
        """Start the call: its value, or an awaitable of it."""
        try:
            return self.fn(*self.args, **self.kwargs)
        except BaseException as error:
            asyncio = sys.modules.get("asyncio")  # if it isn't loaded, nothing of it was raised
            if asyncio is not None and isinstance(error, asyncio.CancelledError):
                raise RuntimeError("the call was cancelled from inside") from error  # our own caller wasn't
            raise


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

    def respond(self, start_response: Callable[[str, list[tuple[str, str]]], Any]) -> list[bytes]:
        """Answer a WSGI request."""
        start_response(f"{self.status.value} {self.status.phrase}", self.headers)
        return [self.body.encode()]


SUCCESS = Answer(HTTPStatus.OK, "ok", "Success")
FORBIDDEN = Answer(HTTPStatus.FORBIDDEN, "untrusted", "Only the engine may call this; its dispatch token is missing.")
WRONG_METHOD = Answer(HTTPStatus.METHOD_NOT_ALLOWED, "retry", "Deferred calls come by POST.")


def refuse(error: TokenError) -> Answer:
    """Return the answer to a request whose token isn't valid: the engine's or this process's keys are at fault."""
    text = payload.one_line(str(error), _ANSWER_BYTES)
    log.error("a request with an invalid dispatch token was refused: %s", text)
    return Answer(HTTPStatus.FORBIDDEN, "untrusted", f"The dispatch token is refused: {text}")


class Attempt:
    """One run of a delivered call: inside the `with` block its task is the current one, in its namespace.

    Whatever the block raises ends there and becomes the `answer`, but KeyboardInterrupt and its like come through.

    >>> with Attempt(dispatch) as attempt:  # doctest: +SKIP
    ...     attempt.load(data)()
    >>> attempt.answer.status  # doctest: +SKIP
    """

    __slots__ = ("_label", "_loading", "_namespace", "_running", "_task", "answer")

    def __init__(self, dispatch: Dispatch) -> None:
        self._task = dispatch.context
        self._label = ""
        self._loading = False
        self.answer = SUCCESS

    def __enter__(self) -> Attempt:
        self._namespace = namespaces.get_namespace()
        namespaces.set_namespace(self._task.namespace)
        self._running = context.running.set(self._task)
        return self

    def load(self, data: bytes) -> Loaded:
        """Verify and unpickle the call; a `PayloadError` says what is wrong with it."""
        task = self._task
        self._loading = True
        binding = payload.Binding(task.id, task.user_name, task.queue, task.url, task.namespace)
        envelope = payload.verify(data, config.runtime().ring, binding)
        self._label = envelope.label
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
            return True
        finally:
            context.running.reset(self._running)
            namespaces.set_namespace(self._namespace)

    def _judge(self, error: BaseException) -> Answer:
        """Return the answer that *error* amounts to, and log it."""
        task = self._task
        who = (self._label or "a call", task.queue, task.name, task.attempt)
        text = payload.describe_error(error)
        match error:
            case PayloadError() if self._loading:  # of a call that raises one by itself, it is an error like any other
                log.error("%s can't be run (queue %s, task %s, attempt %d): %s", *who, text)
                return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, _payload_outcome(error), text)
            case PermanentTaskFailure():
                log.error("%s failed for good (queue %s, task %s, attempt %d)", *who, exc_info=_of_the_call(error))
                return Answer(HTTPStatus.OK, "permanent", text)
            case SingularTaskFailure():
                log.debug("%s asks to be run again (queue %s, task %s, attempt %d)", *who)
                return Answer(HTTPStatus.REQUEST_TIMEOUT, "retry", text)
        log.error("%s failed (queue %s, task %s, attempt %d)", *who, exc_info=_of_the_call(error))
        return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "retry", text)


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


def perform(dispatch: Dispatch, data: bytes, finish: Callable[[Any], Any] | None = None) -> Answer:
    """Load and run the call of *dispatch*, and say how it went.

    *finish* waits for what a coroutine function returns; by default a loop is made for it.
    """
    with Attempt(dispatch) as attempt:
        (finish or _finish)(attempt.load(data)())
    return attempt.answer


def _finish(value: Any) -> Any:
    """Run an awaitable to its end, on a loop of its own; return anything else as it is."""
    if not hasattr(value, "__await__"):
        return value
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(uncancelled(value))
    with ThreadPoolExecutor(1) as pool:  # this thread's loop is busy calling us; another thread has none
        return pool.submit(copy_context().run, asyncio.run, uncancelled(value)).result()


async def uncancelled(awaitable: Awaitable[Any]) -> Any:
    """Wait for *awaitable*; if it cancels itself that is a failure like any other, and not an end of whoever waits."""
    import asyncio

    try:
        return await awaitable
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("the call was cancelled from inside") from error


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
            return self._checkup(environ)
        try:
            dispatch = environ.get(context.ENVIRON_KEY)
            if not isinstance(dispatch, Dispatch):  # it comes from another process
                dispatch = inbound.recognise(environ, config.runtime())
            if dispatch is None:
                return FORBIDDEN
            data = inbound.read_body(environ)
        except TokenError as error:
            return refuse(error)
        return copy_context().run(perform, dispatch, data)

    def _checkup(self, environ: dict[str, Any]) -> Answer:
        """Tell `deferlib doctor` about this process, and anybody else that calls come by POST."""
        if environ["REQUEST_METHOD"] != "GET":
            return WRONG_METHOD
        from deferlib import checkup

        try:
            dispatch = inbound.recognise(environ, config.runtime())
        except TokenError as error:
            return refuse(error)
        if not checkup.is_question(dispatch):
            return WRONG_METHOD
        threads, processes = bool(environ.get("wsgi.multithread")), bool(environ.get("wsgi.multiprocess"))
        text = checkup.answer(environ.get("SERVER_SOFTWARE") or "", threads=threads, processes=processes)
        return Answer(HTTPStatus.OK, "ok", text)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]
    ) -> Iterable[bytes]:
        body, status, headers = self.post(environ)  # not answer(): App Engine's programs override post()
        start_response(f"{status.value} {status.phrase}", headers)
        return [body.encode()]


application = Handler()
