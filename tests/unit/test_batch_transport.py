"""The HTTP transport with several calls in a request, against real sockets: each has its verdict, whatever comes back."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, TypeAlias

import pytest

from deferlib import batch
from deferlib.batch import Told
from deferlib.clock import SystemClock
from deferlib.core.health import Ailment
from deferlib.core.model import SECOND, Action, Delivery, Kind, Micros, Outcome, QueueConfig, QueueRow, Result
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.engine.batching import ENOUGH
from deferlib.engine.http import STOPPING, HttpTransport
from deferlib.engine.transport import Request
from tests.unit.bad_servers import Connection, Received, Script, Server, serving
from tests.unit.batches import delivery

PATIENCE: Micros = 20 * SECOND
DEADLINE: Micros = 20 * SECOND
SHORT: Micros = SECOND // 5
WARM = range(900, 900 + ENOUGH)  # the ids of the calls that show how quick they are
QUICK = b"HTTP/1.1 200 OK\r\nX-Deferlib-Outcome: ok\r\nX-Deferlib-Took: 5\r\nContent-Length: 7\r\n\r\nSuccess"
Reply: TypeAlias = Callable[[list[int]], bytes]


class Clock:
    """The system's, ahead by as much as a test likes."""

    ahead: Micros = 0

    def now(self) -> Micros:
        return SystemClock().now() + self.ahead


def answer(status: str, body: bytes, outcome: str = "batch") -> bytes:
    head = f"HTTP/1.1 {status}\r\nX-Deferlib-Outcome: {outcome}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def tell(answers: Sequence[Told | None]) -> bytes:
    return answer("200 OK", batch.tell(answers).encode())


def all_well(ids: list[int]) -> bytes:
    return tell([Told(200, "ok", 5)] * len(ids))


def ids_of(received: Received) -> list[int]:
    ids: list[int] = json.loads(received.body) if received.line.startswith("POST /batch ") else [int(received.body)]
    return ids


def replying(reply: Reply) -> Script:
    """Return a script that answers single calls well, and several as *reply* says; with nothing it closes."""

    def script(connection: Connection) -> None:
        while received := connection.read():
            data = reply(ids_of(received)) if received.line.startswith("POST /batch ") else QUICK
            if not data:
                return connection.close()
            connection.write(data)

    return script


def prepare(each: Delivery, now: Micros) -> Request:
    return Request("POST", each.base + "/one", [], str(each.claim.id).encode())


def prepare_batch(deliveries: Sequence[Delivery], now: Micros) -> Request:
    return Request("POST", deliveries[0].base + "/batch", [], json.dumps([each.claim.id for each in deliveries]).encode())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transport(clock: Clock) -> Iterator[HttpTransport]:
    made = HttpTransport(prepare, clock, concurrency=1, prepare_batch=prepare_batch)
    yield made
    made.close()


def calls(server: Server, ids: Sequence[int], deadline: Micros = DEADLINE) -> list[Delivery]:
    return [delivery(id, textwrap.dedent, "x", base=server.base, deadline=deadline) for id in ids]


def collect(transport: HttpTransport, count: int) -> list[Result]:
    results: list[Result] = []
    until = SystemClock().now() + PATIENCE
    while len(results) < count and SystemClock().now() < until:
        transport.wait(until)
        results += transport.results()
    assert len(results) == count, results
    return sorted(results)


def deliver(transport: HttpTransport, deliveries: Sequence[Delivery]) -> list[Result]:
    for each in deliveries:
        transport.send(each)
    return collect(transport, len(deliveries))


def warm(transport: HttpTransport, server: Server) -> None:
    """Let the transport learn how quick the calls are, and that the server takes several."""
    for id in WARM:
        deliver(transport, calls(server, [id]))


def requests_of(server: Server) -> list[list[int]]:
    """Return the ids in each request, without the first ones."""
    return [ids_of(each) for each in server.received if ids_of(each)[0] not in WARM]


def ends(results: Sequence[Result]) -> list[tuple[int, Kind, int, str, str]]:
    return [(each.id, each.kind, each.status, each.outcome, each.error) for each in results]


def well(*ids: int) -> list[tuple[int, Kind, int, str, str]]:
    return [(id, Kind.ANSWERED, 200, "ok", "") for id in ids]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_calls_that_wait_go_together_and_each_has_its_result(transport: HttpTransport) -> None:
    with serving(replying(all_well)) as server:
        warm(transport, server)
        before = SystemClock().now()

        results = deliver(transport, calls(server, range(1, 41)))

        assert requests_of(server) == [list(range(1, 33)), list(range(33, 41))]
    assert ends(results) == well(*range(1, 41))
    assert [each.claims for each in results] == list(range(1_001, 1_041))
    times = [time for each in results for time in (each.started, each.ended)]
    assert times == sorted(times), "one after the other"
    assert before <= times[0] <= times[-1] <= SystemClock().now()


