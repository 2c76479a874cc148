"""The WSGI handler and middleware: what runs a call, what is refused, and what a view may believe."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import pytest

import deferlib
from deferlib import attempt, config, context, deferred, inbound, keys, namespaces, payload, token
from deferlib.context import ENVIRON_KEY, Dispatch, TaskContext
from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.errors import ConfigError, PayloadUnverifiedError
from deferlib.keys import Keyring
from deferlib.server.wsgi import Middleware, wrap_wsgi_app

KEY = "a key for the tests of the handler"
NOW: Micros = 1_763_700_000_000_000
DEADLINE: Micros = 10 * MINUTE
URL = deferred.DEFAULT_URL
CALLS: list[Any] = []


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.time = NOW

    def now(self) -> Micros:
        return self.time


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str

    @property
    def outcome(self) -> str | None:
        return self.headers.get("X-Deferlib-Outcome")


@pytest.fixture(autouse=True)
def clock() -> Iterator[Clock]:
    CALLS.clear()
    attempt._refused.clear()
    clock = Clock()
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY, clock=clock)
    yield clock
    config.install(former)


def task(url: str = URL, **changes: Any) -> TaskContext:
    fields: dict[str, Any] = {
        "id": 77, "user_name": "", "queue": "mail", "attempt": 3, "execution_count": 1, "eta_micros": NOW - SECOND,
        "deadline_micros": NOW + DEADLINE, "fence": 9, "namespace": "tenant-1", "url": url, "clock": context.SYSTEM_CLOCK,
    }  # fmt: skip
    return TaskContext(**{**fields, **changes})


TRUE_HEADERS = {"X-AppEngine-QueueName": "mail", "X-AppEngine-TaskName": "77", "X-AppEngine-TaskRetryCount": "2"}


def sealed(fn: Any, *args: Any, key: str = KEY, of: TaskContext | None = None) -> bytes:
    of = of or task()
    binding = payload.Binding(of.id, of.user_name, of.queue, of.url, of.namespace)
    return payload.seal(payload.dump_call(fn, args, {}), Keyring([key.encode()]).signing, binding)


def environ_of(body: bytes, of: TaskContext | None = None, *, key: str = KEY, method: str = "POST") -> dict[str, Any]:
    """Return the environ of a request as the engine makes it."""
    of = of or task()
    path, _, query = of.url.partition("?")
    signature = token.sign(
        Keyring([key.encode()]), NOW, Dispatch(of, TRUE_HEADERS), method=method, body=body, deadline=DEADLINE
    )
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "CONTENT_LENGTH": str(len(body)),
        "REMOTE_ADDR": "192.0.2.1",
        "wsgi.input": io.BytesIO(body),
        "HTTP_X_DEFERLIB_SIGNATURE": signature,
    }


def call(app: Callable[..., Iterable[bytes]], environ: dict[str, Any]) -> Response:
    started: list[Any] = []
    body = app(environ, lambda status, headers: started.append((status, headers)))
    text = b"".join(body).decode()
    close = getattr(body, "close", None)
    if close is not None:
        close()
    (status, headers) = started[0]
    return Response(int(status[:3]), dict(headers), text)


def run(fn: Any, *args: Any) -> Response:
    return call(deferlib.handler, environ_of(sealed(fn, *args)))


@contextmanager
def context_of(current: TaskContext) -> Iterator[None]:
    token = context.running.set(current)
    yield
    context.running.reset(token)


# --- functions that are deferred ------------------------------------------------------------------------------------


def note(value: Any = "ran") -> Any:
    CALLS.append(value)
    return value


def note_task() -> None:
    CALLS.append((deferlib.current_task(), namespaces.get_namespace()))


def fail(error: BaseException) -> None:
    raise error


def leave_namespace() -> None:
    namespaces.set_namespace("somebody-else")


async def note_later() -> None:
    await asyncio.sleep(0)
    found = deferlib.current_task()
    CALLS.append((found and found.name, threading.current_thread()))


async def cancel_itself() -> None:
    raise asyncio.CancelledError


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError


# --- outcomes -------------------------------------------------------------------------------------------------------


def test_call_that_returns_is_a_success() -> None:
    answer = run(note, "hello")

    assert (answer.status, answer.outcome, answer.body) == (200, "ok", "Success")
    assert CALLS == ["hello"]


@pytest.mark.parametrize(
    ("error", "status", "outcome", "body"),
    [
        (ValueError("no"), 500, "retry", "ValueError: no"),
        (deferlib.PermanentTaskFailure("never"), 200, "permanent", "PermanentTaskFailure: never"),
        (deferlib.SingularTaskFailure("soon"), 408, "retry", "SingularTaskFailure: soon"),
        (deferlib.DeadlineExceededError("late"), 500, "retry", "DeadlineExceededError: late"),
        (SystemExit(3), 500, "retry", "SystemExit: 3"),
        (StopIteration(), 500, "retry", "StopIteration: "),
        (asyncio.CancelledError(), 500, "retry", "RuntimeError: the call was cancelled from inside"),
        (MuteError(), 500, "retry", "MuteError: <its message can't be read: ValueError>"),
        (ValueError("a\r\nb\x00" + "x" * 9_999), 500, "retry", r"ValueError: a\r\nb\x00" + "x" * 478),
    ],
)
def test_error_of_a_call_becomes_its_answer(error: BaseException, status: int, outcome: str, body: str) -> None:
    answer = run(fail, error)

    assert (answer.status, answer.outcome) == (status, outcome)
    assert answer.body == body
    assert answer.headers["Content-Length"] == str(len(body))


def test_keyboard_interrupt_comes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(fail, KeyboardInterrupt())
    assert deferlib.current_task() is None


def test_payload_error_that_a_call_raises_by_itself_is_an_error_like_any_other() -> None:
    answer = run(fail, PayloadUnverifiedError("of something that the call has read"))

    assert (answer.status, answer.outcome) == (500, "retry")


def test_missing_module_is_undecodable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "handler_gone.py").write_text("def fn(): pass\n")
    body = sealed(__import__("handler_gone").fn)
    del sys.modules["handler_gone"]
    (tmp_path / "handler_gone.py").unlink()

    answer = call(deferlib.handler, environ_of(body))

    assert (answer.status, answer.outcome) == (500, "undecodable")
    assert answer.body.startswith("PayloadUndecodableError: handler_gone.fn can't be loaded: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        pytest.param(b"\x80\x05N.", "unverified", id="a bare pickle"),
        pytest.param(b"", "unverified", id="nothing"),
        pytest.param(sealed(note, of=task(id=78)), "unverified", id="another task's"),
        pytest.param(sealed(note)[:-1] + b"!", "unverified", id="altered"),
        pytest.param(sealed(note, key="another key of sufficient length"), "key-unknown", id="unknown key"),
        pytest.param(sealed(note)[:3] + b"\x02" + sealed(note)[4:], "newer", id="newer version"),
    ],
)
def test_payload_that_is_not_this_tasks_is_kept_and_not_run(body: bytes, outcome: str) -> None:
    answer = call(deferlib.handler, environ_of(body))

    assert (answer.status, answer.outcome) == (500, outcome)
    assert not CALLS


# --- who may call ---------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_runs_and_nothing_is_read() -> None:
    environ = environ_of(sealed(note))
    del environ["HTTP_X_DEFERLIB_SIGNATURE"]
    environ.update({"HTTP_X_APPENGINE_TASKNAME": "77", "HTTP_X_APPENGINE_USER_IP": "0.1.0.2", "REMOTE_ADDR": "0.1.0.2"})

    answer = call(deferlib.handler, environ)

    assert (answer.status, answer.outcome) == (403, "untrusted")
    assert not CALLS
    assert environ["wsgi.input"].tell() == 0


def test_invalid_token_is_refused_before_the_body_is_read() -> None:
    environ = environ_of(sealed(note), key="another key of sufficient length")

    answer = call(deferlib.handler, environ)

    assert (answer.status, answer.outcome) == (403, "untrusted")
    assert not CALLS
    assert environ["wsgi.input"].tell() == 0


def test_token_expires(clock: Clock) -> None:
    clock.time = NOW + DEADLINE + 10 * MINUTE + 1

    assert call(deferlib.handler, environ_of(sealed(note))).status == 403
    assert not CALLS


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "post", "BREW"])
def test_other_methods_than_post_are_not_allowed(method: str) -> None:
    answer = call(deferlib.handler, environ_of(sealed(note), method=method))

    assert answer.status == 405
    assert answer.headers["Allow"] == "POST"
    assert not CALLS


def test_post_of_a_view_tells_what_is_allowed_too() -> None:
    _, status, headers = deferred.Handler().post(environ_of(b"", method="GET"))

    assert status == 405
    assert ("Allow", "POST") in headers


TYPES = [
    ("CONTENT_TYPE", ""),
    ("CONTENT_TYPE", "application/json"),
    ("CONTENT_TYPE", "multipart/form-data; boundary=x"),
    ("CONTENT_TYPE", " Application/X-WWW-Form-Urlencoded"),
    ("HTTP_CONTENT_ENCODING", "gzip"),
]


@pytest.mark.parametrize(("key", "value"), TYPES)
def test_content_type_of_a_call_is_its_own_business(key: str, value: str) -> None:
    environ = environ_of(sealed(note))
    environ[key] = value

    assert call(deferlib.handler, environ).outcome == "ok"


@pytest.mark.parametrize(("key", "value"), TYPES)
@pytest.mark.parametrize("signature", [None, "v1.nonsense"])
def test_body_of_anybody_else_is_refused_unread_whatever_its_type(key: str, value: str, signature: str | None) -> None:
    environ = environ_of(sealed(note))
    environ |= {key: value, "wsgi.input": None, "HTTP_X_DEFERLIB_SIGNATURE": signature}
    answer = call(deferlib.handler, environ)

    assert (answer.status, answer.outcome) == (403, "untrusted")
    assert CALLS == []


def test_body_beyond_any_tasks_is_refused_unread() -> None:
    environ = environ_of(sealed(note))
    environ["CONTENT_LENGTH"] = str(inbound.max_body() + 1)

    answer = call(deferlib.handler, environ)

    assert answer.status == 413
    assert environ["wsgi.input"].tell() == 0


@pytest.mark.parametrize("length", ["", "²", "-1", "1e3", "0x10", "9" * 5_000, " 5"])
def test_strange_content_length_is_refused(length: str) -> None:
    environ = environ_of(sealed(note))
    environ["CONTENT_LENGTH"] = length

    assert call(deferlib.handler, environ).status in (403, 413)
    assert not CALLS


def test_missing_content_length_reads_a_terminated_stream_only() -> None:
    chunked, endless = environ_of(sealed(note)), environ_of(sealed(note))
    del chunked["CONTENT_LENGTH"], endless["CONTENT_LENGTH"]
    chunked["wsgi.input_terminated"] = True

    assert call(deferlib.handler, endless).status == 403
    assert not CALLS
    assert call(deferlib.handler, chunked).status == 200
    assert CALLS == ["ran"]


@pytest.mark.parametrize("terminated", [False, True])
def test_body_that_comes_in_drops_is_read_whole(terminated: bool) -> None:
    class Drops(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 7))

    environ = environ_of(sealed(note))
    environ["wsgi.input"] = Drops(environ["wsgi.input"].read())
    if terminated:
        del environ["CONTENT_LENGTH"]
        environ["wsgi.input_terminated"] = True

    assert call(deferlib.handler, environ).status == 200


def test_claim_passed_as_an_object_needs_no_token() -> None:
    environ = environ_of(sealed(note))
    del environ["HTTP_X_DEFERLIB_SIGNATURE"]
    environ[ENVIRON_KEY] = Dispatch(task(), TRUE_HEADERS)

    assert call(deferlib.handler, environ).status == 200


@pytest.mark.parametrize("forged", ["77", b"77", {"id": 77}, (task(), TRUE_HEADERS), task()])
def test_anything_else_under_the_claims_key_counts_for_nothing(forged: object) -> None:
    environ = environ_of(sealed(note))
    del environ["HTTP_X_DEFERLIB_SIGNATURE"]
    environ[ENVIRON_KEY] = forged

    assert call(deferlib.handler, environ).status == 403
    assert not CALLS


# --- what a call sees -----------------------------------------------------------------------------------------------


def test_call_runs_in_its_task_and_namespace_and_leaves_none_behind() -> None:
    run(note_task)

    ((found, namespace),) = CALLS
    assert namespace == found.namespace == "tenant-1"
    assert (found.name, found.queue, found.attempt, found.retry_count, found.execution_count) == ("77", "mail", 3, 2, 1)
    assert (found.fence, found.eta.isoformat()) == (9, "2025-11-21T04:39:59+00:00")
    assert found.deadline.isoformat() == "2025-11-21T04:50:00+00:00"
    assert deferlib.current_task() is None
    assert namespaces.get_namespace() == ""


def test_remaining_time_runs_out(clock: Clock) -> None:
    run(note_task)
    ((found, _),) = CALLS

    assert found.remaining().total_seconds() == 600
    clock.time += 601 * SECOND
    assert found.remaining().total_seconds() == -1


def test_named_task_tells_its_name() -> None:
    named = task(user_name="welcome")

    call(deferlib.handler, environ_of(sealed(note_task, of=named), named))

    assert CALLS[0][0].name == "welcome"


def test_namespace_that_a_call_sets_is_gone_with_it() -> None:
    namespaces.set_namespace("mine")
    try:
        run(leave_namespace)
        assert namespaces.get_namespace() == "mine"
    finally:
        namespaces.set_namespace(None)


def test_coroutine_function_runs_to_its_end() -> None:
    assert run(note_later).status == 200
    ((name, thread),) = CALLS
    assert (name, thread) == ("77", threading.current_thread())


def test_coroutine_function_runs_also_where_a_loop_runs_already() -> None:
    async def serve() -> Response:
        return run(note_later)

    assert asyncio.run(serve()).status == 200
    ((name, thread),) = CALLS
    assert name == "77"
    assert thread is not threading.current_thread()


def test_coroutine_that_cancels_itself_has_failed() -> None:
    answer = run(cancel_itself)

    assert (answer.status, answer.outcome) == (500, "retry")


def test_run_returns_what_the_call_returns() -> None:
    assert deferred.run(deferred.serialize(note, 5)) == 5


def test_run_outside_a_task_takes_the_payload_of_any() -> None:
    """As tests do with what their app has deferred."""
    assert deferred.run(sealed(note, 5)) == 5


def test_run_in_a_task_refuses_the_payload_of_another() -> None:
    with context_of(task()):
        assert deferred.run(sealed(note, 5)) == 5
        others = [task(id=78), task(queue="q2"), task(url="/other"), task(namespace="tenant-2"), task(user_name="x")]
        for moved in others:
            with pytest.raises(PayloadUnverifiedError, match="another task"):
                deferred.run(sealed(note, 6, of=moved))
    assert CALLS == [5]


def test_payload_that_is_bound_to_no_task_can_be_refused() -> None:
    unbound = deferred.serialize(note, 5)
    deferlib.configure(store="sqlite:///:memory:", key=KEY, accept_unbound="false", clock=Clock())

    assert call(deferlib.handler, environ_of(unbound)).outcome == "unverified"
    with pytest.raises(PayloadUnverifiedError, match="no task in particular"):
        deferred.run(unbound)
    with pytest.raises(ConfigError, match="accept_unbound"):
        deferred.serialize(note, 5)
    assert run(note, 7).outcome == "ok"
    assert CALLS == [7]


# --- logs -----------------------------------------------------------------------------------------------------------


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "forged", ["v1.0\x1b[2J\r\nERROR forged.x.y", "v1.00\n11\t22334455 66 77.e30.x", "v2\nERROR forged: all is lost"]
)
def test_forged_token_writes_no_lines_of_its_own(forged: str, caplog: pytest.LogCaptureFixture) -> None:
    environ = environ_of(sealed(note))
    environ["HTTP_X_DEFERLIB_SIGNATURE"] = forged

    answer = call(deferlib.handler, environ)

    assert len(lines_of(caplog)) == 1
    assert lines_of(caplog)[0].isprintable()
    assert answer.body.isprintable()


def test_path_of_a_refused_request_is_logged_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    environ = environ_of(sealed(note))
    environ["PATH_INFO"] = "/a\r\nERROR forged\x1b" + "x" * 9_999

    answer = call(wrap_wsgi_app(view), environ)

    assert lines_of(caplog)[0].isprintable()
    assert len(answer.body) < 400


def test_refused_requests_are_a_line_of_each_kind_in_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can send them: they neither fill the disk, nor bury the line that matters."""
    now = 100.0
    monkeypatch.setattr(attempt, "monotonic", lambda: now)
    other = "another key of sufficient length"
    unsigned = environ_of(sealed(note)) | {"HTTP_X_DEFERLIB_SIGNATURE": "junk"}
    refused = "a request with an invalid dispatch token was refused: the token"

    def send(environ: dict[str, Any], times: int = 1) -> list[str]:
        caplog.clear()
        for _ in range(times):
            assert call(deferlib.handler, dict(environ)).status == 403
        return lines_of(caplog)

    assert send(unsigned, 1_000) == [f"{refused} has an unknown format"]
    id = keys.parse(other).signing.id.hex()
    assert send(environ_of(sealed(note), key=other)) == [
        f"{refused} was signed with key {id}, which isn't in the ring here"
    ]
    now += 9.9
    assert send(unsigned) == []
    now += 0.1
    assert send(unsigned, 2) == [f"{refused} has an unknown format (1000 more like it weren't logged)"]
    now += 10
    assert send(unsigned) == [f"{refused} has an unknown format (1 more like it weren't logged)"]


