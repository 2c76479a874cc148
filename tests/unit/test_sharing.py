"""What a queue leaves of a target's room, so that the next task of another one finds some."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib.core.model import MINUTE, SECOND, Delivery, Micros, NewTask, QueueConfig
from deferlib.core.sharing import Sharing
from deferlib.core.verdict import NO_SLOT
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
            made.landed("a", queue)
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
    assert sharing(**in_flight).share("a", queue, free) == share
    assert sharing(**in_flight).share("another target", queue, free) == free


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), max_size=6), st.integers(0, 300))
def test_some_queue_can_use_what_is_free_and_none_gets_more(in_flight: dict[str, int], free: int) -> None:
    shared = sharing(**in_flight)

    shares = {queue: shared.share("a", queue, free) for queue in in_flight}

    assert all(0 <= share <= free for share in shares.values())
    assert shared.share("a", "new", free) >= min(free, 1), "who has nothing in flight may take what is left"
    room = sum(in_flight.values()) + free
    kept = (room + 4) // 8
    for queue, share in shares.items():  # not less than an even share, nor less than all but the kept part
        assert share >= min(free, max(-(-room // len(in_flight)) - in_flight[queue], free - kept), 0)


@pytest.mark.parametrize(
    ("queues", "taken", "free", "share"), [(1, 31, 1, 1), (2, 31, 1, 0), (2, 0, 32, 31), (2, 11, 4, 4)]
)
def test_one_slot_is_left_to_queues_that_have_used_none_lately(queues: int, taken: int, free: int, share: int) -> None:
    shared = sharing(**({HOG: taken} if taken else {}))
    shared.queues = {"a": queues}

    assert shared.share("a", HOG, free) == share


def test_room_is_left_for_a_minute_after_somebody_used_some() -> None:
    shared = Sharing()
    shared.sent("a", QUIET, 0)
    shared.landed("a", QUIET)
    for _ in range(28):
        shared.sent("a", HOG, 30 * SECOND)

    shared.forget(59 * SECOND)
    assert shared.share("a", HOG, 4) == 0
    shared.forget(MINUTE)
    assert shared.share("a", HOG, 4) == 4


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
    assert max(delays) <= SECOND // 1000
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


@pytest.mark.parametrize("hogs", [1, 3, 8])
def test_what_goes_to_other_targets_takes_nothing_of_a_queues_share(hogs: int) -> None:
    """A queue of web hooks used half of their target, or a fraction of it, because it seemed to have had its share."""
    town = Town(*[QueueConfig(name=name) for name in ("hooks", *"abcdefgh"[:hogs])], respond=_answers(SECOND // 10))
    node = town.engine()
    for name in "abcdefgh"[:hogs]:
        town.add(9_000 // hogs, name)
    town.run(3)
    town.add(1_000, "hooks", target="hooks")

    town.run(20)

    assert node.free["http://hooks"] >= 31, "in use"
    assert len(town.times("hooks")) >= 300


def test_queue_whose_other_calls_hang_elsewhere_is_served_at_its_target() -> None:
    town = Town(*[QueueConfig(name=name) for name in ("mixed", *"abcdefgh")], respond=_answers(SECOND // 2))
    town.engine()
    town.add(32, "mixed", target="hang")
    town.run(2)
    for name in "abcdefgh":
        town.add(5_000, name)
    town.run(3)
    town.add(20, "mixed")

    town.run(10)

    assert len(town.times("mixed", "http://app")) == 20


def _answers(app: Micros) -> Callable[[Delivery, Micros], Answer]:
    """Return targets of which the app takes from *app* to twice that long, and others longer."""

    def respond(delivery: Delivery, now: Micros) -> Answer:
        took = 1_000 if delivery.claim.queue == "mixed" else app + delivery.claim.id * 7_919 % app
        return Answer(took={"http://hooks": 2 * SECOND, "http://hang": 300 * SECOND}.get(delivery.base, took))

    return respond


def test_task_that_asks_to_fail_fast_takes_a_slot_that_is_left_to_others() -> None:
    town = Town(QueueConfig(name=HOG), QueueConfig(name=QUIET), respond=_hog_takes_longer)
    node = town.engine()
    town.add(1, QUIET)
    town.run(1)
    town.add(100, HOG)
    town.run(1)
    assert node.free["http://app"] == 28, "in use"

    for id, runs in ((1001, True), (1002, True), (1003, True), (1004, True), (1005, False)):
        _add_fail_fast(town, id)
        town.run(0.05)
        assert any(start.id == id for start in town.starts) is runs
    assert town.row(1005, HOG).reason == NO_SLOT


@pytest.mark.parametrize("tokens", [0, 2])
def test_fail_fast_tasks_that_run_in_slots_left_to_others_spend_tokens(tokens: int) -> None:
    config = QueueConfig(name=HOG, rate=0.001, bucket_size=28 + tokens)
    town = Town(config, QueueConfig(name=QUIET), respond=_hog_takes_longer)
    town.engine()
    town.add(1, QUIET)
    town.run(1)
    town.add(28, HOG)
    town.run(1)
    for id in (1001, 1002, 1003):
        _add_fail_fast(town, id)

    town.run(15)

    assert len(town.times(HOG)) == 28 + tokens


def _hog_takes_longer(delivery: Delivery, now: Micros) -> Answer:
    return Answer(took=20 * SECOND if delivery.claim.queue == HOG else SECOND // 100)


def _add_fail_fast(town: Town, id: int) -> None:
    fields = (None, "push", town.now, town.now, "POST", "/", "", "", "", "", "", 0, 1, b"", b"")
    town.store.run(lambda tx: tx.add(town.now, [NewTask(id, id, HOG, *fields)]))
    town.engines[0].engine.wake()
