"""A clock that stands still until it is moved."""

from __future__ import annotations

from datetime import datetime, timedelta

from deferlib.context import SYSTEM_CLOCK, moment
from deferlib.core.model import SECOND, Micros


class VirtualClock:
    """A `deferlib.clock.Clock` for tests; it begins at *start* (naive: local time), or at the present."""

    def __init__(self, start: datetime | None = None) -> None:
        self._now: Micros = SYSTEM_CLOCK.now() if start is None else round(start.timestamp() * SECOND)

    def now(self) -> Micros:
        """Return the time in microseconds since the epoch."""
        return self._now

    def moment(self) -> datetime:
        """Return the time as an aware datetime in UTC."""
        return moment(self._now)

    def advance(self, by: timedelta | float) -> None:
        """Move the clock forward *by* a timedelta or a number of seconds. What that makes due isn't run by this alone."""
        self.move_to(self._now + span(by))

    def move_to(self, at: Micros) -> None:
        """Move the clock forward to *at*."""
        if at < self._now:
            raise ValueError(f"the clock is at {self.moment()} and moves forward only, not to {moment(at)}")
        self._now = at


def span(by: timedelta | float) -> Micros:
    """Return a timedelta or a number of seconds in microseconds."""
    return by // timedelta(microseconds=1) if isinstance(by, timedelta) else round(by * SECOND)
