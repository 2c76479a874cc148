"""The in-process transport: a WSGI app called in a pool of threads."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from deferlib.clock import SystemClock
from deferlib.context import ENVIRON_KEY, Dispatch
from deferlib.core.model import SECOND, Claim, Delivery, Kind, Micros, Result
from deferlib.engine.local import LocalTransport

StartResponse = Callable[..., Any]
App = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
Make = Callable[..., LocalTransport]

PATIENCE = 10  # seconds before a test that hangs fails


def delivery(id: int = 1, **changes: Any) -> Delivery:
    fields: dict[str, Any] = dict.fromkeys(Claim._fields, 0)
    for name in ("reason", "target", "headers", "namespace", "tag", "retry", "history"):
        fields[name] = ""
    fields |= {
        "id": id, "claims": 7, "queue": "mail", "name": None, "attempts": 1, "method": "POST", "url": "/hook",
        "body": b"body",
    }  # fmt: skip
    return Delivery(Claim(**{**fields, **changes}), "", 600 * SECOND)


def ok(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [])
    return [b"fine"]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[LocalTransport] = []

    def new(app: App = ok, threads: int = 2) -> LocalTransport:
        made.append(LocalTransport(app, SystemClock(), threads=threads))
        return made[-1]

    yield new
    for transport in made:
        transport.close()


def later() -> Micros:
    return SystemClock().now() + PATIENCE * SECOND


def collect(transport: LocalTransport, count: int = 1) -> list[Result]:
    """Wait for *count* results."""
    found: list[Result] = []
    end = later()
    while len(found) < count:
        assert SystemClock().now() < end, f"{len(found)} of {count} results came"
        transport.wait(end)
        found += transport.results()
    return found


def outcome_of(transport: LocalTransport) -> Result:
    transport.send(delivery())
    (result,) = collect(transport)
    assert (result.id, result.claims, result.kind) == (1, 7, Kind.ANSWERED)
    assert result.started <= result.ended
    return result


class Gate:
    """An app whose calls wait until they are let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        self.entered.release()
        assert self.open.wait(PATIENCE)
        return ok(environ, start_response)

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=PATIENCE)


# --- results --------------------------------------------------------------------------------------------------------


def test_answer_becomes_a_result(make: Make) -> None:
    assert outcome_of(make())[5:] == (200, "", "", 0, False)


def test_outcome_and_the_reason_of_a_failure_are_kept(make: Make) -> None:
    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        start_response("500 Oh", [("x-deferlib-outcome", "undecodable")])
        yield b"no module "
        yield b"x" * 10_000

    result = outcome_of(make(app))

    assert (result.status, result.outcome) == (500, "undecodable")
    assert result.error.startswith("no module xxx")
    assert len(result.error) == 500


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration()])
def test_whatever_the_app_raises_is_one_failed_attempt(error: BaseException, make: Make) -> None:
    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        raise error

    transport = make(app, threads=1)

    for _ in range(3):  # the thread lives on
        result = outcome_of(transport)
        assert result.status == 500
        assert result.error.startswith(type(error).__name__)


def test_error_while_the_answer_is_read_is_a_failure_and_the_answer_is_closed(make: Make) -> None:
    closed = threading.Event()

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield b"a"
            raise ValueError("in the middle")

        def close(self) -> None:
            closed.set()

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return Body()

    result = outcome_of(make(app))

    assert (result.status, result.error) == (500, "ValueError: in the middle")
    assert closed.is_set()


def test_answer_without_a_status_is_no_success(make: Make) -> None:
    assert outcome_of(make(lambda environ, start_response: [])).status == 500
    assert outcome_of(make(lambda environ, start_response: start_response("OK", []))).status == 500


# --- what the app is given ------------------------------------------------------------------------------------------


def test_app_gets_the_request_and_the_claim_as_an_object(make: Make) -> None:
    seen: list[dict[str, Any]] = []

    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        seen.append({**environ, "body": environ["wsgi.input"].read()})
        return ok(environ, start_response)

    transport = make(app)
    headers = '[["X-Mine", "1"], ["content_type", "a/b"], ["Host", "evil"], ["Content_Length", "9"]]'
    transport.send(delivery(url="/caf%C3%A9?x=%20", method="PUT", headers=headers, namespace="tenant-1", attempts=3))
    collect(transport)

    (environ,) = seen
    assert (environ["REQUEST_METHOD"], environ["QUERY_STRING"], environ["body"]) == ("PUT", "x=%20", b"body")
    assert environ["PATH_INFO"].encode("latin-1").decode() == "/café"
    assert (environ["CONTENT_LENGTH"], environ["CONTENT_TYPE"], environ["HTTP_X_MINE"]) == ("4", "a/b", "1")
    assert environ["HTTP_HOST"] == "localhost"
    assert "HTTP_CONTENT_LENGTH" not in environ
    known = environ[ENVIRON_KEY]
    assert isinstance(known, Dispatch)
    assert (known.context.attempt, known.context.namespace, known.context.url) == (3, "tenant-1", "/caf%C3%A9?x=%20")
    assert known.headers["X-AppEngine-TaskRetryCount"] == "2"


def test_each_call_has_a_context_of_its_own(make: Make) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="clean")
    seen: list[str] = []

    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        seen.append(variable.get())
        variable.set("used")
        return ok(environ, start_response)

    transport = make(app, threads=1)
    for id in range(3):
        transport.send(delivery(id))
    collect(transport, 3)

    assert seen == ["clean"] * 3


