"""deferlib in ASGI apps (Starlette, FastAPI, Quart, …): the middleware, which needs none of them.

    app = FastAPI()
    app.add_middleware(deferlib.contrib.asgi.Middleware)

Deferred coroutine functions are awaited on the app's own loop, so they may use its connection pools; plain functions
run in a thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias, TypedDict

from deferlib import attempt as attempts
from deferlib import batch, config, deadline, deferred, inbound, namespaces, payload, task_logs, token, tracing
from deferlib.access import ADMIN_KEY, Access, is_at_this_machine
from deferlib.config import Runtime
from deferlib.context import ENVIRON_KEY, Dispatch, call_taken, request_host, running
from deferlib.contrib.calls import perform, perform_all
from deferlib.contrib.outside import outside
from deferlib.errors import DeadlineExceededError, TokenError

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = Iterable[tuple[bytes, bytes]]

_SIGNATURE = token.HEADER.lower()
_CLAIMED = "deferlib.claimed"  # in the scope: the headers that were taken away


class Middleware:
    """An ASGI app with the deferred handler in it, at `/_ah/queue/deferred`.

    Every request and websocket loses its `X-AppEngine-*`, `X-CloudTasks-*` and `X-Deferlib-*` headers, however they are
    spelled; requests that an engine made, as their token proves, get the true ones, come from 0.1.0.2, and run in their
    task's namespace, with `current_task()`, until shortly before their task's deadline, when they are cancelled.

    *task_only* are paths for tasks and admins only, and those below them; *is_admin* tells of a scope (by a coroutine
    function, if need be) whether an admin made it, as for `deferlib.wrap_wsgi_app`.
    """

    def __init__(
        self, app: AsgiApp, *, is_admin: Callable[[Scope], object] | None = None, task_only: Iterable[str] | str = ()
    ) -> None:
        self.app = app
        self.access: Access[Scope] = Access(task_only, is_admin)
        task_logs.install()  # before the first record whose format names a task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":  # never a task
                _clean(scope)
                if not await self._admit(scope):
                    return await send({"type": "websocket.close", "code": 1008})  # before it is accepted: HTTP 403
                await self.app(scope, *outside(receive, send))
            case _:  # lifespan
                await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        receive, send = outside(receive, send)
        request_host.set(_host(scope))  # for this request: a server gives each a task, and so a context, of its own
        body = _Body(receive)
        deferred_call = _split_path(scope)[1] == deferred.DEFAULT_URL
        if deferred_call and scope["method"] not in ("GET", "POST"):
            return await _respond(send, attempts.WRONG_METHOD)
        mounted = deferred_call and ENVIRON_KEY not in scope  # nothing that has looked at it stands around this
        try:
            if mounted and scope["method"] == "POST" and token.is_batch(_header(scope, _SIGNATURE)):
                return await _respond(send, await _perform_batch(scope, body))
            dispatch = await _identify(scope, body)
            if dispatch is not None:
                tracing.receive(_header(scope, tracing.PARENT), _header(scope, tracing.STATE))
            if deferred_call and scope["method"] == "GET":
                return await _respond(send, _checkup(dispatch))
            if deferred_call:
                if dispatch is None:
                    return await _respond(send, attempts.FORBIDDEN)
                answer, took = await perform(dispatch, await body.read(scope["headers"]))
                return await _respond(send, answer, took if mounted else None)
        except TokenError as error:
            return await _respond(send, attempts.refuse(error))
        if dispatch is None:
            if not await self._admit(scope):
                return await _respond(send, attempts.TASKS_ONLY)
            return await self.app(scope, receive, send)
        task = running.set(dispatch.context)
        default = namespaces.default_namespace.set(dispatch.default_namespace)
        task_logs.install()
        try:
            with namespaces.namespace(dispatch.context.namespace), tracing.run(dispatch.context):
                if deferred.is_at_queues_url(dispatch):
                    await self._call_or_view(dispatch, scope, body, send)
                else:
                    await self._attempt(dispatch, scope, body.replay, _noted(send))
        finally:
            namespaces.default_namespace.reset(default)
            running.reset(task)

    async def _admit(self, scope: Scope) -> bool:
        """Tell whether a request that is no task's gets in; an admin's gets the headers back that were set by hand."""
        covered = self._covers(scope)
        claimed: list[tuple[bytes, bytes]] = scope.get(_CLAIMED, [])
        if not covered and not claimed:  # nearly all
            return True
        admin: object = is_at_this_machine((scope.get("client") or ("",))[0], partial(_header, scope))
        if not admin and self.access.is_admin is None:
            admin = ADMIN_KEY in scope  # as a middleware around this one has found
        elif not admin and self.access.is_admin is not None:
            admin = self.access.is_admin(scope)
            if inspect.isawaitable(admin):
                admin = await admin
        if not admin:
            return not covered
        scope[ADMIN_KEY] = True
        scope["headers"] = [*scope["headers"], *scope.pop(_CLAIMED, [])]
        return True

    def _covers(self, scope: Scope) -> bool:
        """Tell whether a request is for tasks only, by whatever the app may take for its path.

        Frameworks have their own mind about `root_path` (an app may set it by itself, after this), and about request
        targets that aren't paths.
        """
        if not self.access.paths:
            return False
        path, root = scope["path"], scope.get("root_path", "").rstrip("/")
        return any(self.access.covers(each, anywhere=True) for each in {path, path.removeprefix(root)})

    async def _call_or_view(self, dispatch: Dispatch, scope: Scope, body: _Body, send: Send) -> None:
        """Run a request to its queue's default URL: by the app's view, or if it has none, as the call that it may be."""
        data = await body.read(scope["headers"])
        messages: list[Message] = []
        taken: list[bool] = []
        call_taken.set(taken)

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._attempt(dispatch, scope, body.replay, keep)
        if messages and not taken and messages[0].get("status", 500) < 500 and payload.is_envelope(data):
            answer, _ = await perform(dispatch, data)
            return await _respond(send, answer)
        for message in messages:
            await _noted(send)(message)

    async def _attempt(self, dispatch: Dispatch, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a task's request to its end or its deadline."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await deadline.limited(self.app(scope, receive, watched))
        except DeadlineExceededError as error:
            tracing.failed(error)
            answer = attempts.stopped(dispatch.context, error)
            if started:  # the server breaks the answer off; some of them let nothing but an Exception do that
                raise TimeoutError(answer.body) from error
            await _respond(send, answer)


def _noted(send: Send) -> Send:
    """Return *send* for the answer of a view, whose status the attempt's span is told."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            tracing.answered(str(message.get("status")))
        await send(message)

    return noted


