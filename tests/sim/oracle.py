"""What must be true after every event, judged from outside: by what was committed and by what the target saw.

The oracle keeps its own account of every task, moved by committed verbs and their results, and compares it with the
rows as they are in the database, read past the store's verbs. It knows nothing of the engine or the scheduler.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deferlib.core.backoff import policy_of
from deferlib.core.model import (
    SECOND,
    Action,
    AddResult,
    Claim,
    DeleteResult,
    Delivery,
    Kind,
    Micros,
    NewTask,
    Outcome,
    QueueConfig,
    Result,
)
from deferlib.core.verdict import NO_SLOT

if TYPE_CHECKING:
    from tests.sim.world import Node, World

REREAD: Micros = SECOND  # how soon an engine must know that a queue is paused
FAST_PAUSE: Micros = SECOND // 50  # and look for tasks that don't wait for a slot, where hint follows upon hint
ROWS = """
select id, claims, attempts, failures, executions, lost, due > eta, due, due is null from tasks
union all
select id, claims, attempts, failures, executions, lost, 0, -1, 2 from dead
"""
LIVE, TOMBSTONE, DEAD = range(3)

Fence = tuple[int, int]


class Violation(AssertionError):
    """A promise was broken."""


def must(true: bool, *what: object) -> None:
    if not true:
        raise Violation(" ".join(map(str, what)))


@dataclass
class Case:
    """What is known of one task."""

    task: NewTask
    acknowledged: bool = False
    state: int | None = None  # None: not in the store
    wanted: bool = True  # nobody deleted it
    succeeded: bool = False  # some run of it did
    claims: int = 0
    attempts: int = 0
    failures: int = 0
    executions: int = 0
    lost: int = 0
    leased: bool = False
    until: Micros = 0  # end of the lease
    ready: Micros = 0  # since when anyone may have known that it is due
    holder: Node | None = None
    results: dict[int, Result] = field(default_factory=dict)  # what the engine was told, by fence


class Oracle:
    def __init__(self, world: World, configs: Sequence[QueueConfig]) -> None:
        self.world = world
        self.configs = {config.name: config for config in configs}
        self.cases: dict[int, Case] = {}
        self.names: dict[tuple[str, str], int] = {}
        self.sometimes: Counter[str] = Counter()
        self.sent_fences: set[Fence] = set()
        self.dispatched: dict[str, deque[Micros]] = {name: deque() for name in self.configs}
        self.paused: dict[str, Micros] = {}
        self.resumed: dict[str, Micros] = {}
        self.owners: dict[str, Node] = {}
        self.hasty: dict[int, bool] = {}  # claimed because they don't wait for a slot, and whether none was free
        self.checked = -1

    # --- what was committed -----------------------------------------------------------------------------------------

    def committed(self, node: Node | None, verbs: Sequence[tuple[str, Micros, Sequence[Any], Any]]) -> None:
        """Take a transaction's verbs, in their order, as (name, now, arguments, result)."""
        if node is not None and verbs:  # leaving does without
            settled = {outcome[:2] for verb, _, outcomes, _ in verbs if verb == "settle" for outcome in outcomes}
            owed = node.owed - settled
            # What has come beside a backlog is claimed first: once, not twice in a row.
            must(not owed or not (settled or node.hurried), node, "committed without settling what it was answered:", owed)
            node.hurried = bool(owed)
            self.sometimes["hurry"] += node.hurried
            node.owed &= owed
        taken: dict[tuple[int, int], tuple[str, Micros]] = {}  # what is claimed, and not refused in the same transaction
        for verb, now, arguments, result in verbs:
            match verb:
                case "add":
                    for task, added in zip(arguments, result, strict=True):
                        self._added(task, added)
                case "settle":
                    for outcome, held in zip(arguments, result, strict=True):
                        self._settled(outcome, held)
                        taken.pop(outcome[:2], None)
                case "claim":
                    fast = {spec.queue for spec in arguments if spec.fail_fast}
                    for claim in result:
                        self._claimed(node, now, claim, claim.queue in fast)
                        if claim.queue not in fast:
                            taken[claim[:2]] = claim.queue, now
                case "delete":
                    for (queue, name), deleted in zip(arguments, result, strict=True):
                        self._deleted(self.names.get((queue, name)) or int(name), deleted)
                case "own":
                    for queue in result:
                        self.sometimes["takeover"] += self.owners.get(queue, node) is not node
                        self.owners[queue] = node
                case "pause":
                    for queue in arguments:
                        if self.paused.pop(queue, None) is None:
                            self.paused[queue] = now
                        else:
                            self.resumed[queue] = now
        for queue, now in taken.values():
            if self.configs[queue].rate:
                self._rate(self.configs[queue], now)
        self.hasty.clear()

    def _added(self, task: NewTask, result: AddResult) -> None:
        case = self.cases.get(task.id)
        name = (task.queue, task.name)
        holder = self.names.get(name) if task.name else None  # type: ignore[arg-type]  # the name is given
        if result is AddResult.ADDED:
            must(holder is None, "the name", name, "was given away twice")
            # Without a name, an add repeated after an unknown outcome is at least once.
            must(case is None or (case.state is None and not task.name), "task", task.id, "was added twice")
            acknowledged = case is not None and case.acknowledged
            ready = max(task.eta, self.world.now)
            self.cases[task.id] = Case(task, state=LIVE, claims=0, acknowledged=acknowledged, ready=ready)
            if task.name:
                self.names[task.queue, task.name] = task.id
        elif result is AddResult.EXISTS:
            must(case is not None and case.state is not None, "a task that isn't there exists:", task.id)
        else:
            must(result in (AddResult.TAKEN, AddResult.TOMBSTONED) and holder not in (None, task.id), result, name)

    def _deleted(self, id: int, result: DeleteResult) -> None:
        case = self.cases[id]
        must(result is DeleteResult.DELETED, "not deleted:", id, result)
        case.state, case.leased, case.wanted = (TOMBSTONE if case.task.name else None), False, False

    def _settled(self, outcome: Outcome, held: bool) -> None:
        case = self.cases[outcome.id]
        valid = case.state == LIVE and case.leased and case.claims == outcome.claims
        must(held == valid, "a settle was", "taken" if held else "refused", "though its fence says otherwise:", outcome)
        if not held:
            self.sometimes["fenced settle"] += 1
            return
        self.sometimes[str(outcome.action)] += 1
        case.leased = outcome.action is Action.RENEW
        case.ready = max(outcome.at, self.world.now)
        result = case.results.get(outcome.claims)
        match outcome.action:
            case Action.RENEW:
                case.until = outcome.at
            case Action.RELEASE:
                case.attempts -= 1
                must(result is None or result.kind is Kind.UNSENT, "released though it was sent:", outcome)
            case Action.RETRY | Action.DONE | Action.DEAD:
                self._ended(case, outcome, result)

    def _ended(self, case: Case, outcome: Outcome, result: Result | None) -> None:
        reported = result is not None and (
            result.kind in (Kind.TIMEOUT, Kind.MALFORMED) or result.outcome == "retry" or result.status in (429, 503)
        )
        case.failures += reported
        case.executions += reported or (result is not None and result.status == 200)
        limit = policy_of(case.task.retry, self.configs[case.task.queue].retry).retry_limit
        exceeded = limit is not None and case.failures > limit
        if outcome.reason == NO_SLOT:
            self.sometimes["failed fast"] += 1
            must(self.hasty.get(outcome.id), "failed though a slot was free:", outcome)
            must(
                outcome.action is not Action.DONE and not outcome.executed and not outcome.charged,
                "it didn't run:",
                outcome,
            )
        if outcome.action is Action.RETRY:
            must(not exceeded, "tried again past its retry limit:", outcome)
            asked = 0 if result is None or result.status not in (429, 503) else result.ended + result.retry_after
            must(outcome.at >= asked, "tried again before its target asked to:", outcome, "before", asked)
        elif outcome.action is Action.DONE:
            must(case.succeeded, "done without a success:", outcome)
            case.state = TOMBSTONE if case.task.name else None
        else:
            permanent = result is not None and result.outcome == "permanent"
            killer = self.world.in_process and case.lost >= self.configs[case.task.queue].lost_limit
            must(permanent or (exceeded and reported) or killer, "given up without a reason:", outcome)
            case.state = DEAD
            self.sometimes["killer given up"] += killer

    def _claimed(self, node: Node | None, now: Micros, claim: Claim, fast: bool) -> None:
        case = self.cases[claim.id]
        must(node is not None and case.state == LIVE, "claimed what isn't there:", claim)
        must(claim.claims > case.claims, "the fence went back:", claim)
        if case.leased:
            must(case.until <= now, "claimed while leased:", claim, "until", case.until)
            must(not self._healthy(case), "a lease ran out though its engine", case.holder, "was well:", claim)
            must(case.holder is not node or not node.flies((claim.id, case.claims)), node, "takes its own", claim)
            case.lost += 1
            self.sometimes["lease expiry"] += 1
        if fast:
            assert node is not None
            must(bool(case.task.fail_fast), "failed though it would have waited for a slot:", claim)
            self.hasty[claim.id] = self._crowded(node, claim.queue, now)
        case.claims, case.leased, case.until, case.holder = claim.claims, True, claim.until, node
        case.attempts += 1
        case.ready = max(claim.until, self.world.now)
        paused = self.paused.get(claim.queue)
        must(paused is None or now <= paused + REREAD, "claimed from a paused queue:", claim)

    def _healthy(self, case: Case) -> bool:
        node = case.holder
        return node is not None and node.alive and node.trouble_at < case.until - self.world.lease

    def _rate(self, config: QueueConfig, now: Micros) -> None:
        """Never more than bucket + rate * t in any window that ends now."""
        times = self.dispatched[config.name]
        times.append(now)
        assert config.rate is not None
        for count, at in enumerate(reversed(times), start=1):
            allowed = config.bucket_size + config.rate * (now - at) / SECOND
            must(count <= allowed, f"{count} dispatches of {config.name} in {(now - at) / SECOND} s, {allowed} allowed")

    # --- what the engines and the target did ------------------------------------------------------------------------

    def sent(self, node: Node, delivery: Delivery) -> None:
        id, claims = fence = delivery.claim[:2]
        case = self.cases[id]
        must(fence not in self.sent_fences, node, "sent a claim twice:", delivery)
        self.sent_fences.add(fence)
        held = case.state == LIVE and case.leased and case.claims == claims and self.world.now < case.until
        must(held or not case.wanted, node, "sent what it doesn't hold:", delivery)

    def answered(self, node: Node, results: Sequence[Result]) -> None:
        for result in results:
            self.cases[result.id].results[result.claims] = result
            node.owed.add((result.id, result.claims))

    def turned(self, node: Node, begun: Micros) -> None:
        """Check, after a turn that asks for no other one at once, that nothing waits for a slot that asks to fail fast."""
        known = begun - self.world.poll - FAST_PAUSE
        if node.trouble_at > known:  # whoever stood still may have missed a hint
            return
        for id, case in self.cases.items():
            if case.task.fail_fast and case.state == LIVE and case.ready < known and self._full(node, case.task.queue):
                must(False, node, "let task", id, "wait for a slot since", case.ready)

    def _full(self, node: Node, queue: str) -> bool:
        """Tell whether *node* lacks slots for *queue*, and nothing else."""
        config, now = self.configs[queue], self.world.now
        limited = config.max_concurrent is not None
        if config.rate or (limited and self.owners.get(queue) is not node) or now <= self.resumed.get(queue, 0) + REREAD:
            return False
        if node.engine._scheduler._queues[queue].throttle.active:
            return False
        flying = sum(self.cases[id].task.queue == queue for id, _ in node.transport.live)
        crowded = config.max_concurrent is not None and flying >= config.max_concurrent
        return queue not in self.paused and (crowded or node.transport.room("") <= 0)

    def _crowded(self, node: Node, queue: str, now: Micros) -> bool:
        """Tell whether *node* has no free slot for *queue*; what it claimed and has yet to send takes one, too.

        Nor has it one while its target can't be reached, and fewer while that is slowed.
        """
        flying = {id for id, _ in node.transport.live if self.cases[id].task.queue == queue}
        held = {id for id, case in self.cases.items() if case.leased and case.holder is node and case.task.queue == queue}
        limit = self.configs[queue].max_concurrent
        free = node.engine._scheduler._health.room("http://app", now, node.transport.room(""))
        return free <= 0 or (limit is not None and len(flying | (held - self.hasty.keys())) >= limit)

    def ran(self, id: int) -> None:
        self.cases[id].succeeded = True

    # --- after every event ------------------------------------------------------------------------------------------

    def check(self) -> None:
        if self.checked != self.world.version:
            self.checked = self.world.version
            self._compare(self.world.rows(ROWS))
        flying: Counter[str] = Counter()
        for node in self.world.nodes:
            for id, claims in node.transport.live:
                case = self.cases[id]
                if node.alive and case.leased and case.claims == claims and case.until > self.world.now:
                    flying[case.task.queue] += 1
        for queue, count in flying.items():
            limit = self.configs[queue].max_concurrent
            must(limit is None or count <= limit, f"{count} deliveries of {queue} at once, {limit} allowed")

    def _compare(self, rows: Sequence[tuple[Any, ...]]) -> None:
        found = {}
        for id, claims, attempts, failures, executions, lost, leased, due, state in rows:
            if state == DEAD or id not in found:  # a named dead letter also leaves its tombstone
                found[id] = state
            case = self.cases.get(id)
            must(case is not None, "a row that nobody added:", id)
            assert case is not None
            if state == LIVE:
                row = (claims, attempts, failures, executions, lost, bool(leased))
                known = (case.claims, case.attempts, case.failures, case.executions, case.lost, case.leased)
                must(
                    row == known, f"task {id} has (claims, attempts, failures, executions, lost, leased)", row, "not", known
                )
                must(not leased or due == case.until, "the lease of task", id, "ends at", due, "not at", case.until)
        for id, case in self.cases.items():
            must(found.get(id) == case.state, "task", id, "should be", case.state, "and is", found.get(id))
            gone = case.acknowledged and case.wanted and case.state is None
            must(not gone or case.succeeded, "task", id, "was acknowledged, and is lost")

    def finished(self) -> None:
        """Check the end of a run: everything that was acknowledged has ended."""
        waiting = [id for id, case in self.cases.items() if case.state == LIVE]
        must(not waiting, "without any more faults these tasks never ended:", waiting)
