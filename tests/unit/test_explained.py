"""What `tasks explain` and the notes say, beside what the engine then does; in virtual time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deferlib.cli.explain import Explanation, explain
from deferlib.core.model import MINUTE, SECOND, Micros, QueueConfig, RetryPolicy
from deferlib.engine import troubles
from deferlib.targets import Targets
from tests.unit.virtual_engines import APP, HANGS, REFUSES, SLOTS, Answer, Node, Town

QUICK = Answer(took=1_000)
BUSY = Answer(took=1_000, status=503)
B = "http://b"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("deferlib.engine")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


def explained(town: Town, id: int, queue: str = "default") -> Explanation:
    """Return what the command says of a task."""
    settings = {"app": APP, "targets": Targets({"b": B}), "concurrency": SLOTS, "allow_urls": None}
    it = cast(Any, SimpleNamespace(settings=settings, store=SimpleNamespace(served=lambda: True)))
    with town.store.read() as tx:
        [row] = tx.find(queue, [str(id)])
        return explain(it, tx, town.now, row)


def reasons(town: Town, id: int, queue: str = "default") -> list[str]:
    return [each.reason for each in explained(town, id, queue).reasons]


def started(town: Town, id: int) -> Micros:
    """Let time pass until the task starts (again); return when that was."""
    since = town.now
    town.run(10 * 60, until=lambda: town.starts and town.starts[-1].id == id and town.starts[-1].at >= since)
    [*_, at] = [start.at for start in town.starts if start.id == id]
    assert at >= since, "it started"
    return at


# --- when it starts ---------------------------------------------------------------------------------------------------


def test_task_that_nothing_holds_back_is_expected_now_and_starts() -> None:
    town = Town()
    [id] = town.add(1)
    told = explained(town, id)

    town.engine()

    assert told == ([], 0, town.now)
    assert started(town, id) - town.begun < SECOND // 100


def test_retry_starts_when_its_backoff_is_told_to_end() -> None:
    town = Town(respond=lambda *_: QUICK._replace(status=429, retry_after=30 * SECOND))
    town.engine()
    [id] = town.add(1)
    town.run(5)
    told = explained(town, id)

    assert [each.reason for each in told.reasons] == ["backing off, after attempt 1 (HTTP 429)"]
    assert told.expected == told.reasons[0].until
    assert started(town, id) == told.expected


# --- what holds it back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QueueConfig(name="default", max_concurrent=3), "queue default is at 3/3 concurrent"),
        (QueueConfig(name="default"), f"target {APP} is at 32/32 deliveries"),
    ],
)
def test_task_behind_calls_that_hang_is_told_so_and_waits(config: QueueConfig, reason: str) -> None:
    town = Town(config, respond=lambda *_: HANGS)
    node = town.engine()
    town.add(SLOTS)
    [id] = town.add(1)
    town.run(2)
    came = len(town.starts)

    assert reasons(town, id) == [reason]
    assert explained(town, id).expected is None
    town.run(60)
    assert len(town.starts) == came == len(node.running)


def test_task_of_a_shrunk_target_is_told_so_and_waits() -> None:
    town = Town(QueueConfig(name="default", deadline=20 * SECOND), respond=lambda *_: HANGS)
    town.engine()
    town.add(100)
    [id] = town.add(1)
    town.run(50)
    town.put(QueueConfig(name="default"))
    town.run(25)
    running = len(town.engines[0].running)
    came = len(town.starts)

    assert reasons(town, id) == [
        f"target {APP} loses deliveries, or lets them time out, and is at {running}/{running} deliveries"
    ]
    assert running < SLOTS
    town.run(200)
    assert len(town.starts) == came
    assert reasons(town, id), "and is still told after minutes"


def test_task_of_a_closed_target_starts_when_that_is_tried_again() -> None:
    up = False
    town = Town(
        QueueConfig(name="default", retry=RetryPolicy(max_backoff=SECOND)), respond=lambda *_: QUICK if up else REFUSES
    )
    town.engine()
    ids = town.add(20)
    town.run(28)
    up = True
    told = explained(town, ids[0])
    until = max(each.until or 0 for each in told.reasons)
    town.starts.clear()
    town.run(20)

    assert any(f"target {APP} can't be reached" in each.reason for each in told.reasons)
    assert until <= town.starts[0].at < until + SECOND // 10


def test_task_of_a_slowed_queue_starts_about_when_it_is_expected() -> None:
    town = Town(QueueConfig(name="default", retry=RetryPolicy(min_backoff=MINUTE)), respond=lambda *_: BUSY)
    town.engine(slots=4)
    town.add(3_000)
    town.run(2)
    [id] = town.add(1)
    town.run(8)
    told = explained(town, id)

    town.respond = lambda *_: QUICK
    at = started(town, id)

    assert told.expected is not None
    assert at <= told.expected, "it is told as if the target stayed as it is"


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"target": "nowhere"}, "target 'nowhere' is not configured"),
        ({"url": "https://abroad/"}, "allow_urls"),
    ],
)
def test_task_that_cannot_be_sent_is_told_so_and_waits(task: dict[str, str], reason: str) -> None:
    town = Town()
    town.engine(target={"b": B}.get)
    [id] = town.add(1, **task)
    [told] = reasons(town, id)
    town.run(60)

    assert reason in told
    assert explained(town, id).expected is None
    assert not town.starts


# --- notes ------------------------------------------------------------------------------------------------------------


def notes(town: Town) -> dict[str, str]:
    with town.store.read() as tx:
        return tx.notes()


def overloaded(town: Town, name: str = "one") -> Node:
    node = town.engine(name)
    town.add(200)
    town.run(5)
    return node


def test_note_is_there_while_its_queue_is_slowed_and_gone_afterwards() -> None:
    town = Town(respond=lambda *_: BUSY)
    node = overloaded(town)
    told = troubles.slowdowns(notes(town), town.now)
    town.respond = lambda *_: QUICK
    town.run(MINUTE / SECOND)

    assert told.keys() == {"default"}
    enforced = node.scheduler._queues["default"].throttle
    assert told["default"].rate is not None
    assert told["default"].since <= town.begun + SECOND
    assert not enforced.active
    assert notes(town) == {}


def test_note_tells_how_long_its_queue_is_held() -> None:
    town = Town(respond=lambda *_: BUSY._replace(retry_after=30 * SECOND))
    overloaded(town)

    told = troubles.slowdowns(notes(town), town.now)

    assert 20 * SECOND < told["default"].until - town.now <= 30 * SECOND


def test_note_stays_while_its_target_is_shrunk_though_nothing_happens() -> None:
    town = Town(QueueConfig(name="default", deadline=15 * SECOND), respond=lambda *_: HANGS)
    town.engine()
    town.add(100)
    town.run(20)
    town.put(QueueConfig(name="default"))
    town.run(200)

    assert [each.base for each in troubles.conditions(notes(town), town.now)] == [APP]


def test_note_of_one_engine_is_not_taken_away_by_another_that_is_well() -> None:
    town = Town(respond=lambda *_: BUSY)
    overloaded(town)
    town.engine("two")
    town.add(100)
    town.run(1)
    both = troubles.slowdowns(notes(town), town.now)
    town.engines[1].engine.drain()
    town.engines[1].engine.turn()
    town.run(3)
    town.engines[1].engine.leave()

    assert len(notes(town)) == 1
    assert both.keys() == troubles.slowdowns(notes(town), town.now).keys() == {"default"}


def test_note_goes_with_an_engine_that_ends() -> None:
    town = Town(respond=lambda *_: BUSY)
    node = overloaded(town)
    node.engine.drain()
    town.run(3)
    node.engine.leave()

    assert notes(town) == {}


def test_note_of_a_killed_engine_is_soon_believed_no_more_and_swept() -> None:
    town = Town(respond=lambda *_: BUSY)
    overloaded(town).kill()
    town.store.run(lambda tx: tx.purge(town.now, "default", 1_000))
    town.engine("two")
    town.run(3 * 60)
    believed = troubles.slowdowns(notes(town), town.now)
    town.run(3_600)

    assert believed == {}
    assert notes(town) == {}