def test_name_of_a_function_writes_no_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    def fn() -> None:
        raise ValueError

    fn.__qualname__ = "fn\nERROR forged"

    run(fn)

    assert lines_of(caplog)[0] == f"{__name__}.fn\\nERROR forged failed (queue mail, task 77, attempt 3)"


def test_nothing_secret_is_logged_or_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = sealed(note, "a secret argument")

    answers = [
        call(deferlib.handler, environ_of(body)),
        call(deferlib.handler, environ_of(body[:-1] + b"!")),
        call(deferlib.handler, environ_of(body, task(id=78))),
        call(deferlib.handler, environ_of(body, key="another key of sufficient length")),
        run(fail, deferlib.SingularTaskFailure()),
    ]

    signature = environ_of(body)["HTTP_X_DEFERLIB_SIGNATURE"].rpartition(".")[2]
    for text in [*lines_of(caplog), *(answer.body for answer in answers)]:
        for secret in (KEY, "another key", "secret argument", signature):
            assert secret not in text


def test_quiet_failure_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="deferlib.handler")

    run(fail, deferlib.SingularTaskFailure())

    assert not [record for record in caplog.records if record.name == "deferlib.handler"]


def test_headers_are_logged_at_the_level_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    logger = "deferlib.handler.headers"
    caplog.set_level(logging.DEBUG, logger=logger)
    run(note, 1)
    deferred.set_log_level(logging.DEBUG)
    try:
        run(note, 2)
        caplog.set_level(logging.INFO, logger=logger)
        run(note, 3)
    finally:
        deferred.set_log_level(logging.INFO)

    found = [record for record in caplog.records if record.name == logger]
    assert [record.levelname for record in found] == ["INFO", "DEBUG"]
    assert found[0].message == ", ".join(f"{name}:{value}" for name, value in TRUE_HEADERS.items())
    with pytest.raises(ValueError, match="LOUD"):
        deferred.set_log_level("LOUD")  # type: ignore[arg-type]  # what is tested