def test_setting_of_one_sends_each_alone(clock: Clock) -> None:
    transport = HttpTransport(prepare, clock, concurrency=1, prepare_batch=prepare_batch, batch=1)
    with serving(replying(all_well)) as server:
        warm(transport, server)

        deliver(transport, calls(server, range(1, 6)))

        assert requests_of(server) == [[1], [2], [3], [4], [5]]
    transport.close()


def test_failures_among_them_are_reported_as_of_calls_that_came_alone(transport: HttpTransport) -> None:
    told = [
        Told(200, "ok", 5),
        Told(500, "retry", 7, "ValueError: a\r\n\x1b[31mb"),
        Told(200, "permanent", 1, "never"),
        Told(503, "", 1, "<html>"),
        Told(500, "Not a word", 1, "why"),
        Told(500, "ok", 1, "an override's"),
        Told(204, "ok", 1),
    ]
    with serving(replying(lambda ids: tell(told))) as server:
        warm(transport, server)

        results = deliver(transport, calls(server, range(1, 8)))

    assert ends(results) == [
        *well(1),
        (2, Kind.ANSWERED, 500, "retry", "ValueError: a [31mb"),
        (3, Kind.ANSWERED, 200, "permanent", "never"),
        (4, Kind.ANSWERED, 503, "", ""),
        (5, Kind.ANSWERED, 500, "", ""),
        (6, Kind.ANSWERED, 500, "ok", "an override's"),
        (7, Kind.ANSWERED, 204, "ok", ""),
    ]


def test_what_was_not_begun_is_sent_again_in_order_and_before_what_waits(transport: HttpTransport) -> None:
    def reply(ids: list[int]) -> bytes:
        return tell([Told(200, "ok", 5)] * 2 + [None] * (len(ids) - 2)) if len(ids) > 2 else all_well(ids)

    with serving(replying(reply)) as server:
        warm(transport, server)

        results = deliver(transport, calls(server, range(1, 41)))

        requests = requests_of(server)
    assert ends(results) == well(*range(1, 41))
    assert [ids[:2] for ids in requests] == [[id, id + 1] for id in range(1, 41, 2)]
    assert requests[1] == list(range(3, 35))


def test_thirty_two_long_failures_fit_into_an_answer(transport: HttpTransport) -> None:
    told = [Told(500, "permanent", 5, "\U0001f600" * 500)] * 32
    with serving(replying(lambda ids: tell(told))) as server:
        warm(transport, server)

        results = deliver(transport, calls(server, range(1, 33)))

    assert {(each.kind, each.outcome) for each in results} == {(Kind.ANSWERED, "permanent")}


# --- who takes none ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        answer("403 Forbidden", b"no", "untrusted"),
        answer("403 Forbidden", b"no", "mismatched"),
        answer("413 Too Large", b"the body has more than", "retry"),
        answer("413 Too Large", b"<html>of a proxy", ""),
    ],
    ids=["untrusted", "mismatched", "too large", "too large for a proxy"],
)
def test_refused_batch_is_sent_singly_at_once_and_none_is_tried_for_a_minute(
    transport: HttpTransport, clock: Clock, refusal: bytes
) -> None:
    with serving(replying(lambda ids: refusal)) as server:
        warm(transport, server)

        results = deliver(transport, calls(server, range(1, 6)))
        clock.ahead = 59 * SECOND
        later = deliver(transport, calls(server, [6, 7, 8]))

        assert requests_of(server) == [[1, 2, 3, 4, 5], [1], [2], [3], [4], [5], [6], [7], [8]]
        assert (ends(results), ends(later)) == (well(1, 2, 3, 4, 5), well(6, 7, 8))
        clock.ahead = 61 * SECOND
        warm(transport, server)
        deliver(transport, calls(server, [9, 10]))
        assert requests_of(server)[-3:] == [[9, 10], [9], [10]]


# --- what isn't an answer ---------------------------------------------------------------------------------------------

