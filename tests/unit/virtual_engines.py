"""Real engines on one real store in virtual time, and targets that answer as a test says; nothing else goes wrong."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from random import Random
from typing import Any, NamedTuple

from deferlib.core.model import SECOND, Delivery, Kind, Micros, NewTask, QueueConfig, QueueSource, Result, TaskRow
from deferlib.core.scheduler import Rules, Scheduler
from deferlib.engine.engine import Engine
from deferlib.engine.lines import Lines
from deferlib.store.sqlite import SqliteStore
from deferlib.testing import VirtualClock

LEASE: Micros = 30 * SECOND
SLOTS = 32
APP = "http://app"
TURN: Micros = 500  # how long one takes, at least


class Answer(NamedTuple):
    """What a target says, after how long."""

    took: Micros = SECOND // 100
    status: int = 200
    kind: Kind = Kind.ANSWERED
    retry_after: Micros = 0


HANGS = Answer(took=10_000 * SECOND, status=0, kind=Kind.TIMEOUT)
REFUSES = Answer(took=1_000, status=0, kind=Kind.UNREACHABLE)


class Start(NamedTuple):
    """A request as its target saw it."""

    at: Micros
    queue: str
    id: int
    base: str
    attempt: int
    node: str


class Town:
    """The store, its engines and their targets. *respond* tells what a target answers to a delivery."""

    def __init__(self, *configs: QueueConfig, respond: Callable[[Delivery, Micros], Answer] = lambda *_: Answer()) -> None:
        self.clock = VirtualClock(datetime(2030, 1, 1, tzinfo=UTC))
        self.store = SqliteStore(":memory:")
        self.store.migrate()
        self.store.run(lambda tx: tx.put_queues(configs or [QueueConfig(name="default")], QueueSource.FILE))
        self.respond = respond
        self.begun = self.now
        self.starts: list[Start] = []
        self.ended: Counter[str] = Counter()
        self.engines: list[Node] = []
        self.turn, self.lease = TURN, LEASE
        self._ids = count(1)
        self._events: list[tuple[Micros, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    @property
    def now(self) -> Micros:
        return self.clock.now()

    @property
    def seconds(self) -> float:
        """How much time has passed."""
        return (self.now - self.begun) / SECOND

    def engine(self, name: str = "one", **rules: Any) -> Node:
        node = Node(self, name, **rules)
        self.engines.append(node)
        return node

    def put(self, *configs: QueueConfig) -> None:
        self.store.run(lambda tx: tx.put_queues(configs, QueueSource.FILE))

    def add(self, number: int, queue: str = "default", *, target: str = "", url: str = "/", wait: Micros = 0) -> list[int]:
        """Add so many tasks to a queue; return their ids."""
        ids = [next(self._ids) for _ in range(number)]
        rest = (target, "", "", "", "", 0, 0, b"", b"")
        eta = self.now + wait
        tasks = [NewTask(id, id, queue, None, "push", eta, self.now, "POST", url, *rest) for id in ids]
        self.store.run(lambda tx: tx.add(self.now, tasks))
        for node in self.engines:
            node.engine.wake()
        return ids

    def at(self, at: Micros, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (at, next(self._order), event, arguments))

    def run(self, seconds: float, until: Callable[[], object] = lambda: False) -> None:
        """Let so much time pass, or less if *until* comes true."""
        end = self.now + round(seconds * SECOND)
        while self._events and self._events[0][0] <= end and not until():
            at, _, event, arguments = heapq.heappop(self._events)
            self.clock.move_to(max(at, self.now))
            event(*arguments)
        if not until():
            self.clock.move_to(max(end, self.now))

    def waiting(self, queue: str = "default") -> int:
        with self.store.read() as tx:
            return tx.stats(self.now, [queue])[0].tasks

    def row(self, id: int, queue: str = "default") -> TaskRow:
        with self.store.read() as tx:
            [row] = tx.find(queue, [str(id)])
        return row

    def times(self, queue: str = "default", base: str | None = None) -> list[Micros]:
        """Return when requests of a queue came to their target, or to *base* alone."""
        return [each.at for each in self.starts if each.queue == queue and base in (None, each.base)]


class Node:
    """One engine, and what it has on its way: to each target as much at once as it has slots, the rest in line."""

    def __init__(self, town: Town, name: str, *, look_ahead: int = 0, slots: int = SLOTS, **rules: Any) -> None:
        self.town, self.name, self.alive = town, name, True
        self.slots, self.look_ahead = slots, look_ahead
        self.running: dict[tuple[int, int], Delivery] = {}
        self.free: Counter[str] = Counter()  # of each base, less than all of them
        self.lines: dict[str, Lines] = {}
        self.turns = 0
        self.writes = 0
        self.most_in_line = 0
        self._found: list[Result] = []
        self._turn_at: Micros | None = None
        given = {"node": name, "lease": town.lease, "base": APP, "target": _named, "concurrency": slots, **rules}
        self.scheduler = Scheduler(Rules(**given), Random(0))
        counted: Any = _Counted(town.store, self)
        self.engine = Engine(counted, self, self.scheduler, town.clock, node=name, lease=town.lease)
        self.wake()

    def kill(self) -> None:
        """Be gone, as by SIGKILL; the requests it made are dropped."""
        self.alive = False
        self.town.engines.remove(self)

    def _turn(self, at: Micros) -> None:
        if not self.alive or at != self._turn_at:
            return
        self._turn_at = None
        self.turns += 1
        until = self.engine.turn()
        self._schedule(max(until, self.town.now + self.town.turn))

    def _schedule(self, at: Micros) -> None:
        if self.alive and (self._turn_at is None or at < self._turn_at):
            self._turn_at = at
            self.town.at(at, self._turn, at)

    # --- its transport --------------------------------------------------------------------------------------------------

    def room(self, base: str) -> int:
        return max(0, self.slots - self.free[base] - self._in_line(base) + self.look_ahead)

    def passes(self, base: str, queue: str) -> bool:
        return self.free[base] < self.slots

    def _in_line(self, base: str) -> int:
        return sum(1 for _ in self.lines.get(base, ()))

    def send(self, delivery: Delivery) -> None:
        if self.free[delivery.base] < self.slots:
            self._start(delivery)
        else:
            self.lines.setdefault(delivery.base, Lines()).put(delivery)
            self.most_in_line = max(self.most_in_line, sum(map(self._in_line, self.lines)))

    def _start(self, delivery: Delivery) -> None:
        now, claim = self.town.now, delivery.claim
        answer = self.town.respond(delivery, now)
        self.town.starts.append(Start(now, claim.queue, claim.id, delivery.base, claim.attempts, self.name))
        self.free[delivery.base] += 1
        self.running[claim[:2]] = delivery
        took = min(answer.took, delivery.deadline)
        self.town.at(now + took, self._end, delivery, answer, now)

    def _end(self, delivery: Delivery, answer: Answer, started: Micros) -> None:
        fence = delivery.claim[:2]
        if not self.alive or fence not in self.running:
            return
        self._leave(delivery)
        self.town.ended[delivery.claim.queue] += answer.status == 200
        self._found.append(
            Result(*fence, answer.kind, started, self.town.now, answer.status, retry_after=answer.retry_after)
        )
        self._schedule(self.town.now)

    def _leave(self, delivery: Delivery) -> None:
        del self.running[delivery.claim[:2]]
        self.free[delivery.base] -= 1
        if self._in_line(delivery.base):
            self._start(self.lines[delivery.base].take())

    def results(self) -> Sequence[Result]:
        found, self._found = self._found, []
        return found

    def cancel(self, id: int, claims: int) -> None:
        if (id, claims) in self.running:
            self._leave(self.running[id, claims])
        for line in self.lines.values():
            line.keep(lambda each: each.claim[:2] != (id, claims))

    def withdraw(self) -> Sequence[Result]:
        lines, self.lines = self.lines, {}
        now = self.town.now
        return [Result(*each.claim[:2], Kind.UNSENT, now, now) for line in lines.values() for each in line]

    def wait(self, until: Micros) -> None: ...

    def wake(self) -> None:
        self._schedule(self.town.now)

    def close(self) -> None: ...


class _Counted:
    """The store, with its write transactions counted for a node."""

    def __init__(self, real: SqliteStore, node: Node) -> None:
        self._real, self._node = real, node

    @contextmanager
    def begin(self, *, durable: bool = True) -> Any:
        self._node.writes += 1
        with self._real.begin(durable=durable) as tx:
            yield tx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _named(target: str) -> str | None:
    return f"http://{target}"


def beyond(times: Sequence[Micros], rate: float, size: int) -> float:
    """Return by how much the busiest window has more than *size* + *rate* times its length; 0 or less if none has."""
    worst, least = float("-inf"), float("inf")
    for number, at in enumerate(times):
        surplus = number - rate * (at - times[0]) / SECOND
        least = min(least, surplus)
        worst = max(worst, surplus - least + 1 - size)
    return round(worst, 6)
