"""The WSGI middleware: mounts the deferred handler, and makes the engine's headers trustworthy for every view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import Context, copy_context
from typing import Any

from deferlib import attempt, config, deadline, deferred, inbound, namespaces, payload
from deferlib.context import Dispatch, call_taken, request_host, running
from deferlib.errors import DeadlineExceededError, NotAvailableError, TokenError

StartResponse = Callable[..., Any]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class Middleware:
    """A WSGI app with the deferred handler in it. What `wrap_wsgi_app` returns."""

    def __init__(self, app: WsgiApp, *, use_deferred: bool) -> None:
        self.app = app
        self.use_deferred = use_deferred

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if self.use_deferred and environ.get("PATH_INFO") == deferred.DEFAULT_URL:
            return deferred.application(environ, start_response)
        try:
            dispatch = inbound.identify(environ, config.runtime())
        except TokenError as error:
            return attempt.refuse(error).respond(start_response)
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

    def _attempt(self, dispatch: Dispatch, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Run a task's request to its end or its deadline; the server gets nothing of the answer before."""
        task = dispatch.context
        running.set(task)
        namespaces.set_namespace(task.namespace)
        namespaces.default_namespace.set(dispatch.default_namespace)
        taken: list[bool] | None = None
        if self.use_deferred and deferred.is_at_queues_url(dispatch) and payload.is_envelope(inbound.read_body(environ)):
            taken = []
            call_taken.set(taken)
        answer = _Answer()
        try:
            body = deadline.call(task, answer.collect, self.app, environ)
        except DeadlineExceededError as error:
            return attempt.stopped(task, error).respond(start_response)
        if answer.started is not None:
            if taken == [] and answer.started[0] < "5":  # an answer of a view that knows nothing of calls
                return deferred.application(environ, start_response)
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


def _is_file(body: object, environ: dict[str, Any]) -> bool:
    """Tell whether *body* is the server's own file wrapper, which it sends faster if nothing is around it."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)


def wrap_wsgi_app(
    app: WsgiApp,
    use_legacy_context_mode: bool = True,
    use_deferred: bool = True,
    *,
    is_admin: Callable[[dict[str, Any]], bool] | None = None,
) -> Middleware:
    """Return *app* with the handler of deferred calls at `/_ah/queue/deferred`.

    Every request loses its `X-AppEngine-*`, `X-CloudTasks-*` and `X-Deferlib-*` headers, however spelled; requests that an
    engine made, as their token proves, get the true ones, come from 0.1.0.2, and run in their task's namespace.
    *use_legacy_context_mode* is accepted for App Engine's sake and changes nothing. Wrapping twice is wrapping once.
    """
    if is_admin is not None:
        raise NotAvailableError("is_admin isn't available in this version; protect the views themselves")
    if isinstance(app, Middleware):
        return app if app.use_deferred or not use_deferred else Middleware(app.app, use_deferred=True)
    return Middleware(app, use_deferred=use_deferred)
