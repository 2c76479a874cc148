"""How many requests a target has at once, against servers in virtual time: first come first served, so many at once."""

from __future__ import annotations

import heapq

import pytest

from deferlib.core.model import SECOND, Micros
from deferlib.engine.window import LEAST, SHARED, STALL, WAIT, Window


def served(
    window: Window,
    requests: int,
    took: Micros,
    *,
    workers: int,
    way: Micros = 0,
    slots: int = 32,
    begin: Micros = 0,
    shared: bool = False,
) -> tuple[Micros, list[Micros]]:
    """Send *requests*, as many at once as *window* and *slots* let, to a server with so many *workers*.

    Returns how long it took, and how long each request waited there. *way* is the time there and back.
    """
    free = [begin] * workers
    flying: list[tuple[Micros, Micros, Micros]] = []  # answered at, waited, sent at
    waits, now, left = [], begin, requests
    while left or flying:
        while left and len(flying) < min(slots, int(window.size)):
            worker = heapq.heappop(free)
            start = max(worker, now + way // 2)
            heapq.heappush(free, start + took)
            heapq.heappush(flying, (start + took + way // 2, start - now - way // 2, now))
            left -= 1
        now, waited, sent = heapq.heappop(flying)
        waits.append(waited)
        window.answered(now, now - sent - took, took, full=left > 0, shared=shared)
    return now - begin, waits


def test_requests_hardly_wait_in_a_server_with_one_worker() -> None:
    window = Window(32)

    _, waits = served(window, 2_000, 1_000, workers=1)

    assert max(waits[-1_000:]) <= 3 * WAIT


def test_requests_wait_less_in_a_server_that_several_queues_share() -> None:
    window = Window(32)

    _, waits = served(window, 2_000, 500, workers=1, shared=True)

    assert max(waits[-1_000:]) <= 3 * SHARED


def test_hardly_any_wait_where_several_queues_share_a_server_that_is_busy_all_the_same() -> None:
    window = Window(32)
    served(window, 2_000, 10_000, workers=1, shared=True)

    elapsed, waits = served(window, 500, 10_000, workers=1, way=500, begin=1_000 * SECOND, shared=True)

    assert max(waits) <= 10_000, "one runs, and at most one waits"
    assert sum(waits) / len(waits) <= 5_000, "mostly none"
    assert elapsed <= 500 * 10_500 * 1.01


@pytest.mark.parametrize("workers", [1, 4, 30])
@pytest.mark.parametrize("took", [2_000, 50_000, SECOND])
def test_all_workers_of_a_shared_server_are_kept_busy(workers: int, took: Micros) -> None:
    window = Window(32)
    served(window, 2_000, took, workers=workers, shared=True)

    elapsed, _ = served(window, 1_000, took, workers=workers, begin=10**12, shared=True)

    assert 1_000 * took / workers >= 0.95 * elapsed - took


def test_waits_that_are_short_beside_their_calls_shrink_no_shared_window() -> None:
    window = Window(32)

    for now in range(0, 1_000_000, 10_000):
        window.answered(now, now % 20_000 // 2, SECOND // 20, full=True, shared=True)

    assert window.size == 32


def test_slow_calls_wait_here_and_not_in_their_server() -> None:
    window = Window(32)

    served(window, 400, SECOND, workers=4)
    _, waits = served(window, 100, SECOND, workers=4, begin=1_000 * SECOND)

    assert 4 <= window.size < 8  # the workers, and a few that follow at once
    assert sum(waited > 0 for waited in waits) <= 60


@pytest.mark.parametrize("workers", [1, 2, 8, 30])
@pytest.mark.parametrize("took", [200, 2_000, 50_000])
def test_all_workers_are_kept_busy(workers: int, took: Micros) -> None:
    window = Window(32)
    served(window, 2_000, took, workers=workers)

    elapsed, _ = served(window, 1_000, took, workers=workers, begin=10**12)

    assert 1_000 * took / workers >= 0.95 * elapsed - took


def test_a_long_way_is_no_wait() -> None:
    window = Window(32)

    elapsed, _ = served(window, 4_000, 1_000, workers=32, way=100_000)

    assert window.size >= 30
    assert elapsed < 1.2 * 4_000 / 32 * 101_000


def test_a_window_that_shrank_grows_back_when_the_server_gets_workers() -> None:
    window = Window(32)
    served(window, 500, 20_000, workers=2)
    assert window.size < 8

    served(window, 3_000, 20_000, workers=16, begin=100 * SECOND)

    assert window.size >= 16


def test_a_window_grows_only_while_more_would_go() -> None:
    window = Window(8)

    for now in range(1_000):
        window.answered(now, 10, 10, full=False, shared=False)

    assert window.size == 8


def test_without_answers_one_more_goes_now_and_then() -> None:
    window = Window(4)
    for now in range(100):
        window.answered(now, 0 if now == 0 else 60 * SECOND, 10, full=True, shared=False)
    assert window.size == LEAST == 2

    assert not window.stalled(99 + STALL - 1)
    assert window.stalled(99 + STALL)
    assert not window.stalled(99 + STALL + 1)
    assert window.stalled(99 + 2 * STALL)
    assert not window.stalled(SECOND), "as many as there are slots"


def test_a_window_opens_also_after_the_clock_was_set_back() -> None:
    window = Window(4)
    window.size = LEAST
    window.answered(1_000 * SECOND, 0, 10, full=False, shared=False)

    assert window.stalled(0)


def test_a_window_never_closes() -> None:
    window = Window(1)
    for now in range(1_000):
        window.answered(now, 0 if now == 0 else 60 * SECOND, 10, full=True, shared=False)

    assert window.size == LEAST


def test_a_new_best_case_is_learned_when_the_way_gets_longer() -> None:
    window = Window(32)
    served(window, 1_000, 1_000, workers=32, way=1_000)

    served(window, 40_000, 1_000, workers=32, way=50_000, begin=100 * SECOND)
    served(window, 4_000, 1_000, workers=32, way=50_000, begin=1_000 * SECOND)

    assert window.size >= 30
