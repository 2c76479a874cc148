"""Which calls go together in one request: small first attempts of what has been quick lately, in order, and few enough."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from deferlib import payload
from deferlib.batch import MOST_BYTES
from deferlib.core.model import SECOND, Delivery
from deferlib.deferred import DEFAULT_URL
from deferlib.engine import batching
from deferlib.engine.batching import ENOUGH, LONGEST, QUICK, REFUSED, Batching
from deferlib.engine.target import Target
from tests.unit.batches import BASE, DEADLINE, NOW, call_of, claim_of, delivery, headers_text, request_of

CALL = call_of(claim_of(1), textwrap.dedent, "x")
OTHER = call_of(claim_of(1), textwrap.indent, "x", "y")
CLAIM = claim_of(1, body=CALL)
OTHERS = claim_of(1, body=OTHER)


def learned(took: int = 50, *, times: int = ENOUGH, most: int = 32) -> Batching:
    known = Batching(most)
    for _ in range(times):
        known.learn(NOW, CLAIM, took)
    return known


# --- what is known ----------------------------------------------------------------------------------------------------


def test_calls_go_alone_until_enough_have_been_quick() -> None:
    known = Batching()

    for _ in range(ENOUGH):
        assert known.expected(CLAIM) is None
        known.learn(NOW, CLAIM, 50)

    assert known.expected(CLAIM) == 50


def test_each_callable_is_known_by_itself() -> None:
    known = learned()

    assert known.expected(OTHERS) is None
    for _ in range(ENOUGH):
        known.learn(NOW, OTHERS, 70)
    assert (known.expected(CLAIM), known.expected(OTHERS)) == (50, 70)


def test_one_slow_call_is_remembered_long_and_forgotten_in_the_end() -> None:
    known = learned()
    known.learn(NOW, CLAIM, 30 * SECOND)

    quick = 0
    while known.expected(CLAIM) is None:
        known.learn(NOW, CLAIM, 50)
        quick += 1
        assert quick < 1_000

    assert quick > 200, "30 s are 10 ms after about 250 quick ones"


@pytest.mark.parametrize(("took", "quick"), [(0, True), (QUICK, True), (QUICK + 1, False)])
def test_calls_are_quick_up_to_ten_milliseconds(took: int, quick: bool) -> None:
    assert (learned(took).expected(CLAIM) is not None) is quick


def test_expected_time_follows_the_calls() -> None:
    known = learned(50)
    for _ in range(100):
        known.learn(NOW, CLAIM, 900)

    expected = known.expected(CLAIM)

    assert expected is not None
    assert 850 < expected <= 900


def test_target_that_has_refused_one_gets_none_for_a_minute() -> None:
    known = learned()

    known.refused(NOW)

    assert known.expected(CLAIM) is None
    known.learn(NOW + REFUSED - 1, CLAIM, 50)
    assert known.expected(CLAIM) is None, "though it says so again"
    known.learn(NOW + REFUSED, CLAIM, 50)
    assert known.expected(CLAIM) is not None


def test_setting_of_one_turns_it_off() -> None:
    assert learned(most=1, times=100).expected(CLAIM) is None


def test_any_number_of_callables_takes_bounded_room() -> None:
    known = Batching()
    for number in range(3_000):
        body = CALL.replace(b"textwrap.dedent", b"t%013d" % number, 1)
        known.learn(NOW, CLAIM._replace(body=body), 50)

    assert len(known._calls) <= 1024


@pytest.mark.parametrize("length", [0, 3, 34, 35, 60, len(CALL) - 1])
def test_what_looks_like_an_envelope_harms_nothing(length: int) -> None:
    known = learned()
    for body in (CALL[:length], CALL[:25] + b"\xff" * 10 + CALL[35:]):
        claim = CLAIM._replace(body=body)
        for _ in range(ENOUGH):
            known.learn(NOW, claim, 50)
        known.expected(claim)
        assert len(payload.label_bytes(body)) <= len(body)


# --- what goes alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"attempts": 2},
        {"status": 500},
        {"fail_fast": 1},
        {"method": "PUT"},
        {"url": "/_ah/queue/mail"},
        {"url": DEFAULT_URL + "?x"},
        {"url": "https://example.com" + DEFAULT_URL},
        {"body": b"data"},
        {"body": b""},
        {"body": CALL + bytes(batching.BODY)},
        {"headers": headers_text(("X-AppEngine-Default-Namespace", "n"))},
        {"headers": headers_text(("x_appengine_default_namespace", ""))},
        {"headers": headers_text(("X-Long", "x" * 1_024))},
    ],
    ids=lambda change: str(change)[:50],
)
def test_whatever_is_special_goes_alone(change: dict[str, Any]) -> None:
    known = learned()

    assert known.expected(CLAIM) is not None
    assert known.expected(CLAIM._replace(**change)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"name": "welcome-7"},
        {"queue": "other"},
        {"namespace": "tenant-1"},
        {"headers": headers_text(("X-Tenant", "7"))},
        {"retry": '{"task_retry_limit":0}'},
        {"executions": 3},
        {"target": "worker"},
    ],
    ids=str,
)
def test_whatever_a_part_can_say_goes_with_others(change: dict[str, Any]) -> None:
    assert learned().expected(CLAIM._replace(**change)) is not None


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "expected", "size"),
    [
        (31, 1, 32),
        (250, 100, 32),
        (160, 100, 20),
        (10, 100, 5),  # 500 µs, however little waits
        (10, 499, 2),
        (1, 5_000, 1),
        (17, 5_000, 3),
    ],
)
def test_one_request_takes_an_eighth_of_what_waits_or_half_a_millisecond(waiting: int, expected: float, size: int) -> None:
    assert Batching().size(waiting, expected) == size


def target(*deliveries: Delivery, took: int = 1, most: int = 32) -> Target:
    made = Target(BASE, 1, learned(took, most=most))
    for _ in range(ENOUGH):
        made.batching.learn(NOW, OTHERS, took)
    for each in deliveries:
        made.put(each)
    return made


def taken(made: Target) -> list[list[int]]:
    """Return the ids of each request, until nothing waits."""
    requests = []
    while made.waiting:
        requests.append([each.claim.id for each in made.take_together()])
    return requests


def many(count: int, first: int = 1, **changes: Any) -> list[Delivery]:
    return [delivery(id, textwrap.dedent, "x", **changes) for id in range(first, first + count)]


def test_calls_go_together_in_the_order_of_their_queue() -> None:
    assert taken(target(*many(40))) == [list(range(1, 33)), list(range(33, 41))]
    assert taken(target(*many(5), most=2)) == [[1, 2], [3, 4], [5]]


def test_one_call_goes_alone() -> None:
    assert taken(target(*many(1))) == [[1]]


def test_calls_of_one_request_are_of_one_queue() -> None:
    requests = taken(target(*many(3), *many(3, 4, queue="other")))

    assert sorted(requests) == [[1, 2, 3], [4, 5, 6]]


def test_calls_of_several_callables_go_together() -> None:
    mixed = [*many(2), delivery(3, textwrap.indent, "x", "y"), *many(2, 4)]

    assert taken(target(*mixed)) == [[1, 2, 3, 4, 5]]


def test_what_has_to_go_alone_is_not_passed() -> None:
    again = delivery(3, textwrap.dedent, "x", attempts=2)

    assert taken(target(*many(2), again, *many(2, 4))) == [[1, 2], [3], [4, 5]]


def test_request_takes_two_milliseconds_as_far_as_is_known() -> None:
    requests = taken(target(*many(200), took=300))

    assert all(len(ids) * 300 <= LONGEST for ids in requests)
    assert len(requests[0]) == LONGEST // 300


@pytest.mark.parametrize("what", ["body", "headers", "name"])
def test_request_stays_small(what: str) -> None:
    """So that no handler and no proxy refuses it, whatever `batch` says: nginx's limit is 1 MB, a handler's 256 KiB."""
    large: dict[str, Any] = {"headers": {"headers": headers_text(("X", "x" * 1_000))}, "name": {"name": "n" * 500}}
    text = "x" * 7_000 if what == "body" else "x"
    made = target(*[delivery(id, textwrap.dedent, text, **large.get(what, {})) for id in range(1_000)], most=1_000)

    while made.waiting:
        assert len(request_of(made.take_together()).body) < MOST_BYTES // 2


def test_no_batch_follows_one_that_has_no_answer_for_a_second() -> None:
    made = target(*many(24), took=400)
    made.batches["on its way"] = NOW

    assert len(made.take_together(NOW + SECOND)) > 1
    assert len(made.take_together(NOW + SECOND + 1)) == 1

    del made.batches["on its way"]
    assert len(made.take_together(NOW + SECOND + 1)) > 1


def test_calls_with_other_deadlines_go_in_another_request() -> None:
    """One that hangs is cut off with its request: with the longest deadline of all that are in it, else."""
    short = many(2, 3, deadline=15 * SECOND)

    assert taken(target(*many(2), *short, *many(1, 5))) == [[1, 2], [3, 4], [5]]
    assert short[0].deadline < DEADLINE
