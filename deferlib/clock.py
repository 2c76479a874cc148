"""The one place that reads the time; everything else takes it as an argument."""

from __future__ import annotations

import time
from typing import Protocol

from deferlib.core.model import Micros


class Clock(Protocol):
    """Where `now` comes from."""

    def now(self) -> Micros:
        """Return the time in microseconds since the epoch."""


class SystemClock:
    """The machine's clock: ETAs are wall time, and every process on a SQLite store shares it."""

    def now(self) -> Micros:
        return time.time_ns() // 1000
