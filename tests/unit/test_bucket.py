"""The token bucket: never above bucket + rate * t, and close to it when there is work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib.core import bucket
from deferlib.core.model import SECOND, Micros

RATES = st.floats(0.01, 5_000)
SIZES = st.integers(1, 500)


@given(RATES, SIZES, st.lists(st.tuples(st.integers(0, 10 * SECOND), st.integers(0, 600)), max_size=60))
def test_no_window_has_more_than_bucket_and_rate(rate: float, size: int, asks: list[tuple[int, int]]) -> None:
    interval, now, tat = bucket.interval_of(rate), 0, 0
    taken: list[tuple[Micros, int]] = []

    for pause, wanted in asks:
        now += pause
        count = min(wanted, bucket.tokens(tat, interval, size, now))
        tat = bucket.spent(tat, interval, count, now)
        taken.append((now, count))

    for first in range(len(taken)):
        total = 0
        for at, count in taken[first:]:
            total += count
            assert total <= size + rate * (at - taken[first][0]) / SECOND + 1e-6


@given(st.floats(0.01, 5_000), SIZES)
def test_backlog_is_worked_off_at_nearly_the_rate(rate: float, size: int) -> None:
    interval, now, tat, dispatched = bucket.interval_of(rate), 0, 0, 0

    for _ in range(500):  # wakes of an engine that always finds work
        count = bucket.tokens(tat, interval, size, now)
        dispatched += count
        tat = bucket.spent(tat, interval, count, now)
        now = bucket.next_token(tat, interval, size, now)

    assert dispatched >= 0.95 * rate * now / SECOND


@given(RATES, SIZES, st.integers(0, 10**15), st.integers(-(10**12), 10**12))
def test_next_token_is_the_first_moment_with_one(rate: float, size: int, now: Micros, ahead: Micros) -> None:
    interval, tat = bucket.interval_of(rate), now + ahead

    at = bucket.next_token(tat, interval, size, now)

    assert at >= now
    assert bucket.tokens(tat, interval, size, at) >= 1
    assert at == now or bucket.tokens(tat, interval, size, at - 1) == 0


def test_idle_bucket_fills_up_and_no_further() -> None:
    interval = bucket.interval_of(10)
    tat = bucket.spent(0, interval, 5, 0)

    assert bucket.tokens(tat, interval, 5, 0) == 0
    assert bucket.tokens(tat, interval, 5, SECOND // 10) == 1
    assert bucket.tokens(tat, interval, 5, 3600 * SECOND) == 5


@pytest.mark.parametrize(("rate", "interval"), [(1, SECOND), (3, 333_334), (1e9, 1), (1 / 86_400, 86_400 * SECOND)])
def test_interval_is_rounded_up(rate: float, interval: Micros) -> None:
    assert bucket.interval_of(rate) == interval