def wrap_asgi_app(app: AsgiApp, *, is_admin: Callable[[Scope], object] | None = None) -> Middleware:
    """Return *app* with the handler of deferred calls at `/_ah/queue/deferred`. Wrapping twice is wrapping once."""
    if not isinstance(app, Middleware):
        return Middleware(app, is_admin=is_admin)
    if is_admin is None:
        return app
    access = app.access.joined((), is_admin)
    return Middleware(app.app, is_admin=access.is_admin, task_only=access.paths)


def task_only(
    app: AsgiApp, paths: Iterable[str] | str = ("/",), *, is_admin: Callable[[Scope], object] | None = None
) -> Middleware:
    """Do what `deferlib.task_only` does, for an ASGI app; *is_admin* takes a scope. The deferred handler is mounted too."""
    if not paths:
        raise ValueError("task_only() needs paths; without any the app would be open to all")
    if not isinstance(app, Middleware):
        return Middleware(app, is_admin=is_admin, task_only=paths)
    access = app.access.joined(Access(paths).paths, is_admin)
    return Middleware(app.app, is_admin=access.is_admin, task_only=access.paths)


def is_asgi(app: object) -> bool:
    """Tell whether *app* is an ASGI app and not a WSGI one: whether a call of it is awaited, or takes three arguments."""
    while isinstance(app, partial):
        app = app.func
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(app, "__call__", None)):  # noqa: B004  # its kind counts, not whether it is there
        return True
    if not callable(app):
        return False
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 3


async def _perform_batch(scope: Scope, body: _Body) -> attempts.Answer:
    """Run the calls of a request that carries several, one after the other; each as if it had come alone.

    `TokenError` if no engine has made it.
    """
    runtime = config.runtime()
    vouched = token.verify_batch(runtime.ring, runtime.clock, _clean(scope))
    data = await body.read(scope["headers"], inbound.max_batch())
    url, sent = vouched.request(body=data, **_place(scope, runtime))
    answers = await perform_all(batch.Batch(url, sent, batch.unpack(data)), runtime.clock)
    return attempts.Answer(HTTPStatus.OK, batch.OUTCOME, batch.tell(answers))


