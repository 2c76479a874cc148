"""What a queue leaves of a target's room, so that the next task of another one finds some."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib.core.model import MINUTE, SECOND, Delivery, Micros, QueueConfig
from deferlib.core.sharing import Sharing
from tests.unit.virtual_engines import Answer, Town

HOG, QUIET = "hog", "quiet"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def sharing(**in_flight: int) -> Sharing:
    """One with so many deliveries of each queue on their way to target a; 0: it had some."""
    made = Sharing()
    for queue, count in in_flight.items():
        for _ in range(max(count, 1)):
            made.sent("a", queue, 0)
        if not count:
            made.landed("a")
    return made


@pytest.mark.parametrize(
    ("in_flight", "queue", "free", "share"),
    [
        ({}, HOG, 32, 32),
        ({HOG: 20}, HOG, 12, 12),  # nobody else is there
        ({HOG: 0, QUIET: 0}, HOG, 32, 28),
        ({HOG: 20, QUIET: 0}, HOG, 12, 8),
        ({HOG: 28, QUIET: 0}, HOG, 4, 0),
        ({HOG: 28, QUIET: 0}, QUIET, 4, 4),
        ({HOG: 28}, QUIET, 4, 4),  # its first
        ({HOG: 28, QUIET: 2}, QUIET, 2, 2),
        ({HOG: 14, QUIET: 14}, HOG, 4, 2),  # an even share, whatever is left
        ({HOG: 0, QUIET: 0}, HOG, 1, 1),
        ({HOG: 2, QUIET: 0}, HOG, 1, 1),  # of three slots none is kept
        ({HOG: 3, QUIET: 0}, HOG, 1, 0),  # of four, one is
    ],
)
def test_queue_that_has_its_share_leaves_some(in_flight: dict[str, int], queue: str, free: int, share: int) -> None:
    assert sharing(**in_flight).share("a", queue, in_flight.get(queue, 0), free) == share
    assert sharing(**in_flight).share("another target", queue, 0, free) == free


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), max_size=6), st.integers(0, 300))
def test_some_queue_can_use_what_is_free_and_none_gets_more(in_flight: dict[str, int], free: int) -> None:
    shared = sharing(**in_flight)

    shares = {queue: shared.share("a", queue, count, free) for queue, count in in_flight.items()}

    assert all(0 <= share <= free for share in shares.values())
    assert shared.share("a", "new", 0, free) >= min(free, 1), "who has nothing in flight may take what is left"
    room = sum(in_flight.values()) + free
    kept = (room + 4) // 8
    for queue, share in shares.items():  # not less than an even share, nor less than all but the kept part
        assert share >= min(free, max(-(-room // len(in_flight)) - in_flight[queue], free - kept), 0)


def test_room_is_left_for_a_minute_after_somebody_used_some() -> None:
    shared = Sharing()
    shared.sent("a", QUIET, 0)
    shared.landed("a")
    for _ in range(28):
        shared.sent("a", HOG, 30 * SECOND)

    shared.forget(59 * SECOND)
    assert shared.share("a", HOG, 28, 4) == 0
    shared.forget(MINUTE)
    assert shared.share("a", HOG, 28, 4) == 4


def test_slow_tasks_of_one_queue_leave_slots_to_the_others_of_their_target() -> None:
    def respond(delivery: Delivery, now: Micros) -> Answer:
        return Answer(took=2 * SECOND if delivery.claim.queue == HOG else SECOND // 100)

    town = Town(QueueConfig(name=HOG), QueueConfig(name=QUIET), respond=respond)
    town.engine()
    town.add(10_000, HOG)
    added = []
    for _ in range(100):
        town.run(0.7)
        added.append(town.now)
        town.add(1, QUIET)
    town.run(1)

    delays = [start - at for start, at in zip(town.times(QUIET), added, strict=True)]
    assert max(delays[3:]) <= SECOND // 1000, "the first ones had to wait for a slot"
    busy = Counter(at // (2 * SECOND) for at in town.times(HOG))
    assert min(sorted(busy.values())[3:]) >= 27, "the others have all but the few that are kept"


def test_backlog_that_fills_the_line_leaves_places_in_it() -> None:
    town = Town(QueueConfig(name=HOG), QueueConfig(name=QUIET), respond=lambda *_: Answer(took=3_000))
    town.engine(look_ahead=256)
    town.add(80_000, HOG)
    added = []
    for _ in range(100):
        town.run(0.037)
        added.append(town.now)
        town.add(1, QUIET)
    town.run(1)

    delays = [start - at for start, at in zip(town.times(QUIET), added, strict=True)]
    assert max(delays[3:]) <= SECOND // 200, "a slot's next answer, and a turn"
    assert town.waiting(HOG) > 10_000, "there was a backlog all the time"
