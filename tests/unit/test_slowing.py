"""Engines that slow themselves down for targets in trouble, and ramp up again: real ones, in virtual time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest

from deferlib.core.model import HOUR, SECOND, Delivery, Micros, QueueConfig, RetryPolicy
from tests.unit.virtual_engines import APP, HANGS, REFUSES, SLOTS, Answer, Town, beyond

QUICK = Answer(took=1_000)
TENTH = Answer(took=SECOND // 10)
B = "http://b"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("deferlib.engine")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


def per_second(town: Town, queue: str = "default") -> list[int]:
    seconds = [(at - town.begun) // SECOND for at in town.times(queue)]
    return [seconds.count(second) for second in range(int(town.seconds))]


@pytest.mark.parametrize("in_process", [False, True])
def test_target_that_is_overloaded_gets_less_and_less_and_then_all_again(in_process: bool) -> None:
    overloaded = False
    town = Town(
        QueueConfig(name="default"),
        QueueConfig(name="other"),
        respond=lambda delivery, _: TENTH._replace(status=503 if overloaded and delivery.claim.queue == "default" else 200),
    )
    town.engine(in_process=in_process, slots=8)
    town.add(9_000)
    town.run(5)
    overloaded = True
    town.run(20)
    overloaded = False
    town.run(95)
    town.add(50, "other")
    town.run(5, until=lambda: not town.waiting("other"))

    starts = per_second(town)
    assert starts[3] == pytest.approx(80, rel=0.05)
    assert sum(starts[10:25]) <= 15 * 8, "a trickle that finds out whether it is well again"
    assert sum(starts[25:27]) <= 20, "no stampede after it"
    assert starts[119] == pytest.approx(80, rel=0.05), "and as before in the end"


def test_two_engines_slow_down_both() -> None:
    town = Town(respond=lambda *_: Answer(took=SECOND // 100, status=503))
    town.engine("one")
    town.engine("two")
    town.add(2_000)

    town.run(20)

    assert {start.node for start in town.starts} == {"one", "two"}
    assert sum(per_second(town)[10:]) <= 10 * 2 * 8


def test_enforced_rate_lies_below_the_queues_own_and_never_above() -> None:
    town = Town(
        QueueConfig(name="default", rate=50, bucket_size=5),
        respond=lambda _, now: QUICK._replace(status=503 if 5 <= (now - town.begun) // SECOND < 15 else 200),
    )
    town.engine()
    town.add(5_000)

    town.run(80)

    starts = per_second(town)
    assert beyond(town.times(), 50, 5) <= 0
    assert sum(starts[10:15]) <= 5 * 8
    assert starts[79] == pytest.approx(50, rel=0.05)


def test_too_many_requests_slow_down_their_own_tasks_alone() -> None:
    limited = set()
    town = Town(
        respond=lambda delivery, _: (
            QUICK._replace(status=429, retry_after=20 * SECOND)
            if delivery.claim.id in limited and delivery.claim.attempts == 1
            else QUICK
        )
    )
    town.engine()
    limited.update(town.add(500))
    town.add(500)

    town.run(10)
    others = len(town.starts) - 500
    town.run(20)

    assert others == 500
    assert not town.waiting()
    first = {start.id: start.at for start in town.starts if start.attempt == 1}
    again = {start.id: start.at for start in town.starts if start.attempt == 2}
    assert again.keys() == limited
    assert all(at - first[id] >= 20 * SECOND for id, at in again.items())


@pytest.mark.parametrize(("status", "asked", "waited"), [(429, 50, 50), (429, 86_400, 3_600), (503, 50, 50), (500, 50, 0)])
def test_task_waits_as_long_as_it_is_asked_to_within_an_hour(status: int, asked: int, waited: int) -> None:
    town = Town(respond=lambda delivery, _: QUICK._replace(status=status if delivery.claim.attempts == 1 else 200,
                                                           retry_after=asked * SECOND))  # fmt: skip
    town.engine()
    town.add(1)

    town.run(waited + 10)

    first, again = town.times()
    assert waited * SECOND <= again - first < (waited + 2) * SECOND


def test_queue_that_is_asked_to_wait_does_for_a_minute_at_most() -> None:
    overloaded = True
    town = Town(
        QueueConfig(name="default"), QueueConfig(name="other"),
        respond=lambda delivery, _: QUICK._replace(
            status=503 if overloaded and delivery.claim.queue == "default" else 200, retry_after=HOUR
        ),
    )  # fmt: skip
    town.engine()
    town.add(100)
    town.run(1)
    sent, overloaded = len(town.starts), False
    town.add(100)
    town.add(10, "other")
    town.run(58)

    assert len(town.starts) == sent + 10, "the other queue's"
    town.run(10)
    assert len(town.starts) > sent + 10


def test_queue_that_was_held_ramps_up() -> None:
    overloaded = True
    town = Town(
        respond=lambda *_: QUICK._replace(status=503 if overloaded else 200, retry_after=20 * SECOND if overloaded else 0)
    )
    town.engine(slots=2)
    town.add(5_000)
    town.run(1)
    overloaded = False
    town.starts.clear()
    town.run(40, until=lambda: town.starts)
    begun = town.now
    town.run(30, until=lambda: not town.waiting())

    assert sum(at < begun + SECOND for at in town.times()) < 500, "2,000 would do, were it well"
    assert not town.waiting()


def test_target_that_cannot_be_reached_is_asked_now_and_then_and_ramps_up() -> None:
    up = False
    retry = RetryPolicy(max_backoff=SECOND // 10)
    town = Town(QueueConfig(name="default", retry=retry), respond=lambda *_: TENTH if up else REFUSES)
    town.engine()
    town.add(2_000)
    town.run(1)
    town.starts.clear()
    town.run(60)
    asked = len(town.starts)
    up, back = True, town.now
    town.starts.clear()
    town.run(30, until=lambda: not town.waiting())

    first = town.starts[0].at
    rounds = [sum(first + number * SECOND // 10 <= at < first + (number + 1) * SECOND // 10 for at in town.times())
              for number in range(5)]  # fmt: skip
    assert 10 <= asked <= 20, "every five seconds in the end"
    assert first - back <= 5 * SECOND
    assert rounds[0] <= 3
    assert all(later <= 2 * sooner + 2 for sooner, later in pairwise(rounds)), rounds
    assert not town.waiting()


def test_tasks_that_time_out_shrink_their_target_and_no_other() -> None:
    poor = True
    town = Town(
        QueueConfig(name="default", deadline=15 * SECOND), QueueConfig(name="other", target="b"),
        respond=lambda delivery, _: HANGS if poor and delivery.base == APP else QUICK,
    )  # fmt: skip
    node = town.engine()
    town.add(1_000)
    town.run(40)
    shrunk = len(node.running)
    town.add(100, "other")
    town.run(1)
    poor, others = False, len(town.times("other"))
    town.run(100, until=lambda: not town.waiting())

    assert shrunk <= SLOTS // 2
    assert others == 100
    assert not town.waiting()


def test_task_that_always_breaks_its_connection_slows_no_target() -> None:
    poison: set[int] = set()

    def respond(delivery: Delivery, now: Micros) -> Answer:
        return REFUSES if delivery.claim.id in poison else QUICK

    town = Town(respond=respond)
    node = town.engine()
    town.add(100)
    poison.update(town.add(5))
    for _ in range(200):
        town.at(town.now + 10_000 * _, town.add, 1)
    town.run(3)

    assert town.waiting() == 5
    assert node.scheduler._health.room(APP, town.now, SLOTS) == SLOTS or not node.running


def test_queue_whose_target_is_changed_is_pushed_to_the_new_one_at_once() -> None:
    town = Town(
        QueueConfig(name="default", target="b", retry=RetryPolicy(max_backoff=SECOND)),
        respond=lambda delivery, _: REFUSES if delivery.base == B else QUICK,
    )
    town.engine()
    town.add(200)
    town.run(30)
    town.put(QueueConfig(name="default", target="c"))

    town.run(3)

    assert not town.waiting()
    assert set(town.times(base="http://c"))


# --- what slows nobody else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "kept"), [(0.01, 0.7), (0.05, 0.5)])
def test_target_that_is_overloaded_for_a_few_keeps_most_of_its_rate(share: float, kept: float) -> None:
    rng = Random(1)
    town = Town(respond=lambda *_: QUICK._replace(status=503 if rng.random() < share else 200))
    town.engine(slots=2)
    town.add(8_000)

    town.run(4)

    assert len(town.starts) > kept * 8_000


@pytest.mark.parametrize("poison", [1, 10])
def test_poison_tasks_that_answer_503_slow_no_others(poison: int) -> None:
    bad: set[int] = set()
    town = Town(respond=lambda delivery, _: QUICK._replace(status=503 if delivery.claim.id in bad else 200))
    town.engine(slots=2)
    for _ in range(poison):
        town.add(5_000 // poison // 2)
        bad.update(town.add(1))
        town.add(5_000 // poison // 2)

    town.run(30, until=lambda: town.waiting() <= poison)

    assert town.seconds < 5, "2.5 at full speed"


def test_stray_503_is_forgotten_after_an_idle_hour() -> None:
    first = [503] * 5
    town = Town(respond=lambda *_: QUICK._replace(status=first.pop() if first else 200))
    town.engine()
    town.add(1)
    town.run(3_600)
    begun = town.now
    town.add(500)

    town.run(60, until=lambda: not town.waiting())

    assert not first
    assert town.now - begun < 2 * SECOND


# --- targets of the tasks' own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "url"), [("b", "/"), ("", "https://abroad/")])
def test_tasks_for_a_hanging_target_of_their_own_are_not_claimed_without_bound(target: str, url: str) -> None:
    town = Town(respond=lambda delivery, _: QUICK if delivery.base == APP else HANGS)
    node = town.engine(origin=lambda url: "https://abroad")
    town.add(2_000, target=target, url=url)
    town.add(10)

    town.run(30)

    assert len(town.times(base=APP)) == 10, "the others run"
    assert node.scheduler.in_flight == SLOTS
    assert node.writes < 30 * 200, "and nothing spins"


def test_queue_is_not_starved_by_tasks_of_another_with_its_target() -> None:
    town = Town(QueueConfig(name="default"), QueueConfig(name="own", target="b"), respond=lambda *_: TENTH)
    town.engine()
    town.add(2_000, target="b")
    town.run(1)
    begun = town.now
    town.add(1, "own")

    town.run(60, until=lambda: town.times("own"))

    assert town.times("own")[0] - begun < 2 * SECOND


@pytest.mark.parametrize(("target", "url"), [("b", "/"), ("", "https://abroad/")])
def test_closed_target_gets_one_probe_at_a_time_also_from_tasks_with_own_targets(target: str, url: str) -> None:
    town = Town(respond=lambda delivery, _: QUICK if delivery.base == APP else REFUSES)
    town.engine(origin=lambda url: "https://abroad")
    town.add(500, target=target, url=url)
    town.run(10)
    town.starts.clear()

    town.run(20)

    assert 1 <= len(town.starts) <= 8


# --- after an outage --------------------------------------------------------------------------------------------------


def test_long_tasks_are_back_to_full_concurrency_soon_after_an_outage() -> None:
    up = True
    town = Town(
        QueueConfig(name="default", retry=RetryPolicy(max_backoff=SECOND)),
        respond=lambda *_: Answer(took=60 * SECOND) if up else REFUSES,
    )
    node = town.engine()
    town.add(500)
    town.run(70)
    up = False
    town.run(60)
    up = True

    town.run(120)

    assert len(node.running) == SLOTS


def test_probe_that_takes_long_doesnt_hold_the_others_up() -> None:
    up = False
    long: set[int] = set()

    def respond(delivery: Delivery, now: Micros) -> Answer:
        if not up:
            return REFUSES
        return Answer(took=500 * SECOND) if delivery.claim.id in long else QUICK

    town = Town(QueueConfig(name="default", retry=RetryPolicy(max_backoff=SECOND)), respond=respond)
    town.engine()
    town.add(10)
    town.run(3)
    town.store.run(lambda tx: tx.purge(town.now, "default", 100))
    long.update(town.add(1))
    town.add(300)
    up = True

    town.run(60)

    assert len(town.times()) > 300
    assert town.waiting() == 1
