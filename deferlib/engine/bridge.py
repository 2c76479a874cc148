"""An ASGI app as a WSGI app, on an event loop in a thread of its own: for the engine's threads, and nobody else."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextvars import copy_context
from http import HTTPStatus
from typing import Any

from deferlib import attempt as attempts
from deferlib import deferred, inbound, payload, tracing
from deferlib.context import ENVIRON_KEY, Dispatch
from deferlib.contrib.asgi import AsgiApp, Message, Scope, wrap_asgi_app
from deferlib.errors import AppError

log = logging.getLogger("deferlib.handler")

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_PATIENCE = 10.0  # seconds for an app to shut down
_KEPT = 64 * 1024  # bytes of an answer that are passed on; an engine shows 500 characters of them


def as_wsgi(app: AsgiApp) -> Bridge:
    """Return a WSGI app that serves *app*, with the deferred handler in it, on one event loop in a thread of its own."""
    return Bridge(wrap_asgi_app(app))


class Bridge:
    """An ASGI app as a WSGI app, for the engine's threads. The loop and the app's lifespan start with the first call.

    Deferred coroutine functions run on the app's loop; plain functions stay in the engine's thread, which saves them two
    hand-offs.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lifespan = _Lifespan(app)

    def start(self) -> None:
        """Start the loop and the app; `AppError` if the app can't start."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the app's loop is closed")
            if self._thread is not None:
                return
            started: Future[None] = Future()
            thread = threading.Thread(target=self._run, args=(started,), name="deferlib-asgi", daemon=True)
            thread.start()
            started.result()
            self._thread = thread
            atexit.register(self.close)

    def close(self) -> None:
        """Cancel what still runs, shut the app down and end the loop. May be called again."""
        with self._lock:
            thread, self._thread, self._closed = self._thread, None, True
        if thread is not None:
            atexit.unregister(self.close)
            self._loop.call_soon_threadsafe(self._stopping.set)
            thread.join(_PATIENCE)

    def __call__(self, environ: inbound.Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._thread is None:
            self.start()
        dispatch = environ.get(ENVIRON_KEY)
        if isinstance(dispatch, Dispatch) and environ["PATH_INFO"] == deferred.DEFAULT_URL:
            if environ["REQUEST_METHOD"] != "POST":
                return attempts.WRONG_METHOD.respond(start_response)
            context = copy_context()
            context.run(tracing.receive, environ.get("HTTP_TRACEPARENT"), environ.get("HTTP_TRACESTATE"))
            answer = context.run(attempts.perform, dispatch, inbound.read_body(environ), self._finish)
            return answer.respond(start_response)
        body = inbound.read_body(environ)
        status, headers, answered = self._wait(_exchange(self._app, self._scope(environ), body))
        start_response(f"{status} {_PHRASES.get(status, 'Unknown')}", headers)
        return [answered]

    def _finish(self, value: Any) -> Any:
        return self._wait(attempts.uncancelled(value)) if inspect.isawaitable(value) else value

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run *coroutine* on the loop, in this thread's context, and wait for it."""
        guarded = _guarded(coroutine)
        try:
            future = asyncio.run_coroutine_threadsafe(guarded, self._loop)
        except RuntimeError:  # closed meanwhile
            guarded.close()
            coroutine.close()
            raise
        value, error = future.result()
        if error is not None:
            raise error
        return value

    def _scope(self, environ: inbound.Environ) -> Scope:
        raw = environ.get("PATH_INFO", "").encode("latin-1", "replace")
        headers = [
            (key[5:].lower().replace("_", "-").encode("latin-1"), str(value).encode("latin-1", "replace"))
            for key, value in environ.items()
            if key.startswith("HTTP_")
        ]
        for key, name in (("CONTENT_TYPE", b"content-type"), ("CONTENT_LENGTH", b"content-length")):
            if environ.get(key):
                headers.append((name, environ[key].encode("latin-1", "replace")))
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": environ["REQUEST_METHOD"],
            "scheme": environ.get("wsgi.url_scheme", "http"),
            "path": raw.decode("utf-8", "replace"),
            "query_string": environ.get("QUERY_STRING", "").encode("latin-1", "replace"),
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": (environ.get("SERVER_NAME", "localhost"), int(environ.get("SERVER_PORT", 80))),
            "state": dict(self._lifespan.state),
            ENVIRON_KEY: environ.get(ENVIRON_KEY),
        }

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:  # the app is the user's
            if started.done():
                log.error("the app's loop failed", exc_info=error)
            else:
                started.set_exception(error)

    async def _serve(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        await self._lifespan.startup()
        started.set_result(None)
        await self._stopping.wait()
        rest = asyncio.all_tasks() - {asyncio.current_task(), self._lifespan.task}
        for task in rest:
            task.cancel()
        await asyncio.wait(rest, timeout=_PATIENCE / 2) if rest else None
        await self._lifespan.shutdown()


async def _guarded(coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """Return what *coroutine* returns and raises: a SystemExit that leaves a task would end the whole loop."""
    try:
        return await coroutine, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error


class _Lifespan:
    """An app's lifespan, for apps that have one."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self._failure = ""
        self.state: dict[str, Any] = {}
        self.task: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Start the app; `AppError` if it says that it failed."""
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._answered = asyncio.Event()
        self.task = asyncio.create_task(self._main())
        await self._messages.put({"type": "lifespan.startup"})
        await self._answered.wait()
        if self._failure:
            raise AppError(self._failure)

    async def shutdown(self) -> None:
        """Shut the app down; wait a few seconds for it."""
        if self.task is not None and not self.task.done():
            await self._messages.put({"type": "lifespan.shutdown"})
            await asyncio.wait({self.task}, timeout=_PATIENCE / 2)

    async def _main(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._messages.get, self._send)
        except Exception as error:
            if self._answered.is_set():
                log.error("the app failed in its lifespan", exc_info=error)
            # else it has no lifespan: the specification's way to say so
        finally:
            self._answered.set()

    async def _send(self, message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            reason = str(message.get("message") or "it gave no reason").strip().splitlines()[-1]
            self._failure = f"the app's startup failed: {payload.one_line(reason, 300)}"
        if message["type"].startswith("lifespan.startup."):
            self._answered.set()


async def _exchange(app: AsgiApp, scope: Scope, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """Make one request to *app*; return status, headers and the beginning of the body."""
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    done = asyncio.Event()
    status, headers, parts, size = 0, [], [], 0

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers, size
        if message["type"] == "http.response.start":
            status = int(message["status"])
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
        elif message["type"] == "http.response.body":
            part = message.get("body", b"")[: _KEPT - size]
            size += len(part)
            parts.append(part)
            if not message.get("more_body", False):
                done.set()

    await app(scope, receive, send)
    if not status:
        raise RuntimeError("the app returned without an answer")
    return status, headers, b"".join(parts)
