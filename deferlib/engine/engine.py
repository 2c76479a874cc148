"""The engine: one loop that settles, renews, claims and sends.

One thread owns the scheduler, the store connection of its turns, and the transport; no lock is needed in `core`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from deferlib.clock import Clock
from deferlib.core import bucket
from deferlib.core.model import (
    MINUTE,
    SECOND,
    Action,
    Claim,
    ClaimSpec,
    Delivery,
    Kind,
    Limiter,
    Micros,
    Outcome,
    QueueRow,
    Result,
)
from deferlib.core.scheduler import Scheduler
from deferlib.engine import troubles
from deferlib.engine.observer import UNMONITORED, Monitor, Observer
from deferlib.engine.transport import ERROR_LENGTH, Transport
from deferlib.errors import StoreError
from deferlib.store import Store, Tx

log = logging.getLogger("deferlib.engine")

_REREAD: Micros = SECOND  # how often the queues' rows are looked at
_SWEEP: Micros = 10 * MINUTE
_FEW_QUEUES = 8
_BATCH = 64  # outcomes that don't wait for more
SWEEP_SLICE = 200  # rows: a few milliseconds, also where their names lie far apart
_SYNC: Micros = SECOND // 20  # how long a power cut may undo a settle: that is one more run, as of a claim that is undone
_FIRST_PAUSE: Micros = SECOND // 20  # after a turn that failed
_LONGEST_PAUSE: Micros = SECOND


def no_step(name: str) -> None:
    """Do nothing at a step."""


class Engine:
    """Delivers the due tasks of *store* through *transport*.

    *node* names this engine as an owner of limited queues; *lease* is how long a claim holds unless renewed. *observer* is
    told of every delivery, *monitor* of every turn. With *take_over* what an engine runs dies with it: a first engine then
    ends the leases it finds, instead of waiting for them. What finished waits up to *gather* for more to be settled with
    it. *step* is called with the name of each step of a turn (answer, settle, claim, commit, committed, send), where tests
    let it fail.
    """

    def __init__(
        self,
        store: Store,
        transport: Transport,
        scheduler: Scheduler,
        clock: Clock,
        *,
        node: str,
        lease: Micros,
        observer: Observer | None = None,
        monitor: Monitor = UNMONITORED,
        take_over: bool = False,
        gather: Micros = 0,
        step: Callable[[str], None] = no_step,
    ) -> None:
        self._store = store
        self._transport = transport
        self._scheduler = scheduler
        self._clock = clock
        self._node = node
        self._lease = lease
        self._observer = observer
        self._monitor = monitor
        self._take_over = take_over
        self._gather = gather
        self._step = step
        self._answers: deque[Result] = deque()  # taken from the transport, not yet judged
        self._unsettled: list[Outcome] = []
        self._settled_at: Micros = -gather  # when outcomes were settled last
        self._sync_at: Micros | None = None  # when what was settled is to be synced, if it isn't yet
        self._transacting = False
        self._outbox: deque[Delivery] = deque()  # claimed, not yet handed to the transport
        self._fresh_until: Micros = 0  # when what lies in the outbox is to be looked at again before it is sent
        self._told = ""  # by the note in the store, of what is slowed
        self._told_at: Micros = 0
        self._hinted = True
        self._pressing: Sequence[str] = ()  # queues where something has come beside the backlog of others, not yet claimed
        self._expressed = False  # in the turn before this one
        self._reread_at: Micros = 0
        self._sweep_at: Micros = clock.now() + _SWEEP
        self._stop_at: Micros | None = None
        self._stopping = False  # not an Event: a signal handler that interrupts Event.set() would wait for itself

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop` is called; then drain: finish what runs, release what hasn't started."""
        with self._store.serving(self._first), self._store.watch(self.wake):
            pause = _FIRST_PAUSE
            while not self._stopping:
                try:
                    with self._monitor:
                        until = self.turn()
                    pause = _FIRST_PAUSE
                except Exception as error:
                    until = self._troubled(error, pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                self._transport.wait(until)
            self._drain()

    def _first(self) -> None:
        """Begin as the only engine of the store."""
        if not self._take_over:  # what was pushed to an app may still run there
            return
        now = self._clock.now()
        try:
            with self._store.begin() as tx:
                taken = tx.take_over(now, now + self._lease)
        except StoreError as error:
            log.error("the leases that another engine left run out by themselves: %s", error)
        else:
            if taken:
                log.warning("tasks that ran when the last engine was killed, and run again now: %d", taken)

    def stop(self, grace: Micros) -> None:
        """Claim nothing more, and return from `run` within *grace*. From any thread or signal handler; again: sooner."""
        at = self._clock.now() + grace
        self._stop_at = at if self._stop_at is None else min(at, self._stop_at)
        self._stopping = True
        self._transport.wake()

    def wake(self) -> None:
        """Take a hint that something may be due. From any thread or signal handler."""
        self._hinted = True
        self._transport.wake()

    def reread(self) -> None:
        """Look at the queues' rows in the next turn, and not up to a second later. From any thread."""
        self._reread_at = 0
        self._transport.wake()

    def close(self) -> None:
        """Close the transport. The store belongs to whoever opened it."""
        self._transport.close()

    def drain(self) -> None:
        """Claim nothing from now on, and take back what hasn't started. Turns go on until `idle`; then `leave`.

        Our own shutdown isn't the task's failure: what hasn't started is released with its attempt refunded.
        """
        self._scheduler.drain()
        now = self._clock.now()
        self._answers += self._transport.withdraw()
        self._answers += (_unsent(delivery, now, "the engine is stopping") for delivery in self._outbox)
        self._outbox.clear()

    def leave(self) -> None:
        """Give back the queues this engine owns, unless something of theirs still runs."""
        if self._scheduler.in_flight:
            self._store.sync()
            log.warning("tasks that still ran at the end of the grace time, and run again: %d", self._scheduler.in_flight)
            return
        with self._store.begin() as tx:
            tx.disown(self._node)
            tx.put_note(troubles.NOTE + self._node, "")

    @property
    def in_flight(self) -> int:
        """How many deliveries are on their way. From any thread."""
        return self._scheduler.in_flight

    @property
    def in_flight_by_base(self) -> Mapping[str, int]:
        """How many deliveries are on their way to which base URL. From any thread."""
        return self._scheduler.in_flight_by_base

    @property
    def fenced(self) -> int:
        """How many settles came too late to count. From any thread."""
        return self._scheduler.fenced

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called. From any thread."""
        return self._stopping

    @property
    def busy(self) -> bool:
        """Whether it holds a task, or is about to. From any thread: what was due before, and isn't now, it holds."""
        return self._transacting or not self.idle

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing waits to be settled, or to be synced."""
        return not self._scheduler.in_flight and not self._unsettled and not self._unsynced

    @property
    def _unsynced(self) -> bool:
        return self._sync_at is not None and self._store.unsynced

    def turn(self) -> Micros:
        """Settle what finished, renew what runs, claim what may start, and say when to be called again.

        If the transaction fails, the error comes through and nothing is lost: outcomes are settled in the next turn (a
        settle that was committed after all changes nothing when repeated), claims that were committed after all run out.
        """
        now = self._clock.now()
        self._take_hint(now)
        if self._pressing and not self._expressed and not self._rereads(now) and self._express(now):
            return now
        self._expressed, self._pressing = False, ()
        self._sync_if_due(now)
        self._look(now)
        self._judge(now)
        specs = self._scheduler.plan(now, self._transport.room)
        specs += self._plan_fast(now, specs)
        settling = [] if self._gathers(now, specs) else self._unsettled[:]
        outcomes = settling + self._scheduler.renewals(now)
        if outcomes or specs:  # an idle turn opens no transaction
            self._transact(now, outcomes, specs)
            if settling:
                del self._unsettled[: len(settling)]  # only now: a failed begin or commit loses no outcome
                self._settled_at = now
        if self._outbox:
            self._step("send")
            self._send()
            now = self._clock.now()
        return self._wake_at(now)

    def _take_hint(self, now: Micros) -> None:
        """Look where a hint may be about something: in all queues, or beside a backlog in those that had nothing due."""
        if not self._hinted:
            return
        self._hinted = False
        quiet = self._scheduler.quiet(now)
        names = self._scheduler.woken(now)
        if not quiet and len(names) <= _FEW_QUEUES:  # to claim in vain is cheaper than to look
            return
        names = quiet or names
        with self._store.read() as tx:
            due = tx.next_due(names)
        self._scheduler.looked_all(names, due)
        if quiet:
            self._pressing = [name for name in quiet if name in due and due[name] <= now]

    def _express(self, now: Micros) -> bool:
        """Claim and send what has come beside a backlog; tell whether there was room. The rest waits for the next turn.

        So it waits for none of what that has to settle, to claim and to send. Not twice in a row, or nothing else is done.
        """
        specs = self._scheduler.plan_beside(now, self._transport.room, self._transport.passes, self._pressing)
        if specs:
            self._expressed = True
            self._transact(now, (), specs)
            self._send()
        return bool(specs)

    def _gathers(self, now: Micros, specs: Sequence[ClaimSpec]) -> bool:
        """Tell whether what finished waits for more to be settled with it: each settle takes the database's lock.

        Those who add tasks wait for that. Not where limited queues are claimed from, or somebody waits for the end.
        """
        if not self._unsettled or not 0 <= now - self._settled_at < self._gather or len(self._unsettled) >= _BATCH:
            return False
        return not self._ending and not self._scheduler.peeks(specs)

    @property
    def _ending(self) -> bool:
        return self._stopping or self._scheduler.draining

    def _plan_fast(self, now: Micros, specs: Sequence[ClaimSpec]) -> list[ClaimSpec]:
        """Return what to claim beside *specs* because it doesn't wait for a slot of its queue's."""
        full = self._scheduler.full(now, self._transport.room)
        if not full:
            return []
        with self._store.read() as tx:  # mostly in vain, so without the write lock: it keeps nobody waiting
            due = tx.next_due(full, fail_fast=True)
        self._scheduler.looked_fast(now, full, due)
        return self._scheduler.fast_specs(now, full, specs, self._transport.room)

    def _judge(self, now: Micros) -> None:
        """Turn the answers that came into outcomes."""
        self._answers.extend(self._transport.results())
        now = self._clock.now()  # what a target asks to wait counts from its answer, which may have come during this turn
        while self._answers:
            self._step("answer")
            self._finish(now, self._answers.popleft())
        for news in self._scheduler.news(now):
            troubles.tell(now, news)

    def _finish(self, now: Micros, result: Result) -> None:
        claim = self._scheduler.claim_of(result) if self._observer is not None else None
        outcome = self._scheduler.finished(now, result)
        if outcome is not None:
            self._unsettled.append(outcome)
            if claim is not None and self._observer is not None:
                self._observer.ended(now, claim, result, outcome)

    def _transact(self, now: Micros, outcomes: Sequence[Outcome], specs: Sequence[ClaimSpec]) -> None:
        self._transacting = True
        try:
            self._do_transact(now, outcomes, specs)
        finally:
            self._transacting = False

    def _do_transact(self, now: Micros, outcomes: Sequence[Outcome], specs: Sequence[ClaimSpec]) -> None:
        """Do a turn's one transaction, tell the scheduler what came of it, and put what to send into the outbox."""
        peeked = self._scheduler.peeks(specs)
        # A power cut mustn't give a limited queue's tokens back, and at the end somebody waits for what was settled.
        durable = self._scheduler.lasting(peeked) or (self._ending and _settles(outcomes))
        with self._store.begin(durable=durable) as tx:
            next_due = tx.next_due(peeked)
            wanted = self._scheduler.limited(now, peeked, next_due)
            owned = tx.own(now, self._node, self._lease, wanted) if wanted else {}
            settled = self._settle(tx, now, outcomes, wanted, owned)  # renewals settle before the claim
            self._step("settle")
            specs = self._scheduler.admit(now, specs, owned)
            claims = tx.claim(now, specs)
            refused = self._scheduler.refusals(now, specs, claims, self._transport.room)
            tx.settle(now, refused)
            tx.refund(self._scheduler.refunds(specs, refused))
            self._step("claim")
            due = tx.next_due(self._scheduler.drained(specs, claims))
            filled = self._scheduler.filled(now, specs, claims)
            fast_due = tx.next_due(filled, fail_fast=True)
            flying = self._scheduler.flying(now, claims, refused)
            tx.fly(self._node, now + self._lease, flying)
            self._step("commit")
        if durable:
            self._sync_at = None
        elif self._sync_at is None and _settles(outcomes) and self._store.unsynced:
            self._sync_at = now + _SYNC
        self._step("committed")
        self._scheduler.flown(now, flying)
        self._scheduler.looked(now, peeked, next_due)  # before what was settled after it: a retry may be due sooner
        for claim in self._scheduler.settled(now, outcomes, settled):
            self._give_up(claim)
        self._scheduler.looked_fast(now, filled, fast_due)
        if self._observer is not None and refused:
            taken = {claim.id: claim for claim in claims}
            for outcome in refused:
                self._observer.ended(now, taken[outcome.id], None, outcome)
        self._fresh_until = 0 if self._outbox else now + self._lease // 2
        self._outbox += self._scheduler.claimed(now, specs, claims, due, owned, wanted, refused)

    def _sync_if_due(self, now: Micros) -> None:
        """See to it that what was settled gets to the disk in time: at once where somebody waits for the end."""
        at = self._sync_at
        if at is not None and (self._ending or not at - _SYNC <= now < at):  # or the clock was set back
            self._store.sync()  # nothing to do if something durable was committed since
            self._sync_at = None

    def _settle(
        self, tx: Tx, now: Micros, outcomes: Sequence[Outcome], wanted: Sequence[str], owned: Mapping[str, Limiter]
    ) -> Sequence[bool]:
        """Settle *outcomes*, but don't renew what ran out in a limited queue that another engine owns by now."""
        foreign = [name for name in wanted if name not in owned]
        # By the clock as it is: this turn may have waited long for the store, and the new owner hasn't.
        forfeited = self._scheduler.forfeited(self._clock.now(), outcomes, foreign) if foreign else ()
        if not forfeited:
            return tx.settle(now, outcomes)
        kept = [outcome for outcome in outcomes if outcome.id not in forfeited]
        held = {outcome.id for outcome, ok in zip(kept, tx.settle(now, kept), strict=True) if ok}
        return [outcome.id in held for outcome in outcomes]

    def _give_up(self, claim: Claim) -> None:
        self._monitor.lost(claim)
        log.warning("task %s of queue %s lost its lease: its answer won't count", claim.public_name, claim.queue)
        self._transport.cancel(claim.id, claim.claims)

    def _send(self) -> None:
        """Hand claims to the transport, but none whose lease has run out meanwhile: somebody else may have it.

        What a failure leaves in the outbox is sent in the next turn: a claim that was forgotten here would be renewed,
        and never run, for as long as this engine lives.
        """
        now = self._clock.now()
        fresh = now < self._fresh_until  # all of it was claimed in this turn, and the turn was quick
        outbox, send = self._outbox, self._transport.send
        while outbox:
            delivery = outbox.popleft()
            if not fresh and now >= self._scheduler.lease_end(delivery.claim) - self._lease // 10:
                self._finish(now, _unsent(delivery, now, "the engine stalled"))
                continue
            try:
                send(delivery)
            except Exception as error:
                claim, text = delivery.claim, f"the transport failed: {type(error).__name__}: {error}"[:ERROR_LENGTH]
                self._finish(now, Result(claim.id, claim.claims, Kind.UNKNOWN, now, now, error=text))
                raise

    def _wake_at(self, now: Micros) -> Micros:
        if self._hinted:
            return now
        settle_at = self._settled_at + self._gather if self._unsettled else self._reread_at
        sync_at = self._reread_at if self._sync_at is None else self._sync_at
        return min(settle_at, sync_at, self._scheduler.wake_at(now, self._transport.room), self._reread_at, self._sweep_at)

    # --- beside the path --------------------------------------------------------------------------------------------

    def _look(self, now: Micros) -> None:
        """Do what is due now and then: reread the queues, sweep."""
        if self._rereads(now):
            self._scheduler.configure(self._rows(now))
            self._reread_at = now + _REREAD
            for recovered in self._scheduler.recovered(now):
                troubles.tell(now, recovered)
            self._note(now)
        if now >= self._sweep_at or now < self._sweep_at - _SWEEP:
            self._sweep_at = now + _SWEEP  # before trying: on a full disk a sweep must fail one turn, not all of them
            with self._store.begin() as tx:
                swept = tx.sweep(now, SWEEP_SLICE)
                for name in troubles.stale(tx.notes(), now):
                    tx.put_note(name, "")
            if swept:
                self._sweep_at = now + SECOND // 10

    def _rereads(self, now: Micros) -> bool:
        return now >= self._reread_at or now < self._reread_at - _REREAD  # or the clock was set back

    def _note(self, now: Micros) -> None:
        """Leave a note of what is slowed, once it has changed, and every so often: an old one is a killed engine's."""
        told = troubles.note_of(self._scheduler.conditions(), self._scheduler.slowdowns(now))
        renewed = now - self._told_at < troubles.RENEW or not self._scheduler.in_flight
        if told == self._told and (not told or renewed):
            return
        with self._store.begin(durable=False) as tx:
            tx.put_note(troubles.NOTE + self._node, troubles.dated(told, now))
        self._told, self._told_at = told, now

    def _rows(self, now: Micros) -> list[QueueRow]:
        """Read the queues; a limiter that is ahead of any that the queue's rate could have made is set right."""
        with self._store.read() as tx:
            rows = tx.queues()
        latest = {row.name: bucket.latest(row.config.rate, row.config.bucket_size, now) for row in rows}
        ahead = {row.name: latest[row.name] for row in rows if row.tat > latest[row.name]}
        if ahead:  # its rate was lower before, or the clock has gone back: it would let nothing through for hours
            with self._store.begin() as tx:
                tx.cap(ahead)
            rows = [row._replace(tat=min(row.tat, ahead.get(row.name, row.tat))) for row in rows]
        return rows

    def _troubled(self, error: Exception, pause: Micros) -> Micros:
        """Log what failed a turn; return when to try again."""
        if isinstance(error, StoreError):
            log.error("the store failed, trying again in %.2f s: %s", pause / SECOND, error)
        else:
            log.exception("a turn failed, trying again in %.2f s", pause / SECOND)
        return self._clock.now() + pause

    def _drain(self) -> None:
        """Finish what runs until the grace time is over; what still runs then keeps its lease."""
        self.drain()
        while True:
            try:
                with self._monitor:
                    until = self.turn()
            except Exception as error:
                until = self._troubled(error, _FIRST_PAUSE)
            now = self._clock.now()
            stop_at = self._stop_at or now
            if self.idle or now >= stop_at:
                break
            self._transport.wait(min(until, stop_at))
        try:
            self.leave()
        except StoreError as error:
            log.error("the store failed while the engine left: %s", error)


def _unsent(delivery: Delivery, now: Micros, why: str) -> Result:
    return Result(delivery.claim.id, delivery.claim.claims, Kind.UNSENT, now, now, error=why)


def _settles(outcomes: Sequence[Outcome]) -> bool:
    """Tell whether *outcomes* say how an attempt ended. A claim, a refusal or a renewal that is lost is only made again."""
    return any(outcome.action is not Action.RENEW for outcome in outcomes)
