"""A queue's enforced rate: it falls when its target answers that it is overloaded (503), and recovers when that ends."""

from __future__ import annotations

from deferlib.core import bucket
from deferlib.core.model import MINUTE, SECOND, Decision, Micros

CUT = 0.5  # of the rate, by overload, at most once a second
GROWTH = 1.25  # a second without it
LEAST = 0.2  # dispatches per second
LONGEST_HOLD: Micros = MINUTE  # that a Retry-After may ask for
_STEP: Micros = SECOND


class Throttle:
    """One engine's throttle of one queue; without overload it lets everything through."""

    __slots__ = ("_before", "_count", "_cut_at", "_grown_at", "_peak", "_second", "_tat", "hold_until", "rate", "since")

    def __init__(self) -> None:
        self.rate: float | None = None  # dispatches per second that are enforced; None: all
        self.since: Micros = 0
        self.hold_until: Micros = 0
        self._peak = 0.0  # the rate at which it was overloaded first
        self._tat: Micros = 0
        self._cut_at: Micros = 0
        self._grown_at: Micros = 0
        self._second: Micros = 0  # in which `_count` was dispatched; `_before` is the former one's
        self._count = 0
        self._before = 0

    # --- what happened ------------------------------------------------------------------------------------------------

    def dispatched(self, count: int, now: Micros) -> None:
        """Count what was dispatched."""
        second = now // SECOND
        if second != self._second:
            self._before = self._count if second == self._second + 1 else 0
            self._second, self._count = second, 0
        self._count += count
        if self.rate is not None:
            self._tat = bucket.spent(self._tat, bucket.interval_of(self.rate), count, now)

    def overloaded(self, now: Micros, retry_after: Micros = 0) -> bool:
        """Take a 503; tell whether the rate has fallen. Many at once are one: they were on their way together."""
        if retry_after:
            self.hold_until = max(self.hold_until, now + min(retry_after, LONGEST_HOLD))
        if self.rate is not None and now - self._cut_at < _STEP:
            return False
        if self.rate is None:
            self.since = now
            self.rate = self._peak = float(max(self._count, self._before, 1))
        self.rate = max(self.rate * CUT, LEAST)
        self._cut_at = self._grown_at = now
        return True

    def accepted(self, now: Micros, configured: float | None) -> bool:
        """Take any other answer; tell whether the rate has changed. It is gone once it limits nothing any more."""
        if self.rate is None or now - self._grown_at < _STEP:
            return False
        self.rate = self.rate * GROWTH
        self._grown_at = now
        if self.rate >= (configured if configured is not None else 2 * self._peak):
            self.rate = None
            self._tat = 0
        return True

    def restore(self, rate: float | None, since: Micros, until: Micros) -> None:
        """Be as another engine's, as it has told."""
        self.rate, self.since, self.hold_until = rate, since, until

    # --- what follows from it -----------------------------------------------------------------------------------------

    def allowance(self, now: Micros) -> int:
        """Return how many tasks it lets through at *now*."""
        if now < self.hold_until:
            return 0
        if self.rate is None:
            return 1 << 30
        return bucket.tokens(self._tat, bucket.interval_of(self.rate), self._size(self.rate), now)

    def hold(self, now: Micros) -> Decision | None:
        """Say why it lets nothing through at *now*, or None if something."""
        if now < self.hold_until:
            return Decision("asked to wait by its target (503, Retry-After)", self.hold_until)
        if self.rate is None or self.allowance(now):
            return None
        at = bucket.next_token(self._tat, bucket.interval_of(self.rate), self._size(self.rate), now)
        return Decision(f"slowed to {self.rate:.3g}/s because its target is overloaded (503)", at)

    @staticmethod
    def _size(rate: float) -> int:
        return max(1, int(rate / 10))  # a tenth of a second's worth at once
