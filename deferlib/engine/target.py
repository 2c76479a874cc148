"""A target as the HTTP transport has it: its slots, what waits for them, and which of that goes together."""

from __future__ import annotations

from deferlib.core.model import MINUTE, SECOND, Delivery, Micros
from deferlib.engine.batching import BYTES, LONGEST, Batching
from deferlib.engine.lines import Lines
from deferlib.engine.window import Window

FIRST_PACE: Micros = 1_000_000  # assumed of a target that has not answered yet: no look-ahead
LATELY: Micros = MINUTE  # since when a target counts as one that several queues use
BEYOND = 2  # requests more than its window has, for queues that have nothing on its way
HELD_UP: Micros = SECOND  # without an answer to a batch: others don't follow it


class Target:
    """A base URL: its slots, and what waits for them."""

    __slots__ = (
        *("_queue", "batches", "batching", "flying", "free", "lines", "name", "pace", "shared_until", "waiting"),
        *("under_way", "window"),
    )

    def __init__(self, base: str, concurrency: int, batching: Batching) -> None:
        scheme, _, rest = base.partition("://")
        self.name = f"{scheme}://{rest.rpartition('@')[2]}"  # for people: without a password
        self.free = concurrency
        self.lines = Lines()
        self.waiting = 0  # deliveries in them
        self.pace: Micros = FIRST_PACE  # moving average of how long a slot is taken by a delivery
        self.batching = batching
        self.batches: dict[object, Micros] = {}  # that are on their way, and since when; the oldest first
        self.flying = 0  # requests without an answer, of calls at the handler's URL
        self.under_way: dict[str, int] = {}  # requests without an answer, of each queue
        self.shared_until: Micros = 0  # when its last queue change is forgotten
        self._queue = ""  # of what was put last
        self.window: Window | None = None  # None while its handler hasn't said how long calls take

    @property
    def open(self) -> int:
        """How many requests more it may have."""
        return self.free if self.window is None else min(self.free, int(self.window.size) - self.flying)

    def put(self, delivery: Delivery, now: Micros = 0) -> None:
        """Let *delivery* wait for a slot, from *now* on."""
        self.lines.put(delivery)
        self.waiting += 1
        self.sees(delivery.claim.queue, now)

    def sees(self, queue: str, now: Micros) -> None:
        """Take that something of *queue* comes here."""
        if queue != self._queue:
            self.shared_until = now + LATELY if self._queue else 0
            self._queue = queue

    def lets_by(self, queue: str) -> bool:
        """Tell whether the next of *queue* passes the line: others wait there, or keep the server busy, and it doesn't.

        Alone, and beyond the window: its server begins it as soon as what it works on is done.
        """
        if self.free <= 0 or queue in self.under_way or self.lines.peek(queue) is not None:
            return False
        return (self.waiting > 0 or self.open <= 0) and (
            self.window is None or self.flying < int(self.window.size) + BEYOND
        )

    def begin(self, queue: str, windowed: bool) -> None:
        """Take a slot for a request of *queue*."""
        self.free -= 1
        self.flying += windowed
        self.under_way[queue] = self.under_way.get(queue, 0) + 1

    def end(self, queue: str, windowed: bool) -> None:
        """Give it back."""
        self.free += 1
        self.flying -= windowed
        left = self.under_way[queue] = self.under_way[queue] - 1
        if not left:
            del self.under_way[queue]

    def put_back(self, delivery: Delivery) -> None:
        """Let *delivery*, which was taken and didn't start, wait before the others of its queue."""
        self.lines.put_back(delivery)
        self.waiting += 1

    def take(self) -> Delivery:
        """Return whose turn it is; only while something waits."""
        self.waiting -= 1
        return self.lines.take()

    def take_together(self, now: Micros = 0) -> list[Delivery]:
        """Return whose turn it is, and what of the same queue goes with it in one request; only while something waits."""
        first = self.take()
        taken, batching = [first], self.batching
        expected = batching.expected(first.claim) if self.waiting and not self._held_up(now) else None
        if expected is None:
            return taken
        queue, size = first.claim.queue, 0
        most, time = batching.size(self.waiting, expected), expected
        while len(taken) < most and (following := self.lines.peek(queue)) is not None:
            expected = batching.expected(following.claim)
            if expected is None or following.deadline != first.deadline:  # one that hangs is cut off with its request
                break
            claim = following.claim
            time += expected
            size += len(claim.body) + len(claim.headers) + len(claim.name or "")
            if time > LONGEST or size > BYTES:
                break
            taken.append(self.lines.follow(queue))
            self.waiting -= 1
        return taken

    def _held_up(self, now: Micros) -> bool:
        """Tell whether a batch has no answer for so long that no others should follow it."""
        return bool(self.batches) and now - next(iter(self.batches.values())) > HELD_UP

    def drop(self, fence: tuple[int, int]) -> None:
        """Forget what waits of this claim."""
        if self.waiting:
            self.lines.keep(lambda delivery: delivery.claim[:2] != fence)
            self.waiting = sum(1 for _ in self.lines)
