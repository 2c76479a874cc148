"""The token bucket as GCRA: one integer says it all.

*tat*, the theoretical arrival time, is when the bucket will be full again. A bucket of *size* tokens refilled every
*interval* microseconds never lets more than size + t / interval dispatches pass in any window of length t.
"""

from __future__ import annotations

import math

from deferlib.core.model import SECOND, Micros

NEVER: Micros = 2**62


def interval_of(rate: float) -> Micros:
    """Return the microseconds per task of *rate* (dispatches per second), rounded up so that the rate is never exceeded."""
    return max(1, math.ceil(SECOND / rate))


def tokens(tat: Micros, interval: Micros, size: int, now: Micros) -> int:
    """Return how many tasks may be dispatched at *now*."""
    return max(0, (now + size * interval - max(tat, now)) // interval)


def spent(tat: Micros, interval: Micros, count: int, now: Micros) -> Micros:
    """Return the next *tat* once *count* tasks were dispatched at *now*."""
    return max(tat, now) + count * interval


def first_token(tat: Micros, interval: Micros, size: int) -> Micros:
    """Return since when there is a token, or when there will be one."""
    return tat + interval - size * interval


def next_token(tat: Micros, interval: Micros, size: int, now: Micros) -> Micros:
    """Return when the next token is there: *now* or later."""
    return max(now, first_token(tat, interval, size))


def latest(rate: float | None, size: int, now: Micros) -> Micros:
    """Return the latest *tat* that *rate* can have made by *now*: that of an empty bucket."""
    return now + size * interval_of(rate) if rate else NEVER
