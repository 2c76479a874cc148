"""The enforced rate of a queue: it falls with overload, and recovers without."""

from __future__ import annotations

import pytest

from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.core.throttle import LEAST, Throttle

NOW: Micros = 1_700_000_000_000_000
ALL = 1 << 30


def busy(rate: int) -> Throttle:
    """Return the throttle of a queue that has dispatched *rate* tasks in the second before NOW."""
    throttle = Throttle()
    throttle.dispatched(rate, NOW - SECOND)
    throttle.dispatched(1, NOW)
    return throttle


def test_without_overload_everything_goes_through() -> None:
    throttle = busy(1_000)

    assert not throttle.accepted(NOW, None)
    assert (throttle.allowance(NOW), throttle.hold(NOW), throttle.rate) == (ALL, None, None)


def test_overload_halves_what_was_dispatched() -> None:
    throttle = busy(100)

    assert throttle.overloaded(NOW)
    assert throttle.rate == 50
    assert throttle.since == NOW
    assert throttle.allowance(NOW) == 5, "a tenth of a second's worth"
    throttle.dispatched(5, NOW)
    decision = throttle.hold(NOW)
    assert decision is not None
    assert decision == ("slowed to 50/s because its target is overloaded (503)", NOW + SECOND // 50)
    assert throttle.allowance(NOW + SECOND // 50) == 1


def test_overload_of_many_at_once_is_one() -> None:
    throttle = busy(100)

    assert [throttle.overloaded(NOW + number) for number in range(30)] == [True] + [False] * 29
    assert throttle.rate == 50
    assert throttle.overloaded(NOW + SECOND)
    assert throttle.rate == 25


def test_rate_has_a_floor() -> None:
    throttle = busy(1)
    for second in range(10):
        throttle.overloaded(NOW + second * SECOND)

    assert throttle.rate == LEAST


@pytest.mark.parametrize(("configured", "seconds"), [(None, 7), (100.0, 4), (60.0, 1)])
def test_rate_recovers_and_then_limits_nothing(configured: float | None, seconds: int) -> None:
    throttle, now, changes = busy(100), NOW, 0
    throttle.overloaded(NOW)
    while throttle.rate is not None:
        now += SECOND // 4
        changes += throttle.accepted(now, configured)

    assert (now - NOW) // SECOND == changes == seconds
    assert throttle.allowance(now) == ALL


def test_overload_while_it_recovers_cuts_again() -> None:
    throttle = busy(100)
    throttle.overloaded(NOW)
    throttle.accepted(NOW + SECOND, None)

    throttle.overloaded(NOW + 2 * SECOND)

    assert throttle.rate == pytest.approx(31.25)


@pytest.mark.parametrize(("asked", "waited"), [(5 * SECOND, 5 * SECOND), (60 * MINUTE, MINUTE)])
def test_retry_after_is_waited_for_within_limits(asked: Micros, waited: Micros) -> None:
    throttle = busy(100)
    throttle.overloaded(NOW, asked)

    assert throttle.allowance(NOW + waited - 1) == 0
    assert throttle.hold(NOW) == ("asked to wait by its target (503, Retry-After)", NOW + waited)
    assert throttle.allowance(NOW + waited) > 0


def test_over_any_window_it_lets_no_more_through_than_its_rate() -> None:
    throttle = busy(200)
    throttle.overloaded(NOW)
    sent = 0
    for step in range(1_000):
        now = NOW + step * SECOND // 1_000
        allowed = throttle.allowance(now)
        throttle.dispatched(allowed, now)
        sent += allowed

    assert 95 <= sent <= 110, "100 a second, and a tenth of a second's worth at once"
