"""A handler that gets several calls in one request: each runs as if it had come alone, and is told by itself."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest

import deferlib
from deferlib import batch, config, context, deferred, inbound, namespaces, series, tracing
from deferlib.batch import Told
from deferlib.clock import SystemClock
from deferlib.contrib import calls
from deferlib.core.model import MINUTE, SECOND, Delivery, Micros
from deferlib.deferred import DEFAULT_URL
from deferlib.keys import Keyring
from tests.unit.batch_senders import BOTH, CLOCK, Post, app_runtime, run, wsgi
from tests.unit.batches import (
    DEADLINE,
    KEY,
    NOW,
    call_of,
    claim_of,
    delivery,
    headers_text,
    request_of,
    token_of,
)

CALLS: list[Any] = []
TENANT: ContextVar[str] = ContextVar("TENANT", default="nobody")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    CALLS.clear()
    with app_runtime():
        yield


# --- functions that are deferred --------------------------------------------------------------------------------------


def note(value: Any = "ran") -> None:
    CALLS.append(value)


def note_task() -> None:
    CALLS.append((deferlib.current_task(), namespaces.get_namespace()))


async def note_task_later() -> None:
    await asyncio.sleep(0)
    note_task()


def take_over() -> None:
    """Leave behind whatever a context can hold."""
    CALLS.append((TENANT.get(), namespaces.get_namespace()))
    TENANT.set("somebody")
    namespaces.set_namespace("somebody-else")


async def take_over_later() -> None:
    await asyncio.sleep(0)
    take_over()


def note_trace() -> None:
    CALLS.append(tracing.current())


def fail(error: BaseException) -> None:
    CALLS.append(type(error).__name__)
    raise error


async def fail_later(error: BaseException) -> None:
    await asyncio.sleep(0)
    fail(error)


def take(micros: Micros) -> None:
    CLOCK.time += micros
    CALLS.append(deferlib.current_task())


def stay() -> None:
    """Go on until it is stopped."""
    CALLS.append("stays")
    for _ in itertools.count():
        pass


class Canary:
    """A pickle of one tells when it is read."""

    def __reduce__(self) -> Any:
        return note, ("canary",)


# --- each as if it had come alone -------------------------------------------------------------------------------------


@BOTH
def test_calls_run_in_their_order_and_each_is_told(send: Post) -> None:
    answer = run(send, [delivery(id, note, id) for id in range(1, 33)])

    assert answer.told(32) == [Told(200, "ok", 0)] * 32
    assert list(range(1, 33)) == CALLS
    assert deferlib.current_task() is None


@BOTH
@pytest.mark.parametrize("fn", [note_task, note_task_later])
def test_each_call_is_told_its_own_task(send: Post, fn: Any) -> None:
    deliveries = [
        delivery(1, fn, name="welcome-7", namespace="tenant-1", claims=77),
        delivery(2, fn, queue="other", attempts=1, executions=4, eta=-5, deadline=15 * SECOND),
        delivery(2**63 - 1, fn, namespace="tenant-2"),
    ]

    answer = run(send, deliveries)

    assert answer.outcomes(3) == ["ok"] * 3
    for (claim, _, deadline), (task, namespace) in zip(deliveries, CALLS, strict=True):
        assert (task.id, task.name, task.queue) == (claim.id, claim.name or str(claim.id), claim.queue)
        assert (task.attempt, task.execution_count, task.retry_count) == (1, claim.executions, 0)
        assert (task.fence, task.eta_micros, task.url) == (claim.claims, claim.eta, DEFAULT_URL)
        assert task.namespace == namespace == claim.namespace
        assert task.deadline_micros == NOW + deadline, "by the engine's clock, as of one that comes alone"


@BOTH
@pytest.mark.parametrize("fn", [take_over, take_over_later])
def test_what_a_call_leaves_in_its_context_the_next_does_not_find(send: Post, fn: Any) -> None:
    run(send, [delivery(id, fn, namespace=f"tenant-{id}") for id in (1, 2, 3)])

    assert CALLS == [("nobody", "tenant-1"), ("nobody", "tenant-2"), ("nobody", "tenant-3")]
    assert (TENANT.get(), namespaces.get_namespace()) == ("nobody", "")


@BOTH
def test_deadline_of_each_counts_from_when_it_begins(send: Post) -> None:
    run(send, [delivery(1, take, 20_000), delivery(2, take, 20_000), delivery(3, take, 0, deadline=SECOND)])

    assert [task.deadline_micros for task in CALLS] == [NOW + DEADLINE, NOW + 20_000 + DEADLINE, NOW + 40_000 + SECOND]


@BOTH
def test_each_call_goes_on_with_its_own_trace(send: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    traced = headers_text(("TraceParent", PARENT), ("tracestate", "own=1"))

    run(send, [delivery(1, note_trace), delivery(2, note_trace, headers=traced), delivery(3, note_trace)])

    assert [None, tracing.Carried(PARENT, "own=1"), None] == CALLS


class Around(deferred.Handler):
    """Does something around every call, as `Handler` says how."""

    def run_from_request(self, environ: dict[str, Any]) -> Any:
        CALLS.append(environ)
        return super().run_from_request(environ)


def test_override_is_called_for_each_with_an_environ_of_its_own() -> None:
    own = headers_text(("X-Tenant", "7"), ("Content-Type", "text/x-call"), ("accept-language", "de"))
    deliveries = [delivery(1, note, headers=own), delivery(2, note)]

    answer = run(wsgi, deliveries, app=Around(), HTTP_ACCEPT="*/*")

    assert answer.outcomes(2) == ["ok", "ok"]
    first, second = [each for each in CALLS if each != "ran"]
    for environ, (claim, _, _) in zip((first, second), deliveries, strict=True):
        assert environ["CONTENT_LENGTH"] == str(len(claim.body))
        assert environ["wsgi.input"].read() == inbound.read_body(environ) == claim.body
        assert environ[context.ENVIRON_KEY].context.id == claim.id
        assert "HTTP_X_DEFERLIB_SIGNATURE" not in environ
        assert (environ["HTTP_HOST"], environ["HTTP_ACCEPT"]) == ("app", "*/*")
    assert (first["HTTP_X_TENANT"], first["CONTENT_TYPE"], first["HTTP_ACCEPT_LANGUAGE"]) == ("7", "text/x-call", "de")
    assert second["CONTENT_TYPE"] == "application/octet-stream"
    assert not {"HTTP_X_TENANT", "HTTP_ACCEPT_LANGUAGE"} & set(second)


def test_override_that_answers_for_itself_is_told_as_it_answers() -> None:
    class Strange(deferred.Handler):
        def run_from_request(self, environ: dict[str, Any]) -> Any:
            body, status, headers = super().run_from_request(environ)
            return CALLS[-1] or (body, status, headers)

    answers: list[Any] = [None, ("x" * 5_000, 503, []), ("", 204, []), ("no", 500, [("x-deferlib-outcome", "ok")])]

    told = run(wsgi, [delivery(id, note, each) for id, each in enumerate(answers, 1)], app=Strange()).told(4)

    assert told == [Told(200, "ok", 0), Told(503, "", 0, "x" * 300), Told(204, "", 0), Told(500, "ok", 0, "no")]


FORGED = (
    "X-AppEngine-TaskName", "x_appengine_queuename", "X-CloudTasks-TaskName", "X-Deferlib-Signature",
    "X-Appeng\u0131ne-TaskName", "-X-AppEngine-User-Email", "X-AppEngine-" + "a" * 100,
)  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_header_that_only_an_engine_may_set_is_not_let_in_by_a_row(name: str) -> None:
    """Who can write to the store, without a key; alone, it would be taken away from the request."""
    own = headers_text((name, "forged"), ("X-Harmless", "yes"))

    run(wsgi, [delivery(1, note, headers=own), delivery(2, note)], app=Around())

    environ = CALLS[0]
    assert environ["HTTP_X_HARMLESS"] == "yes"
    assert "forged" not in environ.values()


@pytest.mark.parametrize(
    "name", ["Host", "content-length", "Content_Length", "Transfer-Encoding", "wsgi.input", "deferlib.claim", "PATH_INFO"]
)
def test_header_of_a_task_sets_nothing_but_a_header(name: str) -> None:
    own = headers_text((name, "forged"))

    answer = run(wsgi, [delivery(1, note, headers=own), delivery(2, note)], app=Around())

    assert answer.outcomes(2) == ["ok", "ok"]
    changed = {key for key, value in CALLS[0].items() if value == "forged"}
    assert changed <= {"HTTP_WSGI.INPUT", "HTTP_DEFERLIB.CLAIM", "HTTP_PATH_INFO"}


# --- failures among them ----------------------------------------------------------------------------------------------

ENDS = [
    (ValueError("no"), 500, "retry", "ValueError: no"),
    (deferlib.PermanentTaskFailure("never"), 200, "permanent", "PermanentTaskFailure: never"),
    (deferlib.SingularTaskFailure("soon"), 408, "retry", "SingularTaskFailure: soon"),
    (deferlib.DeadlineExceededError("late"), 500, "retry", "DeadlineExceededError: late"),
    (SystemExit(3), 500, "retry", "SystemExit: 3"),
    (asyncio.CancelledError(), 500, "retry", "RuntimeError: the call was cancelled from inside"),
    (StopIteration(), 500, "retry", "StopIteration: "),
]


@BOTH
@pytest.mark.parametrize("fn", [fail, fail_later])
def test_failure_of_one_is_its_own(send: Post, fn: Any) -> None:
    ends = ENDS if fn is fail else ENDS[:-1]  # a coroutine can't raise a StopIteration
    deliveries = [[delivery(2 * id, fn, end[0]), delivery(2 * id + 1, note)] for id, end in enumerate(ends, 1)]

    told = run(send, [each for pair in deliveries for each in pair]).told(2 * len(ends))

    assert told[1::2] == [Told(200, "ok", 0)] * len(ends)
    assert told[::2] == [Told(status, outcome, 0, text) for _, status, outcome, text in ends]
    assert [name for error, *_ in ends for name in (type(error).__name__, "ran")] == CALLS


@BOTH
def test_call_that_can_not_be_run_is_told_so_and_the_others_run(send: Post) -> None:
    """What a store may hold: an engine vouches for none of it."""
    genuine, other = call_of(claim_of(1), note), Keyring([b"another key of sufficient length"])
    bodies = {
        "unverified": [genuine[:-1] + b"!", genuine, b"", b"\x80\x05N.", pickle.dumps(Canary())],
        "key-unknown": [call_of(claim_of(9), note, ring=other)],
        "newer": [genuine[:3] + b"\x02" + genuine[4:]],
    }
    expected, deliveries = [], []
    for outcome, each in bodies.items():
        for body in each:
            id = 10 + len(deliveries)
            deliveries += [Delivery(claim_of(id, body=body), "http://app", DEADLINE), delivery(id + 1, note, id)]
            expected += [outcome, "ok"]

    answer = run(send, deliveries)

    assert answer.outcomes(len(expected)) == expected
    assert [10 + number for number in range(0, len(expected), 2)] == CALLS


@BOTH
def test_call_whose_module_is_gone_is_undecodable_and_the_others_run(send: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("batch_handler_gone")
    monkeypatch.setitem(sys.modules, "batch_handler_gone", module)
    exec("def fn(): pass", module.__dict__)
    gone = delivery(1, module.fn)
    monkeypatch.delitem(sys.modules, "batch_handler_gone")

    assert run(send, [gone, delivery(2, note)]).outcomes(2) == ["undecodable", "ok"]


@BOTH
@pytest.mark.parametrize(
    "change",
    [{"id": 8}, {"name": "other"}, {"queue": "other"}, {"namespace": "other"}, {"url": DEFAULT_URL + "?x"}],
    ids=str,
)
def test_call_of_another_task_does_not_run(send: Post, change: dict[str, Any]) -> None:
    """A row copied onto another task, which an engine then delivers among others."""
    moved = delivery(7, note, "moved")
    claim = moved.claim._replace(body=call_of(moved.claim._replace(**change), note, "moved"))

    answer = run(send, [moved._replace(claim=claim), delivery(9, note)])

    assert answer.outcomes(2) == ["unverified", "ok"]
    assert CALLS == ["ran"]


def test_what_is_not_a_failure_ends_the_request() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(wsgi, [delivery(1, fail, KeyboardInterrupt()), delivery(2, note)])

    assert CALLS == ["KeyboardInterrupt"]
    assert deferlib.current_task() is None


@BOTH
def test_deadline_stops_one_call_and_not_the_next(send: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY)
    monkeypatch.setattr(series, "PATIENCE", MINUTE)
    monkeypatch.setattr(calls, "HELPERS", 0)
    deliveries = [delivery(1, stay, deadline=SECOND // 5), delivery(2, note_task, deadline=SECOND), delivery(3, note)]
    begun = SystemClock().now()
    request = request_of(deliveries, now=begun)

    told = send(request.body, token_of(request)).told(3)

    assert [each and (each.status, each.outcome) for each in told] == [(500, "retry"), (200, "ok"), (200, "ok")]
    assert told[0] is not None
    assert told[0].text.startswith("DeadlineExceededError: stopped shortly before")
    _, (task, _), ran = CALLS
    assert task.deadline_micros >= begun + told[0].took + SECOND
    assert ran == "ran"


# --- patience ---------------------------------------------------------------------------------------------------------


@BOTH
def test_after_a_slow_call_no_other_is_begun(send: Post) -> None:
    slow = batch.PATIENCE // 2 + 1
    deliveries = [delivery(id, take, slow) for id in (1, 2)] + [delivery(id, note) for id in (3, 4)]

    answer = run(send, deliveries)

    assert answer.told(4) == [Told(200, "ok", slow), Told(200, "ok", slow), None, None]
    assert "ran" not in CALLS


@BOTH
def test_first_call_is_always_begun(send: Post) -> None:
    assert run(send, [delivery(1, take, MINUTE), delivery(2, note)]).told(2) == [Told(200, "ok", MINUTE), None]
