"""The WSGI middleware: mounts the deferred handler, and makes the engine's headers trustworthy for every view."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from deferlib import config, deferred, inbound, namespaces
from deferlib.context import running
from deferlib.errors import TokenError

StartResponse = Callable[..., Any]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class Middleware:
    """A WSGI app with the deferred handler in it. What `wrap_wsgi_app` returns."""

    def __init__(self, app: WsgiApp, *, use_deferred: bool) -> None:
        self.app = app
        self._use_deferred = use_deferred

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if self._use_deferred and environ.get("PATH_INFO") == deferred.DEFAULT_URL:
            return deferred.application(environ, start_response)
        try:
            dispatch = inbound.identify(environ, config.runtime())
        except TokenError as error:
            answer = deferred.refuse(error)
            start_response(f"{answer.status.value} {answer.status.phrase}", answer.headers)
            return [answer.body.encode()]
        if dispatch is None:
            return self.app(environ, start_response)
        token = running.set(dispatch.context)
        try:
            with namespaces.namespace(dispatch.context.namespace):
                return self.app(environ, start_response)
        finally:
            running.reset(token)


def wrap_wsgi_app(
    app: WsgiApp,
    use_legacy_context_mode: bool = True,
    use_deferred: bool = True,
    *,
    is_admin: Callable[[dict[str, Any]], bool] | None = None,
) -> Middleware:
    """Return *app* with the handler of deferred calls at `/_ah/queue/deferred`.

    Every request loses its `X-AppEngine-*` and `X-CloudTasks-*` headers, however they are spelled; requests that an engine
    made, as their token proves, get the true ones, come from 0.1.0.2, and run in their task's namespace.
    *use_legacy_context_mode* is accepted for App Engine's sake and changes nothing. Wrapping twice is wrapping once.
    """
    if isinstance(app, Middleware):
        return app
    return Middleware(app, use_deferred=use_deferred)