# --- room -----------------------------------------------------------------------------------------------------------


def test_as_many_run_at_once_as_there_are_threads(make: Make) -> None:
    gate = Gate()
    transport = make(gate, threads=3)
    assert transport.room("") == 3

    for id in range(5):
        transport.send(delivery(id))
    gate.wait(3)

    assert not gate.entered.acquire(timeout=0.05)
    assert transport.room("") == 0
    gate.open.set()
    collect(transport, 5)


def test_room_looks_ahead_once_calls_have_been_quick(make: Make) -> None:
    transport = make(threads=2)

    for _ in range(60):
        outcome_of(transport)

    assert 2 < transport.room("") <= 2 + 256
    before = transport.room("")
    transport.send(delivery())
    assert transport.room("") == before - 1


@pytest.mark.parametrize("woken", [False, True])
def test_wake_shortens_the_gathering_of_results(make: Make, monkeypatch: pytest.MonkeyPatch, woken: bool) -> None:
    """A task of a quiet queue waited up to 10 ms beside a backlog of another one."""
    gate, polls = Gate(), [0]

    class Poll:
        def poll(self, milliseconds: float) -> list[Any]:
            polls[0] += 1
            return []

    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        return ok(environ, start_response) if environ["PATH_INFO"] == "/first" else gate(environ, start_response)

    transport = make(app, threads=1)
    transport.send(delivery(1, url="/first"))
    for id in range(2, 6):
        transport.send(delivery(id))
    gate.wait()  # the first has ended, the second runs, three are in line
    monkeypatch.setattr(transport, "_poll", Poll())
    shortened = False
    for wakes in (woken, woken, False):  # the second one comes at once
        polls[0] = 0
        if wakes:
            transport.wake()
        transport.wait(later())
        assert polls == [0 if woken and not shortened else 5]
        shortened = True
    gate.open.set()
    monkeypatch.undo()
    collect(transport, 5)


def test_queues_take_turns_in_the_line_for_a_thread(make: Make) -> None:
    gate = Gate()
    transport = make(gate, threads=1)
    transport.send(delivery(0))
    gate.wait()
    for id in range(1, 6):
        transport.send(delivery(id))
    transport.send(delivery(6, queue="other"))

    gate.open.set()

    assert [result.id for result in collect(transport, 7)] == [0, 6, 1, 2, 3, 4, 5]


# --- withdraw, cancel -----------------------------------------------------------------------------------------------


def test_what_has_not_started_can_be_withdrawn(make: Make) -> None:
    gate = Gate()
    transport = make(gate, threads=1)
    for id in (1, 2, 3):
        transport.send(delivery(id))
    gate.wait()

    withdrawn = transport.withdraw()

    assert [(result.id, result.kind) for result in withdrawn] == [(2, Kind.UNSENT), (3, Kind.UNSENT)]
    assert transport.withdraw() == []
    gate.open.set()
    assert [result.id for result in collect(transport)] == [1]
    assert transport.room("") >= 1


def test_cancelled_delivery_is_not_reported(make: Make) -> None:
    gate = Gate()
    transport = make(gate, threads=2)
    transport.send(delivery(1))
    transport.send(delivery(2))
    gate.wait(2)

    transport.cancel(1, 7)
    gate.open.set()

    assert [result.id for result in collect(transport)] == [2]
    transport.send(delivery(3))
    assert [result.id for result in collect(transport)] == [3]


def test_delivery_cancelled_before_it_starts_never_runs(make: Make) -> None:
    gate = Gate()
    transport = make(gate, threads=1)
    transport.send(delivery(1))
    transport.send(delivery(2))
    gate.wait()

    transport.cancel(2, 7)
    transport.send(delivery(3))
    gate.open.set()

    assert [result.id for result in collect(transport, 2)] == [1, 3]
    gate.wait()  # the third delivery's call
    assert not gate.entered.acquire(blocking=False)


def test_cancel_is_for_one_claim_only(make: Make) -> None:
    gate = Gate()
    transport = make(gate)
    transport.send(delivery(1))
    gate.wait()

    transport.cancel(1, 6)
    gate.open.set()

    assert [result.id for result in collect(transport)] == [1]


# --- waiting --------------------------------------------------------------------------------------------------------


def test_wait_ends_with_a_result_with_a_wake_and_with_the_time(make: Make) -> None:
    gate = Gate()
    transport = make(gate)
    transport.wait(SystemClock().now() - 1)  # the time
    transport.wake()
    transport.wait(later())  # an earlier wake
    threading.Timer(0.01, transport.wake).start()
    transport.wait(later())  # a wake meanwhile

    transport.send(delivery())
    gate.wait()
    threading.Timer(0.01, gate.open.set).start()
    assert collect(transport)  # a result


def test_close_lets_the_threads_go_and_may_be_repeated(make: Make) -> None:
    transport = make(threads=3)
    names = {thread.name for thread in threading.enumerate()}
    assert {"deferlib-0", "deferlib-1", "deferlib-2"} <= names
    mine = [thread for thread in threading.enumerate() if re.fullmatch(r"deferlib-\d+", thread.name)]

    transport.close()
    transport.close()
    transport.wake()

    for thread in mine:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in mine)


def test_call_that_outlives_the_transport_harms_nobody(make: Make) -> None:
    gate = Gate()
    transport = make(gate, threads=1)
    transport.send(delivery())
    gate.wait()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "deferlib-0"]

    transport.close()
    gate.open.set()

    thread.join(PATIENCE)
    assert not thread.is_alive()
