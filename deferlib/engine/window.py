"""How many requests a target has at once, so that what it can't begin waits here, and not in its server.

A server takes requests first come first served: behind a backlog of one queue, the next task of another one would wait for
all of it. Here the queues' lines take turns. How long a request waited in its server is what its answer took, less what
its calls took, as handlers tell (`X-Deferlib-Took`), less what it took in the best case lately: the way there and back.
"""

from __future__ import annotations

from deferlib.core.model import SECOND, Micros

WAIT: Micros = 2_500  # in the server: enough to keep it busy until the next request arrives, once the engine is back
SHARED: Micros = 300  # where several queues come to it, or a quarter of what the calls take
LONG: Micros = 5_000  # calls: one of them that waits there is too much for the next one of a quiet queue
LEAST = 2.0  # requests; where several queues come, one: then the next one of a quiet queue waits for half of it on average
STALL: Micros = SECOND // 50  # without any answer: one more goes, for what is there may take long and hold up nobody
_LATELY: Micros = 30 * SECOND  # the best case is that of the last one to two of these


class Window:
    """One target's window: it grows while requests hardly wait there, and shrinks when they do."""

    __slots__ = ("_best", "_former", "_most", "_moved", "_until", "size")

    def __init__(self, most: int) -> None:
        self._most = max(float(most), LEAST)
        self.size = self._most  # requests
        self._moved: Micros = 0  # when the last answer came
        self._best: Micros | None = None
        self._former: Micros | None = None
        self._until: Micros = 0

    def answered(self, now: Micros, waited: Micros, took: Micros, *, full: bool, shared: bool) -> None:
        """Take that a request waited so long in its server, or on its way, and its calls took so long.

        *full* if more would go at once, *shared* if the calls of other queues may have to wait for these.
        """
        self._moved = now
        waited = max(waited, 0)
        if not self._until - _LATELY <= now < self._until:
            self._former, self._best, self._until = self._best, None, now + _LATELY
        self._best = waited if self._best is None else min(self._best, waited)
        extra = waited - (self._best if self._former is None else min(self._best, self._former))
        enough, least = (max(SHARED, took // 4), 1.0) if shared else (WAIT, LEAST)
        step, back = 1.0, 0.5 if extra > took + 4 * enough else 0.1  # where requests wait longer than they run, most do
        if shared and took > LONG:
            step, back = 0.25, 0.5
        if extra <= enough:
            if full:
                self.size = min(self.size + step / self.size, self._most)  # one more in each round, or in four
        elif extra > 2 * enough:
            self.size = max(self.size - back, least)

    def stalled(self, now: Micros) -> bool:
        """Tell whether one more request may go although the window is full, because no answer has come for a while.

        Else a few long calls would hold up all others of a server that has threads for them. One without gets as many as
        there are slots, and shrinks the window with its next answers.
        """
        if 0 <= now - self._moved < STALL or self.size >= self._most:
            return False
        self._moved = now
        self.size = min(self.size + 1, self._most)
        return True
