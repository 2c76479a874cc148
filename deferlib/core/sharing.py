"""How queues share the room of a target: evenly, and who has had its share leaves some for those that come next.

Without that a queue with a million tasks would hold every slot of a target, and every place in the line before it, and the
next task of any other queue would wait for one of its calls to end.
"""

from __future__ import annotations

from collections.abc import Mapping

from deferlib.core.model import MINUTE, Micros

_LATELY: Micros = MINUTE  # since when a queue counts as one that needs room now and then
_PART = 8  # of the room, one part is left
_ENOUGH = 16  # slots, of which one is left even where nobody else has used any lately


class Sharing:
    """One engine's view of it, by base URL."""

    __slots__ = ("_queues", "_used", "in_flight", "queues")

    def __init__(self) -> None:
        self.queues: Mapping[str, int] = {}  # how many have a base as their target
        self.in_flight: dict[str, int] = {}
        self._queues: dict[tuple[str, str], int] = {}  # of them, by base and queue
        self._used: dict[str, dict[str, Micros]] = {}  # by base, when each queue last used it

    def sent(self, base: str, queue: str, now: Micros, count: int = 1) -> None:
        """Take that *count* deliveries of *queue* are on their way to *base*."""
        self.in_flight[base] = self.in_flight.get(base, 0) + count
        self._queues[base, queue] = self._queues.get((base, queue), 0) + count
        self._used.setdefault(base, {})[queue] = now

    def landed(self, base: str, queue: str) -> None:
        """Take that one has ended."""
        left = self.in_flight[base] = self.in_flight[base] - 1
        if not left:
            del self.in_flight[base]
        key = base, queue
        left = self._queues[key] = self._queues[key] - 1
        if not left:
            del self._queues[key]

    def share(self, base: str, queue: str, free: int) -> int:
        """Return how much of the *free* room of *base* a *queue* may take.

        Up to its even share all of it, beyond that all but what is left to others: one slot, if they have used none
        lately. What it has on its way to other targets doesn't count.
        """
        users = self._used.get(base, ())
        count = len(users) + (queue not in users)
        if count == 1:
            others = self.queues.get(base, 0) > 1 and free + self.in_flight.get(base, 0) >= _ENOUGH
            return max(free - 1, 0) if others else free
        room = free + self.in_flight.get(base, 0)
        mine = self._queues.get((base, queue), 0)
        return min(free, max(-(-room // count) - mine, free - (room + _PART // 2) // _PART, 0))

    def idle(self, base: str, queue: str) -> bool:
        """Tell whether *queue* has nothing on its way to *base*."""
        return (base, queue) not in self._queues

    def alone(self, base: str, queue: str) -> bool:
        """Tell whether no other queue than *queue* has used *base* lately."""
        users = self._used.get(base, ())
        return not users or (len(users) == 1 and queue in users)

    def forget(self, now: Micros) -> None:
        """Forget who has used nothing for a while."""
        for base, users in list(self._used.items()):
            kept = {queue: at for queue, at in users.items() if abs(now - at) < _LATELY}
            if kept:
                self._used[base] = kept
            else:
                del self._used[base]
