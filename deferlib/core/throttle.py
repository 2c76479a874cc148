"""A queue's enforced rate: it falls when its target answers that it is overloaded (503), and recovers with time.

What counts is the share of such answers in a second, so that a task which always gets one slows nobody else.
"""

from __future__ import annotations

from math import log2

from deferlib.core import bucket
from deferlib.core.model import MINUTE, SECOND, Decision, Micros

FEWEST = 3  # 503s in a second, beside
SHARE = 0.1  # of what was dispatched in it: chance alone makes no such number of a twentieth
CUT, DEEP_CUT = 0.5, 0.25  # of the pace, or of the rate enforced by then; the deep one where most answers are such
QUICK, SLOW = 2.0, 1.5  # growth a second: up to half of the pace at which it was overloaded first, and from there on
LEAST = 1.0  # dispatches per second
LONGEST_HOLD: Micros = MINUTE  # that a Retry-After may ask for
_WINDOW: Micros = SECOND
_LONGEST_WINDOW: Micros = MINUTE
_SAMPLE = 10  # dispatches that make a window of a second


class Throttle:
    """One engine's throttle of one queue; without overload it lets everything through."""

    __slots__ = (
        "_asked",
        "_at",
        "_count",
        "_deep",
        "_overloads",
        "_peak",
        "_rate",
        "_tat",
        "_window",
        "hold_until",
        "since",
    )

    def __init__(self) -> None:
        self.since: Micros = 0
        self.hold_until: Micros = 0
        self._rate: float | None = None  # dispatches per second at `_at`, growing since; None: all
        self._at: Micros = 0
        self._peak = 0.0  # the pace at which it was overloaded first
        self._tat: Micros = 0
        self._window: Micros = 0  # when the window began that `_count` and `_overloads` belong to
        self._count = 0
        self._overloads = 0
        self._deep = False  # whether the last cut was
        self._asked: Micros = 0  # the longest Retry-After in it

    # --- what happened ------------------------------------------------------------------------------------------------

    def dispatched(self, count: int, now: Micros) -> None:
        """Count what was dispatched."""
        self._roll(now)
        self._count += count
        rate = self.rate(now)
        if rate is not None:
            self._tat = bucket.spent(self._tat, bucket.interval_of(rate), count, now)

    def overloaded(self, now: Micros, retry_after: Micros = 0) -> bool:
        """Take a 503; tell whether the rate falls: once a second at most, or twice to the deeper cut."""
        self._roll(now)
        self._overloads += 1
        self._asked = max(self._asked, retry_after)
        if self._overloads < FEWEST + SHARE * self._count:
            return False
        most = 2 * self._overloads > self._count
        if now - self._at < _WINDOW:
            return self._deepen(now) if most and not self._deep else False
        elapsed = max(now - self._window, _WINDOW // 20)
        pace = max(self._count, self._overloads) * SECOND / elapsed
        rate = self.rate(now)
        if rate is None:
            self.since, self._peak, rate = now, pace, pace
        self._deep = most
        self._rate, self._at = max(min(rate, pace) * (DEEP_CUT if most else CUT), LEAST), now
        self._tat = max(self._tat, now)
        if self._asked:
            self.hold_until = max(self.hold_until, now + min(self._asked, LONGEST_HOLD))
            self._at = max(self._at, self.hold_until)  # nothing grows before it ends
        return True

    def _deepen(self, now: Micros) -> bool:
        """Cut deeper: what was to be seen of the second when the rate was cut was not the worst of it."""
        self._deep = True
        rate = self.rate(now)
        if rate is not None:
            self._rate, self._at = max(rate * DEEP_CUT / CUT, LEAST), max(now, self.hold_until)
        return rate is not None

    def ended(self, now: Micros, configured: float | None) -> bool:
        """Tell, once, that it limits nothing any more, beside the rate that is *configured*."""
        if self._rate is None or now < self.hold_until:
            return False
        rate = self.rate(now)
        if rate is not None and (configured is None or rate < configured):
            return False
        self._rate = None
        return True

    def restore(self, rate: float, since: Micros, until: Micros, now: Micros) -> None:
        """Be as another engine's, as it has told *now*."""
        self._rate, self._at, self._peak, self.since, self.hold_until = rate, now, rate, since, until

    def _roll(self, now: Micros) -> None:
        """Begin a new window after a second; a queue of few tasks gets a longer one, or nothing of it would ever count."""
        length = now - self._window
        if length < _WINDOW or (self._count < _SAMPLE and length < _LONGEST_WINDOW):
            return
        self._window, self._count, self._overloads, self._asked = now, 0, 0, 0

    # --- what follows from it -----------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether it may limit anything."""
        return self._rate is not None

    def rate(self, now: Micros) -> float | None:
        """Return the enforced rate, dispatches per second; None for all."""
        if self._rate is None:
            return None
        rate, seconds = self._rate, max(now - self._at, 0) / SECOND
        half = self._peak / 2
        if rate < half:
            doubling = min(seconds, log2(half / rate))
            rate, seconds = rate * QUICK**doubling, seconds - doubling
        rate *= SLOW ** min(seconds, 100.0)
        return rate if rate < 2 * self._peak else None

    def allowance(self, now: Micros) -> int:
        """Return how many tasks it lets through at *now*."""
        if self._rate is None:
            return 1 << 30
        if now < self.hold_until:
            return 0
        rate = self.rate(now)
        return 1 << 30 if rate is None else bucket.tokens(self._tat, bucket.interval_of(rate), _size(rate), now)

    def hold(self, now: Micros) -> Decision | None:
        """Say why it lets nothing through at *now*, or None if something."""
        if self._rate is None:
            return None
        if now < self.hold_until:
            return Decision("asked to wait by its target (503, Retry-After)", self.hold_until)
        rate = self.rate(now)
        if rate is None or self.allowance(now):
            return None
        at = bucket.next_token(self._tat, bucket.interval_of(rate), _size(rate), now)
        return Decision(f"slowed to {rate:.3g}/s because its target is overloaded (503)", at)


def _size(rate: float) -> int:
    return max(1, int(rate / 10))  # a tenth of a second's worth at once
