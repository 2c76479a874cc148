"""Who gets in where only tasks and admins may, and who may set an engine's headers by hand: for WSGI and ASGI apps."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pytest
from starlette.applications import Starlette

import deferlib
from deferlib import access, config, context, token
from deferlib.access import Access
from deferlib.context import Dispatch, TaskContext
from deferlib.contrib import asgi
from deferlib.core.model import MINUTE
from deferlib.keys import Keyring

KEY = "a key for the tests of who gets in"
COOKIE = "session=boss"
FORGED = {"X-AppEngine-QueueName": "forged", "X_CloudTasks_TaskName": "forged", "X-Deferlib-Fence": "forged"}

Kind = Literal["wsgi", "asgi"]


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(access, "_open", False)
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY)
    yield
    config.install(former)


@pytest.fixture(params=["wsgi", "asgi"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return "wsgi" if request.param == "wsgi" else "asgi"


class Seen(NamedTuple):
    """What the app saw of a request, or the status that stopped it before."""

    status: int
    engines: dict[str, str]  # headers that only an engine may set, in lower case with dashes


# --- an app of either kind, and a server of either kind ---------------------------------------------------------------


def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    found = {key[5:].lower().replace("_", "-"): value for key, value in environ.items() if key.startswith("HTTP_X_")}
    start_response("200 OK", [])
    return [repr(found).encode()]


async def async_view(scope: Any, receive: Any, send: Any) -> None:
    found = {name.decode().lower().replace("_", "-"): value.decode() for name, value in scope["headers"]}
    found = {name: value for name, value in found.items() if name.startswith("x-")}
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": repr(found).encode()})


def has_cookie(request: dict[str, Any]) -> bool:
    """Tell whether an admin's session is in an environ or a scope."""
    return request.get("HTTP_COOKIE") == COOKIE or (b"cookie", COOKIE.encode()) in request.get("headers", ())


async def has_cookie_after_a_while(scope: Any) -> bool:
    await asyncio.sleep(0)
    return has_cookie(scope)


def guarded(kind: Kind, paths: Iterable[str] | str = "/tasks", is_admin: Any = None) -> Any:
    if kind == "wsgi":
        return deferlib.task_only(deferlib.wrap_wsgi_app(view, is_admin=is_admin), paths)
    return asgi.task_only(asgi.wrap_asgi_app(async_view, is_admin=is_admin), paths)


def get(
    app: Any, path: str = "/tasks/mail", headers: Mapping[str, str] | None = None, *, address: str = "192.0.2.1"
) -> Seen:
    headers = {"Host": "shop.example", **(headers or {})}
    if isinstance(app, asgi.Middleware):
        return _asgi(app, path, headers, address)
    environ = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "", "REMOTE_ADDR": address,
        "wsgi.input": io.BytesIO(), **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()},
    }  # fmt: skip
    started: list[str] = []
    body = b"".join(app(environ, lambda status, headers: started.append(status)))
    return _seen(int(started[0][:3]), body)


