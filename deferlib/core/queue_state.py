"""What one engine knows of one queue, and what holds the queue's tasks back."""

from __future__ import annotations

from deferlib.core import bucket
from deferlib.core.model import SECOND, Decision, Micros, Mode, QueueConfig, QueueRow
from deferlib.core.throttle import Throttle

FAST_PAUSE: Micros = SECOND // 50


class QueueState:
    """A queue's configuration, limits and when to look at it again."""

    __slots__ = (
        *("config", "fast_at", "fast_looked", "in_flight", "interval", "look_at", "owned_by_other_until", "paused", "tat"),
        *("disabled", "flown", "flown_at", "owned_until", "served", "spent", "throttle"),
    )

    def __init__(self, name: str) -> None:
        self.config = QueueConfig(name=name)
        self.paused = False
        self.disabled = False
        self.in_flight = 0
        self.flown = 0  # how many are in flight as the store knows it
        self.flown_at: Micros = 0  # and since when
        self.interval: Micros = 0
        self.tat: Micros = 0
        self.spent = False  # the last claim left no token
        self.look_at: Micros = 0  # when something may be due; 0: look now
        self.fast_at: Micros = 0  # when a fail-fast task may be due, of use while no slot is free
        self.fast_looked: Micros = 0  # when that was last looked up
        self.owned_by_other_until: Micros = 0
        self.owned_until: Micros = 0  # by whoever owns it, as its row says
        self.served = 0  # in which turn something of it was claimed last
        self.throttle = Throttle()

    def configure(self, row: QueueRow) -> None:
        self.tat = row.tat
        self.owned_until = row.owned_until
        if (row.config, row.paused, row.disabled) != (self.config, self.paused, self.disabled):
            self.look_at = 0
        self.config = row.config
        self.paused = row.paused
        self.disabled = row.disabled
        self.interval = bucket.interval_of(row.config.rate) if row.config.rate else 0

    def woken(self, now: Micros) -> None:
        """Take a hint that something may be due.

        A full engine looks for fail-fast tasks at most each `FAST_PAUSE`: a look costs 15 µs, ten times that with cold
        caches, and one for each of 3,000 adds a second took about a tenth of a core.
        """
        self.look_at = 0
        recent = 0 <= now - self.fast_looked < FAST_PAUSE
        self.fast_at = min(self.fast_at, self.fast_looked + FAST_PAUSE if recent else 0)

    def hold(self, now: Micros) -> Decision | None:
        """Say why nothing of this queue may be dispatched at *now*, or None if something may."""
        closed = self.closed(now)
        if closed is None and self.crowded:
            return Decision(reason=f"at {self.in_flight}/{self.config.max_concurrent} concurrent")
        return closed

    @property
    def live(self) -> bool:
        """Whether it dispatches, if not at once."""
        return self.config.mode is Mode.PUSH and not self.disabled and not self.paused

    @property
    def crowded(self) -> bool:
        """Whether the queue is at its concurrency limit."""
        return self.config.max_concurrent is not None and self.in_flight >= self.config.max_concurrent

    def closed(self, now: Micros) -> Decision | None:
        """Say why nothing of this queue may be dispatched at *now* even with free slots, or None if something may."""
        config = self.config
        if config.mode is Mode.PULL:
            return Decision(reason="a pull queue: workers lease from it")
        if self.disabled:
            return Decision(reason="disabled: it has left queue.yaml")
        if self.paused:
            return Decision(reason="paused")
        if config.rate == 0:
            return Decision(reason="paused: its rate is 0")
        if config.limited and self.owned_by_other_until > now:
            return Decision(reason="dispatched by another engine", until=self.owned_by_other_until)
        if self.interval:
            first = bucket.first_token(self.tat, self.interval, config.bucket_size)
            if now < first + (self.gathering if self.spent else 0):
                return Decision(reason="waiting for a token", until=first)
        return self.throttle.hold(now)

    @property
    def gathering(self) -> Micros:
        """How much longer to wait for tokens than for the first: each turn is a commit, a hundred a second are enough.

        Not for more than half of the bucket: what comes while it is full is lost, and a turn may come late.
        """
        rate = self.config.rate
        if not self.interval or not rate:
            return 0
        return max(min(self.config.bucket_size // 2, int(rate / 100)) - 1, 0) * self.interval

    def allowance(self, now: Micros) -> int:
        """Return how many tasks the queue's own limits let through at *now*."""
        allowed = self.throttle.allowance(now)
        if self.config.max_concurrent is not None:
            allowed = min(allowed, self.config.max_concurrent - self.in_flight)
        if self.interval:
            allowed = min(allowed, bucket.tokens(self.tat, self.interval, self.config.bucket_size, now))
        return max(allowed, 0)
