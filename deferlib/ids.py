"""Ids and nonces of tasks, made by whoever adds them.

An id has 63 bits: 42 of milliseconds since the epoch, 21 that begin at random in each millisecond and count up. So ids are
ordered in time, grow within a process, and two processes collide rarely; when they do, the store says so and the adder
takes another.
"""

from __future__ import annotations

import os
import random
import threading

from deferlib.core.model import Micros

_LOW_BITS = 21
_LAST_MILLISECOND = 2**42 - 1  # in the year 2109


class IdMaker:
    """Makes ids that grow, whatever the clock does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = -1  # so that the first id of a virtual clock's first millisecond begins at random too
        self._random = random.Random()

    def next(self, now: Micros) -> int:
        """Return a new id for a task made at *now*."""
        first = min(max(now, 0) // 1000, _LAST_MILLISECOND) << _LOW_BITS
        with self._lock:
            # Half the range is left for counting up within the millisecond.
            fresh = first | self._random.getrandbits(_LOW_BITS - 1)
            self._last = fresh if fresh >> _LOW_BITS > self._last >> _LOW_BITS else self._last + 1
            return self._last

    def nonce(self) -> int:
        """Return 64 random bits as a signed number."""
        return self._random.getrandbits(64) - 2**63

    def reseed(self) -> None:
        """Start anew: after a fork, both processes would make the same ids."""
        self.__init__()  # type: ignore[misc]  # the same state as a new one's, kept at the same place


ids = IdMaker()
os.register_at_fork(after_in_child=ids.reseed)
