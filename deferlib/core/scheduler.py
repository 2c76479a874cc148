"""What to dispatch, when, and what an answer means: every decision of the engine, pure.

The scheduler holds what one engine knows: its queues, what it has in flight, and when to look again. The engine asks
`plan` and `renewals` (which change no state, so that a failed transaction leaves none), and tells what came of them
through `settled`, `claimed` and `finished`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter, itemgetter
from random import Random
from typing import NamedTuple

from deferlib.core import bucket
from deferlib.core.crowding import Crowding
from deferlib.core.fitness import Fitness
from deferlib.core.health import Ailment, Condition, Health
from deferlib.core.model import (
    SECOND,
    Action,
    Claim,
    ClaimSpec,
    Delivery,
    Kind,
    Limiter,
    Micros,
    Mode,
    Outcome,
    QueueConfig,
    QueueRow,
    Result,
)
from deferlib.core.queue_state import QueueState
from deferlib.core.rules import Rules, leaves
from deferlib.core.sharing import Sharing
from deferlib.core.verdict import UNTRUSTED, release, verdict
from deferlib.errors import InvalidUrlError

CLAIM_BYTES = 4 * 1024 * 1024  # what one claim takes of one queue, in bytes of bodies
CLAIM = 256  # how many tasks a turn claims of a queue at most: 15 ms, in which nothing else happens
CLAIM_BESIDE = 32  # where other queues use the same target: theirs may have to wait for a whole turn
RESTART: Micros = 2 * SECOND  # no machine is back sooner after a power cut
FAST_CLAIM = 100  # how many tasks that don't wait for a slot a turn fails at most
NEVER: Micros = 2**62
_served = attrgetter("served")
_QUEUE = itemgetter(Claim._fields.index("queue"))
OVERLOADED = 503
_AILMENTS = {
    Kind.UNREACHABLE: Ailment.UNREACHABLE,
    Kind.UNKNOWN: Ailment.FAILING,
    Kind.TIMEOUT: Ailment.FAILING,
    Kind.MALFORMED: Ailment.FAILING,
}


class Slowdown(NamedTuple):
    """What is told of a queue when its enforced rate changes."""

    queue: str
    since: Micros
    rate: float | None  # dispatches per second; None: as before
    until: Micros  # nothing before


class _Flight:
    __slots__ = ("base", "claim", "renew_at", "until")

    def __init__(self, claim: Claim, base: str, renew_at: Micros) -> None:
        self.claim = claim
        self.base = base
        self.until = claim.until
        self.renew_at = renew_at


class Scheduler:
    """One engine's decisions. Not thread-safe: the engine's thread owns it."""

    def __init__(self, rules: Rules, rng: Random) -> None:
        self._rules = rules
        self._rng = rng
        self._queues: dict[str, QueueState] = {}
        self._flights: dict[int, _Flight] = {}  # in order of renewal: every lease is equally long
        self._health = Health(rules.concurrency)
        self._fitness = Fitness(rules, rng)
        self._throttled: set[str] = set()  # queues whose enforced rate has changed, untold
        self._crowding = Crowding(rules.concurrency)
        self._sharing = Sharing()
        self._isolated: int | None = None  # the suspect that runs alone
        self._turn = 0
        self._draining = False
        self.fenced = 0  # settles that came too late

    # --- what the engine asks ---------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many deliveries are on their way."""
        return len(self._flights)

    @property
    def in_flight_by_base(self) -> Mapping[str, int]:
        """How many deliveries are on their way to which base URL. From any thread: they are copied in one step."""
        return dict(self._sharing.in_flight)

    def configure(self, rows: Iterable[QueueRow]) -> None:
        """Take the queues as the store has them now."""
        known = {row.name: row for row in rows}
        for name in self._queues.keys() - known.keys():
            del self._queues[name]
        for name, row in known.items():
            queue = self._queues.get(name)
            if queue is None:
                queue = self._queues[name] = QueueState(name)
                queue.in_flight = sum(flight.claim.queue == name for flight in self._flights.values())
            queue.configure(row)
        live = [queue for queue in self._queues.values() if queue.config.mode is Mode.PUSH and not queue.disabled]
        self._sharing.queues = Counter(map(self._base, live))

    def quiet(self, now: Micros) -> list[str]:
        """Return the queues with nothing due, as far as is known, or nothing on its way, where others have a backlog."""
        live = [queue for queue in self._queues.values() if queue.live]
        names = [queue.config.name for queue in live if queue.look_at > now or not queue.in_flight]
        return names if any(queue.in_flight and queue.look_at <= now for queue in live) else []

    def woken(self, now: Micros) -> list[str]:
        """Take a hint: any queue may have something due. Returns those where that isn't known."""
        for queue in self._queues.values():
            queue.woken(now)
        return list(self._queues)

    def looked_all(self, names: Iterable[str], due: Mapping[str, Micros]) -> None:
        """Take when something is due next in each of the queues *names*."""
        for name in names:
            self._queues[name].look_at = due.get(name, NEVER)

    @property
    def draining(self) -> bool:
        """Whether nothing more is claimed."""
        return self._draining

    def drain(self) -> None:
        """Claim nothing from now on."""
        self._draining = True

    def plan(self, now: Micros, room: Callable[[str], int], only: Collection[str] | None = None) -> list[ClaimSpec]:
        """Return how much of which queue to claim at *now*; *room* tells how many deliveries a base URL can still take.

        *only* are the names of the queues to claim from, if not all.

        Changes no state. Queues share the room evenly, those that come short first in the next turn; beyond its share of
        all that the target takes a queue leaves some to others.
        """
        if self._draining:
            return []
        queues = self._queues.values() if only is None else [self._queues[name] for name in only if name in self._queues]
        ready = [queue for queue in queues if queue.look_at <= now and queue.hold(now) is None]
        if not ready:
            return []
        ready.sort(key=_served)  # who was served longest ago comes first, and so does who comes short
        bases = [self._base(queue) for queue in ready]
        left = {base: self._health.room(base, now, room(base)) for base in set(bases)}
        share = {base: -(-free // bases.count(base)) for base, free in left.items()}
        specs = []
        for queue, base in zip(ready, bases, strict=True):
            most = CLAIM if self._sharing.alone(base, queue.config.name) else CLAIM_BESIDE
            count = min(share[base], self._share(queue, base, left[base]), queue.allowance(now), most)
            if count > 0:
                left[base] -= count
                specs.append(self._spec(queue, count, now))
        return specs

    def plan_beside(
        self, now: Micros, room: Callable[[str], int], passes: Callable[[str, str], bool], names: Collection[str]
    ) -> list[ClaimSpec]:
        """Return how much to claim of the queues *names*, which had nothing due, beside the backlog of others.

        As `plan` does, and one of each queue that found no room, if it has nothing on its way and *passes*, called with a
        base URL and the queue, tells that it wouldn't have to wait for what is in line there. Changes no state.
        """
        specs = self.plan(now, room, names)
        planned = {spec.queue for spec in specs}
        for name in names:
            queue = self._queues.get(name)
            if queue is None or name in planned or self._draining or queue.look_at > now or queue.hold(now) is not None:
                continue
            base = self._base(queue)
            if self._sharing.idle(base, name) and self._health.room(base, now, 1) and passes(base, name):
                specs.append(self._spec(queue, 1, now))
        return specs

    def full(self, now: Micros, room: Callable[[str], int]) -> list[str]:
        """Return the queues without a free slot where a fail-fast task may be due: those tasks don't wait for one.

        Changes no state. A queue that lacks more than slots (paused, another engine's, without a token) is left alone.
        """
        if self._draining:
            return []
        return [
            name
            for name, queue in self._queues.items()
            if queue.fast_at <= now
            and queue.look_at <= now
            and not self._has_slot(queue, now, room)
            and not queue.closed(now)
        ]

    def fast_specs(
        self, now: Micros, full: Iterable[str], specs: Sequence[ClaimSpec], room: Callable[[str], int]
    ) -> list[ClaimSpec]:
        """Return what to claim of the *full* queues that doesn't wait for a slot, beside *specs*. Changes no state.

        It is claimed only to be failed, and spends no tokens, unless there are slots that are left to other queues.
        """
        until = now + self._rules.lease
        fast = []
        for name in full:
            queue = self._queues[name]
            if queue.fast_at > now:
                continue
            free = self._free(queue, now, room)
            if not free:
                fast.append(ClaimSpec(name, FAST_CLAIM, CLAIM_BYTES, until, fail_fast=True))
                continue
            base = self._base(queue)
            taken = sum(spec.limit for spec in (*specs, *fast) if self._base(self._queues[spec.queue]) == base)
            count = min(free - taken, queue.allowance(now))
            if count > 0:
                fast.append(ClaimSpec(name, count, CLAIM_BYTES, until, queue.interval, fail_fast=True))
        return fast

    def peeks(self, specs: Iterable[ClaimSpec]) -> list[str]:
        """Return the limited queues of *specs*: they are owned only if something is due there.

        Owning one writes, other engines take any write for a hint, and so do this one's own watchers: idle engines would
        keep each other writing for ever.
        """
        return [spec.queue for spec in specs if self._queues[spec.queue].config.limited]

    def lasting(self, peeked: Iterable[str]) -> bool:
        """Tell whether claims of the *peeked* queues must survive a power cut.

        Undone, they would be made again, and the tokens they spent with them. Where the bucket is full again before any
        machine is up again, that comes to nothing: at 1,000 a second one transaction in ten milliseconds needn't wait for
        the disk. What holds a slot may still run on another machine.
        """
        configs = [self._queues[name].config for name in peeked]
        return any(
            config.max_concurrent is not None or not config.rate or config.bucket_size > config.rate * (RESTART / SECOND)
            for config in configs
        )

    def limited(self, now: Micros, peeked: Iterable[str], due: Mapping[str, Micros]) -> list[str]:
        """Return the limited queues to own: those with something due of the *peeked* ones, and those in flight here."""
        names = {name for name in peeked if due.get(name, NEVER) <= now}
        return [name for name, q in self._queues.items() if q.config.limited and (name in names or q.in_flight)]

    def admit(self, now: Micros, specs: Iterable[ClaimSpec], owned: Mapping[str, Limiter]) -> list[ClaimSpec]:
        """Return *specs* cut to what the limiters in the store allow; a limited queue of another owner is left out."""
        admitted = []
        for spec in specs:
            queue = self._queues[spec.queue]
            if queue.config.limited:
                limiter = owned.get(spec.queue)
                if limiter is None:
                    continue
                if queue.interval:
                    tokens = bucket.tokens(limiter.tat, queue.interval, queue.config.bucket_size, now)
                    if not tokens:
                        continue
                    if spec.interval:
                        spec = spec._replace(limit=min(spec.limit, tokens))
            admitted.append(spec)
        return admitted

    def drained(self, specs: Iterable[ClaimSpec], claims: Iterable[Claim]) -> list[str]:
        """Return the queues that gave less than asked: when something is due there next must be looked up."""
        got = _count(claims)
        return [spec.queue for spec in specs if not spec.fail_fast and got.get(spec.queue, 0) < spec.limit]

    def filled(self, now: Micros, specs: Iterable[ClaimSpec], claims: Iterable[Claim]) -> list[str]:
        """Return the queues that may be full once *claims* are sent: when a fail-fast task is due there must be looked up.

        Looked up in the same transaction, because a turn of its own for it would settle few answers, and sync all the same.
        """
        got = _count(claims)
        return [
            spec.queue
            for spec in specs
            if self._queues[spec.queue].fast_at <= now and (spec.fail_fast or got.get(spec.queue, 0) >= spec.limit)
        ]

    def refusals(
        self, now: Micros, specs: Iterable[ClaimSpec], claims: Iterable[Claim], room: Callable[[str], int]
    ) -> list[Outcome]:
        """Return the outcomes of those *claims* of *specs* that may not be sent.

        They are past their limits, without a target, to run alone, or don't wait for a slot and found none. Changes no
        state. Settled in the transaction that claimed them: an engine that is killed between two would leave
        them leased, and count each as an attempt that was lost with its process.
        """
        full = {spec.queue for spec in specs if spec.fail_fast and not self._free(self._queues[spec.queue], now, room)}
        refused, isolated = [], self._isolated
        left: dict[str, int] = {}  # room of the targets that claims have beside their queue's
        for name, group in groupby(claims, _QUEUE):
            config, is_full = self._config(name), name in full
            for claim in group:
                outcome = self._fitness.unfit(now, claim, config, isolated, is_full)
                if outcome is None and _has_its_own(claim):
                    outcome = self._crowded_out(now, claim, config, left, room)
                if outcome is not None:
                    refused.append(outcome)
                elif claim.lost and self._fitness.suspect(claim, config):
                    isolated = claim.id
        return refused

    def refunds(self, specs: Iterable[ClaimSpec], refusals: Iterable[Outcome]) -> dict[str, Micros]:
        """Return what the limiters get back, as `Tx.refund` takes it: what isn't sent costs no tokens."""
        intervals = {spec.queue: spec.interval for spec in specs if spec.interval}
        back: dict[str, Micros] = {}
        for outcome in refusals:
            if outcome.queue in intervals:
                back[outcome.queue] = back.get(outcome.queue, 0) + intervals[outcome.queue]
        return back

    def _crowded_out(
        self, now: Micros, claim: Claim, config: QueueConfig, left: dict[str, int], room: Callable[[str], int]
    ) -> Outcome | None:
        """Return the outcome of a fit claim whose own target has no room; its queue was asked for by another one's."""
        base = self._rules.destination(claim, config)
        if self._rules.in_process or base == self._base(self._queues[claim.queue]):
            return None
        if base not in left:
            left[base] = self._health.room(base, now, room(base))
        left[base] -= 1
        if left[base] >= 0:
            return None
        until = max(self._health.until(base), self._crowding.again(base, now, -left[base]))
        return release(claim, until, self._health.trouble(base) or f"target {base} takes no more at once")

    def renewals(self, now: Micros) -> list[Outcome]:
        """Return the renewals due at *now*. Changes no state."""
        outcomes = []
        for flight in self._flights.values():
            if flight.renew_at > now:
                break
            claim = flight.claim
            outcomes.append(Outcome(claim.id, claim.claims, claim.queue, Action.RENEW, now + self._rules.lease))
        return outcomes

    def forfeited(self, now: Micros, outcomes: Sequence[Outcome], foreign: Iterable[str]) -> set[int]:
        """Return the tasks not to be renewed: of a *foreign* queue (limited, another's), and past their lease.

        Their fence may still hold, but the new owner counts on finding nothing of the former one in flight: renewed,
        they would come on top of what it dispatches.
        """
        queues = set(foreign)
        return {
            outcome.id
            for outcome in outcomes
            if outcome.action is Action.RENEW and outcome.queue in queues and self._flights[outcome.id].until <= now
        }

    def wake_at(self, now: Micros, room: Callable[[str], int]) -> Micros:
        """Return when `Engine.turn` should run next if nothing else happens."""
        at = NEVER
        for flight in self._flights.values():
            at = flight.renew_at
            break
        if self._draining:
            return at
        for queue in self._queues.values():
            look_at = queue.look_at
            if look_at >= at:
                continue
            closed = queue.closed(now)
            if closed is not None:
                look_at = NEVER if closed.until is None else max(look_at, closed.until + queue.gathering)
            look_at = max(look_at, self._health.until(self._base(queue))) if self._health.states else look_at
            if look_at < at and not self._has_slot(queue, look_at, room):  # then only what doesn't wait for one counts
                look_at = max(look_at, queue.fast_at)
            at = min(at, look_at)
        return at

    def flying(self, now: Micros, claims: Iterable[Claim], refusals: Iterable[Outcome]) -> dict[str, int]:
        """Return how many tasks of which queue are in flight with these *claims*, where the store knows another number.

        Said again within the lease, so that what a killed engine said ends with its leases. Changes no state.
        """
        refused = {outcome.id for outcome in refusals}
        taken = _count(claim for claim in claims if claim.id not in refused)
        stale = now - self._rules.lease // 2
        return {
            name: count
            for name, queue in self._queues.items()
            if (count := queue.in_flight + taken.get(name, 0)) != queue.flown or (count and queue.flown_at <= stale)
        }

    # --- what the engine tells --------------------------------------------------------------------------------------

    def settled(self, now: Micros, outcomes: Sequence[Outcome], accepted: Sequence[bool]) -> list[Claim]:
        """Take the committed settles; return the claims in flight that lost their lease to another one."""
        lost: list[Claim] = []
        self.fenced += len(outcomes) - sum(accepted)
        # Nearly all are DONE, and of those there is no more to be learned.
        done = Action.DONE  # to look it up takes as long as all the rest of this
        notable = [pair for pair in zip(outcomes, accepted, strict=True) if pair[0].action is not done]
        for outcome, ok in notable:
            if outcome.action is not Action.RENEW:
                if outcome.action is Action.RETRY or outcome.action is Action.RELEASE:
                    self._due(outcome.queue, outcome.at)
                continue
            flight = self._flights.get(outcome.id)
            if flight is None or flight.claim.claims != outcome.claims:
                self.fenced -= not ok  # it is gone, and was counted when it went
                continue
            if ok:
                del self._flights[outcome.id]  # to the end: the order of renewal
                flight.until = outcome.at
                flight.renew_at = now + self._rules.lease // 3
                self._flights[outcome.id] = flight
            else:
                self._land(flight)
                lost.append(flight.claim)
        return lost

    def claimed(
        self,
        now: Micros,
        specs: Sequence[ClaimSpec],
        claims: Sequence[Claim],
        due: Mapping[str, Micros],
        owned: Mapping[str, Limiter],
        wanted: Iterable[str],
        refusals: Sequence[Outcome] = (),
    ) -> list[Delivery]:
        """Take the committed claims of *specs*, without the refused ones, and what else the transaction read.

        *due* has the next due time of each drained queue, *owned* the limited queues that this engine owns out of
        *wanted*. Returns what to send.
        """
        self._turn += 1
        got = _count(claims)
        self._note_put_off(now, claims, refusals)
        for name in wanted:
            self._owned(name, now, owned.get(name))
        refunds = self.refunds(specs, refusals)
        for spec in specs:
            queue, count = self._queues[spec.queue], got.get(spec.queue, 0)
            if count < spec.limit and not spec.fail_fast:
                queue.look_at = due.get(spec.queue, NEVER)
            queue.served = self._turn
            if count:
                queue.throttle.dispatched(count, now)
            if count and spec.interval:
                queue.tat = bucket.spent(queue.tat, spec.interval, count, now) - refunds.get(spec.queue, 0)
            if spec.interval and not spec.fail_fast:
                size = queue.config.bucket_size
                queue.spent = bool(count) and not bucket.tokens(queue.tat, spec.interval, size, now)
        refused = {outcome.id for outcome in refusals}
        sent = [claim for claim in claims if claim.id not in refused] if refused else claims
        return [delivery for name, group in groupby(sent, _QUEUE) for delivery in self._deliver(now, name, list(group))]

    def _note_put_off(self, now: Micros, claims: Sequence[Claim], refusals: Iterable[Outcome]) -> None:
        """Remember until when tasks with targets of their own were put off."""
        released = {outcome.id: outcome.at for outcome in refusals if outcome.action is Action.RELEASE}
        if released:
            for claim in claims:
                if claim.id in released and _has_its_own(claim):
                    with suppress(InvalidUrlError):
                        base = self._rules.destination(claim, self._config(claim.queue))
                        self._crowding.put_off(base, now, released[claim.id])

    def flown(self, now: Micros, tasks: Mapping[str, int]) -> None:
        """Take what the store was told to be in flight."""
        for name, count in tasks.items():
            queue = self._queues.get(name)
            if queue is not None:
                queue.flown, queue.flown_at = count, now

    def looked(self, now: Micros, peeked: Iterable[str], due: Mapping[str, Micros]) -> None:
        """Take what was found to be due next in the *peeked* queues."""
        for name in peeked:
            at = due.get(name, NEVER)
            if at > now:
                self._queues[name].look_at = at

    def looked_fast(self, now: Micros, queues: Iterable[str], due: Mapping[str, Micros]) -> None:
        """Take when a fail-fast task is due next in each of *queues*."""
        for name in queues:
            queue = self._queues[name]
            queue.fast_at, queue.fast_looked = due.get(name, NEVER), now

    def lease_end(self, claim: Claim) -> Micros:
        """Return when the lease of *claim* ends as far as is committed; 0 once it is lost or over."""
        flight = self._flights.get(claim.id)
        return flight.until if flight is not None and flight.claim.claims == claim.claims else 0

    def claim_of(self, result: Result) -> Claim | None:
        """Return the claim in flight that *result* ends; None if its lease was lost."""
        flight = self._flights.get(result.id)
        return flight.claim if flight is not None and flight.claim.claims == result.claims else None

    def finished(self, now: Micros, result: Result) -> Outcome | None:
        """Turn a delivery's result into its outcome; None if the lease was lost and the result counts no more."""
        flight = self._flights.get(result.id)
        if flight is None or flight.claim.claims != result.claims:
            return None
        self._land(flight)
        claim = flight.claim
        queue = self._queues.get(claim.queue)
        if _has_its_own(claim) and result.kind is Kind.ANSWERED:
            self._crowding.answered(flight.base, result.ended - result.started)
        if (result.outcome != "ok" or self._health.states) and not result.echo:
            self._learn(now, flight, queue, result)
        config = queue.config if queue is not None else QueueConfig(name=claim.queue)
        return verdict(now, claim, result, config, quarantine_after=self._rules.quarantine_after, rng=self._rng)

    def news(self, now: Micros) -> list[Condition | Slowdown]:
        """Return and forget which targets and queues are slowed now, and which are as before."""
        changed, self._throttled = self._throttled, set()
        slowdowns = [each for each in self.slowdowns(now) if each.queue in changed]
        return [*self._health.news(), *slowdowns]

    def recovered(self, now: Micros) -> list[Slowdown]:
        """Return and forget which queues aren't slowed any more: that comes with time alone, so it is to be asked for."""
        self._health.forget(now)
        self._sharing.forget(now)
        self._set_renewals_right(now)
        return [
            Slowdown(name, queue.throttle.since, None, 0)
            for name, queue in self._queues.items()
            if queue.throttle.active and queue.throttle.ended(now, queue.config.rate)
        ]

    def _set_renewals_right(self, now: Micros) -> None:
        """After the clock was set back: one that waits for the time before that would hold up all that came later."""
        soon = now + self._rules.lease // 3
        for flight in self._flights.values():
            if flight.renew_at <= soon:
                break
            flight.renew_at = soon

    def slowdowns(self, now: Micros) -> list[Slowdown]:
        """Return the queues that are slowed."""
        return [
            Slowdown(name, queue.throttle.since, queue.throttle.rate(now), queue.throttle.hold_until)
            for name, queue in self._queues.items()
            if queue.throttle.active
        ]

    def conditions(self) -> list[Condition]:
        """Return the targets in trouble."""
        return self._health.conditions()

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _learn(self, now: Micros, flight: _Flight, queue: QueueState | None, result: Result) -> None:
        """Learn from a delivery's end how its target and its queue are."""
        answered = result.kind is Kind.ANSWERED
        overloaded = answered and result.status == OVERLOADED and not result.outcome
        # What another target than the queue's answers is none of the queue's business.
        mine = queue is not None and flight.base == self._base(queue)
        if overloaded and mine and queue is not None and queue.throttle.overloaded(now, result.retry_after):
            self._throttled.add(queue.config.name)
        if self._rules.in_process:  # nothing is between us
            return
        ailment = Ailment.REFUSING if result.outcome == UNTRUSTED else _AILMENTS.get(result.kind)
        if ailment is not None:
            self._health.troubled(flight.base, now, result.started, ailment, result.error, self._in_flight_to)
        elif answered and self._health.states:
            self._health.answered(flight.base, now)

    def _spec(self, queue: QueueState, count: int, now: Micros) -> ClaimSpec:
        return ClaimSpec(queue.config.name, count, CLAIM_BYTES, now + self._rules.lease, queue.interval)

    def _owned(self, name: str, now: Micros, limiter: Limiter | None) -> None:
        queue = self._queues.get(name)
        if queue is None:
            return
        if limiter is None:
            # Ask again within the lease: the owner may have gone, and its ownership ends with its last lease.
            again = now + self._rules.lease // 4
            queue.owned_by_other_until = min(again, queue.owned_until) if queue.owned_until > now else again
        else:
            queue.owned_by_other_until = 0
            queue.tat = limiter.tat

    def _due(self, name: str, at: Micros) -> None:
        """Look at a queue no later than *at*: this engine put something there."""
        queue = self._queues.get(name)
        if queue is not None:
            queue.look_at = min(queue.look_at, at)
            queue.fast_at = min(queue.fast_at, at)

    def _deliver(self, now: Micros, name: str, claims: Sequence[Claim]) -> list[Delivery]:
        """Take *claims* of one queue as being in flight; what they have in common is done once: 0.7 µs a task less."""
        config, queue = self._config(name), self._queues.get(name)
        common = self._rules.resolve(config.target) or self._rules.base  # of those without a target of their own
        renew_at = now + self._rules.lease // 3
        bases: dict[str, int] = {}
        deliveries = []
        for claim in claims:
            id = claim.id
            former = self._flights.get(id)
            if former is not None:  # its lease ran out, and this engine has claimed it again
                self._land(former)
            if claim.lost and self._fitness.suspect(claim, config):
                self._isolated = id
            base = self._rules.destination(claim, config) if _has_its_own(claim) else common
            self._flights[id] = _Flight(claim, base, renew_at)
            bases[base] = bases.get(base, 0) + 1
            deliveries.append(Delivery(claim, base, claim.deadline or config.deadline))
        if queue is not None:
            queue.in_flight += len(claims)
        for base, count in bases.items():
            self._sharing.sent(base, name, now, count)
            if self._health.states:
                self._health.sent(base, now, count)
        return deliveries

    def _land(self, flight: _Flight) -> None:
        claim, base = flight.claim, flight.base
        del self._flights[claim.id]
        if self._isolated == claim.id:
            self._isolated = None
        queue = self._queues.get(claim.queue)
        if queue is not None:
            queue.in_flight -= 1
        self._sharing.landed(base, claim.queue)
        if self._health.states:
            self._health.landed(base)

    def _in_flight_to(self, base: str) -> int:
        return self._sharing.in_flight.get(base, 0)

    def _base(self, queue: QueueState) -> str:
        return self._rules.resolve(queue.config.target) or self._rules.base

    def _has_slot(self, queue: QueueState, at: Micros, room: Callable[[str], int]) -> bool:
        return self._share(queue, self._base(queue), self._free(queue, at, room)) > 0

    def _free(self, queue: QueueState, at: Micros, room: Callable[[str], int]) -> int:
        """Return how many slots *queue* could use, those that are left to others included."""
        base = self._base(queue)
        return 0 if queue.crowded else self._health.room(base, at, room(base))

    def _share(self, queue: QueueState, base: str, free: int) -> int:
        """Return how many of the *free* slots of *base* are *queue*'s."""
        return self._sharing.share(base, queue.config.name, free)

    def _config(self, queue: str) -> QueueConfig:
        known = self._queues.get(queue)
        return known.config if known is not None else QueueConfig(name=queue)


def _has_its_own(claim: Claim) -> bool:
    """Tell whether a claim may go to another target than its queue's."""
    return claim.target != "" or leaves(claim.url)


def _count(claims: Iterable[Claim]) -> Mapping[str, int]:
    """Return how many of *claims* are of which queue; counted in C, since each turn asks several times."""
    return Counter(map(_QUEUE, claims))
