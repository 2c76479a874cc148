"""Deliveries that wait for a slot: a line for each queue, and the lines take turns.

So a task waits for those of its own queue only, however many of another one are before it: at 12,000 a second, behind 250
of them, it would wait 20 ms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from deferlib.core.model import Delivery

_FEW = 16  # lines that are kept though they are empty


class Lines:
    """The lines before one target. One thread puts and looks through; any number may take.

    No locks: a step on a deque is atomic, and where two threads take at once, at worst one line comes twice in a row.
    """

    __slots__ = ("_by_queue", "_most", "_turns")

    def __init__(self) -> None:
        self._by_queue: dict[str, deque[Delivery]] = {}
        self._turns: deque[deque[Delivery]] = deque()
        self._most = _FEW  # lines, before those that are empty are dropped

    def put(self, delivery: Delivery) -> None:
        """Let *delivery* wait behind those of its queue."""
        self._line(delivery).append(delivery)

    def put_back(self, delivery: Delivery) -> None:
        """Let *delivery* wait before those of its queue: it was taken, and didn't start."""
        self._line(delivery).appendleft(delivery)

    def _line(self, delivery: Delivery) -> deque[Delivery]:
        queue = delivery.claim.queue
        line = self._by_queue.get(queue)
        if line is None:
            if len(self._by_queue) >= self._most:
                self._drop_empty()
            line = self._by_queue[queue] = deque()
            self._turns.appendleft(line)  # nothing of it has had a turn
        return line

    def take(self) -> Delivery:
        """Return whose turn it is. Only for who knows that something waits for it."""
        while True:
            turns = self._turns
            line = turns[0]
            if len(turns) > 1:
                turns.rotate(-1)
            try:
                return line.popleft()
            except IndexError:
                continue

    def peek(self, queue: str) -> Delivery | None:
        """Return what comes next of *queue*."""
        line = self._by_queue.get(queue)
        return line[0] if line else None

    def follow(self, queue: str) -> Delivery:
        """Return what comes next of *queue*, out of turn: it goes with what was taken. Only where one thread takes."""
        return self._by_queue[queue].popleft()

    def __iter__(self) -> Iterator[Delivery]:
        for line in self._by_queue.values():
            yield from line

    def keep(self, wanted: Callable[[Delivery], bool]) -> None:
        """Drop what isn't *wanted*. While nobody takes."""
        for line in self._by_queue.values():
            kept = [delivery for delivery in line if wanted(delivery)]
            if len(kept) < len(line):
                line.clear()
                line.extend(kept)

    def _drop_empty(self) -> None:
        # Only who puts may: a line that it finds empty stays so. Others may still hold it, and find it empty as well.
        self._by_queue = {queue: line for queue, line in self._by_queue.items() if line}
        self._turns = deque(self._by_queue.values())
        self._most = max(_FEW, 2 * len(self._by_queue))
