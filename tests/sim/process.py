"""One simulated process: a real engine, with a transport and a store that fail as the seed says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from deferlib.core.model import SECOND, Delivery, Kind, Micros, Result
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.engine.engine import Engine
from deferlib.errors import EnqueueUnknownError, StoreBusyError, StoreError, StoreFullError
from tests.sim.oracle import Fence, must

if TYPE_CHECKING:
    from tests.sim.world import World

LEASE: Micros = 3 * SECOND
GRACE: Micros = 2 * SECOND


class Crash(BaseException):
    """The process is gone."""


class Glitch(Exception):
    """Something failed that has nothing to do with the store."""


class Fate(NamedTuple):
    """How one delivery goes."""

    wait: Micros  # until the request is there
    runs: Micros | None  # how long the handler takes; None: it never gets the request
    result: tuple[Kind, int, str]  # what the engine is told
    told: Micros  # when, after the request was there
    success: bool
    retry_after: Micros = 0


class Node:
    """A process with an engine in it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.alive = True
        self.busy = self.missed = self.draining = self.terminated = False
        self.turn_at: Micros | None = None
        self.hint_pending = False
        self.stop_at: Micros = 0
        self.trouble_at: Micros = world.now  # when something last went wrong with it
        self.idle_turns = 0  # in a row, without a moment between them
        self.owed: set[Fence] = set()  # answers it took and hasn't settled
        self.hurried = False  # its last commit left them for the next one
        self.store = FaultyStore(world, self)
        self.transport = SimTransport(world, self)
        rules = Rules(
            node=name, lease=LEASE, in_process=world.in_process, base="http://app", target={}.get,
            concurrency=self.transport.slots,
        )  # fmt: skip
        scheduler = Scheduler(rules, Random(world.rng.random()))
        self.engine = Engine(
            self.store, self.transport, scheduler, world.clock, node=name, lease=LEASE, step=self.step
        )  # fmt: skip
        self.schedule(world.now)

    def __repr__(self) -> str:
        return self.name

    def flies(self, fence: Fence) -> bool:
        return self.alive and fence in self.transport.live

    def schedule(self, at: Micros) -> None:
        at = max(at, self.world.now)
        if self.alive and (self.turn_at is None or at < self.turn_at):
            self.turn_at = at
            self.world.at(at, self.turn, at)

    def turn(self, at: Micros) -> None:
        if not self.alive or at != self.turn_at:
            return
        self.turn_at = None
        if self.busy:  # stalled in a turn
            self.missed = True
            return
        self.busy, begun, writes = True, self.world.now, self.store.writes
        try:
            if self.terminated and not self.draining:
                self.draining, self.stop_at = True, self.world.now + GRACE
                self.engine.drain()
            until = self.engine.turn()
            if until > self.world.now and not self.draining:
                self.world.oracle.turned(self, begun)
        except Crash:
            self.world.crash(self)
            return
        except (StoreError, Glitch):
            until = self.world.now + SECOND // 20
        finally:
            self.busy = False
        if self.draining and (self.engine.idle or self.world.now >= self.stop_at):
            self.leave()
            return
        spun = until <= self.world.now and self.world.now == begun and self.store.writes == writes
        self.idle_turns = self.idle_turns + 1 if spun else 0
        must(self.idle_turns < 10, self, "spins")
        if self.missed:
            self.missed, until = False, self.world.now
        self.schedule(max(until, self.world.now + self.world.rng.randrange(100, 2_000)))

    def leave(self) -> None:
        self.busy = True
        self.world.oracle.sometimes["drained"] += self.engine.idle
        with suppress(StoreError):
            self.engine.leave()
        self.world.crash(self)  # what still runs goes on by itself, and its lease runs out

    def hint(self) -> None:
        self.hint_pending = False
        if self.alive:
            self.engine.wake()

    def step(self, name: str) -> None:
        """Crash, fail or stall at a step of the engine."""
        world, chance = self.world, self.world.chance
        if chance(0.004):
            world.note("crash", self, name)
            raise Crash
        if chance(0.02 if name == "answer" else 0.004):
            self.glitch(name)
        if chance(0.006):
            stall = world.rng.randrange(SECOND // 10, 2 * LEASE)
            world.note("stall", self, name, stall)
            self.stall(stall, alone=name in ("settle", "claim", "commit"))

    def glitch(self, where: str) -> None:
        self.world.note("glitch", self, where)
        self.trouble_at = self.world.now
        raise Glitch

    def stall(self, span: Micros, *, alone: bool) -> None:
        """Stand still while the others go on, unless this one holds the store's lock."""
        self.trouble_at = self.world.now + span
        if alone:
            for node in self.world.nodes:
                node.trouble_at = self.trouble_at
            self.world.clock.move_to(self.world.now + span)
        else:
            self.world.run(self.world.now + span)


class SimTransport:
    """Carries deliveries to the simulated target."""

    def __init__(self, world: World, node: Node) -> None:
        self.world, self.node = world, node
        self.slots = world.rng.randint(2, 8)
        self.live: dict[Fence, Delivery] = {}
        self.waiting: set[Fence] = set()
        self.found: list[Result] = []

    def room(self, base: str) -> int:
        return max(0, self.slots - len(self.live))

    def passes(self, base: str, queue: str) -> bool:
        return self.room(base) > 0

    def send(self, delivery: Delivery) -> None:
        fence = delivery.claim[:2]
        if self.world.chance(0.03):
            self.node.glitch("transport")
        self.world.oracle.sent(self.node, delivery)
        self.live[fence] = delivery
        self.waiting.add(fence)
        fate = self.world.fate(delivery)
        self.world.at(self.world.now + fate.wait, self.start, fence, fate)

    def start(self, fence: Fence, fate: Fate) -> None:
        if not self.node.alive or fence not in self.waiting:
            return
        self.waiting.discard(fence)
        if fate.runs is not None:
            self.world.starts(fence[0])
            self.world.at(self.world.now + fate.runs, self.world.ends, fence[0], fate.success, self.node)
        self.world.at(self.world.now + fate.told, self.tell, fence, fate, self.world.now)

    def tell(self, fence: Fence, fate: Fate, started: Micros) -> None:
        if self.node.alive and fence in self.live:
            kind, status, outcome = fate.result
            now, wait = self.world.now, fate.retry_after
            self.found.append(Result(*fence, kind, started, now, status, outcome, retry_after=wait))
            self.node.schedule(self.world.now)

    def results(self) -> Sequence[Result]:
        found, self.found = self.found, []
        for result in found:
            del self.live[result.id, result.claims]
        self.world.oracle.answered(self.node, found)
        return found

    def cancel(self, id: int, claims: int) -> None:
        self.live.pop((id, claims), None)
        self.waiting.discard((id, claims))
        self.found = [result for result in self.found if result[:2] != (id, claims)]

    def withdraw(self) -> Sequence[Result]:
        now = self.world.now
        back = [Result(*fence, Kind.UNSENT, now, now) for fence in sorted(self.waiting)]
        for fence in self.waiting:
            del self.live[fence]
        self.waiting.clear()
        self.world.oracle.answered(self.node, back)
        return back

    def wait(self, until: Micros) -> None: ...

    def wake(self) -> None:
        self.node.schedule(self.world.now)

    def close(self) -> None: ...


class FaultyStore:
    """The real store, as one process sees it: sometimes it fails, and sometimes nobody knows whether it did."""

    def __init__(self, world: World, node: Node | None = None) -> None:
        self.world, self.node = world, node
        self.writes = 0
        self.unsynced = False

    @contextmanager
    def begin(self, *, durable: bool = True) -> Iterator[Any]:
        world, chance = self.world, self.world.chance
        self.writes += 1
        if self.node is not None and chance(0.004):
            world.note("stall", self.node, "before begin")
            self.node.stall(world.rng.randrange(SECOND, 2 * LEASE), alone=False)
        if chance(0.03):
            self._trouble("failed begin")
            raise StoreBusyError
        definite, forgotten, kept = chance(0.015), chance(0.015), chance(0.015)
        recorder, changes = Recorder(world), world.connection.total_changes()
        try:
            with world.store.begin(durable=durable) as tx:
                recorder.tx = world.tamper(tx)
                yield recorder
                if definite or forgotten:
                    raise _Undone
        except _Undone:
            self._trouble("failed commit" if definite else "unknown commit")
            raise (StoreFullError if definite else EnqueueUnknownError) from None
        self.unsynced = not durable
        world.oracle.committed(self.node, recorder.verbs)
        for verb, _, arguments, result in recorder.verbs:
            world.log.append(f"{world.now} {self.node or 'client'} {verb} {_brief(verb, arguments, result)}")
        if world.connection.total_changes() != changes:
            world.version += 1
            world.hint()
        if kept:
            self._trouble("unknown commit")
            raise EnqueueUnknownError

    @contextmanager
    def read(self) -> Iterator[Any]:
        with self.world.store.read() as tx:
            yield tx

    def sync(self) -> None:
        if self.world.chance(0.015):
            self.unsynced = False  # nobody knows
            self._trouble("failed sync")
            raise EnqueueUnknownError
        self.unsynced = False

    def run(self, work: Callable[[Any], Any]) -> Any:
        with self.begin() as tx:
            return work(tx)

    def _trouble(self, what: str) -> None:
        self.world.note(what, self.node)
        if self.node is not None:
            self.node.trouble_at = self.world.now


class _Undone(Exception):
    pass


def _brief(verb: str, arguments: Sequence[Any], result: Any) -> str:
    """Return what a verb did as short text, for the log."""
    match verb:
        case "settle":
            pairs = zip(arguments, result, strict=True)
            return ", ".join(f"{o.action} {o.id}@{o.claims} {o.at}{'' if held else ' REFUSED'}" for o, held in pairs)
        case "claim":
            return ", ".join(f"{claim.id}@{claim.claims} until {claim.until}" for claim in result)
        case "add":
            return ", ".join(f"{task.id} {result}" for task, result in zip(arguments, result, strict=True))
    return f"{arguments} {result}"


class Recorder:
    """A transaction that remembers what was asked of it and what it answered."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tx: Any = None
        self.verbs: list[tuple[str, Micros, Any, Any]] = []

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(self.tx, verb)(*arguments, **options)
            match verb:
                case "add" | "settle" | "claim":
                    self.verbs.append((verb, arguments[0], list(arguments[1]), list(result)))
                case "delete":
                    self.verbs.append((verb, arguments[0], [(arguments[1], name) for name in arguments[2]], list(result)))
                case "own":
                    self.verbs.append((verb, arguments[0], (), list(result)))
                case "put_note":
                    self.world.oracle.sometimes["troubled target told"] += '"targets": [[' in arguments[1]
                    self.world.oracle.sometimes["slowed queue told"] += '"queues": [[' in arguments[1]
                case "pause":
                    self.verbs.append((verb, self.world.now, list(arguments[0]), result))
            return result

        return call