def _asgi(app: Any, path: str, headers: Mapping[str, str], address: str) -> Seen:
    sent: list[Any] = []
    scope = {
        "type": "http", "method": "GET", "path": path, "query_string": b"", "root_path": "", "client": (address, 5),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return _seen(sent[0]["status"], sent[1]["body"])


def _seen(status: int, body: bytes) -> Seen:
    found = eval(body) if status == 200 else {}
    return Seen(status, {name: value for name, value in found.items() if name.startswith(("x-a", "x-c", "x-d"))})


def signed(path: str = "/tasks/mail") -> dict[str, str]:
    """Return the headers of an engine's own request."""
    now = context.SYSTEM_CLOCK.now()
    task = TaskContext(7, "", "mail", 1, 0, now, now + MINUTE, 1, "", path, context.SYSTEM_CLOCK)
    dispatch = Dispatch(task, {"X-AppEngine-QueueName": "mail"})
    signature = token.sign(Keyring([KEY.encode()]), now, dispatch, method="GET", body=b"", deadline=MINUTE)
    return {"X-Deferlib-Signature": signature}


# --- tasks and admins -------------------------------------------------------------------------------------------------


def test_task_gets_in_and_nobody_else(kind: Kind) -> None:
    app = guarded(kind)

    assert get(app, headers=signed()) == Seen(200, {"x-appengine-queuename": "mail"})
    assert get(app).status == 403
    assert get(app, headers=FORGED).status == 403
    assert get(app, headers={"Cookie": COOKIE}).status == 403, "nobody said who is an admin"
    assert get(app, path="/", headers=FORGED) == Seen(200, {})


@pytest.mark.parametrize("is_admin", [has_cookie, has_cookie_after_a_while])
def test_admin_gets_in_and_may_set_the_headers_by_hand(kind: Kind, is_admin: Any) -> None:
    if kind == "wsgi" and is_admin is has_cookie_after_a_while:
        is_admin = has_cookie
    app = guarded(kind, is_admin=is_admin)

    assert get(app, headers={"Cookie": COOKIE}) == Seen(200, {})
    by_hand = Seen(200, {"x-appengine-queuename": "forged", "x-cloudtasks-taskname": "forged"})
    for path in ("/tasks/mail", "/elsewhere"):
        assert get(app, path, {"Cookie": COOKIE, **FORGED}) == by_hand
    assert get(app, headers={"Cookie": "session=guest", **FORGED}).status == 403
    assert get(app, "/elsewhere", {"Cookie": "session=guest", **FORGED}) == Seen(200, {})


def test_admin_is_asked_for_with_clean_headers(kind: Kind) -> None:
    """Else an `is_admin` that looks at App Engine's own admin header would believe anybody."""
    asked: list[Any] = []

    def is_admin(request: dict[str, Any]) -> bool:
        asked.append(dict(request))
        return False

    get(guarded(kind, is_admin=is_admin), headers={"X-AppEngine-User-Is-Admin": "1"})

    assert len(asked) == 1
    headers = asked[0].get("headers") or {key for key in asked[0] if key.startswith("HTTP_")}
    assert "appengine" not in repr(headers).lower()


def test_admin_is_asked_for_only_if_it_matters(kind: Kind) -> None:
    def is_admin(request: object) -> bool:
        raise AssertionError

    app = guarded(kind, is_admin=is_admin)

    assert get(app, "/elsewhere").status == 200
    assert get(app, headers=signed()).status == 200


def test_error_while_asking_for_an_admin_lets_nobody_in(kind: Kind) -> None:
    def is_admin(request: object) -> bool:
        raise LookupError("no session store")

    with pytest.raises(LookupError):
        get(guarded(kind, is_admin=is_admin))


def test_admin_runs_no_unsigned_call(kind: Kind) -> None:
    app = guarded(kind, is_admin=lambda request: True)

    assert get(app, "/_ah/queue/deferred", {"Cookie": COOKIE}).status == 405


def test_order_of_the_wrappers_does_not_matter() -> None:
    one = deferlib.wrap_wsgi_app(deferlib.task_only(view, "/tasks"), is_admin=has_cookie)
    two = deferlib.task_only(deferlib.wrap_wsgi_app(view), "/tasks", is_admin=has_cookie)
    three = deferlib.task_only(deferlib.task_only(deferlib.wrap_wsgi_app(view, is_admin=has_cookie), "/a"), "/tasks")
    for app in (one, two, three):
        assert (app.app, app.use_deferred) == (view, True)
        assert get(app).status == 403
        assert get(app, headers={"Cookie": COOKIE}).status == 200
    alone = deferlib.task_only(view, "/tasks")
    assert not alone.use_deferred
    assert get(alone).status == 403
    assert get(alone, headers=signed()).status == 200


def test_one_middleware_inside_another_keeps_what_an_admin_has_set(kind: Kind) -> None:
    inner = guarded(kind)
    if kind == "wsgi":
        outer: Any = deferlib.wrap_wsgi_app(lambda environ, start: inner(environ, start), is_admin=has_cookie)
    else:

        async def layer(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)

        outer = asgi.wrap_asgi_app(layer, is_admin=has_cookie)

    seen = get(outer, headers={"Cookie": COOKIE, **FORGED})

    assert seen == Seen(200, {"x-appengine-queuename": "forged", "x-cloudtasks-taskname": "forged"})
    assert get(outer, headers=FORGED).status == 403


def test_websocket_is_never_a_task() -> None:
    def connect(path: str, cookie: str) -> Any:
        sent: list[Any] = []
        scope = {"type": "websocket", "path": path, "root_path": "", "headers": [(b"cookie", cookie.encode())]}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(guarded("asgi", is_admin=has_cookie)(scope, lambda: None, send))
        return sent[0]["type"]

    assert connect("/tasks/live", "session=guest") == "websocket.close"
    assert connect("/tasks/live", COOKIE) == "websocket.accept"
    assert connect("/live", "session=guest") == "websocket.accept"


# --- which paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/tasks", "/tasks/", "/tasks/mail", "//tasks", "/./tasks", "/tasks//mail", "/x/../tasks", "/tasks/../x",
        "/x/y/../../tasks", "/Tasks", "/TASKS/mail",
        "/../tasks", "/tasks/..", "tasks", "/admin/jobs", "/admin/jobs/7", "/admin//jobs",
    ],
)  # fmt: skip
def test_path_is_covered_however_it_is_spelled(path: str) -> None:
    assert Access(("/tasks", "/admin/jobs/")).covers(path)