# --- a handler of one's own -------------------------------------------------------------------------------------------


class Own(deferred.Handler):
    def run_from_request(self, environ: dict[str, Any]) -> deferred.Response:
        CALLS.append("before")
        try:
            body, status, headers = super().run_from_request(environ)
        finally:
            CALLS.append("after")
        return body.upper(), status, [*headers, ("X-Own", "1")]


class Silent(deferred.Handler):
    def run_from_request(self, environ: dict[str, Any]) -> Any:
        super().run_from_request(environ)


class Refusing(deferred.Handler):
    def run_from_request(self, environ: dict[str, Any]) -> deferred.Response:
        return "not now", HTTPStatus.SERVICE_UNAVAILABLE, []


def test_handler_of_ones_own_does_something_around_every_call() -> None:
    body = sealed(note, 1)
    CALLS.clear()

    text, status, headers = Own().post(environ_of(body))

    assert (text, status, dict(headers)["X-Deferlib-Outcome"], dict(headers)["X-Own"]) == ("SUCCESS", 200, "ok", "1")
    assert CALLS == ["before", 1, "after"]
    text, status, headers = Own().post(environ_of(sealed(fail, ValueError("no"))))
    assert (text, status, dict(headers)["X-Deferlib-Outcome"]) == ("ValueError: no", 500, "retry")
    assert CALLS[3:] == ["before", "after"]


