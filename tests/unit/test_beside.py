"""What comes beside a backlog: it is claimed first, passes the line, and waits for no more than its turn."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from deferlib.clock import SystemClock
from deferlib.core.health import Ailment, Condition
from deferlib.core.model import SECOND, Delivery, Kind, Micros, QueueConfig
from deferlib.deferred import DEFAULT_URL
from deferlib.engine.batching import Batching
from deferlib.engine.http import HttpTransport
from deferlib.engine.local import LocalTransport
from deferlib.engine.target import BEYOND, Target
from deferlib.engine.transport import Request
from deferlib.engine.window import Window
from tests.unit.bad_servers import Connection, serving
from tests.unit.batches import claim_of
from tests.unit.engine_bench import Bench

BUSY, QUIET = "busy", "quiet"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
PATIENCE: Micros = 20 * SECOND


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One with a backlog of a queue beside one that has nothing due, both of which the engine knows."""
    bench = Bench()
    bench.carrier.slots = 16
    bench.put(QueueConfig(name=BUSY), QueueConfig(name=QUIET))
    bench.engine.turn()
    bench.add(*range(100), queue=BUSY)
    bench.engine.turn()
    bench.engine.turn()
    yield bench
    bench.store.close()


def delivery(queue: str, base: str = "http://app", id: int = 1, url: str = DEFAULT_URL) -> Delivery:
    return Delivery(claim_of(id, queue=queue, url=url), base, 600 * SECOND)


def queues(bench: Bench) -> list[str]:
    """The queues of what was sent since the last call."""
    sent = [each.claim.queue for each in bench.carrier.sent]
    seen = bench.__dict__.setdefault("seen", set())
    fresh = [each for each in bench.carrier.sent if each.claim.id not in seen]
    seen.update(each.claim.id for each in bench.carrier.sent)
    assert len(sent) >= len(fresh)
    return [each.claim.queue for each in fresh]


# --- the engine -----------------------------------------------------------------------------------------------------


def test_what_comes_beside_a_backlog_is_claimed_before_anything_else_is_done(bench: Bench) -> None:
    answered, *others = [each for each in bench.carrier.sent if each.claim.queue == BUSY][:4]
    for each in (answered, *others):
        bench.carrier.answer(each)
    queues(bench)

    bench.add(1_000, queue=QUIET)
    until = bench.engine.turn()

    assert queues(bench) == [QUIET]
    assert until <= bench.now, "the rest is to follow at once"
    assert bench.row(answered.claim.id, BUSY) is not None, "its answer isn't settled yet"

    bench.engine.turn()

    assert set(queues(bench)) == {BUSY}
    assert bench.row(answered.claim.id, BUSY) is None


def test_it_never_comes_first_twice_in_a_row(bench: Bench) -> None:
    answered = [each for each in bench.carrier.sent if each.claim.queue == BUSY]
    for number, each in enumerate(answered[:8]):
        bench.carrier.answer(each)
        bench.add(1_000 + number, queue=QUIET)
        bench.engine.turn()
        if number % 2:
            assert bench.row(answered[number - 1].claim.id, BUSY) is None, "every other turn settles"


def test_queues_are_reread_in_time_all_the_same(bench: Bench) -> None:
    with bench.store.real.begin() as tx:
        tx.pause([QUIET], True)
    bench.clock.advance(1)
    queues(bench)

    bench.add(1_000, queue=QUIET)
    bench.engine.turn()
    bench.engine.turn()

    assert QUIET not in queues(bench)


def test_a_hint_beside_a_backlog_opens_no_transaction_where_nothing_has_come(bench: Bench) -> None:
    bench.engine.turn()
    begun, looked = len(bench.store.begun), bench.store.looked

    for _ in range(5):
        bench.engine.wake()
        bench.engine.turn()

    assert len(bench.store.begun) == begun
    assert bench.store.looked == looked + 5


def test_a_full_line_keeps_nobody_who_may_pass_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def passes(base: str, queue: str) -> bool:
        asked.append((base, queue))
        return True

    monkeypatch.setattr(bench.carrier, "passes", passes)
    bench.carrier.slots = len(bench.carrier.sent)
    queues(bench)

    bench.add(1_000, 1_001, queue=QUIET)
    bench.engine.turn()

    assert asked == [("http://app", QUIET)]
    assert queues(bench) == [QUIET], "one"

    bench.engine.turn()
    bench.engine.wake()
    bench.engine.turn()
    assert queues(bench) == [], "it has something on its way now, and waits for room like all the others"

    bench.carrier.answer(bench.carrier.sent[-1])
    bench.carrier.slots -= 1
    bench.engine.turn()
    bench.engine.wake()
    bench.engine.turn()
    assert queues(bench) == [QUIET], "the second, once the first has ended"