BROKEN = {
    "500": b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nOops",
    "502 page": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 14\r\n\r\n<html>no</html>"[:-1],
    "403 page": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "200 of somebody else": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    "200 of a single call": answer("200 OK", b"Success", "ok"),
    "no list": answer("200 OK", b"Success"),
    "not UTF-8": answer("200 OK", b"\xff\xff"),
    "empty": answer("200 OK", b""),
    "one too few": answer("200 OK", b"[1,1,1]"),
    "one too many": answer("200 OK", b"[1,1,1,1,1]"),
    "nothing begun": answer("200 OK", b"[null,null,null,null]"),
    "a status that SQLite refuses": answer("200 OK", b'[1,1,1,[9223372036854775808,"retry",1,""]]'),
    "an outcome with half a character": answer("200 OK", b'[1,1,1,[500,"\\ud800",1,""]]'),
    "very deep": answer("200 OK", b"[" * 50_000),
    "huge": answer("200 OK", b"[1,1,1," + b" " * 5_000_000 + b"1]"),
    "another status": answer("500 Oops", b"[1,1,1,1]"),
    "nothing": b"",
    "garbage": b"\x00\x01garbage\xff\r\n\r\n",
    "half": answer("200 OK", b"[1,1,1,1]")[:-3],
}


@pytest.mark.parametrize("what", BROKEN)
def test_without_an_answer_nobody_knows_and_the_target_has_failed_once(transport: HttpTransport, what: str) -> None:
    """None is charged: one of them may be at fault, or none. Each comes again, by itself."""

    def script(connection: Connection) -> None:
        while received := connection.read():
            alone = received.line.startswith("POST /one ")
            connection.write(QUICK if alone else BROKEN[what])
            if not alone and what in ("nothing", "garbage", "half"):
                return connection.close()

    with serving(script) as server:
        warm(transport, server)

        results = deliver(transport, calls(server, [1, 2, 3, 4]))

        assert requests_of(server) == [[1, 2, 3, 4]]
    assert {(each.kind, each.status, each.outcome) for each in results} == {(Kind.UNKNOWN, 0, "")}
    assert [each.echo for each in results].count(False) == 1
    assert all(server.base in each.error for each in results), results[0].error


def test_batch_without_an_answer_ends_shortly_after_its_deadline(transport: HttpTransport) -> None:
    def script(connection: Connection) -> None:
        while received := connection.read():
            if received.line.startswith("POST /batch "):
                return connection.hold()
            connection.write(QUICK)

    with serving(script) as server:
        warm(transport, server)
        before = SystemClock().now()

        results = deliver(transport, calls(server, [1, 2, 3], SHORT))

    assert {each.kind for each in results} == {Kind.UNKNOWN}
    assert SHORT + batch.PATIENCE <= results[0].ended - before < 10 * SECOND
    assert [each.echo for each in results].count(False) == 1


def test_batch_that_can_not_be_made_sends_nothing(clock: Clock) -> None:
    def fail(deliveries: Sequence[Delivery], now: Micros) -> Request:
        raise TypeError("a row that somebody wrote by hand")

    transport = HttpTransport(prepare, clock, concurrency=1, prepare_batch=fail)
    with serving(replying(all_well)) as server:
        warm(transport, server)

        results = deliver(transport, calls(server, [1, 2]))

        assert requests_of(server) == []
        assert {each.kind for each in results} == {Kind.UNFIT}
        assert ends(deliver(transport, calls(server, [3]))) == well(3)
    transport.close()


# --- what the engine does meanwhile -----------------------------------------------------------------------------------


