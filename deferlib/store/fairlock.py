"""A lock that serves its waiters in the order they came; `threading.Lock` starves them under load."""

from __future__ import annotations

import threading


class FairLock:
    """A line of turns, each of which begins when the one before it has ended.

    Made for threads that may be interrupted anywhere, by Ctrl-C or a deadline's exception: to end a turn is one call into
    C, waiting for one takes nothing that would have to be given back, and who leaves the line passes its place on.
    """

    __slots__ = ("_gate", "_holder", "_last")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._last: _Turn | None = None
        self._holder = 0

    def acquire(self) -> threading.Lock:
        """Wait in line; return the turn, for `release`."""
        turn = _Turn()
        before: _Turn | None = turn  # not in line yet
        try:
            with self._gate:
                before, self._last = self._last, turn
            while before is not None:
                with before.ended:
                    pass
                before = before.instead
            self._holder = threading.get_ident()
        except BaseException:
            if before is not turn:
                turn.instead = before
                turn.ended.release()
            raise
        return turn.ended

    def release(self, turn: threading.Lock) -> None:
        """End what `acquire` returned, and let the next one in."""
        self._holder = 0
        turn.release()

    def mine(self) -> bool:
        """Tell whether the calling thread holds the lock."""
        return self._holder == threading.get_ident()


class _Turn:
    """One place in the line: *ended* is held until it is over, *instead* is whom to wait for if it was given up."""

    __slots__ = ("ended", "instead")

    def __init__(self) -> None:
        self.ended = threading.Lock()
        self.ended.acquire()
        self.instead: _Turn | None = None
