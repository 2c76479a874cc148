"""Rates, concurrency limits and fairness as the targets see them: real engines in virtual time, killed and replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from random import Random

import pytest

from deferlib.core.model import DAY, HOUR, MINUTE, SECOND, Micros, QueueConfig, RetryPolicy
from tests.unit.virtual_engines import APP, HANGS, LEASE, SLOTS, Answer, Node, Town, beyond

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


def victim(town: Town, rng: Random) -> Node:
    """Return an engine to be killed: mostly the one that has most to lose."""
    return rng.choice(town.engines) if rng.random() < 0.3 else max(town.engines, key=lambda node: len(node.running))


# --- rates ------------------------------------------------------------------------------------------------------------


def test_windows_are_judged_rightly() -> None:
    steady = [number * SECOND for number in range(10)]

    assert beyond(steady, 1.0, 1) == 0
    assert beyond([0, 0, *steady[1:]], 1.0, 1) == 1
    assert beyond([*steady, 9 * SECOND + 1], 1.0, 2) < 0
    assert beyond([*steady, 9 * SECOND + 1], 1.0, 1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("rate", "size", "seconds"),
    [
        (1 / 60, 1, 600),
        (0.5, 5, 60),
        (5, 5, 20),
        (100, 1, 4),
        (100, 50, 4),
        (1_000, 5, 2),
        (5_000, 5, 0.4),
        (5_000, 500, 0.4),
    ],
)
def test_no_window_has_more_than_bucket_and_rate_and_a_backlog_has_nearly_all_of_it(
    rate: float, size: int, seconds: float
) -> None:
    town = Town(QueueConfig(name="default", rate=rate, bucket_size=size), respond=lambda *_: QUICK)
    town.engine(look_ahead=256)
    town.turn = min(town.turn, round(SECOND / rate / 2))
    town.add(round(rate * seconds) + size + 10)

    town.run(seconds)

    assert beyond(town.times(), rate, size) <= 0
    assert len(town.starts) >= 0.95 * (rate * seconds + size)


def test_limited_backlog_isnt_claimed_from_in_every_turn_that_is_made_for_another_queue() -> None:
    """A token is there nearly always, and each such turn would wait for the disk: a hundred a second are enough."""
    town = Town(
        QueueConfig(name="default", rate=1_000, bucket_size=50), QueueConfig(name="quick"), respond=lambda *_: QUICK
    )
    town.engine(look_ahead=256)
    town.add(3_000)
    for _ in range(1_000):
        town.run(0.001)
        town.add(1, "quick")
    town.run(0.01)

    assert len(town.times("quick")) == 1_000
    assert len(town.times()) >= 0.98 * 1_050
    assert len(set(town.times())) <= 150, "turns that claimed from it"


@pytest.mark.parametrize(("rate", "size"), [(200, 2), (300, 3), (500, 5), (1_000, 10), (2_000, 20), (5_000, 50)])
def test_backlog_has_nearly_all_of_its_rate_though_its_bucket_is_small_and_turns_are_slow(rate: int, size: int) -> None:
    town = Town(
        QueueConfig(name="default", rate=rate, bucket_size=size), QueueConfig(name="quick"), respond=lambda *_: QUICK
    )
    town.engine(look_ahead=256)
    town.turn = 3_000
    town.add(2 * rate + size + 10)
    for _ in range(600):
        town.run(1 / 300)
        town.add(1, "quick")

    assert beyond(town.times(), rate, size) <= 0
    assert len(town.times()) >= 0.95 * (2 * rate + size)


def test_queue_of_one_a_day_starts_one_a_day() -> None:
    town = Town(QueueConfig(name="default", rate=SECOND / DAY, bucket_size=2))
    town.engine()
    town.add(20)
    for _ in range(10 * 24):
        town.run(2)
        town.clock.move_to(town.now + HOUR - 2 * SECOND)

    assert beyond(town.times(), SECOND / DAY, 2) <= 0
    assert 11 <= len(town.starts) <= 12, "the two of the bucket, and one each day"


def test_retries_and_first_attempts_share_the_rate() -> None:
    retry = RetryPolicy(min_backoff=SECOND // 100, max_backoff=SECOND // 10)
    town = Town(
        QueueConfig(name="default", rate=50, bucket_size=5, retry=retry),
        respond=lambda delivery, _: QUICK._replace(status=500 if delivery.claim.attempts < 5 else 200),
    )
    town.engine()
    town.add(100)

    town.run(30, until=lambda: not town.waiting())

    assert len(town.starts) == 500
    assert town.seconds == pytest.approx(500 / 50, abs=0.6)
    assert beyond(town.times(), 50, 5) <= 0


@pytest.mark.parametrize("seed", range(4))
def test_rate_holds_while_engines_are_killed_and_restarted(seed: int) -> None:
    rng = Random(seed)
    town = Town(QueueConfig(name="default", rate=40, bucket_size=8), respond=lambda *_: Answer(took=rng.randrange(SECOND)))
    town.lease = 3 * SECOND
    town.engine("0")
    town.engine("1")
    town.add(3_000)
    for number in range(2, 12):
        town.run(rng.uniform(0, 8))
        victim(town, rng).kill()
        town.engine(str(number))

    assert len(town.starts) > 50
    assert len({start.node for start in town.starts}) > 1, "others took over"
    assert beyond(town.times(), 40, 8) <= 0


def test_bucket_that_was_emptied_is_empty_for_the_next_engine_too() -> None:
    town = Town(QueueConfig(name="default", rate=SECOND / HOUR, bucket_size=20))
    first = town.engine("first")
    town.add(100)
    town.run(5)
    first.kill()

    town.engine("second")
    town.run(2 * LEASE / SECOND)

    assert len(town.starts) == 20


def test_rate_that_is_changed_holds_from_then_on() -> None:
    town = Town(QueueConfig(name="default", rate=SECOND / DAY, bucket_size=1), respond=lambda *_: QUICK)
    town.engine()
    town.add(1_000)
    town.run(5)
    town.put(QueueConfig(name="default", rate=100, bucket_size=5))
    town.run(3)
    faster = len(town.starts)
    town.put(QueueConfig(name="default", rate=10, bucket_size=5))
    town.run(1.01)  # noticed
    begun, before = town.now, len(town.starts)
    town.run(10)

    assert 190 <= faster <= 210, "at most a second to notice"
    assert 95 <= sum(start.at > begun for start in town.starts) <= 105
    assert before > faster


def test_tasks_that_cant_be_sent_cost_no_tokens() -> None:
    town = Town(QueueConfig(name="default", rate=10, bucket_size=5))
    town.engine(target=lambda name: None)
    town.add(100, target="nowhere")
    town.run(30)
    begun = town.now
    for number in range(100):
        town.at(begun + number * SECOND // 10, town.add, 1)

    town.run(11)

    assert len(town.starts) >= 95
    assert beyond(town.times(), 10, 5) <= 0


# --- concurrency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_no_more_run_at_once_than_may_while_engines_are_killed(seed: int) -> None:
    rng = Random(seed)
    town = Town(QueueConfig(name="default", max_concurrent=3), respond=lambda *_: Answer(took=rng.randrange(3 * SECOND)))
    town.lease = 3 * SECOND
    town.engine("0")
    town.engine("1")
    town.add(2_000)
    most = 0
    for number in range(2, 12):
        for _ in range(rng.randrange(1, 200)):
            town.run(0.05)
            most = max(most, sum(len(node.running) for node in town.engines))
        victim(town, rng).kill()
        town.engine(str(number))

    assert most == 3
    assert len({start.node for start in town.starts}) > 1, "others took over"


def test_slots_of_a_killed_engine_are_anothers_when_its_leases_have_ended() -> None:
    town = Town(QueueConfig(name="default", max_concurrent=3), respond=lambda *_: Answer(took=10 * SECOND))
    nodes = [town.engine("one"), town.engine("two")]
    town.add(50)
    town.run(25)
    [owner] = [node for node in nodes if node.running]
    owner.kill()
    killed = town.now
    town.starts.clear()

    town.run(2 * LEASE / SECOND, until=lambda: len(town.starts) == 3)

    assert {start.node for start in town.starts} == {node.name for node in nodes if node is not owner}
    assert LEASE // 2 < town.starts[0].at - killed <= LEASE + 2 * SECOND


# --- order and fairness -----------------------------------------------------------------------------------------------


def test_tasks_start_in_the_order_of_their_etas() -> None:
    rng = Random(1)
    town = Town(respond=lambda *_: Answer(took=rng.randrange(20_000)))
    waits = [rng.randrange(MINUTE) for _ in range(500)]
    etas = {town.add(1, wait=wait)[0]: wait for wait in waits}
    town.clock.move_to(town.now + MINUTE)  # all are due
    town.engine()

    town.run(60, until=lambda: not town.waiting())

    assert [etas[start.id] for start in town.starts] == sorted(waits)


def test_retry_that_is_due_comes_before_what_is_due_later() -> None:
    town = Town(
        QueueConfig(name="default", retry=RetryPolicy(min_backoff=SECOND)),
        respond=lambda delivery, _: TENTH._replace(
            status=500 if delivery.claim.id == 1 and delivery.claim.attempts == 1 else 200
        ),
    )
    town.engine(slots=1)
    town.add(1)
    for number in range(50):
        town.add(1, wait=number * SECOND // 10)

    town.run(10, until=lambda: not town.waiting())

    [again] = [start.at for start in town.starts if start.attempt == 2]
    assert again - town.begun < SECOND + 3 * SECOND // 10


@pytest.mark.parametrize(
    ("slots", "took", "within"),
    [(4, 2_000, SECOND // 100), (32, SECOND // 10, SECOND // 25)],
)
def test_queue_with_a_long_backlog_delays_no_other(slots: int, took: Micros, within: Micros) -> None:
    """A task of the quiet queue starts with the next slot or two that come free."""
    rng = Random(1)
    town = Town(
        QueueConfig(name="busy"),
        QueueConfig(name="quiet"),
        respond=lambda *_: Answer(took=rng.randrange(took // 2, 2 * took)),
    )
    town.engine(slots=slots)
    town.add(5_000, "busy")
    added: list[Micros] = []

    def one() -> None:
        town.add(1, "quiet")
        added.append(town.now)

    for number in range(50):
        town.at(town.begun + SECOND // 10 + number * SECOND // 50 + rng.randrange(9_000), one)
    town.run(2)

    delays = sorted(start - add for start, add in zip(town.times("quiet"), added, strict=True))
    assert delays[-1] < within
    assert town.waiting("busy"), "the backlog was there all the time"


def test_queues_with_backlogs_get_equal_shares() -> None:
    names = ["a", "b", "c"]
    town = Town(*(QueueConfig(name=name) for name in names))
    town.engine()
    for name in names:
        town.add(5_000, name)

    town.run(2)

    shares = [len(town.times(name)) for name in names]
    assert max(shares) - min(shares) < 0.05 * sum(shares)


def test_queues_share_a_slot_evenly_whatever_other_targets_do() -> None:
    town = Town(
        QueueConfig(name="a"), QueueConfig(name="b"), QueueConfig(name="other", target="o"), respond=lambda *_: TENTH
    )  # fmt: skip
    town.engine(slots=1)
    town.add(200, "a")
    town.add(200, "b")
    town.run(0.05)
    town.add(400, "other")

    town.run(15)

    assert abs(len(town.times("a")) - len(town.times("b"))) < 10


def test_idle_queues_cost_a_busy_one_little() -> None:
    """Every hint may be about any of them."""
    town = Town(QueueConfig(name="default"), *(QueueConfig(name=f"idle-{number}") for number in range(100)))
    node = town.engine()
    town.add(6_000)

    def hint() -> None:
        node.engine.wake()
        town.at(town.now + 2_000, hint)

    hint()
    town.run(1)

    assert len(town.starts) > 0.7 * SLOTS * 100


def test_target_that_hangs_costs_its_own_slots_only() -> None:
    town = Town(
        QueueConfig(name="default"),
        QueueConfig(name="stuck", target="b"),
        respond=lambda delivery, _: HANGS if delivery.base == B else QUICK,
    )
    node = town.engine()
    town.add(1_000, "stuck")
    town.run(1)
    town.add(1_000)
    begun = town.now

    town.run(5, until=lambda: not town.waiting())

    assert town.now - begun < SECOND // 4
    assert len(town.times("stuck")) == SLOTS
    assert node.most_in_line == 0, "no more are claimed than have a slot"


def test_task_whose_own_target_hangs_doesnt_keep_the_others_of_its_queue() -> None:
    town = Town(respond=lambda delivery, _: HANGS if delivery.base == B else QUICK)
    town.engine()
    town.add(300, target="b")
    town.add(100)

    town.run(5)

    assert len(town.times(base=APP)) == 100
    assert len(town.times(base=B)) == SLOTS
