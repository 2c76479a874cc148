"""The WSGI middleware: mounts the deferred handler, and makes the engine's headers trustworthy for every view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from deferlib import attempt, config, deadline, deferred, inbound, namespaces, payload, task_logs, tracing
from deferlib.access import ADMIN_KEY, Access, is_at_this_machine
from deferlib.context import Dispatch, call_taken, request_host, running
from deferlib.errors import DeadlineExceededError, TokenError
from deferlib.inbound import Environ

StartResponse = Callable[..., Any]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

_ANYBODY: Access[Environ] = Access()
_COROUTINE = 0x80  # inspect.CO_COROUTINE, without the 6 ms of inspect


class Middleware:
    """A WSGI app with the deferred handler in it. What `wrap_wsgi_app` and `task_only` return."""

    def __init__(self, app: WsgiApp, *, use_deferred: bool, access: Access[Environ] = _ANYBODY) -> None:
        self.app = app
        self.use_deferred = use_deferred
        self.access = access
        task_logs.install()  # before the first record whose format names a task

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if self.use_deferred and environ.get("PATH_INFO") == deferred.DEFAULT_URL:
            return deferred.application(environ, start_response)
        try:
            dispatch = inbound.identify(environ, config.runtime())
        except TokenError as error:
            return attempt.refuse(error).respond(start_response)
        if dispatch is None and not self._admit(environ):
            return attempt.TASKS_ONLY.respond(start_response)
        # A context of its own for each request (0.4 µs of the middleware's 2.4): servers use a thread again, and the next
        # tenant's request must not start in the namespace that a view of the last one's has set.
        context = copy_context()
        context.run(request_host.set, environ.get("HTTP_HOST"))
        if dispatch is not None:
            return context.run(self._attempt, dispatch, environ, start_response)
        body = context.run(self.app, environ, start_response)
        if isinstance(body, list | tuple) or _is_file(body, environ):
            return body
        return _Body(body, context)

    def _admit(self, environ: Environ) -> bool:
        """Tell whether a request that is no task's gets in; an admin's gets the headers back that were set by hand."""
        covered = self.access.covers(inbound.decoded(environ.get("PATH_INFO", "")))
        claimed = inbound.claimed(environ)
        if not covered and not claimed:  # nearly all
            return True
        if not self._is_admin(environ):
            return not covered
        environ[ADMIN_KEY] = True
        environ.update(claimed)
        return True

    def _is_admin(self, environ: Environ) -> bool:
        if is_at_this_machine(environ.get("REMOTE_ADDR") or "", partial(_header, environ)):
            return True
        if self.access.is_admin is None:
            return ADMIN_KEY in environ  # as a middleware around this one has found
        answer = self.access.is_admin(environ)
        if hasattr(answer, "__await__"):
            getattr(answer, "close", bool)()
            raise TypeError(
                "is_admin of a WSGI app returns whether it is an admin, not a coroutine: it can't be awaited here"
            )
        return bool(answer)

    def _attempt(self, dispatch: Dispatch, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Run a task's request to its end or its deadline; the server gets nothing of the answer before."""
        task = dispatch.context
        running.set(task)
        namespaces.set_namespace(task.namespace)
        namespaces.default_namespace.set(dispatch.default_namespace)
        task_logs.install()
        tracing.receive(environ.get("HTTP_TRACEPARENT"), environ.get("HTTP_TRACESTATE"))
        with tracing.run(task):
            return self._answer(dispatch, environ, start_response)

    def _answer(self, dispatch: Dispatch, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        task = dispatch.context
        taken: list[bool] | None = None
        if self.use_deferred and deferred.is_at_queues_url(dispatch) and payload.is_envelope(inbound.read_body(environ)):
            taken = []
            call_taken.set(taken)
        answer = _Answer()
        try:
            body = deadline.call(task, answer.collect, self.app, environ)
        except DeadlineExceededError as error:
            tracing.failed(error)
            return attempt.stopped(task, error).respond(start_response)
        if answer.started is not None:
            if taken == [] and answer.started[0] < "5":  # an answer of a view that knows nothing of calls
                return deferred.application(environ, start_response)
            tracing.answered(answer.started[0])
            start_response(*answer.started)
        return body


class _Answer:
    """An app's answer to a task, whole: an app that is a generator does its work while it is read."""

    def __init__(self) -> None:
        self.started: tuple[str, list[tuple[str, str]]] | None = None
        self._parts: list[bytes] = []

    def collect(self, app: WsgiApp, environ: dict[str, Any]) -> Iterable[bytes]:
        """Call *app*; return the body of its answer."""
        body = app(environ, self._start)
        if _is_file(body, environ):  # what is left to do is the server's
            return body
        try:
            self._parts.extend(body)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        return self._parts

    def _start(
        self, status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], None]:  # fmt: skip
        self.started = status, headers
        return self._parts.append