@pytest.mark.parametrize("path", ["", "/", "/task", "/tasks-list", "/tasksx/mail", "/x/tasks", "/admin", "/jobs"])
def test_path_beside_is_not_covered(path: str) -> None:
    assert not Access(("/tasks", "/admin/jobs/")).covers(path)


@pytest.mark.parametrize("path", ["", "/", "/x", "//", "/x/.."])
def test_root_covers_everything(path: str) -> None:
    assert Access("/").covers(path)
    assert not Access(()).covers(path)


@pytest.mark.parametrize("paths", ["tasks", ["/a", "b"], [7], ["*"]])
def test_path_that_is_none_is_refused(paths: Any) -> None:
    with pytest.raises(ValueError, match="begin with '/'"):
        deferlib.task_only(view, paths)


@pytest.mark.parametrize(
    "path", ["/tasks/.*", "/tasks/*", "/tasks/<id>", "/tasks/{id}", "/t%C3%A2ches", "/tasks/../x", "/a?b", "^/x"]
)
def test_pattern_is_no_path(path: str) -> None:
    """app.yaml has patterns; here one would protect nothing, and nobody would know."""
    with pytest.raises(ValueError, match=r"stands for itself and all below it|begin with '/'"):
        deferlib.task_only(view, path)


@pytest.mark.parametrize("paths", ["", [], ()])
def test_no_paths_at_all_are_refused(paths: Any, kind: Kind) -> None:
    with pytest.raises(ValueError, match="open to all"):
        deferlib.task_only(view, paths) if kind == "wsgi" else asgi.task_only(async_view, paths)


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("", "http://x/tasks/resize"),  # the absolute form of a request's target, as hypercorn and uvicorn's h11 pass it on
        ("", "tasks/resize"),
        ("", "/api/tasks/resize"),  # FastAPI(root_path="/api") and Django's FORCE_SCRIPT_NAME set it after the middleware
        ("/api", "/api/tasks/resize"),
        ("/api", "/api/api/tasks/resize"),
        ("/api", "/x/api/tasks/resize"),
        ("/api", "/apitasks/resize"),
        ("/api", "/tasks/resize"),
        ("/api/", "/api//TASKS/resize"),
    ],
)
def test_path_is_covered_whatever_the_app_takes_for_its_mount_point(root: str, path: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "query_string": b"", "headers": []}
    asyncio.run(asgi.task_only(async_view, "/tasks")(scope, receive, send))

    assert sent[0]["status"] == 403


def test_app_has_one_is_admin(kind: Kind) -> None:
    def other(request: object) -> bool:
        return True

    with pytest.raises(ValueError, match="has one is_admin"):
        _wrapped_twice(kind, other)
    same = deferlib.task_only(deferlib.wrap_wsgi_app(view, is_admin=has_cookie), "/tasks", is_admin=has_cookie)
    assert same.access.is_admin is has_cookie


def _wrapped_twice(kind: Kind, other: Any) -> None:
    if kind == "wsgi":
        deferlib.task_only(deferlib.wrap_wsgi_app(view, is_admin=has_cookie), "/tasks", is_admin=other)
    else:
        asgi.task_only(asgi.wrap_asgi_app(async_view, is_admin=has_cookie), "/tasks", is_admin=other)


