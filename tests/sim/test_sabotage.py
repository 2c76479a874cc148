"""Bugs planted on purpose: a simulation that doesn't notice one of them proves nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from deferlib.core import backoff, bucket, fitness, verdict
from deferlib.core.model import Action, Limiter, Outcome, Result
from deferlib.core.scheduler import NEVER, Scheduler
from deferlib.core.throttle import Throttle
from deferlib.engine.engine import Engine
from tests.sim.oracle import Violation
from tests.sim.world import World

SEEDS = range(1, 61)  # those of CI

Plant = Callable[[pytest.MonkeyPatch], None]


def live_all(tamper: Callable[[Any], Any] = lambda tx: tx) -> None:
    for seed in SEEDS:
        World(seed, tamper=tamper).live()


class Tampered:
    """A transaction that does one thing wrong."""

    def __init__(self, tx: Any) -> None:
        self.tx = tx
        self.put_off: list[Outcome] = []

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.tx, verb)


class SettlesWithoutFence(Tampered):
    def settle(self, now: int, outcomes: Sequence[Outcome]) -> list[bool]:
        return self.tx.settle(now, [self._held(outcome) for outcome in outcomes])

    def _held(self, outcome: Outcome) -> Outcome:
        rows = self.tx.find(outcome.queue, [str(outcome.id)])
        return outcome._replace(claims=rows[0].claims) if rows else outcome


class ClaimsBeforeItRenews(Tampered):
    def settle(self, now: int, outcomes: Sequence[Outcome]) -> list[bool]:
        self.put_off = [outcome for outcome in outcomes if outcome.action is Action.RENEW]
        others = [outcome for outcome in outcomes if outcome.action is not Action.RENEW]
        held = dict(zip(others, self.tx.settle(now, others), strict=True))
        return [held.get(outcome, True) for outcome in outcomes]

    def claim(self, now: int, specs: Sequence[Any]) -> Any:
        claims = self.tx.claim(now, specs)
        self.tx.settle(now, self.put_off)
        return claims


class ForgetsTheRate(Tampered):
    def claim(self, now: int, specs: Sequence[Any]) -> Any:
        return self.tx.claim(now, [spec._replace(interval=0) for spec in specs])


class ReleaseCountsAnAttempt(Tampered):
    def settle(self, now: int, outcomes: Sequence[Outcome]) -> list[bool]:
        counted = {Action.RELEASE: Action.RETRY}
        return self.tx.settle(now, [each._replace(action=counted.get(each.action, each.action)) for each in outcomes])


class EverybodyOwns(Tampered):
    def own(self, now: int, node: str, ttl: int, queues: Sequence[str]) -> dict[str, Limiter]:
        rows = {row.name: row for row in self.tx.queues()}
        return {name: Limiter(rows[name].tat, now + ttl) for name in queues}


class LeavesNoTombstone(Tampered):
    def settle(self, now: int, outcomes: Sequence[Outcome]) -> list[bool]:
        return self.tx.settle(now, [outcome._replace(named=False) for outcome in outcomes])


class ForgetsAcknowledged(Tampered):
    def add(self, now: int, tasks: Sequence[Any]) -> Any:
        results = self.tx.add(now, tasks)
        if sum(task.nonce for task in tasks) % 7 == 0:
            self.tx.delete(now, tasks[0].queue, [task.name or str(task.id) for task in tasks])
        return results


def unsettled_cleared_before_commit(patch: pytest.MonkeyPatch) -> None:
    transact = Engine._transact

    def forgetful(self: Engine, *arguments: Any) -> None:
        self._unsettled = []
        transact(self, *arguments)

    patch.setattr(Engine, "_transact", forgetful)


def outbox_forgotten_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    send = Engine._send

    def forgetful(self: Engine) -> None:
        try:
            send(self)
        finally:
            self._outbox.clear()

    patch.setattr(Engine, "_send", forgetful)


def answers_forgotten_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    judge = Engine._judge

    def forgetful(self: Engine, now: int) -> None:
        self._answers.clear()
        judge(self, now)

    patch.setattr(Engine, "_judge", forgetful)


def never_renewed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "renewals", lambda self, now: [])


def renewed_under_the_new_owner(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "forfeited", lambda self, now, outcomes, foreign: set())


def sent_after_the_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "lease_end", lambda self, claim: NEVER)


def owned_without_need(patch: pytest.MonkeyPatch) -> None:
    limited = Scheduler.limited
    patch.setattr(
        Scheduler, "limited", lambda self, now, peeked, due: limited(self, now, peeked, dict.fromkeys(peeked, now))
    )


def unreachable_charged(patch: pytest.MonkeyPatch) -> None:
    again = verdict._again
    patch.setattr(
        verdict, "_again", lambda *arguments, **counts: again(*arguments, **{"executed": 1, **counts, "charged": 1})
    )


def timeout_not_charged(patch: pytest.MonkeyPatch) -> None:
    failed = verdict._failed

    def kind(now: int, claim: Any, result: Result, *rest: Any) -> Outcome:
        outcome = failed(now, claim, result, *rest)
        return outcome if result.status else outcome._replace(charged=0)

    patch.setattr(verdict, "_failed", kind)


def one_retry_too_many(patch: pytest.MonkeyPatch) -> None:
    may_retry = backoff.may_retry
    patch.setattr(verdict, "may_retry", lambda policy, failures, age: may_retry(policy, failures - 1, age))


def one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    tokens = bucket.tokens
    patch.setattr(bucket, "tokens", lambda tat, interval, size, now: tokens(tat, interval, size + 1, now))


def pauses_unnoticed(patch: pytest.MonkeyPatch) -> None:
    configure = Scheduler.configure

    def once(self: Scheduler, rows: Any) -> None:
        if not self._queues:
            configure(self, rows)

    patch.setattr(Scheduler, "configure", once)


def full_queues_unnoticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "full", lambda self, now, room: [])


def failed_fast_though_slots_are_free(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_has_slot", lambda self, queue, at, room: False)


def failed_fast_and_charged(patch: pytest.MonkeyPatch) -> None:
    failed_fast = verdict.failed_fast
    patch.setattr(fitness, "failed_fast", lambda *arguments: failed_fast(*arguments)._replace(charged=1))


def failed_fast_a_transaction_later(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "refusals", lambda self, now, specs, claims, room: [])


def retry_after_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdict, "LONGEST_RETRY_AFTER", 0)


def slowed_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Throttle, "allowance", lambda self, now: 0 if self.active else NEVER)
    patch.setattr(Throttle, "ended", lambda self, now, configured: False)


TAMPERS: list[type[Tampered]] = [
    SettlesWithoutFence,
    ClaimsBeforeItRenews,
    ForgetsTheRate,
    ReleaseCountsAnAttempt,
    EverybodyOwns,
    LeavesNoTombstone,
    ForgetsAcknowledged,
]
PLANTS: list[Plant] = [
    unsettled_cleared_before_commit,
    outbox_forgotten_after_a_failure,
    answers_forgotten_after_a_failure,
    never_renewed,
    renewed_under_the_new_owner,
    sent_after_the_lease,
    owned_without_need,
    unreachable_charged,
    timeout_not_charged,
    one_retry_too_many,
    one_token_too_many,
    pauses_unnoticed,
    full_queues_unnoticed,
    failed_fast_though_slots_are_free,
    failed_fast_and_charged,
    failed_fast_a_transaction_later,
    retry_after_ignored,
    slowed_for_ever,
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("deferlib.engine")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda tamper: tamper.__name__)
def test_simulation_catches_a_store_that(tamper: type[Tampered]) -> None:
    with pytest.raises(Violation) as caught:
        live_all(tamper)

    assert "replay: " in "".join(caught.value.__notes__)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_simulation_catches_an_engine_with(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    with pytest.raises(Violation):
        live_all()
