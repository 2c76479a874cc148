"""The ASGI middleware: the deferred handler in Starlette, FastAPI and their kin, and what such an app may believe."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.websockets import WebSocket

import deferlib
from deferlib import config, context, deferred, inbound, namespaces, payload, token
from deferlib.context import ENVIRON_KEY, Dispatch, TaskContext
from deferlib.contrib.asgi import Middleware, is_asgi, wrap_asgi_app
from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.keys import Keyring

KEY = "a key for the tests of the ASGI app"
NOW: Micros = 1_763_700_000_000_000
DEADLINE: Micros = 10 * MINUTE
URL = deferred.DEFAULT_URL
CALLS: list[Any] = []
TRUE_HEADERS = {"X-AppEngine-QueueName": "mail", "X-AppEngine-TaskName": "77", "X-AppEngine-TaskRetryCount": "2"}


class Clock:
    def now(self) -> Micros:
        return NOW


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    CALLS.clear()
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY, clock=Clock())
    yield
    config.install(former)


def task(url: str = URL) -> TaskContext:
    return TaskContext(
        id=77, user_name="", queue="mail", attempt=3, execution_count=1, eta_micros=NOW - SECOND,
        deadline_micros=NOW + DEADLINE, fence=9, namespace="tenant-1", url=url, clock=context.SYSTEM_CLOCK,
    )  # fmt: skip


def sealed(fn: Any, *args: Any, url: str = URL) -> bytes:
    binding = payload.Binding(77, "", "mail", url, "tenant-1")
    return payload.seal(payload.dump_call(fn, args, {}), Keyring([KEY.encode()]).signing, binding)


def signature(body: bytes, url: str = URL, method: str = "POST", base_path: str = "") -> bytes:
    ring, dispatch = Keyring([KEY.encode()]), Dispatch(task(url), TRUE_HEADERS)
    return token.sign(
        ring, NOW, dispatch, method=method, body=body, deadline=DEADLINE, base_path=base_path
    ).encode()  # fmt: skip


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str

    @property
    def outcome(self) -> str | None:
        return self.headers.get("x-deferlib-outcome")


class Client:
    """An ASGI server's side of one request; remembers what the app took and sent."""

    def __init__(self, body: bytes, url: str, method: str, headers: list[tuple[bytes, bytes]], pieces: int) -> None:
        path, _, query = url.partition("?")
        size = max(1, -(-len(body) // pieces))
        self.parts = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        self.sent: list[Any] = []
        self.scope: dict[str, Any] = {
            "type": "http", "method": method, "path": path, "query_string": query.encode(), "root_path": "",
            "headers": headers, "client": ("192.0.2.1", 5), "asgi": {"version": "3.0"}, "http_version": "1.1",
            "scheme": "http", "server": ("h", 80),
        }  # fmt: skip

    async def receive(self) -> Any:
        if not self.parts:
            return {"type": "http.disconnect"}
        part = self.parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def response(self) -> Response:
        start, *bodies = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Response(start["status"], headers, b"".join(part.get("body", b"") for part in bodies).decode())


def client(
    body: bytes = b"", url: str = URL, *, method: str = "POST", signed: bool = True, pieces: int = 1,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> Client:  # fmt: skip
    own = [(b"x-deferlib-signature", signature(body, url, method))] if signed else []
    return Client(body, url, method, [*own, *(headers or [])], pieces)


def send(app: Any, request: Client) -> Response:
    asyncio.run(app(request.scope, request.receive, request.send))
    return request.response


async def view(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    body = b""
    if scope["type"] == "http":
        more = True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
    CALLS.append((dict(scope), deferlib.current_task(), namespaces.get_namespace()))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


APP = wrap_asgi_app(view)

# --- functions that are deferred ------------------------------------------------------------------------------------


def note() -> None:
    CALLS.append((threading.current_thread(), deferlib.current_task(), namespaces.get_namespace()))


async def note_loop() -> None:
    await asyncio.sleep(0)
    CALLS.append((asyncio.get_running_loop(), deferlib.current_task(), namespaces.get_namespace()))


def fail(error: BaseException) -> None:
    raise error


async def fail_later(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


async def stay() -> None:
    CALLS.append("staying")
    await asyncio.Event().wait()


# --- calls ----------------------------------------------------------------------------------------------------------


def test_coroutine_function_is_awaited_on_the_running_loop() -> None:
    loops = []

    async def serve() -> Response:
        loops.append(asyncio.get_running_loop())
        request = client(sealed(note_loop))
        await APP(request.scope, request.receive, request.send)
        assert deferlib.current_task() is None
        assert namespaces.get_namespace() == ""
        return request.response

    answer = asyncio.run(serve())

    assert (answer.status, answer.outcome, answer.body) == (200, "ok", "Success")
    ((loop, found, namespace),) = CALLS
    assert [loop] == loops
    assert (found.name, found.attempt, namespace) == ("77", 3, "tenant-1")


def test_plain_function_runs_in_a_thread_with_its_task() -> None:
    assert send(APP, client(sealed(note))).status == 200

    ((thread, found, namespace),) = CALLS
    assert thread is not threading.current_thread()
    assert (found.name, namespace) == ("77", "tenant-1")


@pytest.mark.parametrize("fn", [fail, fail_later])
@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (ValueError("no"), 500, "retry"),
        (deferlib.PermanentTaskFailure("never"), 200, "permanent"),
        (deferlib.SingularTaskFailure("soon"), 408, "retry"),
        (deferlib.DeadlineExceededError("late"), 500, "retry"),
        (SystemExit(3), 500, "retry"),
        (StopIteration(), 500, "retry"),
        (asyncio.CancelledError(), 500, "retry"),
    ],
)
def test_error_of_a_call_becomes_its_answer(fn: Any, error: BaseException, status: int, outcome: str) -> None:
    answer = send(APP, client(sealed(fn, error)))

    assert (answer.status, answer.outcome) == (status, outcome)


def test_cancelled_request_cancels_its_call_and_answers_nothing() -> None:
    async def serve() -> Client:
        request = client(sealed(stay))
        serving = asyncio.ensure_future(APP(request.scope, request.receive, request.send))
        while not CALLS:
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert deferlib.current_task() is None
        return request

    assert asyncio.run(serve()).sent == []


@pytest.mark.parametrize(("body", "outcome"), [(b"\x80\x05N.", "unverified"), (sealed(note)[:-1] + b"!", "unverified")])
def test_payload_that_is_not_this_tasks_is_not_run(body: bytes, outcome: str) -> None:
    answer = send(APP, client(body))

    assert (answer.status, answer.outcome) == (500, outcome)
    assert not CALLS


# --- who may call ---------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_runs_and_nothing_is_read() -> None:
    request = client(
        sealed(note), signed=False, headers=[(b"x-appengine-taskname", b"77"), (b"x-appengine-user-ip", b"0.1.0.2")]
    )

    answer = send(APP, request)

    assert (answer.status, answer.outcome) == (403, "untrusted")
    assert not CALLS
    assert request.parts


def test_invalid_token_is_refused_before_the_body_is_read() -> None:
    request = client(sealed(note), headers=[])
    request.scope["headers"] = [(b"x-deferlib-signature", signature(b"")[:-1] + b"?")]

    assert send(APP, request).status == 403
    assert request.parts


def test_token_of_another_body_is_refused() -> None:
    request = client(sealed(note))
    request.parts = [sealed(note_loop)]

    assert send(APP, request).status == 403
    assert not CALLS


def test_two_tokens_are_none() -> None:
    body = sealed(note)

    assert send(APP, client(body, headers=[(b"X-Deferlib_Signature", signature(body))])).status == 403
    assert not CALLS


def test_other_methods_than_post_are_not_allowed() -> None:
    answer = send(APP, client(b"", method="GET"))

    assert answer.status == 405
    assert answer.headers["allow"] == "POST"


def test_body_is_read_in_pieces_and_bounded() -> None:
    assert send(APP, client(sealed(note), pieces=9)).status == 200

    announced = client(sealed(note), headers=[(b"content-length", str(inbound.max_body() + 1).encode())])
    assert send(APP, announced).status == 413
    assert announced.parts

    endless = client(sealed(note))
    endless.parts = [b"x" * (inbound.max_body() // 2)] * 5
    assert send(APP, endless).status == 413
    assert len(endless.parts) == 2


def test_client_that_leaves_before_the_end_is_refused() -> None:
    request = client(sealed(note))

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    asyncio.run(APP(request.scope, leave, request.send))

    assert request.response.status == 403
    assert not CALLS


def test_claim_passed_as_an_object_needs_no_token_and_anything_else_counts_for_nothing() -> None:
    request = client(sealed(note), signed=False)
    request.scope[ENVIRON_KEY] = Dispatch(task(), TRUE_HEADERS)
    assert send(APP, request).status == 200

    for forged in ("77", {"id": 77}, (task(), TRUE_HEADERS), task()):
        request = client(sealed(note), signed=False)
        request.scope[ENVIRON_KEY] = forged
        assert send(APP, request).status == 403


@pytest.mark.parametrize(
    ("root", "path", "base", "status"),
    [
        ("", URL, "", 200),
        ("/app", f"/app{URL}", "/app", 200),  # newer servers and Starlette
        ("/app/", f"/app{URL}", "/app", 200),
        ("/app", URL, "/app", 200),  # older servers
        ("/app", f"/app{URL}", "", 200),  # pushed to uvicorn --root-path /app, which puts it before every path
        ("", URL, "/app", 403),
    ],
)
def test_root_path_is_part_of_the_path(root: str, path: str, base: str, status: int) -> None:
    body = sealed(note)
    request = client(body, signed=False)
    request.scope |= {
        "root_path": root, "path": path, "headers": [(b"x-deferlib-signature", signature(body, base_path=base))]
    }  # fmt: skip

    assert send(APP, request).status == status


# --- what an app may believe ----------------------------------------------------------------------------------------

SPELLINGS = [
    b"x-appengine-taskname", b"X-AppEngine-TaskName", b"X_APPENGINE_TASKNAME", b"x-appengine_taskname", b"x-appengine",
    b"x-appengine-taskname ", b" x-appengine-taskname", b"x-cloudtasks-taskname", b"X_CloudTasks_QueueName",
    b"x-deferlib-outcome", b"X_DEFERLIB_FOO",
]  # fmt: skip


def engines(scope: Any) -> list[tuple[bytes, bytes]]:
    marks = (b"appengine", b"cloudtasks", b"deferlib")
    return [(name, value) for name, value in scope["headers"] if any(mark in name.lower() for mark in marks)]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("is_task", [False, True])
def test_forged_header_never_reaches_an_app(name: bytes, is_task: bool) -> None:
    forged = [(name, b"forged"), (b"x-other", b"1"), (name, b"again")]

    assert send(APP, client(b"body", "/view?x=1", signed=is_task, headers=forged)).body == "body"

    scope = CALLS[0][0]
    true = [(key.lower().encode(), value.encode()) for key, value in TRUE_HEADERS.items()]
    assert engines(scope) == (true if is_task else [])
    assert (b"x-other", b"1") in scope["headers"]


def test_websocket_is_cleaned_and_never_a_task() -> None:
    scope: dict[str, Any] = {
        "type": "websocket", "path": "/ws", "client": ("0.1.0.2", 1),
        "headers": [(b"x-appengine-taskname", b"1"), (b"x-deferlib-signature", signature(b"")), (b"host", b"h")],
    }  # fmt: skip
    request = client()

    asyncio.run(APP(scope, request.receive, request.send))

    ((seen, found, _),) = CALLS
    assert seen["headers"] == [(b"host", b"h")]
    assert seen["client"] == ("0.0.0.0", 1)
    assert found is None


def test_lifespan_passes_through_as_it_is() -> None:
    scope = {"type": "lifespan", "state": {}}
    request = client()

    asyncio.run(APP(scope, request.receive, request.send))

    assert CALLS[0][0] == scope


def test_view_of_a_task_gets_the_truth_and_the_body_again() -> None:
    body = bytes(range(256)) * 100

    async def serve() -> Client:
        request = client(body, "/caf%C3%A9?x=1", pieces=5)
        request.scope["path"] = "/café"
        await APP(request.scope, request.receive, request.send)
        assert deferlib.current_task() is None
        assert namespaces.get_namespace() == ""
        return request

    request = asyncio.run(serve())

    assert request.sent[1]["body"] == body
    ((scope, found, namespace),) = CALLS
    assert (found.attempt, namespace, scope["client"]) == (3, "tenant-1", ("0.1.0.2", 0))


def test_view_of_anybody_else_gets_no_task_and_no_tasks_address() -> None:
    request = client(b"body", "/view", signed=False)
    request.scope["client"] = ("0.1.0.2", 9)

    assert send(APP, request).body == "body"

    ((scope, found, namespace),) = CALLS
    assert (found, namespace, scope["client"]) == (None, "", ("0.0.0.0", 9))


def test_app_hears_that_the_client_leaves() -> None:
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])
        await view(scope, client().receive, send)

    send(wrap_asgi_app(app), client(b"body", "/view"))

    assert heard == ["http.request", "http.disconnect"]


def test_wrapping_twice_is_wrapping_once() -> None:
    assert wrap_asgi_app(APP) is APP
    assert send(Middleware(Middleware(view)), client(b"body", "/view")).body == "body"
    assert send(Middleware(Middleware(view)), client(sealed(note))).outcome == "ok"


def test_starlette_takes_the_middleware() -> None:
    async def home(request: Request) -> PlainTextResponse:
        CALLS.append((request.headers.get("x-appengine-queuename"), request.client and request.client.host))
        return PlainTextResponse(await request.body())

    inner = Starlette(routes=[Route("/view", home, methods=["POST"])])
    app = Starlette(routes=[Mount("/sub", inner), Route("/view", home, methods=["POST"])])
    app.add_middleware(Middleware)

    assert send(app, client(b"body", "/view")).body == "body"
    assert send(app, client(b"body", "/sub/view")).body == "body"
    assert CALLS == [("mail", "0.1.0.2")] * 2
    assert send(app, client(sealed(note))).outcome == "ok"


def test_starlette_app_that_is_mounted_has_the_handler_below_its_mount() -> None:
    inner = Starlette()
    inner.add_middleware(Middleware)
    app = Starlette(routes=[Mount("/sub", inner)])
    body = sealed(note)
    request = client(body, signed=False)
    request.scope |= {"path": f"/sub{URL}", "headers": [(b"x-deferlib-signature", signature(body, base_path="/sub"))]}

    assert send(app, request).outcome == "ok"


def test_starlette_websocket_is_cleaned() -> None:
    async def socket(websocket: WebSocket) -> None:
        CALLS.append(list(websocket.headers))
        await websocket.close()

    from starlette.routing import WebSocketRoute

    app = Starlette(routes=[WebSocketRoute("/ws", socket)])
    app.add_middleware(Middleware)
    scope = {
        "type": "websocket", "path": "/ws", "root_path": "", "query_string": b"", "scheme": "ws", "subprotocols": [],
        "headers": [(b"x_appengine_taskname", b"1"), (b"host", b"h")], "asgi": {"version": "3.0"},
    }  # fmt: skip

    async def connect() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(app(scope, connect, client().send))  # type: ignore[arg-type]  # what a server does

    assert CALLS == [["host"]]


# --- telling ASGI from WSGI -----------------------------------------------------------------------------------------


def plain_asgi(scope: Any, receive: Any, send: Any) -> Coroutine[Any, Any, None]:
    return view(scope, receive, send)


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    return []


class WsgiApp:
    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        return []


@pytest.mark.parametrize(
    "app", [view, APP, Starlette(), plain_asgi, functools.partial(view), functools.partial(plain_asgi)]
)
def test_asgi_apps_are_known(app: object) -> None:
    assert is_asgi(app)


@pytest.mark.parametrize(
    "app", [wsgi, WsgiApp(), deferlib.handler, deferlib.wrap_wsgi_app(wsgi), functools.partial(wsgi), 5]
)
def test_wsgi_apps_are_known(app: object) -> None:
    assert not is_asgi(app)


# --- the queue's default URL ------------------------------------------------------------------------------------------

AT_QUEUE = "/_ah/queue/mail"


async def not_found(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 404, "headers": [(b"x-view", b"1")]})
    await send({"type": "http.response.body", "body": b"no such page"})


async def running(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    message = await receive()
    await asyncio.to_thread(deferred.run, message["body"])
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def found(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    CALLS.append("found")
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_call_at_its_queues_url_runs_if_the_app_has_no_view_there() -> None:
    answer = send(Middleware(not_found), client(sealed(note, url=AT_QUEUE), AT_QUEUE))

    assert (answer.status, answer.body, len(CALLS)) == (200, "Success", 1)
    assert send(Middleware(found), client(sealed(note, url=AT_QUEUE), AT_QUEUE)).body == "Success"
    assert (CALLS[1], len(CALLS)) == ("found", 3)
    send(Middleware(running), client(sealed(note, url=AT_QUEUE), AT_QUEUE))
    assert len(CALLS) == 4


@pytest.mark.parametrize(("body", "url"), [(b"no call", AT_QUEUE), (None, "/_ah/queue/other")])
def test_any_other_request_that_is_not_found_stays_so(body: bytes | None, url: str) -> None:
    answer = send(Middleware(not_found), client(sealed(note, url=url) if body is None else body, url))

    assert (answer.status, answer.body, answer.headers, CALLS) == (404, "no such page", {"x-view": "1"}, [])


TYPES = [(b"content-type", b"multipart/form-data; boundary=x"), (b"content-encoding", b"gzip")]


@pytest.mark.parametrize("header", TYPES)
def test_content_type_of_a_call_is_its_own_business(header: tuple[bytes, bytes]) -> None:
    of = client(sealed(note), headers=[header])

    asyncio.run(wrap_asgi_app(Starlette())(of.scope, of.receive, of.send))

    assert (of.response.status, of.response.outcome) == (200, "ok")


@pytest.mark.parametrize("header", TYPES)
def test_body_of_anybody_else_is_refused_unread_whatever_its_type(header: tuple[bytes, bytes]) -> None:
    async def receive() -> Any:
        raise AssertionError("it was read")

    of = client(sealed(note), headers=[header])
    of.scope["headers"] = [each for each in of.scope["headers"] if each[0].lower() != b"x-deferlib-signature"]

    asyncio.run(wrap_asgi_app(Starlette())(of.scope, receive, of.send))

    assert (of.response.status, of.response.outcome) == (403, "untrusted")
    assert CALLS == []
