"""A bench for the engine: the real scheduler and store, a clock that stands still, a transport that does as it is told."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random
from typing import Any

from deferlib.core.model import SECOND, Delivery, Kind, Micros, NewTask, QueueConfig, QueueSource, Result, TaskRow
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.engine.engine import Engine
from deferlib.engine.observer import Observer
from deferlib.store.sqlite import SqliteStore
from deferlib.testing import VirtualClock

LEASE = 30 * SECOND


class Carrier:
    """A transport whose deliveries wait until a test starts or answers them."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.slots = 100
        self.sent: list[Delivery] = []
        self.started: set[int] = set()
        self.found: list[Result] = []
        self.cancelled: list[tuple[int, int]] = []
        self.wakes = 0
        self.broken = False
        self.during_wait: deque[Callable[[], None]] = deque()

    def answer(self, delivery: Delivery, status: int = 200, kind: Kind = Kind.ANSWERED, outcome: str = "") -> None:
        self.sent.remove(delivery)
        now = self.clock.now()
        self.found.append(Result(*delivery.claim[:2], kind, now, now, status, outcome))

    def room(self, base: str) -> int:
        return max(0, self.slots - len(self.sent))

    def passes(self, base: str, queue: str) -> bool:
        return self.room(base) > 0

    def send(self, delivery: Delivery) -> None:
        if self.broken:
            self.broken = False
            raise OSError("too many open files")
        self.sent.append(delivery)

    def results(self) -> Sequence[Result]:
        found, self.found = self.found, []
        return found

    def cancel(self, id: int, claims: int) -> None:
        self.cancelled.append((id, claims))
        self.sent = [delivery for delivery in self.sent if delivery.claim[:2] != (id, claims)]

    def withdraw(self) -> Sequence[Result]:
        back = [delivery for delivery in self.sent if delivery.claim.id not in self.started]
        for delivery in back:
            self.answer(delivery, kind=Kind.UNSENT)
        return self.results()

    def wait(self, until: int) -> None:
        if self.during_wait:
            self.during_wait.popleft()()
        else:
            self.clock.move_to(max(until, self.clock.now()))

    def wake(self) -> None:
        self.wakes += 1

    def close(self) -> None: ...


class Store:
    """The real store, counted, that fails as told. If it is *on_disk*, it has something to sync."""

    def __init__(self, real: SqliteStore) -> None:
        self.real = real
        self.begun: list[bool] = []  # durable or not
        self.looked = 0  # how often it was only read
        self.on_disk = False
        self.syncs = 0
        self._unsynced_at: int | None = None  # the number of the last commit, if that wasn't durable
        self.before_sync: Callable[[], None] = lambda: None
        self.before_begin: Callable[[], None] = lambda: None
        self.before_commit: Callable[[], None] = lambda: None
        self.after_commit: Callable[[], None] = lambda: None

    @contextmanager
    def begin(self, *, durable: bool = True) -> Iterator[Any]:
        self.begun.append(durable)
        self.before_begin()
        with self.real.begin(durable=durable) as tx:
            yield tx
            self.before_commit()
        self._unsynced_at = None if durable else self.real.commits
        self.after_commit()

    @property
    def unsynced(self) -> bool:
        return self.on_disk and self._unsynced_at == self.real.commits  # or else there was another, a durable one

    def sync(self) -> None:
        self.before_sync()
        self.syncs += self.unsynced
        self._unsynced_at = None

    @contextmanager
    def read(self) -> Iterator[Any]:
        self.looked += 1
        with self.real.read() as tx:
            yield tx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Bench:
    def __init__(self) -> None:
        self.clock = VirtualClock(datetime(2030, 1, 1, tzinfo=UTC))
        self.store = Store(SqliteStore(":memory:"))
        self.store.migrate()
        self.steps: Counter[str] = Counter()
        self.at_step: dict[str, Callable[[], None]] = {}
        self.put(QueueConfig(name="default"))
        self.carrier = Carrier(self.clock)
        self.engine = self.boot("me", self.carrier)

    def boot(self, node: str, carrier: Carrier, *, observer: Observer | None = None, take_over: bool = False) -> Engine:
        scheduler = Scheduler(Rules(node=node, lease=LEASE, base="http://app", target={}.get), Random(0))
        return Engine(
            self.store,  # type: ignore[arg-type]  # the store's wrapper passes everything on
            carrier,
            scheduler,
            self.clock,
            node=node,
            lease=LEASE,
            observer=observer,
            take_over=take_over,
            step=self.step,
        )

    def step(self, name: str) -> None:
        self.steps[name] += 1
        self.at_step.pop(name, lambda: None)()

    @property
    def now(self) -> int:
        return self.clock.now()

    def put(self, *configs: QueueConfig) -> None:
        self.store.real.run(lambda tx: tx.put_queues(configs, QueueSource.FILE))

    def add(self, *ids: int, queue: str = "default", name: str | None = None, fail_fast: int = 0, wait: Micros = 0) -> None:
        eta, rest = self.now + wait, (0, fail_fast, b"", b"")
        tasks = [
            NewTask(id, id, queue, name, "push", eta, self.now, "POST", "/", "", "", "", "", "", *rest)
            for id in ids
        ]  # fmt: skip
        self.store.real.run(lambda tx: tx.add(self.now, tasks))
        self.engine.wake()

    def row(self, id: int, queue: str = "default") -> TaskRow | None:
        with self.store.real.begin() as tx:
            rows = tx.find(queue, [str(id)])
        return rows[0] if rows else None

    def deliver(self, *ids: int, queue: str = "default") -> list[Delivery]:
        self.add(*ids, queue=queue)
        self.engine.turn()
        return list(self.carrier.sent)
