"""Tasks with a target of their own, more of them than it takes at once: its slots are used, and nobody else waits."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from deferlib.core.crowding import LONGEST, Crowding
from deferlib.core.model import SECOND
from tests.unit.virtual_engines import Answer, Town


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("tasks", "took"), [(1_000, SECOND // 10), (1_000, SECOND // 100), (200, 5 * SECOND)])
def test_tasks_with_a_target_of_their_own_that_is_well_use_its_slots(tasks: int, took: int) -> None:
    town = Town(respond=lambda *_: Answer(took=took))
    town.engine()
    town.add(tasks, target="b")

    town.run(300, until=lambda: not town.waiting())

    assert town.seconds < 1.5 * tasks * took / SECOND / 32 + 1


@pytest.mark.parametrize("took", [0, 2 * SECOND])
def test_thousands_that_find_no_room_come_again_one_after_the_other(took: int) -> None:
    """All at once they keep the engine busy for longer than a task beside them should wait."""
    crowding = Crowding(full=2_000)
    if took:
        crowding.answered("b", took)
    times = []
    for now in range(0, 240_000, 10_000):  # turns
        found = [crowding.again("b", now, place) for place in range(1, 257)]
        for until in found:
            crowding.put_off("b", now, until)
        times += found

    assert len(set(times)) == len(times)
    assert times == sorted(times)
    assert times[-1] < LONGEST
    within = max(sum(at <= other < at + SECOND // 100 for other in times) for at in times[::100])
    assert within <= 51, "each costs 30 µs when it comes again"


def test_queue_that_was_held_ramps_up() -> None:
    """R5: a Retry-After is no reason to begin with everything at once."""
    busy = [True]
    town = Town(
        respond=lambda *_: Answer(took=2_000, status=503 if busy[0] else 200, retry_after=20 * SECOND if busy[0] else 0)
    )
    town.engine(slots=4)
    town.add(9_000)
    town.run(1)
    busy[0] = False
    town.starts.clear()
    town.run(40, until=lambda: town.starts)
    first = town.now
    town.run(1)

    assert sum(start.at < first + SECOND for start in town.starts) < 500