class _Body:
    """An app's answer, read in the context that the app was called in: of a generator, all of the app runs there."""

    def __init__(self, body: Iterable[bytes], context: Context) -> None:
        self._body = body
        self._context = context
        self._parts: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._parts is None:
            self._parts = self._context.run(iter, self._body)
        return self._context.run(next, self._parts)

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            self._context.run(close)


def _header(environ: Environ, name: str) -> str:
    return str(environ.get("HTTP_" + name.upper().replace("-", "_")) or "")


def _is_file(body: object, environ: dict[str, Any]) -> bool:
    """Tell whether *body* is the server's own file wrapper, which it sends faster if nothing is around it."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)


def wrap_wsgi_app(
    app: WsgiApp,
    use_legacy_context_mode: bool = True,
    use_deferred: bool = True,
    *,
    is_admin: Callable[[Environ], object] | None = None,
) -> Middleware:
    """Return *app* with the handler of deferred calls at `/_ah/queue/deferred`.

    Every request loses its `X-AppEngine-*`, `X-CloudTasks-*` and `X-Deferlib-*` headers, however spelled; requests that an
    engine made, as their token proves, get the true ones, come from 0.1.0.2, and run in their task's namespace.

    *is_admin* tells of a request's environ whether an admin made it, by a session or a login: never by a header that
    anybody can send. Admins keep the `X-AppEngine-*` and `X-CloudTasks-*` headers that they set by hand, and get in where
    `task_only` lets tasks in only. *use_legacy_context_mode* is accepted for App Engine's sake and changes nothing.
    Wrapping twice is wrapping once.
    """
    _check_admin(is_admin)
    if isinstance(app, Middleware):
        if is_admin is None and (app.use_deferred or not use_deferred):
            return app
        return Middleware(app.app, use_deferred=use_deferred or app.use_deferred, access=app.access.joined((), is_admin))
    _refuse_asgi(app, "wrap_wsgi_app", "wrap_asgi_app")
    return Middleware(app, use_deferred=use_deferred, access=Access((), is_admin))


def task_only(
    app: WsgiApp, paths: Iterable[str] | str = ("/",), *, is_admin: Callable[[Environ], object] | None = None
) -> Middleware:
    """Return *app* with *paths*, and all below them, for tasks and admins only: App Engine's `login: admin`.

    Anybody else gets a 403. A path is the app's own, as in its routes: `/tasks` covers `/tasks` and `/tasks/mail`, not
    `/tasks-list`. *is_admin* is as for `wrap_wsgi_app`; in either order, both functions make one middleware. ValueError for
    a path that doesn't begin with `/`.
    """
    _check_admin(is_admin)
    if not paths:
        raise ValueError("task_only() needs paths; without any the app would be open to all")
    if isinstance(app, Middleware):
        return Middleware(app.app, use_deferred=app.use_deferred, access=app.access.joined(Access(paths).paths, is_admin))
    _refuse_asgi(app, "task_only", "task_only")
    return Middleware(app, use_deferred=False, access=Access(paths, is_admin))


def _check_admin(is_admin: object) -> None:
    """Raise TypeError for a coroutine function: what it returns counts as true, for anybody."""
    if _is_coroutine_function(is_admin):
        raise TypeError("is_admin of a WSGI app is a plain function, not a coroutine function")


def _is_coroutine_function(value: object) -> bool:
    for function in (value, getattr(type(value), "__call__", None)):  # noqa: B004  # its kind counts, not whether it is there
        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & _COROUTINE:
            return True
    return False


def _refuse_asgi(app: object, name: str, other: str) -> None:
    """Say to whoever has an ASGI app which function is for it; TypeError also for what can't be called."""
    if not callable(app):
        raise TypeError(f"{name}() takes a WSGI app, not {type(app).__name__}")
    if _is_coroutine_function(app):
        raise TypeError(f"{name}() takes a WSGI app, and this is an ASGI app: use deferlib.contrib.asgi.{other}()")
