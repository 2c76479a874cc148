"""App Engine's `deferred`: run a Python call later.

`defer(fn, *args)` pickles the call into a task; the handler mounted at `/_ah/queue/deferred` unpickles and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from datetime import datetime
from http import HTTPStatus
from typing import Any, NamedTuple, ParamSpec

from deferlib import attempt, config, context, inbound, payload
from deferlib.context import Dispatch
from deferlib.errors import (
    DeferredError,
    NotAvailableError,
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


P = ParamSpec("P")


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
        raise ValueError(f"a callable is needed to defer, not {fn!r}; say defer(fn, argument), not defer(fn(argument))")
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
    return attempt.finished(fn(*args, **kwargs))


class Handler:
    """The WSGI application at `/_ah/queue/deferred`: runs the call that an engine delivers, and nothing else.

    For a handler at another URL, call `post(environ)` in a view of that URL.
    """

    def post(self, environ: dict[str, Any]) -> tuple[str, HTTPStatus, list[tuple[str, str]]]:
        """Run the request's call; return the body, the status and the headers of the answer."""
        answer = self.answer(environ)
        return answer.body, answer.status, answer.headers

    def answer(self, environ: dict[str, Any]) -> attempt.Answer:
        """Run the request's call and return the `Answer`."""
        if environ["REQUEST_METHOD"] != "POST":
            return self._checkup(environ)
        try:
            dispatch = environ.get(context.ENVIRON_KEY)
            if not isinstance(dispatch, Dispatch):  # it comes from another process
                dispatch = inbound.recognise(environ, config.runtime())
            if dispatch is None:
                return attempt.FORBIDDEN
            data = inbound.read_body(environ)
        except TokenError as error:
            return attempt.refuse(error)
        return copy_context().run(attempt.perform, dispatch, data)

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

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]
    ) -> Iterable[bytes]:
        body, status, headers = self.post(environ)  # not answer(): App Engine's programs override post()
        start_response(f"{status.value} {status.phrase}", headers)
        return [body.encode()]


application = Handler()
