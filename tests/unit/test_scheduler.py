"""What the scheduler decides, one decision at a time; without store, transport or clock."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest

from deferlib.core import bucket
from deferlib.core.fitness import ISOLATION_DELAY, UNRESOLVED_DELAY
from deferlib.core.health import Ailment, Condition
from deferlib.core.model import (
    DAY,
    MINUTE,
    SECOND,
    Action,
    Claim,
    ClaimSpec,
    Delivery,
    Kind,
    Limiter,
    Mode,
    Outcome,
    QueueConfig,
    QueueRow,
    Result,
    RetryPolicy,
)
from deferlib.core.queue_state import FAST_PAUSE
from deferlib.core.rules import Rules
from deferlib.core.scheduler import CLAIM, CLAIM_BYTES, FAST_CLAIM, NEVER, Scheduler, Slowdown
from deferlib.core.verdict import NO_SLOT

NOW = 1_000 * SECOND
LEASE = 30 * SECOND
BASE = "http://app"


def make(*configs: QueueConfig, **rules: Any) -> Scheduler:
    rules = {"node": "me", "lease": LEASE, "base": BASE, "target": {"worker": "http://worker"}.get, **rules}
    scheduler = Scheduler(Rules(**rules), Random(0))
    scheduler.configure([QueueRow(config=config) for config in configs or [QueueConfig(name="default")]])
    return scheduler


def claim(id: int = 1, **fields: Any) -> Claim:
    values: dict[str, Any] = {
        "claims": NOW, "queue": "default", "name": None, "eta": NOW, "until": NOW + LEASE, "attempts": 1, "executions": 0,
        "failures": 0, "lost": 0, "first_try": NOW, "status": 0, "reason": "", "method": "POST", "url": "/", "target": "",
        "headers": "", "namespace": "", "tag": "", "retry": "", "deadline": 0, "fail_fast": 0, "created": NOW,
        "history": "", "body": b"",
    }  # fmt: skip
    return Claim(id=id, **{**values, **fields})


def result(claim: Claim, kind: Kind = Kind.ANSWERED, status: int = 200, outcome: str = "", error: str = "") -> Result:
    return Result(claim.id, claim.claims, kind, NOW, NOW + 5, status, outcome, error)


def room(slots: int) -> Any:
    return lambda base: slots


def commit(
    scheduler: Scheduler, *claims: Claim, now: int = NOW, due: dict[str, int] | None = None, slots: int = 100
) -> list[Delivery]:
    """Let a transaction claim *claims* of what is planned; return what to send."""
    specs = scheduler.plan(now, room(slots))
    peeked = scheduler.peeks(specs)
    wanted = scheduler.limited(now, peeked, dict.fromkeys(peeked, now))
    owned = {name: Limiter(0, now + LEASE) for name in wanted}
    assert not scheduler.refusals(now, specs, claims, room(100))
    return scheduler.claimed(now, scheduler.admit(now, specs, owned), claims, due or {}, owned, wanted)


def asked(specs: list[ClaimSpec]) -> dict[str, int]:
    return {spec.queue: spec.limit for spec in specs}


# --- planning -------------------------------------------------------------------------------------------------------


def test_plan_asks_for_what_has_room_for_one_lease() -> None:
    scheduler = make()

    assert scheduler.plan(NOW, room(7)) == [ClaimSpec("default", 7, CLAIM_BYTES, NOW + LEASE, 0)]


def test_plan_asks_for_no_more_than_a_turn_can_do_quickly() -> None:
    scheduler = make()

    assert asked(scheduler.plan(NOW, room(100 * CLAIM))) == {"default": CLAIM}
    assert asked(scheduler.plan(NOW, room(CLAIM - 1))) == {"default": CLAIM - 1}


def test_plan_without_room_asks_for_nothing() -> None:
    assert make().plan(NOW, room(0)) == []


def test_queues_share_the_room_evenly() -> None:
    scheduler = make(*(QueueConfig(name=name) for name in "abc"))

    assert asked(scheduler.plan(NOW, room(9))) == {"a": 3, "b": 3, "c": 3}


def test_queue_that_comes_short_is_first_in_the_next_turn() -> None:
    scheduler = make(*(QueueConfig(name=name) for name in "abc"))
    served = []

    for _ in range(3):
        served.append(asked(scheduler.plan(NOW, room(1))))
        commit(scheduler, claim(len(served), queue=next(iter(served[-1]))), slots=1)

    assert served == [{"a": 1}, {"b": 1}, {"c": 1}]


def test_room_of_one_target_is_not_shared_with_another() -> None:
    scheduler = make(QueueConfig(name="a"), QueueConfig(name="b", target="worker"))

    plan = scheduler.plan(NOW, lambda base: {BASE: 4, "http://worker": 2}[base])

    assert asked(plan) == {"a": 4, "b": 2}


def test_plan_and_renewals_change_no_state() -> None:
    scheduler = make(QueueConfig(name="a", rate=1.0), QueueConfig(name="b", max_concurrent=2))
    commit(scheduler, claim(queue="b"))
    before = copy.deepcopy(scheduler)

    again = [(scheduler.plan(NOW + LEASE, room(5)), scheduler.renewals(NOW + LEASE)) for _ in range(3)]

    assert again[0] == again[1] == again[2] == (before.plan(NOW + LEASE, room(5)), before.renewals(NOW + LEASE))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (QueueRow(config=QueueConfig(name="default"), paused=True), "paused"),
        (QueueRow(config=QueueConfig(name="default", rate=0.0)), "paused: its rate is 0"),
        (QueueRow(config=QueueConfig(name="default", mode=Mode.PULL)), "a pull queue: workers lease from it"),
    ],
)
def test_queue_on_hold_is_left_alone_and_says_why(row: QueueRow, reason: str) -> None:
    scheduler = make()
    scheduler.configure([row])

    assert scheduler.plan(NOW, room(5)) == []
    decision = scheduler._queues["default"].hold(NOW)
    assert decision is not None
    assert (decision.reason, decision.until) == (reason, None)


def test_resumed_queue_is_looked_at_at_once() -> None:
    scheduler = make()
    commit(scheduler)  # found nothing
    scheduler.configure([QueueRow(config=QueueConfig(name="default"), paused=True)])

    scheduler.configure([QueueRow(config=QueueConfig(name="default"))])

    assert scheduler.wake_at(NOW, room(5)) <= NOW
    assert scheduler.plan(NOW, room(5))


def test_removed_queue_is_forgotten_and_what_flies_still_lands() -> None:
    scheduler = make()
    [delivery] = commit(scheduler, claim())
    scheduler.configure([])

    outcome = scheduler.finished(NOW, result(delivery.claim))

    assert outcome is not None
    assert outcome.action is Action.DONE
    assert scheduler.in_flight == 0


def test_draining_scheduler_claims_nothing_and_wakes_for_renewals_alone() -> None:
    scheduler = make()
    commit(scheduler, claim())

    scheduler.drain()

    assert scheduler.plan(NOW, room(5)) == []
    assert scheduler.wake_at(NOW, room(5)) == NOW + LEASE // 3


# --- limits ---------------------------------------------------------------------------------------------------------


def test_plan_asks_for_no_more_than_the_tokens() -> None:
    scheduler = make(QueueConfig(name="default", rate=2.0, bucket_size=3))

    [spec] = scheduler.plan(NOW, room(10))

    assert (spec.limit, spec.interval) == (3, SECOND // 2)


def test_queue_without_a_token_waits_for_the_next_one() -> None:
    scheduler = make(QueueConfig(name="default", rate=2.0, bucket_size=3))
    commit(scheduler, *(claim(id) for id in range(3)))

    assert scheduler.plan(NOW, room(10)) == []
    assert scheduler.wake_at(NOW, room(10)) == NOW + SECOND // 2
    assert asked(scheduler.plan(NOW + SECOND // 2, room(10))) == {"default": 1}


def test_plan_asks_for_no_more_than_the_free_places() -> None:
    scheduler = make(QueueConfig(name="default", max_concurrent=3))
    [delivery, _] = commit(scheduler, claim(1), claim(2), due={"default": NOW})

    assert asked(scheduler.plan(NOW, room(10))) == {"default": 1}

    commit(scheduler, claim(3))
    assert scheduler.plan(NOW, room(10)) == []

    scheduler.finished(NOW, result(delivery.claim))
    assert asked(scheduler.plan(NOW, room(10))) == {"default": 1}


def test_limited_queue_is_owned_if_something_is_due_there() -> None:
    scheduler = make(QueueConfig(name="free"), QueueConfig(name="busy", rate=1.0), QueueConfig(name="idle", rate=1.0))
    peeked = scheduler.peeks(scheduler.plan(NOW, room(10)))

    wanted = scheduler.limited(NOW, peeked, {"busy": NOW, "idle": NOW + 1})

    assert sorted(peeked) == ["busy", "idle"]
    assert wanted == ["busy"]


def test_limited_queue_is_owned_while_something_of_it_is_in_flight() -> None:
    scheduler = make(QueueConfig(name="default", max_concurrent=1))
    commit(scheduler, claim())

    assert scheduler.limited(NOW, [], {}) == ["default"]


def test_limited_queue_where_nothing_is_due_is_looked_at_when_something_is() -> None:
    scheduler = make(QueueConfig(name="default", rate=1.0))

    scheduler.looked(NOW, ["default"], {"default": NOW + 7})

    assert scheduler.wake_at(NOW, room(5)) == NOW + 7


def test_queue_of_another_owner_is_left_out_and_tried_again_within_the_lease() -> None:
    scheduler = make(QueueConfig(name="free"), QueueConfig(name="limited", rate=1.0))
    specs = scheduler.plan(NOW, room(10))

    admitted = scheduler.admit(NOW, specs, {})
    scheduler.claimed(NOW, admitted, [], {}, {}, ["limited"])

    assert asked(admitted) == {"free": 5}
    assert scheduler.plan(NOW, room(10)) == []
    assert NOW < scheduler.wake_at(NOW, room(10)) < NOW + LEASE


def test_tokens_that_another_engine_spent_are_respected() -> None:
    scheduler = make(QueueConfig(name="default", rate=1.0, bucket_size=5))
    specs = scheduler.plan(NOW, room(10))
    two_left = Limiter(bucket.spent(0, SECOND, 3, NOW), NOW + LEASE)
    none_left = Limiter(bucket.spent(0, SECOND, 5, NOW), NOW + LEASE)

    assert asked(specs) == {"default": 5}
    assert asked(scheduler.admit(NOW, specs, {"default": two_left})) == {"default": 2}
    assert scheduler.admit(NOW, specs, {"default": none_left}) == []


# --- leases ---------------------------------------------------------------------------------------------------------


def test_flight_is_renewed_after_a_third_of_its_lease_and_again_a_third_later() -> None:
    scheduler = make()
    [delivery] = commit(scheduler, claim())
    at = NOW + LEASE // 3

    assert scheduler.renewals(at - 1) == []
    assert scheduler.wake_at(NOW, room(5)) == at
    [renewal] = scheduler.renewals(at)
    scheduler.settled(at, [renewal], [True])

    assert renewal == Outcome(1, NOW, "default", Action.RENEW, at + LEASE)
    assert scheduler.renewals(at) == []
    assert scheduler.lease_end(delivery.claim) == at + LEASE
    assert scheduler.renewals(at + LEASE // 3)


def test_refused_renewal_ends_the_flight() -> None:
    scheduler = make(QueueConfig(name="default", max_concurrent=1))
    [delivery] = commit(scheduler, claim())
    renewals = scheduler.renewals(NOW + LEASE)

    lost = scheduler.settled(NOW + LEASE, renewals, [False])

    assert lost == [delivery.claim]
    assert scheduler.fenced == 1
    assert scheduler.lease_end(delivery.claim) == 0
    assert scheduler.finished(NOW + LEASE, result(delivery.claim)) is None
    assert scheduler.plan(NOW + LEASE, room(5)), "its place is free again"


def test_result_of_an_older_claim_counts_no_more() -> None:
    scheduler = make()
    commit(scheduler, claim(claims=NOW + 1))

    assert scheduler.finished(NOW, result(claim(claims=NOW))) is None
    assert scheduler.in_flight == 1


def test_task_that_is_claimed_again_is_in_flight_once() -> None:
    """Its lease ran out unnoticed: the clock was set, say."""
    scheduler = make()
    commit(scheduler, claim(claims=NOW))
    commit(scheduler, claim(claims=NOW + 1))

    scheduler.finished(NOW, result(claim(claims=NOW + 1)))

    assert (scheduler.in_flight, scheduler.in_flight_by_base) == (0, {})


def test_renewals_go_on_after_the_clock_was_set_back() -> None:
    scheduler = make()
    commit(scheduler, claim(1), now=NOW + 3600 * SECOND)
    commit(scheduler, claim(2), now=NOW)
    later = NOW + LEASE // 2
    assert not scheduler.renewals(later), "the first waits for an hour, and holds up the second"

    scheduler.recovered(NOW)

    assert [outcome.id for outcome in scheduler.renewals(later)] == [1, 2]


@pytest.mark.parametrize(
    ("queue", "foreign", "at", "forfeited"),
    [
        pytest.param("limited", ["limited"], NOW + LEASE, {1}, id="ran out under another owner"),
        pytest.param("limited", ["limited"], NOW + LEASE - 1, set(), id="still held: the limit is new"),
        pytest.param("limited", [], NOW + LEASE, set(), id="still owned"),
        pytest.param("free", ["limited"], NOW + LEASE, set(), id="nobody owns it"),
    ],
)
def test_lease_that_ran_out_is_not_renewed_under_a_new_owner(
    queue: str, foreign: list[str], at: int, forfeited: set[int]
) -> None:
    scheduler = make(QueueConfig(name="limited", max_concurrent=1), QueueConfig(name="free"))
    commit(scheduler, claim(queue=queue))

    assert scheduler.forfeited(at, scheduler.renewals(at), foreign) == forfeited


# --- looking ahead --------------------------------------------------------------------------------------------------


def test_drained_queue_is_looked_at_when_something_is_due_next() -> None:
    scheduler = make(QueueConfig(name="a"), QueueConfig(name="b"))
    specs = scheduler.plan(NOW, room(4))
    claims = [claim(1, queue="a"), claim(2, queue="a"), claim(3, queue="b")]

    assert scheduler.drained(specs, claims) == ["b"]

    scheduler.claimed(NOW, specs, claims, {"b": NOW + 9}, {}, [])
    assert asked(scheduler.plan(NOW, room(4))) == {"a": 3}, "one is left to b"
    assert asked(scheduler.plan(NOW + 9, room(4))) == {"a": 2, "b": 2}


def test_empty_queue_is_looked_at_again_after_a_hint() -> None:
    scheduler = make()
    commit(scheduler)

    assert scheduler.wake_at(NOW, room(5)) == NEVER

    scheduler.woken(NOW)
    assert scheduler.wake_at(NOW, room(5)) <= NOW


@pytest.mark.parametrize("action", [Action.RETRY, Action.RELEASE])
@pytest.mark.parametrize("accepted", [True, False])
def test_queue_is_looked_at_when_its_own_retry_is_due(action: Action, accepted: bool) -> None:
    scheduler = make()
    [delivery] = commit(scheduler, claim(), due={"default": NOW + LEASE})
    scheduler.finished(NOW, result(delivery.claim, status=500))

    scheduler.settled(NOW, [Outcome(1, NOW, "default", action, NOW + 100)], [accepted])

    assert scheduler.wake_at(NOW, room(5)) == NOW + 100


def test_busy_target_is_waited_for() -> None:
    scheduler = make()
    scheduler.looked_fast(NOW, ["default"], {})

    assert scheduler.wake_at(NOW, room(0)) == NEVER


# --- what doesn't wait for a slot -----------------------------------------------------------------------------------


def crowded(**fields: Any) -> Scheduler:
    """Return a scheduler whose only queue is at its concurrency limit."""
    scheduler = make(QueueConfig(name="default", max_concurrent=1, **fields))
    commit(scheduler, claim(), due={"default": NOW})
    return scheduler


def test_queue_without_a_slot_is_full_and_others_are_not() -> None:
    scheduler = make(
        QueueConfig(name="narrow", max_concurrent=1),
        QueueConfig(name="wide", max_concurrent=2),
        QueueConfig(name="elsewhere", target="worker"),
    )
    commit(scheduler, claim(1, queue="narrow"), claim(2, queue="wide"))
    scheduler.woken(NOW)

    assert scheduler.full(NOW, room(5)) == ["narrow"]
    assert scheduler.full(NOW, lambda base: 0 if base == BASE else 5) == ["narrow", "wide"]


@pytest.mark.parametrize(
    "row",
    [
        QueueRow(config=QueueConfig(name="default"), paused=True),
        QueueRow(config=QueueConfig(name="default", rate=0.0)),
        QueueRow(config=QueueConfig(name="default", mode=Mode.PULL)),
    ],
)
def test_closed_queue_is_not_called_full(row: QueueRow) -> None:
    scheduler = make()
    scheduler.configure([row])

    assert scheduler.full(NOW, room(0)) == []
    assert scheduler.wake_at(NOW, room(0)) == NEVER


def test_full_queue_that_waits_for_a_token_too_is_left_alone_until_it_comes() -> None:
    scheduler = crowded(rate=2.0, bucket_size=1)

    assert scheduler.full(NOW, room(5)) == []
    assert scheduler.wake_at(NOW, room(5)) == NOW + SECOND // 2
    assert scheduler.full(NOW + SECOND // 2, room(5)) == ["default"]


def test_full_queue_of_another_owner_is_left_alone() -> None:
    scheduler = make(QueueConfig(name="default", rate=1.0))
    scheduler.claimed(NOW, [], [], {}, {}, ["default"])

    assert scheduler.full(NOW, room(0)) == []
    assert NOW < scheduler.wake_at(NOW, room(0)) < NOW + LEASE


def test_draining_scheduler_fails_nothing_fast() -> None:
    scheduler = make()
    scheduler.drain()

    assert scheduler.full(NOW, room(0)) == []


def test_full_queue_is_looked_at_when_a_fail_fast_task_is_due_and_after_a_hint() -> None:
    scheduler = crowded()
    assert scheduler.full(NOW, room(5)) == ["default"]
    assert scheduler.wake_at(NOW, room(5)) <= NOW, "nobody has looked yet"

    scheduler.looked_fast(NOW, ["default"], {"default": NOW + 7})

    assert scheduler.fast_specs(NOW, ["default"], [], room(0)) == []
    assert scheduler.full(NOW, room(5)) == []
    assert scheduler.wake_at(NOW, room(5)) == NOW + 7
    assert scheduler.full(NOW + 7, room(5)) == ["default"]
    scheduler.looked_fast(NOW, ["default"], {})
    assert scheduler.full(NOW + 7, room(5)) == []
    assert scheduler.wake_at(NOW, room(5)) == NOW + LEASE // 3, "for the renewal alone"
    scheduler.woken(NOW + FAST_PAUSE)
    assert scheduler.full(NOW + FAST_PAUSE, room(5)) == ["default"]


@pytest.mark.parametrize(
    ("passed", "until"), [(0, FAST_PAUSE), (FAST_PAUSE - 1, FAST_PAUSE), (FAST_PAUSE, 0), (-SECOND, 0)]
)
def test_hints_one_upon_the_other_let_a_full_queue_be_looked_at_only_now_and_then(passed: int, until: int) -> None:
    scheduler = crowded()
    scheduler.looked_fast(NOW, ["default"], {})
    at = NOW + passed

    scheduler.woken(at)

    if until:
        assert scheduler.full(NOW + until - 1, room(5)) == []
        assert scheduler.wake_at(at, room(5)) == NOW + until
    assert scheduler.full(max(at, NOW + until), room(5)) == ["default"]


def test_hint_puts_no_fail_fast_task_off_that_is_known() -> None:
    scheduler = crowded()
    scheduler.looked_fast(NOW, ["default"], {"default": NOW + 7})

    scheduler.woken(NOW + 1)

    assert scheduler.wake_at(NOW + 1, room(5)) == NOW + 7


@pytest.mark.parametrize("action", [Action.RETRY, Action.RELEASE])
def test_full_queue_is_looked_at_when_its_own_retry_is_due(action: Action) -> None:
    scheduler = crowded()
    scheduler.looked_fast(NOW, ["default"], {})

    scheduler.settled(NOW, [Outcome(9, NOW, "default", action, NOW + 5)], [True])

    assert scheduler.full(NOW + 4, room(5)) == []
    assert scheduler.full(NOW + 5, room(5)) == ["default"]


def test_full_queue_where_nothing_is_due_at_all_is_not_looked_at() -> None:
    scheduler = make(QueueConfig(name="default", max_concurrent=1))
    commit(scheduler, claim())
    scheduler.looked(NOW, ["default"], {"default": NOW + 9})

    assert scheduler.full(NOW, room(5)) == []
    assert scheduler.full(NOW + 9, room(5)) == ["default"]


def test_full_and_fast_specs_change_no_state() -> None:
    scheduler = crowded()

    again = [(scheduler.full(NOW, room(5)), scheduler.fast_specs(NOW, ["default"], [], room(0))) for _ in range(3)]

    assert again[0] == again[1] == again[2] == (["default"], scheduler.fast_specs(NOW, ["default"], [], room(0)))


def test_what_fails_fast_spends_no_token_and_needs_one_to_be_there() -> None:
    scheduler = make(QueueConfig(name="default", rate=1.0, bucket_size=5))
    specs = scheduler.fast_specs(NOW, scheduler.full(NOW, room(0)), [], room(0))
    left = Limiter(bucket.spent(0, SECOND, 4, NOW), NOW + LEASE)
    none_left = Limiter(bucket.spent(0, SECOND, 5, NOW), NOW + LEASE)

    assert specs == [ClaimSpec("default", FAST_CLAIM, CLAIM_BYTES, NOW + LEASE, 0, None, True)]
    assert scheduler.peeks(specs) == ["default"]
    assert scheduler.admit(NOW, specs, {"default": left}) == specs
    assert scheduler.admit(NOW, specs, {"default": none_left}) == []
    assert scheduler.admit(NOW, specs, {}) == []
    taken = [claim(id, fail_fast=1) for id in range(4)]
    refused = scheduler.refusals(NOW, specs, taken, room(0))
    assert scheduler.claimed(NOW, specs, taken, {}, {"default": left}, ["default"], refused) == []
    assert asked(scheduler.plan(NOW, room(9))) == {"default": 1}


def test_what_doesnt_wait_for_a_slot_is_tried_again_after_its_backoff_and_uncharged() -> None:
    scheduler = crowded()
    specs = scheduler.fast_specs(NOW, ["default"], [], room(0))

    [outcome] = scheduler.refusals(NOW, specs, [claim(2, attempts=2, fail_fast=1, name="x")], room(0))

    assert outcome[:8] == (2, NOW, "default", Action.RETRY, NOW + SECOND // 5, False, 0, 0)
    assert outcome.reason == NO_SLOT
    assert scheduler.in_flight == 1, "it isn't sent"


def test_what_doesnt_wait_for_a_slot_and_is_past_its_limits_is_given_up() -> None:
    scheduler = crowded(retry=RetryPolicy(retry_limit=1))
    specs = scheduler.fast_specs(NOW, ["default"], [], room(0))

    [outcome] = scheduler.refusals(NOW, specs, [claim(2, failures=2, fail_fast=1)], room(0))

    assert outcome.action is Action.DEAD


def test_task_that_asks_to_fail_fast_runs_like_any_other_where_a_slot_is_free() -> None:
    [delivery] = commit(make(), claim(fail_fast=1))

    assert delivery.claim.fail_fast


def test_queue_that_gave_all_that_was_asked_is_looked_at_for_fail_fast_tasks_in_the_same_transaction() -> None:
    scheduler = make(QueueConfig(name="a"), QueueConfig(name="b"), QueueConfig(name="c"))
    specs = scheduler.plan(NOW, room(6))
    claims = [claim(1, queue="a"), claim(2, queue="a"), claim(3, queue="b"), claim(4, queue="c"), claim(5, queue="c")]
    assert scheduler.filled(NOW, specs, claims) == ["a", "c"]

    scheduler.looked_fast(NOW, ["a"], {"a": NOW + 1})

    assert scheduler.filled(NOW, specs, claims) == ["c"], "what is known isn't looked up again"
    fast = scheduler.fast_specs(NOW, ["b"], [], room(0))
    assert scheduler.filled(NOW, fast, []) == ["b"]
    assert scheduler.drained(fast, []) == [], "what else is due there isn't known by it"
    before = scheduler.wake_at(NOW, room(1))
    scheduler.claimed(NOW, fast, [], {}, {}, [])
    assert scheduler.wake_at(NOW, room(1)) == before


# --- claims that may not be sent ------------------------------------------------------------------------------------


def refuse(scheduler: Scheduler, *claims: Claim) -> list[Outcome]:
    specs = scheduler.plan(NOW, room(10))
    refused = scheduler.refusals(NOW, specs, claims, room(100))
    assert not scheduler.claimed(NOW, specs, claims, {}, {}, [], refused)
    return refused


def test_task_that_killed_its_process_too_often_is_given_up() -> None:
    [outcome] = refuse(make(in_process=True), claim(lost=3, name="x", status=500, history="[]"))

    assert (outcome.action, outcome.named, outcome.at) == (Action.DEAD, True, NOW + 9 * DAY)
    assert outcome.reason == "lost: its process died 3 times while it ran"
    assert (outcome.charged, outcome.executed, outcome.status, outcome.history) == (0, 0, 500, "[]")


def test_lost_leases_are_nobodys_fault_over_http() -> None:
    [delivery] = commit(make(), claim(lost=1_000))

    assert delivery.claim.lost == 1_000


def test_suspects_run_one_at_a_time() -> None:
    scheduler = make(in_process=True)
    specs = scheduler.plan(NOW, room(10))
    first, second, innocent = claim(1, lost=2), claim(2, lost=2), claim(3, lost=1)

    refused = scheduler.refusals(NOW, specs, [first, second, innocent], room(100))
    deliveries = scheduler.claimed(NOW, specs, [first, second, innocent], {}, {}, [], refused)

    assert [delivery.claim.id for delivery in deliveries] == [1, 3]
    assert [(outcome.id, outcome.action, outcome.at) for outcome in refused] == [
        (2, Action.RELEASE, NOW + ISOLATION_DELAY)
    ]  # fmt: skip
    scheduler.finished(NOW, result(first))
    assert not scheduler.refusals(NOW, specs, [second], room(100))
    assert scheduler.claimed(NOW, specs, [second], {}, {}, [])


@pytest.mark.parametrize("own", ["", '{"retry_limit":1}'])
def test_task_over_a_limit_that_was_lowered_meanwhile_is_given_up(own: str) -> None:
    queue = QueueConfig(name="default", retry=RetryPolicy(retry_limit=None if own else 1))

    [outcome] = refuse(make(queue), claim(failures=2, retry=own))

    assert (outcome.action, outcome.reason) == (Action.DEAD, "retry limit: 2 failures")


def test_task_at_its_limit_is_still_sent() -> None:
    assert commit(make(QueueConfig(name="default", retry=RetryPolicy(retry_limit=2))), claim(failures=2))


def test_task_for_an_unknown_target_moves_back_and_says_why() -> None:
    scheduler = make(QueueConfig(name="default"))

    [outcome] = refuse(scheduler, claim(target="gone"))

    assert (outcome.action, outcome.at) == (Action.RELEASE, NOW + UNRESOLVED_DELAY)
    assert outcome.reason == "target 'gone' is not configured"


def test_refused_claim_is_not_in_flight() -> None:
    scheduler = make()

    refuse(scheduler, claim(target="gone"))

    assert scheduler.in_flight == 0


@pytest.mark.parametrize(
    ("queue", "own", "base"), [("", "", BASE), ("", "worker", "http://worker"), ("worker", "gone", "http://worker")]
)
def test_target_of_the_queue_comes_before_the_tasks_own(queue: str, own: str, base: str) -> None:
    [delivery] = commit(make(QueueConfig(name="default", target=queue)), claim(target=own))

    assert delivery.base == base


@pytest.mark.parametrize(("own", "deadline"), [(0, 10 * MINUTE), (SECOND, SECOND)])
def test_deadline_is_the_tasks_or_the_queues(own: int, deadline: int) -> None:
    [delivery] = commit(make(), claim(deadline=own))

    assert delivery.deadline == deadline


# --- slowed targets ---------------------------------------------------------------------------------------------------


def refuse_tokens(scheduler: Scheduler, ids: range, *, now: int = NOW, **fields: Any) -> None:
    """Let the target refuse the token of one delivery after the other."""
    for id in ids:
        sent = claim(id, **fields)
        commit(scheduler, sent, now=now)
        outcome = scheduler.finished(now, result(sent, status=403, outcome="untrusted", error="unknown key"))
        assert outcome is not None
        assert (outcome.action, outcome.charged, outcome.executed) == (Action.RETRY, 0, 0)
        scheduler.settled(now, [outcome], [True])
    scheduler.woken(now)


def test_target_that_refuses_the_token_is_tried_with_one_task_after_a_pause() -> None:
    scheduler = make(QueueConfig(name="default"), QueueConfig(name="own", target="worker"))

    refuse_tokens(scheduler, range(3))

    assert asked(scheduler.plan(NOW, room(8))) == {"own": 8}
    assert scheduler.news(NOW) == [Condition(BASE, NOW, Ailment.REFUSING, "unknown key", 1, NOW + SECOND)]

    later = NOW + SECOND
    assert asked(scheduler.plan(later, room(8))) == {"default": 1, "own": 8}
    probe = claim(9)
    commit(scheduler, probe, now=later)
    scheduler.woken(later)
    assert asked(scheduler.plan(later, room(8))) == {"own": 8}
    scheduler.finished(later, result(probe, outcome="ok"))
    assert asked(scheduler.plan(later, room(8))) == {"default": 2, "own": 8}, "it ramps up"


def test_turn_is_due_when_a_slowed_target_is_tried_again() -> None:
    scheduler = make()
    refuse_tokens(scheduler, range(3))

    assert scheduler.wake_at(NOW, room(8)) == NOW + SECOND


def test_lost_delivery_to_a_slowed_target_makes_way_for_the_next() -> None:
    scheduler = make()
    refuse_tokens(scheduler, range(3))
    later = NOW + SECOND
    probe = claim(9)
    commit(scheduler, probe, now=later)

    scheduler.finished(later, result(probe, Kind.UNKNOWN, 0))
    scheduler.woken(later)

    assert asked(scheduler.plan(later, room(8))) == {"default": 1}


def test_task_with_a_slowed_target_of_its_own_gives_way_to_the_others() -> None:
    scheduler = make()
    refuse_tokens(scheduler, range(3), target="worker")
    specs = scheduler.plan(NOW, room(8))

    outcomes = scheduler.refusals(NOW, specs, [claim(7, target="worker"), claim(8)], room(100))

    assert [(o.id, o.action, o.at) for o in outcomes] == [(7, Action.RELEASE, NOW + SECOND)]
    assert outcomes[0].reason == "target http://worker refuses this engine's requests: unknown key"
    assert asked(specs) == {"default": 8}


def test_target_that_cannot_be_reached_is_tried_less_and_less_often() -> None:
    scheduler, now = make(), NOW
    for id in range(3):
        commit(scheduler, sent := claim(id), now=now)
        scheduler.finished(now, result(sent, Kind.UNREACHABLE, 0, error="connection refused"))
        scheduler.woken(now)

    assert scheduler.plan(now, room(8)) == []
    assert scheduler.wake_at(now, room(8)) == now + SECOND // 20
    assert asked(scheduler.plan(now + SECOND // 20, room(8))) == {"default": 1}


def test_overload_slows_the_queue_and_no_other() -> None:
    scheduler = make(QueueConfig(name="default"), QueueConfig(name="other"))
    commit(scheduler, *(sent := [claim(id) for id in range(8)]))

    for each in sent:
        outcome = scheduler.finished(NOW, result(each, status=503))
        assert outcome is not None
        assert outcome.charged == 1
    scheduler.woken(NOW)

    assert scheduler.news(NOW) == [Slowdown("default", NOW, 40.0, 0)]
    assert asked(scheduler.plan(NOW, room(40))) == {"default": 4, "other": 20}
    for each in [claim(id, queue="other") for id in range(20, 24)]:
        commit(scheduler, each)
        scheduler.finished(NOW, result(each, status=429))
    scheduler.woken(NOW)
    assert asked(scheduler.plan(NOW, room(40)))["other"] == 20


def test_handler_of_calls_that_says_why_is_not_overloaded() -> None:
    scheduler = make()
    commit(scheduler, sent := claim())

    scheduler.finished(NOW, result(sent, status=503, outcome="retry"))

    assert scheduler.news(NOW) == []


def test_what_another_target_of_the_queue_answers_counts_for_it_alone() -> None:
    scheduler = make()
    for id in range(3):
        commit(scheduler, sent := claim(id, target="worker"))
        scheduler.finished(NOW, result(sent, Kind.UNREACHABLE, 0))
    scheduler.woken(NOW)

    assert asked(scheduler.plan(NOW, room(8))) == {"default": 8}