def test_handler_of_ones_own_has_the_last_word() -> None:
    assert Silent().post(environ_of(sealed(note)))[:2] == ("Success", HTTPStatus.OK)
    answer = call(Refusing(), environ_of(sealed(note)))
    assert (answer.status, answer.body, CALLS) == (503, "not now", ["ran"])


def test_view_may_run_the_call_itself_and_see_what_it_raises() -> None:
    environ = environ_of(sealed(fail, ValueError("of the call")))

    with pytest.raises(ValueError, match="of the call"):
        deferred.Handler().run_from_request(environ)
    unsigned = {**environ_of(sealed(note)), "HTTP_X_DEFERLIB_SIGNATURE": ""}
    assert deferred.Handler().run_from_request(unsigned)[1] == HTTPStatus.FORBIDDEN
    assert deferred.Handler().run_from_request(environ_of(sealed(note)))[:2] == ("Success", HTTPStatus.OK)
    with pytest.raises(deferlib.errors.PayloadError):
        deferred.Handler().run_from_request(environ_of(b"no payload"))
    with pytest.raises(deferlib.PermanentTaskFailure):  # as on App Engine
        deferred.run(b"no payload")


def test_member_is_invoked_by_its_name() -> None:
    assert deferred.invoke_member("a,b", "split", ",") == ["a", "b"]


