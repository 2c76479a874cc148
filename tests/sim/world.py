"""Several real engines on one real store, in virtual time, with everything going wrong that can; by one seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from random import Random
from typing import Any

import apsw

from deferlib.core.model import (
    SECOND,
    AddResult,
    Delivery,
    Kind,
    Micros,
    NewTask,
    QueueConfig,
    QueueSource,
    RetryPolicy,
)
from deferlib.errors import EnqueueUnknownError, StoreError
from deferlib.store.sqlite import SqliteStore
from deferlib.testing import VirtualClock
from tests.sim.oracle import LIVE, Oracle, must
from tests.sim.process import LEASE, Fate, FaultyStore, Node

STORM: Micros = 30 * SECOND  # how long things go wrong
RECOVERY = 60 * SECOND  # until no target and no queue is slowed any more
CALM: Micros = 300 * SECOND  # after that, how long the engines may take to finish everything
POLL: Micros = SECOND // 2  # how late an engine notices what another process wrote
START = datetime(2030, 1, 1, tzinfo=UTC)

RETRY = RetryPolicy(min_backoff=SECOND // 10, max_backoff=2 * SECOND, max_doublings=4)
QUEUES = [
    QueueConfig(name="default", retry=RETRY, deadline=8 * SECOND),
    QueueConfig(name="fragile", retry=RetryPolicy(min_backoff=0, retry_limit=1), deadline=8 * SECOND),
    QueueConfig(name="metered", retry=RETRY, rate=2.0, bucket_size=3, deadline=8 * SECOND),
    QueueConfig(name="narrow", retry=RETRY, max_concurrent=2, deadline=8 * SECOND),
    QueueConfig(name="both", retry=RETRY, rate=5.0, bucket_size=2, max_concurrent=1, deadline=8 * SECOND),
]


class World:
    """Everything of one seed."""

    def __init__(self, seed: int, *, tamper: Callable[[Any], Any] = lambda tx: tx, peace: bool = False) -> None:
        self.seed, self.tamper = seed, tamper
        self.rng = Random(seed)
        self.clock = VirtualClock(START)
        self.end_of_storm = self.now + STORM
        self.storm, self.peace = not peace, peace  # in peace nothing fails but the tasks themselves
        self.in_process = self.rng.random() < 0.4
        self.lease, self.poll = LEASE, POLL
        self.events: list[tuple[Micros, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order, self.names, self.numbers = count(), count(), count()
        self.log: list[str] = []
        self.version = 0  # of the database
        self.outage_until: Micros = 0
        self.overloaded_until: dict[str, Micros] = {}  # by queue
        self.running: dict[int, int] = {}  # handlers by task
        self.unknown = 0  # adds whose outcome is still unknown
        self.store = SqliteStore(":memory:")
        others = apsw.connections()
        self.store.migrate()
        [self.connection] = [each for each in apsw.connections() if each not in others]
        self.store.run(lambda tx: tx.put_queues(QUEUES, QueueSource.FILE))
        self.oracle = Oracle(self, QUEUES)
        self.client = FaultyStore(self)
        self.nodes: list[Node] = []
        self.boot(self.rng.choice((2, 2, 3)))
        self.plan()

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> Micros:
        return self.clock.now()

    def at(self, at: Micros, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (at, next(self.order), event, arguments))

    def run(self, until: Micros, done: Callable[[], bool] = lambda: False) -> None:
        """Let happen what happens until then. A stalled engine calls this too, while it stands still."""
        while self.events and self.events[0][0] <= until and not done():
            at, _, event, arguments = heapq.heappop(self.events)
            self.clock.move_to(max(at, self.now))
            event(*arguments)
            self.oracle.check()
        if not done():
            self.clock.move_to(max(until, self.now))

    def live(self) -> None:
        """Run the storm, then the calm; everything must end, and then nothing must happen any more."""
        try:
            self.run(self.end_of_storm)
            self.storm = False
            self.note("calm")
            for queue in list(self.oracle.paused):
                self.pause(queue)
            self.run(self.now + CALM, self.over)
            self.oracle.finished()
            self.run(self.now + RECOVERY)
            self.hint()  # one that says nothing is no reason to go on
            self.run(self.now + 3 * SECOND)
            writes = [node.store.writes for node in self.nodes]
            self.run(self.now + 3 * SECOND)
            must(writes == [node.store.writes for node in self.nodes], "idle engines write")
        except Exception as error:
            error.add_note(f"replay: python -m tests.sim {self.seed}{' peace' if self.peace else ''}")
            raise
        finally:
            self.store.close()

    def over(self) -> bool:
        return not self.unknown and all(case.state != LIVE for case in self.oracle.cases.values())

    def chance(self, share: float) -> bool:
        return self.storm and self.now < self.end_of_storm and self.rng.random() < share

    def note(self, what: str, *details: object) -> None:
        self.oracle.sometimes[what] += 1
        self.log.append(f"{self.now} {what} {' '.join(map(str, details))}")

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Read the database past the store's verbs."""
        return self.connection.execute(query).fetchall()

    # --- what happens -----------------------------------------------------------------------------------------------

    def plan(self) -> None:
        rng, begin = self.rng, self.now
        for _ in range(rng.randint(15, 50)):
            self.at(begin + rng.randrange(STORM), self.add, self.task(next(self.numbers)))
        if not self.peace:
            self.at(begin + rng.randrange(STORM // 2), self.overload, rng.choice(("default", "metered", "narrow")))
        for _ in range(0 if self.peace else rng.randint(0, 3)):
            self.at(begin + rng.randrange(STORM), self.outage)
            self.at(begin + rng.randrange(STORM), self.terminate)
            self.at(begin + rng.randrange(STORM), self.kill)
            self.at(begin + rng.randrange(STORM), self.freeze)
            self.at(begin + rng.randrange(STORM), self.delete)
            queue = rng.choice(QUEUES).name
            self.at(begin + rng.randrange(STORM // 2), self.pause, queue)

    def task(self, number: int, queue: str = "") -> NewTask:
        rng = self.rng
        name = f"name-{rng.randrange(12)}" if rng.random() < 0.3 else None
        queue = queue or rng.choice(QUEUES).name
        eta = self.now + (rng.randrange(2 * STORM) if rng.random() < 0.3 else 0)
        retry = '{"retry_limit":2,"max_backoff":1000000}' if rng.random() < 0.2 else ""
        fail_fast = int(rng.random() < 0.3)
        return NewTask(
            number + 1, rng.getrandbits(60), queue, name, "push", eta, self.now, "POST", "/work", "", "", "", "", retry,
            0, fail_fast, b"", b"",
        )  # fmt: skip

    def add(self, task: NewTask, tries: int = 0) -> None:
        self.unknown -= tries > 0
        try:
            [result] = self.client.run(lambda tx: tx.add(self.now, [task]))
        except EnqueueUnknownError:
            self.unknown += 1
            self.at(self.now + self.rng.randrange(SECOND), self.add, task, tries + 1)
            return
        except StoreError:
            # Nothing was added by this call. After an unknown outcome the client must go on until it knows.
            if tries:
                self.unknown += 1
                self.at(self.now + self.rng.randrange(SECOND), self.add, task, tries)
            return
        self.note("add", task.id, task.queue, task.name, result)
        if result in (AddResult.ADDED, AddResult.EXISTS):
            self.oracle.cases[task.id].acknowledged = True

    def boot(self, nodes: int = 1) -> None:
        for _ in range(nodes):
            self.nodes.append(Node(self, f"engine-{next(self.names)}"))
            self.note("boot", self.nodes[-1])

    def crash(self, node: Node) -> None:
        """Drop an engine and begin another one; the handlers it called go on, unless they run in its process."""
        node.alive = False
        self.nodes.remove(node)
        self.at(self.now + self.rng.randrange(3 * SECOND), self.boot)

    def kill(self) -> None:
        node = self.rng.choice(self.nodes) if self.nodes else None
        if node is not None and not node.busy:
            self.note("kill", node)
            self.crash(node)

    def terminate(self) -> None:
        if self.nodes:
            node = self.rng.choice(self.nodes)
            self.note("terminate", node)
            node.terminated = True
            node.schedule(self.now)

    def freeze(self) -> None:
        node = self.rng.choice(self.nodes) if self.nodes else None
        if node is not None and not node.busy:
            self.note("freeze", node)
            node.busy = True
            node.stall(self.rng.randrange(SECOND, 3 * LEASE), alone=False)
            node.busy = False
            node.schedule(self.now)

    def outage(self) -> None:
        self.outage_until = self.now + self.rng.randrange(5 * SECOND)
        self.note("outage", self.outage_until)

    def overload(self, queue: str) -> None:
        """Let the target answer 503 to all of a queue for a while, in which much is added to it."""
        until = min(self.now + self.rng.randrange(5 * SECOND, 15 * SECOND), self.end_of_storm)
        self.overloaded_until[queue] = until
        self.note("overload", queue, until)
        for _ in range(12):
            task = self.task(next(self.numbers), queue)._replace(eta=self.now, fail_fast=0)
            self.at(self.now + self.rng.randrange(SECOND), self.add, task)

    def pause(self, queue: str) -> None:
        """Pause a queue, or resume it."""
        paused = queue not in self.oracle.paused
        self.note("pause" if paused else "resume", queue)
        try:
            self.client.run(lambda tx: tx.pause([queue], paused))
        except StoreError:
            return
        if paused:
            self.at(self.now + self.rng.randrange(STORM // 3), self.pause, queue)

    def delete(self) -> None:
        """Delete a task, whether it runs or not."""
        live = [case.task for case in self.oracle.cases.values() if case.state == LIVE]
        if live:
            task = self.rng.choice(live)
            self.note("delete", task.id)
            with suppress(StoreError):
                self.client.run(lambda tx: tx.delete(self.now, task.queue, [task.name or str(task.id)]))

    def hint(self) -> None:
        """Every engine notices a change of the file, sooner or later."""
        for node in self.nodes:
            if not node.hint_pending:
                node.hint_pending = True
                self.at(self.now + self.rng.randrange(POLL), node.hint)

    # --- the target -------------------------------------------------------------------------------------------------

    def fate(self, delivery: Delivery) -> Fate:
        rng, deadline = self.rng, delivery.deadline
        wait, quick = rng.randrange(20_000), rng.randrange(1_000, 300_000)
        ok = (Kind.ANSWERED, 200, "ok")
        slow = rng.randrange(LEASE // 2, deadline)
        failed = (Kind.ANSWERED, 500, "retry")
        if self.peace:
            spans, ends = (quick, slow), ((ok, True), (failed, False))
            took, (end, success) = rng.choice(spans), rng.choice(ends)
            return Fate(wait, took, end, took, success)
        if not self.storm:
            return Fate(wait, quick, ok, quick, True)
        pause = rng.choice((0, 0, SECOND // 2, 3 * SECOND))
        if self.now < self.overloaded_until.get(delivery.claim.queue, 0):
            return Fate(wait, quick, (Kind.ANSWERED, 503, ""), quick, False, pause)
        if self.now < self.outage_until:
            return Fate(wait, None, (Kind.UNREACHABLE, 0, ""), quick, False)
        fates = {
            Fate(wait, quick, ok, quick, True): 50,
            Fate(wait, slow, ok, slow, True): 8,  # longer than a lease, perhaps
            Fate(rng.randrange(2 * SECOND), quick, ok, quick, True): 4,  # waits for a connection
            Fate(wait, quick, failed, quick, False): 20,
            Fate(wait, quick, (Kind.ANSWERED, 503, ""), quick, False, pause): 3,
            Fate(wait, quick, (Kind.ANSWERED, 429, ""), quick, False, pause): 3,
            Fate(wait, quick, (Kind.ANSWERED, 200, "permanent"), quick, False): 2,
            Fate(wait, quick, (Kind.ANSWERED, 500, "undecodable"), quick, False): 2,
            Fate(wait, quick, (Kind.MALFORMED, 0, ""), quick, False): 2,
            Fate(wait, None, (Kind.UNREACHABLE, 0, ""), quick, False): 4,
            Fate(wait, None, (Kind.UNKNOWN, 0, ""), quick, False): 2,
            Fate(wait, slow, (Kind.UNKNOWN, 0, ""), quick, True): 3,  # the connection breaks while it runs
            Fate(wait, quick, (Kind.UNKNOWN, 0, ""), 2 * quick, True): 3,  # or before its answer comes
            Fate(wait, 2 * deadline, (Kind.TIMEOUT, 0, ""), deadline, True): 3,
        }
        return rng.choices(list(fates), list(fates.values()))[0]

    def starts(self, id: int) -> None:
        self.note("run", id)
        if self.running.get(id) or self.oracle.cases[id].succeeded:
            self.note("duplicate run", id)
        self.running[id] = self.running.get(id, 0) + 1

    def ends(self, id: int, success: bool, node: Node) -> None:
        self.running[id] -= 1
        if success and (node.alive or not self.in_process):
            self.note("success", id)
            self.oracle.ran(id)