def test_who_has_something_on_its_way_passes_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.carrier.slots = 40  # so that it is known that no other task of it is due
    bench.add(1_000, queue=QUIET)
    bench.engine.turn()
    bench.engine.turn()
    monkeypatch.setattr(bench.carrier, "passes", lambda base, queue: True)
    bench.carrier.slots = len(bench.carrier.sent)
    queues(bench)

    bench.add(1_001, queue=QUIET)
    bench.engine.turn()
    bench.engine.turn()

    assert queues(bench) == []


def test_without_a_backlog_nobody_looks_first() -> None:
    bench = Bench()
    bench.put(QueueConfig(name=BUSY), QueueConfig(name=QUIET))
    bench.engine.turn()
    bench.add(1, queue=BUSY)
    bench.engine.turn()
    bench.engine.turn()
    looked = bench.store.looked

    bench.add(2, queue=QUIET)
    bench.engine.turn()

    assert bench.store.looked == looked
    assert [each.claim.queue for each in bench.carrier.sent] == [BUSY, QUIET]
    bench.store.close()


@pytest.mark.parametrize("limit", ["concurrency", "rate", "target", "paused", "slowed", "draining"])
def test_nothing_that_holds_a_queue_back_is_passed(bench: Bench, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(bench.carrier, "passes", lambda base, queue: True)
    scheduler = bench.engine._scheduler
    if limit in ("concurrency", "rate"):
        limits: dict[str, Any] = {"concurrency": {"max_concurrent": 1}, "rate": {"rate": 0.01}}
        bench.put(QueueConfig(name=QUIET, bucket_size=1, **limits[limit]))
        bench.clock.advance(1)
        bench.engine.turn()
        bench.add(999, queue=QUIET)
        bench.engine.turn()
        assert QUIET in queues(bench)
        if limit == "rate":
            bench.carrier.answer(next(each for each in bench.carrier.sent if each.claim.queue == QUIET))
        bench.engine.turn()
    bench.carrier.slots = len(bench.carrier.sent)
    if limit == "target":
        trouble = Condition("http://app", bench.now, Ailment.UNREACHABLE, "refused", 1, bench.now + SECOND)
        scheduler._health.restore(trouble, 1)
    elif limit == "paused":
        scheduler._queues[QUIET].paused = True
    elif limit == "slowed":
        scheduler._queues[QUIET].throttle.restore(1.0, bench.now, bench.now + SECOND, bench.now)
    elif limit == "draining":
        scheduler.drain()
    queues(bench)

    bench.add(1_000, queue=QUIET)
    bench.engine.turn()
    bench.engine.turn()

    assert QUIET not in queues(bench)


def test_where_that_transaction_fails_nothing_is_lost(bench: Bench) -> None:
    def fail() -> None:
        bench.store.before_commit = lambda: None
        raise OSError("on purpose")

    bench.add(1_000, queue=QUIET)
    bench.store.before_commit = fail
    with pytest.raises(OSError, match="on purpose"):
        bench.engine.turn()
    bench.carrier.answer(bench.carrier.sent[0])
    bench.engine.wake()
    bench.engine.turn()
    bench.engine.turn()

    assert QUIET in queues(bench)


# --- the target -----------------------------------------------------------------------------------------------------


def target(*, waiting: int = 1, window: float | None = None, flying: int = 1) -> Target:
    """Return one with so many deliveries of the busy queue in line, and so many requests of it on their way."""
    made = Target("http://app", 32, Batching())
    for id in range(waiting):
        made.put(delivery(BUSY, id=id))
    for _ in range(flying):
        made.begin(BUSY, True)
    if window is not None:
        made.window = Window(32)
        made.window.size = window
    return made


def test_who_has_nothing_there_passes_the_line_and_the_window() -> None:
    assert target().lets_by(QUIET)
    assert target(waiting=0, window=1.0).lets_by(QUIET), "nothing is in line, but the window is full"
    assert not target(waiting=0, window=2.0).lets_by(QUIET), "there is no line to pass"
    assert not target().lets_by(BUSY)


def test_who_has_passed_it_waits_the_next_time() -> None:
    made = target()
    made.begin(QUIET, True)
    assert not made.lets_by(QUIET)
    assert made.lets_by("another")

    made.end(QUIET, True)
    assert made.lets_by(QUIET)

    made.put(delivery(QUIET))
    assert not made.lets_by(QUIET), "before its own"


def test_no_more_pass_a_window_than_a_server_begins_soon() -> None:
    made, names = target(window=1.9), map(str, itertools.count())
    passed = 0
    while made.lets_by(name := next(names)):
        made.begin(name, True)
        passed += 1

    assert passed == BEYOND


def test_nobody_passes_where_no_slot_is_free() -> None:
    assert not target(flying=32).lets_by(QUIET)


# --- the transports -------------------------------------------------------------------------------------------------


def prepare(each: Delivery, now: Micros) -> Request:
    return Request("POST", f"{each.base}/task/{each.claim.queue}/{each.claim.id}", [], b"body")


@pytest.fixture
def transport() -> Iterator[HttpTransport]:
    made = HttpTransport(prepare, SystemClock(), concurrency=4)
    yield made
    made.close()


def held(release: threading.Event) -> Callable[[Connection], None]:
    def script(connection: Connection) -> None:
        while received := connection.read():
            if f"/{BUSY}/" in received.task:
                release.wait(10)
            connection.write(OK)

    return script


def finish(transport: HttpTransport, count: int) -> list[Any]:
    results: list[Any] = []
    until = SystemClock().now() + PATIENCE
    while len(results) < count and SystemClock().now() < until:
        transport.wait(until)
        results += transport.results()
    return results


def test_over_http_the_first_of_a_quiet_queue_starts_before_all_that_waits(transport: HttpTransport) -> None:
    release = threading.Event()
    with serving(held(release)) as server:
        assert transport.passes(server.base, QUIET), "a target that is new has no line"
        transport.send(delivery(BUSY, server.base, id=0))
        transport.wait(0)
        window = transport._targets[server.base].window = Window(4)
        window.size = 1.0
        window.answered(SystemClock().now(), 0, 0, full=False, shared=True)  # it hasn't stalled
        for id in range(1, 20):
            transport.send(delivery(BUSY, server.base, id=id))
        transport.wait(0)

        assert transport.passes(server.base, QUIET)
        assert not transport.passes(server.base, BUSY)
        transport.send(delivery(QUIET, server.base, id=100))
        assert not transport.passes(server.base, QUIET)
        [first] = finish(transport, 1)

        release.set()
        others = finish(transport, 20)

    assert first.id == 100
    assert sorted(result.id for result in others) == list(range(20))
    assert {result.kind for result in (first, *others)} == {Kind.ANSWERED}
    assert not transport._targets[server.base].under_way


def test_a_hint_comes_before_what_was_sent_is_started_where_queues_share_a_target(transport: HttpTransport) -> None:
    release = threading.Event()
    with serving(held(release)) as server:
        for number, queue in enumerate((BUSY, QUIET, BUSY)):
            transport.send(delivery(queue, server.base, id=number))
        started = [len(transport._running)]
        for _ in range(2):
            transport.wake()
            transport.wait(SystemClock().now() + PATIENCE)
            started.append(len(transport._running))
        release.set()
        finish(transport, 3)

    assert started == [1, 1, 3], "the first wait is over at once, and not twice in a row"


@pytest.mark.parametrize("stuck", [False, True])
def test_in_process_the_next_thread_takes_the_first_of_a_quiet_queue(stuck: bool) -> None:
    release, order = threading.Event(), list[str]()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Sequence[bytes]:
        order.append(environ["PATH_INFO"])
        release.wait(10)
        start_response("200 OK", [])
        return []

    transport = LocalTransport(app, SystemClock(), threads=1)
    try:
        transport.send(delivery(BUSY, id=0, url="/busy")._replace(deadline=1 if stuck else 600 * SECOND))
        while not order:
            transport.wait(SystemClock().now() + SECOND // 100)
        for id in range(1, 4):
            transport.send(delivery(BUSY, id=id, url="/busy"))
        if stuck:
            while not transport.results():
                transport.wait(SystemClock().now() + SECOND // 100)
        assert transport.passes("", QUIET) is not stuck, "where every thread is held nobody passes"
        assert not transport.passes("", BUSY) or stuck

        if not stuck:
            transport.send(delivery(QUIET, id=100, url="/quiet"))
            assert not transport.passes("", QUIET)
            release.set()
            while len(order) < 5:
                transport.wait(SystemClock().now() + SECOND // 100)
            assert order.index("/quiet") <= 2
    finally:
        release.set()
        transport.close()