def test_inner_middleware_asks_for_its_own_admins(kind: Kind) -> None:
    inner = guarded(kind, is_admin=lambda request: False)
    if kind == "wsgi":
        outer: Any = deferlib.wrap_wsgi_app(lambda environ, start: inner(environ, start), is_admin=has_cookie)
    else:

        async def layer(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)

        outer = asgi.wrap_asgi_app(layer, is_admin=has_cookie)

    assert get(outer, headers={"Cookie": COOKIE, **FORGED}).status == 403


def test_coroutine_function_is_no_is_admin_of_a_wsgi_app() -> None:
    """The coroutine that it returns would count as true, for anybody."""

    class Admins:
        async def __call__(self, environ: Any) -> bool:
            return False

    for is_admin in (has_cookie_after_a_while, Admins()):
        for wrap in (deferlib.wrap_wsgi_app, deferlib.task_only):
            with pytest.raises(TypeError, match="not a coroutine function"):
                wrap(view, is_admin=is_admin)  # type: ignore[operator]
    with pytest.raises(TypeError, match="can't be awaited here"):
        get(guarded("wsgi", is_admin=lambda environ: has_cookie_after_a_while(environ)))


def test_app_of_the_wrong_kind_is_named() -> None:
    for wrap in (deferlib.wrap_wsgi_app, deferlib.task_only):
        for app in (async_view, Starlette()):
            with pytest.raises(TypeError, match=r"use deferlib\.contrib\.asgi\."):
                wrap(app)  # type: ignore[operator]
        with pytest.raises(TypeError, match="takes a WSGI app, not str"):
            wrap("app:app")  # type: ignore[operator]
    with pytest.raises(ValueError, match="is_admin is a function"):
        deferlib.wrap_wsgi_app(view, is_admin=True)  # type: ignore[arg-type]


# --- a developer's own machine ------------------------------------------------------------------------------------------


LOCAL = {"Host": "localhost:8080"}


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1:8080", "[::1]:8080", "shop.localhost", "LOCALHOST"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_developer_is_an_admin_of_their_own_machine(kind: Kind, host: str, address: str) -> None:
    access.open_to_this_machine()
    app = guarded(kind)

    assert get(app, headers={"Host": host}, address=address) == Seen(200, {})
    seen = get(app, headers={"Host": host, **FORGED}, address=address)
    assert seen == Seen(200, {"x-appengine-queuename": "forged", "x-cloudtasks-taskname": "forged"})


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        (LOCAL, "192.0.2.1"),
        (LOCAL, "0.1.0.2"),
        (LOCAL, ""),
        (LOCAL, "127.0.0.1.example"),
        ({"Host": "evil.example"}, "127.0.0.1"),
        ({"Host": "localhost.evil.example"}, "127.0.0.1"),
        ({"Host": "127.0.0.1.evil.example:8080"}, "127.0.0.1"),
        ({"Host": ""}, "127.0.0.1"),
        ({**LOCAL, "X-Forwarded-For": "198.51.100.7"}, "127.0.0.1"),
        ({**LOCAL, "Forwarded": "for=198.51.100.7"}, "127.0.0.1"),
        ({**LOCAL, "Sec-Fetch-Site": "cross-site"}, "127.0.0.1"),
        ({**LOCAL, "Sec-Fetch-Site": "same-site"}, "127.0.0.1"),
        ({**LOCAL, "Origin": "https://evil.example"}, "127.0.0.1"),
        ({**LOCAL, "Origin": "null"}, "127.0.0.1"),
        ({**LOCAL, "X-Real-IP": "198.51.100.7"}, "127.0.0.1"),
        ({**LOCAL, "Via": "1.1 proxy"}, "127.0.0.1"),
    ],
)
def test_nobody_else_is_even_there(kind: Kind, headers: dict[str, str], address: str) -> None:
    access.open_to_this_machine()
    app = guarded(kind)

    assert get(app, headers={**headers, **FORGED}, address=address).status == 403
    assert get(app, "/elsewhere", {**headers, **FORGED}, address=address) == Seen(200, {})


def test_nobody_is_local_in_production(kind: Kind) -> None:
    assert get(guarded(kind), headers=LOCAL, address="127.0.0.1").status == 403


def test_developer_runs_no_unsigned_call_either(kind: Kind) -> None:
    access.open_to_this_machine()

    assert get(guarded(kind), "/_ah/queue/deferred", LOCAL, address="127.0.0.1").status == 405