def _checkup(dispatch: Dispatch | None) -> attempts.Answer:
    """Tell `deferlib doctor` about this process, and anybody else that calls come by POST."""
    from deferlib import checkup

    if not checkup.is_question(dispatch):
        return attempts.WRONG_METHOD
    return attempts.Answer(HTTPStatus.OK, "ok", checkup.answer("ASGI", threads=True, processes=False))


async def _identify(scope: Scope, body: _Body) -> Dispatch | None:
    """Return the dispatch that a request is part of, None for anybody else's; the scope tells the truth afterwards.

    Raises `TokenError` if there is a token, but not a valid one for this request (the scope is cleaned all the same).
    """
    known = scope.get(ENVIRON_KEY)
    if isinstance(known, Dispatch):
        _tell(scope, known)
        return known
    signature = _clean(scope)
    if not signature:
        return None
    runtime = config.runtime()
    vouched = token.verify(runtime.ring, runtime.clock, signature)
    data = await body.read(scope["headers"])
    dispatch = vouched.dispatch(method=scope["method"], body=data, **_place(scope, runtime))
    scope[ENVIRON_KEY] = dispatch
    _tell(scope, dispatch)
    return dispatch


class _Place(TypedDict):
    path: str
    inner: str
    query: str
    prefix: str


def _place(scope: Scope, runtime: Runtime) -> _Place:
    """Return where a request goes, as a token is compared with it."""
    return {
        "path": "".join(_split_path(scope)),
        "inner": _split_path(scope)[1],  # uvicorn's --root-path stands before every path, whoever sent it
        "query": scope.get("query_string", b"").decode("latin-1"),
        "prefix": runtime.settings["prefix"],
    }


class _Body:
    """A request's body: read whole, once, and only if somebody asks; then replayed to the app."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._data: bytes | None = None
        self._replayed = False

    async def read(self, headers: Headers, most: int = 0) -> bytes:
        """Return the body; `TokenError` if it is longer than *most* or any task's, or the client leaves before its end."""
        if self._data is not None:
            return self._data
        most = most or inbound.max_body()
        for name, value in headers:
            if name.lower() == b"content-length":
                inbound.content_length(value.decode("latin-1"), most)
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise TokenError("the client left before the end of the body")
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise inbound.too_long(most)
            parts.append(part)
            more = message.get("more_body", False)
        self._data = b"".join(parts)
        return self._data

    async def replay(self) -> Message:
        """Receive for the app: the body that was read, then what the server says."""
        if self._data is None or self._replayed:
            return await self._receive()
        self._replayed = True
        return {"type": "http.request", "body": self._data, "more_body": False}


def _host(scope: Scope) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"), None)


def _clean(scope: Scope) -> str:
    """Take the headers that only an engine may set out of *scope*; return the dispatch token that was among them."""
    kept: list[tuple[bytes, bytes]] = []
    signatures: list[str] = []
    for name, value in scope["headers"]:
        spelled = name.decode("latin-1")
        if not inbound.is_engines(spelled):
            kept.append((name, value))
        elif inbound.folded(spelled) == _SIGNATURE:
            signatures.append(value.decode("latin-1"))
        elif inbound.is_platforms(spelled):
            scope.setdefault(_CLAIMED, []).append((name, value))
    scope["headers"] = kept
    client = scope.get("client")
    if client is not None and inbound.is_tasks_address(str(client[0])):  # nothing else comes from there
        scope["client"] = (inbound.NO_ADDRESS, client[1])
    return ",".join(signatures)  # as WSGI servers do it: two of them are valid nowhere


def _tell(scope: Scope, dispatch: Dispatch) -> None:
    _clean(scope)
    scope["headers"] += [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in dispatch.headers.items()
    ]
    scope["client"] = (inbound.TASK_ADDRESS, 0)


def _header(scope: Scope, name: str) -> str:
    """Return a header's value, of several the last; '' without one."""
    wanted = name.lower().encode()
    return next((value.decode("latin-1") for key, value in reversed(scope["headers"]) if key.lower() == wanted), "")


def _split_path(scope: Scope) -> tuple[str, str]:
    """Return `root_path` and the path below it; newer servers repeat the one in `path`, older ones don't."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return root, path.removeprefix(root) if path.startswith(f"{root}/") else path


async def _respond(send: Send, answer: attempts.Answer, took: int | None = None) -> None:
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    if took is not None:
        headers.append((token.TOOK.lower().encode(), str(took).encode()))
    await send({"type": "http.response.start", "status": int(answer.status), "headers": headers})
    await send({"type": "http.response.body", "body": answer.body.encode()})