class Holding:
    """A server that holds every batch until it is told to go on."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.ended = 0

    def __call__(self, connection: Connection) -> None:
        while received := connection.read():
            if received.line.startswith("POST /batch "):
                while not self.released:
                    if connection.server.stopping.wait(0.002):
                        return
            data = self.reply(ids_of(received)) if received.line.startswith("POST /batch ") else QUICK
            if not data:
                return connection.close()
            connection.write(data)

    released = False


def held(transport: HttpTransport, server: Server, count: int, more: int = 0) -> None:
    """Send that many calls as one request, which the server has, and *more* that wait."""
    warm(transport, server)
    for each in calls(server, range(1, count + more + 1)):
        transport.send(each)
    until = SystemClock().now() + PATIENCE
    while not requests_of(server) and SystemClock().now() < until:
        transport.wait(SystemClock().now() + 1_000)
    assert requests_of(server)[0][0] == 1


def test_cancelled_call_of_a_batch_is_not_reported_and_the_others_are(transport: HttpTransport) -> None:
    script = Holding(all_well)
    with serving(script) as server:
        held(transport, server, 4)

        transport.cancel(2, 1_002)
        script.released = True

        assert ends(collect(transport, 3)) == well(1, 3, 4)


@pytest.mark.parametrize("cancelled", [1, 2, 4])
def test_of_a_broken_batch_one_result_counts_for_its_target_whichever_is_cancelled(
    transport: HttpTransport, cancelled: int
) -> None:
    script = Holding(lambda ids: b"")
    with serving(script) as server:
        held(transport, server, 4)

        transport.cancel(cancelled, 1_000 + cancelled)
        script.released = True

        results = collect(transport, 3)
    assert cancelled not in {each.id for each in results}
    assert [each.echo for each in results].count(False) == 1


def test_batch_whose_calls_are_all_cancelled_is_broken_off_and_its_slot_is_free(transport: HttpTransport) -> None:
    with serving(Holding(all_well)) as server:
        held(transport, server, 3)

        for id in (1, 2, 3):
            transport.cancel(id, id + 1_000)

        assert ends(deliver(transport, calls(server, [7]))) == well(7)


def test_cancelled_call_that_was_not_begun_is_not_sent_again(transport: HttpTransport) -> None:
    script = Holding(lambda ids: tell([Told(200, "ok", 5)] + [None] * (len(ids) - 1)))
    with serving(script) as server:
        held(transport, server, 3)

        transport.cancel(2, 1_002)
        script.released = True

        assert ends(collect(transport, 2)) == well(1, 3)
        assert requests_of(server) == [[1, 2, 3], [3]]


def test_what_waits_behind_a_batch_is_withdrawn_and_what_it_did_not_begin_too(transport: HttpTransport) -> None:
    script = Holding(lambda ids: tell([Told(200, "ok", 5)] * 2 + [None] * (len(ids) - 2)))
    with serving(script) as server:
        held(transport, server, 32, more=3)

        withdrawn = transport.withdraw()
        script.released = True

        assert [each.id for each in withdrawn] == [33, 34, 35]
        results = collect(transport, 32)
        assert requests_of(server) == [list(range(1, 33))]
    assert ends(results) == [*well(1, 2), *[(id, Kind.UNSENT, 0, "", STOPPING) for id in range(3, 33)]]
    assert transport.withdraw() == []


def test_closing_drops_a_batch_that_runs(transport: HttpTransport) -> None:
    with serving(Holding(all_well)) as server:
        held(transport, server, 4)

        transport.close()

        assert transport.results() == []


# --- how the target is ------------------------------------------------------------------------------------------------


class Scheduled:
    """A scheduler that takes results of deliveries to *base*, and says how it is."""

    def __init__(self, base: str) -> None:
        rules = Rules(node="me", lease=30 * SECOND, base=base, target={}.get)
        self._scheduler = Scheduler(rules, Random(0))
        self._scheduler.configure([QueueRow(config=QueueConfig(name="mail"))])

    def deliver(self, transport: HttpTransport, deliveries: Sequence[Delivery]) -> list[Outcome]:
        """Deliver, and return what becomes of the tasks."""
        claims = [each.claim for each in deliveries]
        self._scheduler.claimed(SystemClock().now(), [], claims, {}, {}, [])
        return [self._scheduler.finished(each.ended, each) for each in deliver(transport, deliveries)]

    @property
    def ailments(self) -> list[Ailment | None]:
        return [each.ailment for each in self._scheduler.conditions()]


def test_one_broken_batch_makes_no_healthy_target_ailing_and_charges_nobody(transport: HttpTransport) -> None:
    with serving(replying(lambda ids: b"")) as server:
        scheduled = Scheduled(server.base)
        warm(transport, server)

        outcomes = scheduled.deliver(transport, calls(server, range(1, 33)))

    assert scheduled.ailments == []
    assert {(each.action, each.charged, each.executed) for each in outcomes} == {(Action.RETRY, 0, 0)}


def test_target_that_loses_every_second_batch_is_ailing(transport: HttpTransport) -> None:
    """Thirty-two answers in one request don't make up for sixteen that were lost, each with as many."""
    turns: list[Any] = []

    def reply(ids: list[int]) -> bytes:
        turns.append(ids)
        return b"" if len(turns) % 2 else all_well(ids)

    with serving(replying(reply)) as server:
        scheduled = Scheduled(server.base)
        warm(transport, server)
        for first in range(1, 13):
            scheduled.deliver(transport, calls(server, range(32 * first, 32 * first + 32)))

    assert scheduled.ailments == [Ailment.FAILING]
