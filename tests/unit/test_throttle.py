"""The enforced rate of a queue: it falls with overload, and recovers without."""

from __future__ import annotations

import pytest

from deferlib.core.model import HOUR, MINUTE, SECOND, Micros
from deferlib.core.throttle import LEAST, Throttle

NOW: Micros = 1_700_000_000_000_000
ALL = 1 << 30


def busy(rate: int, *, seconds: float = 0.5) -> Throttle:
    """Return the throttle of a queue that has dispatched *rate* tasks a second for some time before NOW."""
    throttle = Throttle()
    began = NOW - round(seconds * SECOND)
    throttle.dispatched(1, began)
    throttle.dispatched(round(rate * seconds) - 1, NOW - 1)
    return throttle


def overload(throttle: Throttle, count: int, *, now: Micros = NOW, retry_after: Micros = 0) -> list[bool]:
    return [throttle.overloaded(now, retry_after) for _ in range(count)]


def test_without_overload_everything_goes_through() -> None:
    throttle = busy(1_000)

    assert (throttle.allowance(NOW), throttle.hold(NOW), throttle.rate(NOW), throttle.active) == (ALL, None, None, False)
    assert not throttle.ended(NOW, None)


def test_overload_halves_the_pace() -> None:
    throttle = busy(1_000)

    assert overload(throttle, 60) == [False] * 52 + [True] + [False] * 7
    assert throttle.rate(NOW) == 500
    assert throttle.since == NOW
    assert throttle.allowance(NOW) == 50, "a tenth of a second's worth"
    throttle.dispatched(50, NOW)
    decision = throttle.hold(NOW)
    assert decision is not None
    assert decision == ("slowed to 500/s because its target is overloaded (503)", NOW + SECOND // 500)
    assert throttle.allowance(NOW + SECOND // 400) >= 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.09])
def test_few_503s_among_many_answers_slow_nothing(share: float) -> None:
    """A task that always gets one, say."""
    throttle, now, changes = Throttle(), NOW, 0
    for _ in range(600):
        throttle.dispatched(100, now)
        changes += sum(overload(throttle, round(100 * share), now=now + 10))
        now += SECOND // 10

    assert changes == 0
    assert not throttle.active


def test_one_or_two_slow_nothing() -> None:
    throttle = Throttle()
    for minute in range(10):
        throttle.dispatched(2, NOW + minute * MINUTE)
        assert overload(throttle, 2, now=NOW + minute * MINUTE) == [False, False]


def test_overload_right_after_a_start_is_judged_by_the_pace() -> None:
    """A window that has just begun says little of a second, but enough of its own milliseconds."""
    throttle = Throttle()
    throttle.dispatched(32, NOW)

    assert overload(throttle, 7, now=NOW + SECOND // 100) == [False] * 6 + [True]
    assert throttle.rate(NOW + SECOND // 100) == pytest.approx(320)


def test_rate_falls_deeper_where_most_answers_are_503() -> None:
    throttle = busy(1_000)

    assert sum(overload(throttle, 500)) == 2
    assert throttle.rate(NOW) == 250


def test_rate_falls_once_a_second() -> None:
    throttle = busy(1_000)
    overload(throttle, 60)

    assert not any(overload(throttle, 100, now=NOW + SECOND // 4))
    throttle.dispatched(400, NOW + SECOND)
    assert any(overload(throttle, 150, now=NOW + 2 * SECOND - 1))
    assert throttle.rate(NOW + 2 * SECOND - 1) == pytest.approx(200, rel=0.01)


def test_rate_has_a_floor_and_is_tried_again_from_there() -> None:
    """A target that answers nothing but 503 for half a minute."""
    throttle, now = busy(1_000), NOW
    lowest = 1e9
    for _ in range(300):
        now += SECOND // 10
        allowed = min(throttle.allowance(now), 100)
        throttle.dispatched(allowed, now)
        overload(throttle, allowed, now=now)
        lowest = min(lowest, throttle.rate(now) or 1e9)

    assert LEAST <= lowest <= 10
    back = next(step for step in range(600) if throttle.rate(now + step * SECOND // 10) is None)
    assert back <= 200, "it recovers within 20 seconds"


def test_rate_recovers_with_time_alone() -> None:
    throttle = busy(1_000)
    overload(throttle, 60)

    rates = [throttle.rate(NOW + second * SECOND) for second in range(8)]

    assert rates[:3] == pytest.approx([500, 750, 1125])
    assert rates[-1] is None
    assert throttle.allowance(NOW + HOUR) == ALL
    assert throttle.ended(NOW + HOUR, None)
    assert not throttle.ended(NOW + HOUR, None), "told once"


def test_rate_that_is_as_high_as_the_configured_one_has_ended() -> None:
    throttle = busy(1_000)
    overload(throttle, 60)

    assert not throttle.ended(NOW, 600.0)
    assert throttle.ended(NOW + SECOND, 600.0)


@pytest.mark.parametrize(("asked", "waited"), [(5 * SECOND, 5 * SECOND), (60 * MINUTE, MINUTE)])
def test_retry_after_is_waited_for_within_limits(asked: Micros, waited: Micros) -> None:
    throttle = busy(100)
    overload(throttle, 9, retry_after=asked)

    assert throttle.allowance(NOW + waited - 1) == 0
    assert throttle.hold(NOW) == ("asked to wait by its target (503, Retry-After)", NOW + waited)
    assert not throttle.ended(NOW + waited - 1, 0.1)
    assert throttle.allowance(NOW + waited) > 0


def test_retry_after_of_few_holds_up_nobody_else() -> None:
    throttle = busy(1_000)
    overload(throttle, 4, retry_after=MINUTE)

    assert throttle.allowance(NOW) == ALL


def test_over_any_window_it_lets_no_more_through_than_its_rate() -> None:
    throttle = busy(200)
    overload(throttle, 30)
    sent = 0
    for step in range(1_000):
        now = NOW + step * SECOND // 1_000
        allowed = throttle.allowance(now)
        throttle.dispatched(allowed, now)
        sent += allowed

    assert 100 <= sent <= 145, "100 a second, growing by a half, and a tenth of a second's worth at once"


def test_slow_queue_whose_target_is_always_overloaded_waits_as_asked() -> None:
    throttle, now, held = Throttle(), NOW, 0
    for _ in range(10):
        throttle.dispatched(1, now)
        held += throttle.overloaded(now, MINUTE)
        if throttle.hold(now) is not None:
            break
        now += SECOND

    assert held == 1
    assert throttle.hold(now) == ("asked to wait by its target (503, Retry-After)", now + MINUTE)


def test_rate_does_not_grow_while_it_is_held() -> None:
    throttle = busy(1_000)
    overload(throttle, 60, retry_after=MINUTE)

    assert throttle.rate(NOW + MINUTE) == throttle.rate(NOW) == 500