# --- the middleware -------------------------------------------------------------------------------------------------

SEEN: list[dict[str, Any]] = []


def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    SEEN.append({**environ, "task": deferlib.current_task(), "namespace": namespaces.get_namespace()})
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["wsgi.input"].read()]


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


def engines(environ: dict[str, Any]) -> dict[str, Any]:
    """Return what an app could take for the engine's headers, in any spelling."""
    return {
        key: value
        for key, value in environ.items()
        if any(mark in key.upper().replace("-", "_") for mark in ("APPENGINE", "CLOUDTASKS", "HTTP_X_DEFERLIB"))
    }


def test_middleware_mounts_the_handler() -> None:
    app = wrap_wsgi_app(view)

    assert call(app, environ_of(sealed(note))).outcome == "ok"
    assert not SEEN


def test_middleware_without_the_handler_passes_its_url_on() -> None:
    app = wrap_wsgi_app(view, use_deferred=False)

    assert call(app, environ_of(b"x")).body == "x"
    assert SEEN[0]["task"].queue == "mail"


AT_QUEUE = "/_ah/queue/mail"


def not_found(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    environ["wsgi.input"].read()
    start_response("404 Not Found", [("X-View", "1")])
    return [b"no such page"]


def test_call_at_its_queues_url_runs_if_the_app_has_no_view_there() -> None:
    app, of = wrap_wsgi_app(not_found), task(AT_QUEUE)

    assert call(app, environ_of(sealed(note, "hi", of=of), of)).outcome == "ok"
    assert CALLS == ["hi"]
    assert call(wrap_wsgi_app(view), environ_of(sealed(note, "all", of=of), of)).outcome == "ok", "a view for all URLs"
    assert CALLS == ["hi", "all"]


@pytest.mark.parametrize("status", ["200 OK", "405 Method Not Allowed", "302 Found", "403 Forbidden", "404 Not Found"])
@pytest.mark.parametrize("way", ["handler", "run"])
def test_call_that_a_view_runs_isnt_run_again(status: str, way: str) -> None:
    def own(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if way == "handler":
            deferred.Handler().post(environ)
        else:
            deferred.run(environ["wsgi.input"].read())
        start_response(status, [])
        return [b"mine"]

    of = task(AT_QUEUE)
    answer = call(wrap_wsgi_app(own), environ_of(sealed(note, of=of), of))

    assert (answer.status, answer.body, CALLS) == (int(status[:3]), "mine", ["ran"])


def test_view_that_fails_at_its_queues_url_is_tried_again() -> None:
    def failing(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("500 Internal Server Error", [])
        return [b"down"]

    of = task(AT_QUEUE)
    assert call(wrap_wsgi_app(failing), environ_of(sealed(note, of=of), of)).status == 500
    assert CALLS == []


@pytest.mark.parametrize(
    ("body", "url", "mounted"),
    [
        (b"no call", AT_QUEUE, True),
        (None, "/_ah/queue/other", True),
        (None, f"{AT_QUEUE}/x", True),
        (None, AT_QUEUE, False),
    ],
)
def test_any_other_request_that_is_not_found_stays_so(body: bytes | None, url: str, mounted: bool) -> None:
    of = task(url)
    body = sealed(note, of=of) if body is None else body

    answer = call(wrap_wsgi_app(not_found, use_deferred=mounted), environ_of(body, of))

    assert (answer.status, answer.body, answer.headers["X-View"], CALLS) == (404, "no such page", "1", [])


def test_unsigned_request_to_a_queues_url_runs_nothing() -> None:
    of = task(AT_QUEUE)
    environ = environ_of(sealed(note, of=of), of)
    del environ["HTTP_X_DEFERLIB_SIGNATURE"]

    assert call(wrap_wsgi_app(not_found), environ).status == 404
    assert CALLS == []


SPELLINGS = [
    "HTTP_X_APPENGINE_TASKNAME",
    "HTTP_X_APPENGINE_QUEUENAME",
    "HTTP_X_APPENGINE_USER_IP",
    "HTTP_X_APPENGINE_FOO",
    "HTTP_X-APPENGINE-TASKNAME",
    "HTTP_X_AppEngine_TaskName",
    "HTTP_x_appengine_taskname",
    "http_x_appengine_taskname",
    "HTTP_X_APPENGINE-TASKNAME",
    "HTTP_X_APPENGINE_TASKNAME ",
    "HTTP_X_APPENGINE",
    "HTTP_X_CLOUDTASKS_TASKNAME",
    "HTTP_X_CLOUDTASKS_QUEUENAME",
    "HTTP_x-cloudtasks-taskname",
    "HTTP_X_DEFERLIB_OUTCOME",
    "HTTP_X_DEFERLIB_SIGNATURE ",
    "HTTP_\0X_APPENGINE_TASKNAME",
    "HTTP_\xa0X_APPENGINE_TASKNAME",
    "HTTP__X_APPENGINE_TASKNAME",
    "HTTP_ X_CLOUDTASKS_TASKNAME",
    "HTTP_X_APPENGINE_" + 8 * "VERY_LONG_",
]


@pytest.mark.parametrize("key", SPELLINGS)
@pytest.mark.parametrize("is_task", [False, True])
def test_forged_header_never_reaches_a_view(key: str, is_task: bool) -> None:
    environ = environ_of(b"body", task("/view?x=1"))
    if not is_task:
        del environ["HTTP_X_DEFERLIB_SIGNATURE"]
    environ[key] = "forged"

    assert call(wrap_wsgi_app(view), environ).body == "body"

    true = {"HTTP_" + name.upper().replace("-", "_"): value for name, value in TRUE_HEADERS.items()}
    assert engines(SEEN[0]) == (true if is_task else {})


def test_no_name_that_is_let_through_unread_is_an_engines() -> None:
    assert not any(inbound.is_engines(key.removeprefix("HTTP_")) for key in inbound._ORDINARY)


def test_other_headers_stay() -> None:
    environ = environ_of(b"", task("/view"))
    others = {"HTTP_X_REQUEST_ID": "1", "HTTP_HOST": "h", "HTTP_APPENGINE": "2", "HTTP_X_DEFER": "3", "HTTP_XX": "4"}
    environ.update(others)

    call(wrap_wsgi_app(view), environ)

    assert others.items() <= SEEN[0].items()


def test_view_of_a_task_gets_the_truth() -> None:
    call(wrap_wsgi_app(view), environ_of(b"body", task("/caf%C3%A9?x=1")))

    assert SEEN[0]["task"].attempt == 3
    assert SEEN[0]["namespace"] == "tenant-1"
    assert SEEN[0]["REMOTE_ADDR"] == "0.1.0.2"
    assert deferlib.current_task() is None
    assert namespaces.get_namespace() == ""


@pytest.mark.parametrize("address", ["0.1.0.2", "0.1.0.2:80", "::ffff:0.1.0.2", "[::ffff:0.1.0.2]:80"])
def test_view_of_anybody_else_gets_no_task_and_no_tasks_address(address: str) -> None:
    environ = environ_of(b"body", task("/view"))
    del environ["HTTP_X_DEFERLIB_SIGNATURE"]
    environ["REMOTE_ADDR"] = address

    call(wrap_wsgi_app(view), environ)

    assert SEEN[0]["task"] is None
    assert SEEN[0]["REMOTE_ADDR"] == "0.0.0.0"


@pytest.mark.parametrize("address", ["10.1.0.2", "0.1.0.21", "192.0.1.0", "2001:db8::1", ""])
def test_other_addresses_stay(address: str) -> None:
    environ = environ_of(b"body", task("/view"))
    del environ["HTTP_X_DEFERLIB_SIGNATURE"]
    environ["REMOTE_ADDR"] = address

    call(wrap_wsgi_app(view), environ)

    assert SEEN[0]["REMOTE_ADDR"] == address


def test_invalid_token_stops_at_the_middleware() -> None:
    environ = environ_of(b"body", task("/view"))
    environ["wsgi.input"] = io.BytesIO(b"ydob")

    answer = call(wrap_wsgi_app(view), environ)

    assert (answer.status, answer.outcome) == (403, "mismatched")
    assert not SEEN
    assert not engines(environ)


def test_wrapping_twice_is_wrapping_once() -> None:
    app = wrap_wsgi_app(view)

    assert wrap_wsgi_app(app) is app
    assert wrap_wsgi_app(app, use_deferred=False) is app
    mounted = wrap_wsgi_app(wrap_wsgi_app(view, use_deferred=False))
    assert mounted.app is view
    assert mounted.use_deferred


def test_middleware_inside_another_layer_inside_the_middleware_works() -> None:
    inner = wrap_wsgi_app(view)

    def layer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return inner(environ, start_response)

    outer = Middleware(layer, use_deferred=False)

    assert call(outer, environ_of(b"body", task("/view"))).body == "body"
    assert call(outer, environ_of(sealed(note))).outcome == "ok"


def test_app_that_is_a_generator_runs_in_its_task_to_its_end() -> None:
    def lazy(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        try:
            start_response("200 OK", [])
            yield str(deferlib.current_task() is not None).encode()
            yield namespaces.get_namespace().encode()
        finally:
            CALLS.append(namespaces.get_namespace())

    assert call(wrap_wsgi_app(lazy), environ_of(b"", task("/view"))).body == "Truetenant-1"
    assert CALLS == ["tenant-1"]
    assert deferlib.current_task() is None


@pytest.mark.parametrize("is_task", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_namespace_that_a_view_sets_is_gone_for_the_next_request(is_task: bool, lazy: bool) -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        namespaces.set_namespace("somebody-else")
        yield b""

    environ = environ_of(b"", task("/view"))
    if not is_task:
        del environ["HTTP_X_DEFERLIB_SIGNATURE"]

    call(wrap_wsgi_app(app if lazy else lambda *args: list(app(*args))), environ)

    assert namespaces.get_namespace() == ""


def test_namespace_that_stands_around_the_app_is_kept() -> None:
    def served() -> None:
        namespaces.set_namespace("around")
        environ = environ_of(b"", task("/view"))
        del environ["HTTP_X_DEFERLIB_SIGNATURE"]
        call(wrap_wsgi_app(view), environ)

    Context().run(served)

    assert SEEN[0]["namespace"] == "around"


def test_servers_file_wrapper_is_passed_through() -> None:
    class FileWrapper:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"file"])

    wrapper = FileWrapper()
    environ = {**environ_of(b"", task("/view")), "wsgi.file_wrapper": FileWrapper}

    assert wrap_wsgi_app(lambda environ, start_response: wrapper)(environ, lambda *args: None) is wrapper


def test_prefix_that_a_proxy_strips_is_a_setting(clock: Clock) -> None:
    def stripped() -> dict[str, Any]:
        body = sealed(note)
        signature = token.sign(
            Keyring([KEY.encode()]), NOW, Dispatch(task(), TRUE_HEADERS), method="POST", body=body, deadline=DEADLINE,
            base_path="/tasks",
        )  # fmt: skip
        return {**environ_of(body), "HTTP_X_DEFERLIB_SIGNATURE": signature}

    assert call(deferlib.handler, stripped()).status == 403
    assert call(deferlib.handler, {**stripped(), "SCRIPT_NAME": "/tasks"}).status == 200
    deferlib.configure(store="sqlite:///:memory:", key=KEY, clock=clock, prefix="/tasks")
    assert call(deferlib.handler, stripped()).status == 200
