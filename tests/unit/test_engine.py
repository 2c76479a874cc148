"""The engine's turns, one by one, on the bench."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from deferlib.core.model import (
    MINUTE,
    SECOND,
    Action,
    Claim,
    ClaimSpec,
    Delivery,
    Kind,
    Micros,
    Outcome,
    QueueConfig,
    QueueSource,
    Result,
    RetryPolicy,
)
from deferlib.core.queue_state import FAST_PAUSE
from deferlib.core.scheduler import FAST_CLAIM
from deferlib.core.verdict import NO_SLOT
from deferlib.engine.engine import Engine
from deferlib.errors import EnqueueUnknownError, StoreBusyError, StoreFullError
from deferlib.store.sqlite_tx import SqliteTx
from tests.unit.engine_bench import LEASE, Bench, Carrier


def fail(error: type[BaseException]) -> Callable[[], None]:
    def raising() -> None:
        raise error("on purpose")

    return raising


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.store.close()


# --- turns ----------------------------------------------------------------------------------------------------------


def test_turn_delivers_what_is_due_and_settles_what_was_answered(bench: Bench) -> None:
    [delivery] = bench.deliver(1)
    leased = bench.row(1)

    bench.carrier.answer(delivery)
    bench.engine.turn()

    assert leased is not None
    assert leased.state(bench.now) == "leased"
    assert bench.row(1) is None
    assert bench.engine.idle


def test_idle_turn_opens_no_transaction_and_sleeps_until_the_next_look_at_the_queues(bench: Bench) -> None:
    bench.engine.turn()
    bench.store.begun.clear()

    until = bench.engine.turn()

    assert bench.store.begun == []
    assert until == bench.now + SECOND


def test_turn_after_a_hint_comes_at_once(bench: Bench) -> None:
    bench.engine.turn()

    bench.engine.wake()

    assert bench.carrier.wakes == 1
    assert bench.engine.turn() > bench.now, "the hint is taken"


def test_what_a_target_asks_to_wait_counts_from_its_answer(bench: Bench) -> None:
    """It may come while a turn waits for the store (seed 20281 of the simulation)."""
    [delivery] = bench.deliver(1)

    def look() -> Iterator[Any]:
        bench.clock.move_to(bench.now + 2 * SECOND)
        bench.carrier.answer(delivery, 503)
        bench.carrier.found[-1] = bench.carrier.found[-1]._replace(retry_after=5 * SECOND)
        return read()

    read = bench.store.read
    bench.engine.reread()
    bench.store.read = look  # type: ignore[method-assign]
    answered = bench.now + 2 * SECOND
    bench.engine.turn()

    row = bench.row(1)
    assert row is not None
    assert row.eta == answered + 5 * SECOND


def test_retry_is_sent_at_its_time_without_any_hint(bench: Bench) -> None:
    [delivery] = bench.deliver(1)
    bench.carrier.answer(delivery, 500)

    until = bench.engine.turn()

    assert until == bench.now + SECOND // 10
    bench.clock.move_to(until)
    bench.engine.turn()
    assert [again.claim.attempts for again in bench.carrier.sent] == [2]


def test_long_delivery_is_renewed_before_anything_is_claimed(bench: Bench) -> None:
    [delivery] = bench.deliver(1)
    bench.clock.advance(31)  # past the lease: nobody else took it

    bench.engine.wake()
    bench.engine.turn()

    row = bench.row(1)
    assert row is not None
    assert (row.claims, row.due, row.lost) == (delivery.claim.claims, bench.now + LEASE, 0)
    assert bench.carrier.sent == [delivery]


def test_paused_queue_is_noticed_within_a_second(bench: Bench) -> None:
    bench.engine.turn()
    bench.store.real.run(lambda tx: tx.pause(["default"], True))
    bench.clock.advance(1)

    assert bench.deliver(1) == []


def test_delivery_that_lost_its_lease_is_cancelled(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    [delivery] = bench.deliver(1)
    bench.clock.advance(31)
    bench.store.real.run(lambda tx: tx.claim(bench.now, [ClaimSpec("default", 1, 1, bench.now + LEASE)]))

    bench.engine.turn()

    assert bench.carrier.cancelled == [delivery.claim[:2]]
    assert "lost its lease" in caplog.text
    assert bench.engine.idle


def test_claim_that_may_not_be_sent_is_never_seen_leased(bench: Bench) -> None:
    config = QueueConfig(name="default", target="nowhere")  # a target that isn't configured
    bench.store.real.run(lambda tx: tx.put_queues([config], QueueSource.COMMAND))
    assert bench.deliver(1) == []

    row = bench.row(1)

    assert row is not None
    assert row.claims > 0, "it was claimed"
    assert (row.state(bench.now), row.attempts) == ("scheduled", 0), "an engine killed now would not have lost it"


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        ("before_begin", StoreBusyError),
        ("before_commit", StoreFullError),
        ("before_commit", EnqueueUnknownError),
        ("after_commit", EnqueueUnknownError),
    ],
)
@pytest.mark.parametrize("status", [200, 500])
def test_failed_transaction_loses_no_outcome(bench: Bench, moment: str, error: type[Exception], status: int) -> None:
    [delivery] = bench.deliver(1)
    bench.carrier.answer(delivery, status)
    setattr(bench.store, moment, fail(error))
    with pytest.raises(error):
        bench.engine.turn()

    setattr(bench.store, moment, lambda: None)
    bench.engine.turn()

    row = bench.row(1)
    assert (row is None) == (status == 200)
    assert row is None or (row.attempts, row.failures) == (1, 1)
    assert bench.engine.idle


@pytest.mark.parametrize("step", ["answer", "settle", "claim", "commit", "committed", "send"])
def test_failure_at_any_step_loses_no_task(bench: Bench, step: str) -> None:
    bench.carrier.answer(*bench.deliver(1))
    bench.add(2, 3)
    bench.at_step[step] = fail(RuntimeError)
    with pytest.raises(RuntimeError):
        bench.engine.turn()

    for _ in range(3):
        bench.engine.turn()
        for delivery in list(bench.carrier.sent):
            bench.carrier.answer(delivery)
        bench.clock.advance(31)  # a claim that was committed and forgotten runs out

    assert [bench.row(id) for id in (1, 2, 3)] == [None, None, None]
    assert bench.engine.idle


def test_delivery_that_the_transport_fails_to_take_is_tried_again_and_the_others_are_sent(bench: Bench) -> None:
    bench.add(1, 2, 3)
    bench.carrier.broken = True
    with pytest.raises(OSError, match="too many open files"):
        bench.engine.turn()

    bench.engine.turn()

    row = bench.row(1)
    assert [delivery.claim.id for delivery in bench.carrier.sent] == [2, 3]
    assert row is not None
    assert (row.state(bench.now), row.failures) == ("scheduled", 0)
    assert row.reason == "the transport failed: OSError: too many open files"


def test_claim_whose_lease_ran_out_before_it_was_sent_is_not_sent(bench: Bench) -> None:
    bench.at_step["send"] = lambda: bench.clock.advance(28)

    deliveries = bench.deliver(1)
    bench.engine.turn()  # releases it, and claims it again
    bench.engine.turn()

    row = bench.row(1)
    assert deliveries == []
    assert row is not None
    assert row.attempts == 1, "the stall was not the task's failure"
    assert [delivery.claim.claims for delivery in bench.carrier.sent] == [row.claims]


# --- what is written ------------------------------------------------------------------------------------------------


def test_claim_from_a_queue_without_limits_needs_no_sync(bench: Bench) -> None:
    bench.deliver(1)

    assert bench.store.begun == [False]


def test_claim_of_limited_queues_is_synced_and_renewals_are_not(bench: Bench) -> None:
    bench.put(QueueConfig(name="limited", rate=1.0))
    bench.deliver(1, queue="limited")
    assert bench.store.begun == [True]

    bench.clock.advance(10)
    bench.engine.turn()
    assert bench.store.begun[1:] == [False]
    assert bench.engine._sync_at is None


@pytest.mark.parametrize(
    ("limits", "synced"),
    [
        ({"rate": 1_000.0, "bucket_size": 500}, False),  # whoever comes back after a power cut finds a full bucket anyway
        ({"rate": 1_000.0, "bucket_size": 5_000}, True),
        ({"rate": 1 / 60, "bucket_size": 1}, True),
        ({"rate": 1_000.0, "max_concurrent": 5}, True),  # what holds a slot may run on, elsewhere
        ({"max_concurrent": 5}, True),
    ],
)
def test_claims_are_synced_where_a_power_cut_could_break_a_limit(
    bench: Bench, limits: dict[str, Any], synced: bool
) -> None:
    bench.put(QueueConfig(name="limited", **limits))

    bench.deliver(1, queue="limited")

    assert bench.store.begun == [synced]


def settle_without_sync(bench: Bench, *ids: int) -> int:
    """Return when the engine wants its next turn."""
    bench.store.on_disk = True
    for delivery in bench.deliver(*ids):
        bench.carrier.answer(delivery)
    bench.store.begun.clear()
    until = bench.engine.turn()
    assert bench.store.begun == [False]
    return until


def test_settles_are_synced_within_50_ms(bench: Bench) -> None:
    until = settle_without_sync(bench, 1)

    assert until == bench.now + SECOND // 20
    assert (bench.store.unsynced, bench.store.syncs) == (True, 0)
    assert not bench.engine.idle
    assert bench.engine.busy

    bench.clock.move_to(until)
    until = bench.engine.turn()

    assert (bench.store.unsynced, bench.store.syncs) == (False, 1)
    assert bench.engine.idle
    assert until >= bench.now + SECOND // 2, "and it stays idle"
    bench.clock.move_to(until)
    bench.engine.turn()
    assert bench.store.syncs == 1


def test_settles_that_follow_put_no_sync_off(bench: Bench) -> None:
    until = settle_without_sync(bench, 1)
    bench.clock.move_to(until - SECOND // 100)

    assert settle_without_sync(bench, 2) == until


def test_durable_commit_of_somebody_else_in_the_process_counts_as_the_sync(bench: Bench) -> None:
    settle_without_sync(bench, 1)

    bench.add(2, wait=MINUTE)

    assert bench.engine.idle


def test_limited_queues_turn_syncs_what_was_settled_before(bench: Bench) -> None:
    bench.put(QueueConfig(name="limited", rate=1.0))
    settle_without_sync(bench, 1)

    bench.deliver(2, queue="limited")

    assert bench.store.begun[-1:] == [True]
    assert bench.engine._sync_at is None


def test_sync_that_fails_is_asked_for_again_in_the_next_turn(bench: Bench) -> None:
    bench.clock.move_to(settle_without_sync(bench, 1))
    bench.store.before_sync = fail(EnqueueUnknownError)

    with pytest.raises(EnqueueUnknownError):
        bench.engine.turn()
    assert not bench.engine.idle
    bench.store.before_sync = lambda: None
    bench.engine.turn()

    assert bench.engine.idle


def test_clock_that_is_set_back_keeps_no_settle_unsynced(bench: Bench) -> None:
    settle_without_sync(bench, 1)

    bench.clock._now -= MINUTE
    bench.engine.turn()

    assert not bench.store.unsynced


@pytest.mark.parametrize("end", [Engine.drain, lambda engine: engine.stop(SECOND)])
def test_engine_that_ends_syncs_at_once(bench: Bench, end: Callable[[Engine], None]) -> None:
    bench.store.on_disk = True
    first, second = bench.deliver(1, 2)
    bench.carrier.started.add(2)
    bench.carrier.answer(first)
    bench.engine.turn()
    assert bench.store.unsynced

    end(bench.engine)
    bench.engine.turn()
    assert bench.store.syncs == 1
    bench.carrier.answer(second)
    bench.engine.turn()

    assert bench.store.begun[-1] is True
    assert bench.engine.idle


def test_engine_that_leaves_a_running_task_behind_has_synced_the_others(bench: Bench) -> None:
    bench.store.on_disk = True
    first, _ = bench.deliver(1, 2)
    bench.carrier.answer(first)
    bench.engine.turn()
    assert bench.store.unsynced

    bench.engine.leave()

    assert not bench.store.unsynced


def test_looking_at_an_empty_limited_queue_writes_nothing(bench: Bench) -> None:
    bench.put(QueueConfig(name="limited", max_concurrent=1))
    bench.engine.turn()

    bench.engine.wake()
    bench.engine.turn()

    with bench.store.real.begin() as tx:
        assert {row.owner for row in tx.queues()} == {""}


def test_expired_tombstones_are_swept_in_slices(bench: Bench) -> None:
    def left() -> int:
        with bench.store.real.begin() as tx:
            return sum(bool(tx.find("default", [f"name-{id}"])) for id in range(1, 242))

    for id in range(1, 242):
        bench.add(id, name=f"name-{id}")
    bench.store.real.run(lambda tx: tx.purge(bench.now, "default", 1_000))
    bench.engine.turn()
    bench.clock.advance(9 * 86_400)

    until = bench.engine.turn()
    assert left() == 41
    assert until == bench.now + SECOND // 10

    bench.clock.move_to(until)
    bench.engine.turn()
    assert left() == 0


def test_failing_sweep_does_not_stop_deliveries(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqliteTx, "sweep", lambda *_: fail(StoreFullError)())
    bench.clock.advance(10 * MINUTE / SECOND)
    bench.add(1)
    with pytest.raises(StoreFullError):
        bench.engine.turn()

    bench.engine.turn()

    assert len(bench.carrier.sent) == 1


# --- limited queues -------------------------------------------------------------------------------------------------


def test_limited_queue_is_dispatched_by_one_engine_and_taken_over_when_that_is_gone(bench: Bench) -> None:
    bench.put(QueueConfig(name="narrow", max_concurrent=1))
    bench.deliver(1, queue="narrow")
    other = Carrier(bench.clock)
    successor = bench.boot("other", other)
    bench.add(2, queue="narrow")

    successor.turn()
    assert other.sent == []

    bench.clock.advance(30)
    successor.turn()
    assert [delivery.claim.id for delivery in other.sent] == [2]


@pytest.mark.parametrize("waits_for_the_store", [False, True])
def test_engine_that_overslept_does_not_renew_under_the_new_owner(bench: Bench, waits_for_the_store: bool) -> None:
    bench.put(QueueConfig(name="narrow", max_concurrent=1))
    [delivery] = bench.deliver(1, 2, queue="narrow")
    other = Carrier(bench.clock)
    successor = bench.boot("other", other)

    def oversleep() -> None:
        bench.store.before_begin = lambda: None
        bench.clock.advance(30)
        successor.turn()

    bench.clock.advance(15)
    if waits_for_the_store:
        bench.store.before_begin = oversleep
    else:
        oversleep()
    bench.engine.turn()

    assert [taken.claim.id for taken in other.sent] == [2]
    assert bench.carrier.sent == []
    assert bench.carrier.cancelled == [delivery.claim[:2]]


# --- tasks that don't wait for a slot -------------------------------------------------------------------------------


def fill(bench: Bench, slots: int = 1) -> list[Delivery]:
    """Let the transport be full."""
    bench.carrier.slots = slots
    sent = bench.deliver(*range(1_000, 1_000 + slots))
    assert len(sent) == slots
    bench.store.begun.clear()
    bench.clock.move_to(bench.now + FAST_PAUSE)
    return sent


def waiting(bench: Bench, *ids: int, queue: str = "default") -> list[tuple[str, int, int, int]]:
    """Return what became of tasks that are still there."""
    rows = [row for id in ids if (row := bench.row(id, queue))]
    return [(row.reason, row.eta - bench.now, row.attempts, row.failures + row.executions) for row in rows]


def test_task_that_asks_to_fail_fast_fails_at_once_where_no_slot_is_free(bench: Bench) -> None:
    sent = fill(bench)
    bench.add(1, 2, fail_fast=1)
    bench.add(3)

    until = bench.engine.turn()

    assert waiting(bench, 1, 2, 3) == [*[(NO_SLOT, SECOND // 10, 1, 0)] * 2, ("", 0, 0, 0)]
    assert bench.store.begun == [False], "claimed and settled in one transaction, which needs no sync"
    assert bench.carrier.sent == sent
    assert until == bench.now + SECOND // 10
    bench.clock.move_to(until)
    assert bench.engine.turn() == bench.now + SECOND // 5
    assert waiting(bench, 1) == [(NO_SLOT, SECOND // 5, 2, 0)]


def test_task_that_asks_to_fail_fast_runs_where_a_slot_is_free(bench: Bench) -> None:
    [first] = fill(bench)
    bench.add(1, fail_fast=1)
    bench.clock.move_to(bench.engine.turn())

    bench.carrier.answer(first)
    bench.engine.turn()

    assert [(delivery.claim.id, delivery.claim.attempts) for delivery in bench.carrier.sent] == [(1, 2)]
    assert bench.carrier.sent[0].claim.reason == NO_SLOT


def test_fail_fast_task_that_comes_due_in_a_full_queue_is_failed_without_any_hint(bench: Bench) -> None:
    fill(bench)
    bench.add(1, fail_fast=1, wait=SECOND // 2)

    until = bench.engine.turn()

    assert until == bench.now + SECOND // 2
    assert bench.store.begun == []
    bench.clock.move_to(until)
    bench.engine.turn()
    assert waiting(bench, 1) == [(NO_SLOT, SECOND // 10, 1, 0)]


def test_fail_fast_tasks_left_over_by_the_turn_that_fills_the_slots_fail_in_the_next_one(bench: Bench) -> None:
    bench.carrier.slots = 1
    bench.add(1, 2, fail_fast=1)

    again = [bench.engine.turn() for _ in range(3)]

    assert again == [bench.now, bench.now + SECOND // 10, bench.now + SECOND // 10]
    assert [delivery.claim.id for delivery in bench.carrier.sent] == [1]
    assert waiting(bench, 2) == [(NO_SLOT, SECOND // 10, 1, 0)]


def test_more_fail_fast_tasks_than_a_turn_takes_fail_in_the_next_ones(bench: Bench) -> None:
    fill(bench)
    bench.add(*range(1, 2 * FAST_CLAIM + 2), fail_fast=1)

    again = [bench.engine.turn() for _ in range(3)]

    assert again == [bench.now, bench.now, bench.now + SECOND // 10]
    assert waiting(bench, 1, 2 * FAST_CLAIM + 1) == [(NO_SLOT, SECOND // 10, 1, 0)] * 2


def test_queue_at_its_concurrency_limit_fails_them_too_as_its_owner_alone(bench: Bench) -> None:
    bench.put(QueueConfig(name="narrow", max_concurrent=1))
    bench.deliver(1, queue="narrow")
    other = Carrier(bench.clock)
    other.slots = 0
    successor = bench.boot("other", other)
    bench.clock.move_to(bench.now + FAST_PAUSE)
    bench.add(2, queue="narrow", fail_fast=1)

    successor.turn()
    assert waiting(bench, 2, queue="narrow") == [("", 0, 0, 0)]

    bench.engine.turn()
    assert waiting(bench, 2, queue="narrow") == [(NO_SLOT, SECOND // 10, 1, 0)]


def test_fail_fast_tasks_of_a_paused_queue_or_one_without_tokens_wait(bench: Bench) -> None:
    bench.put(QueueConfig(name="paused"), QueueConfig(name="metered", rate=0.1, bucket_size=1))
    bench.store.real.run(lambda tx: tx.pause(["paused"], True))
    bench.deliver(1, queue="metered")
    bench.carrier.slots = 1
    for queue in ("paused", "metered"):
        bench.add(2 if queue == "paused" else 3, queue=queue, fail_fast=1)

    bench.engine.turn()

    assert waiting(bench, 2, queue="paused") == waiting(bench, 3, queue="metered") == [("", 0, 0, 0)]


def test_failing_fast_spends_no_tokens(bench: Bench) -> None:
    bench.put(QueueConfig(name="metered", rate=1.0, bucket_size=3))
    bench.carrier.slots = 0
    bench.add(*range(1, 9), queue="metered", fail_fast=1)
    bench.engine.turn()
    assert len(waiting(bench, *range(1, 9), queue="metered")) == 8

    bench.carrier.slots = 9
    bench.clock.advance(0.1)
    bench.engine.turn()

    assert len(bench.carrier.sent) == 3


@pytest.mark.parametrize("moment", ["before_begin", "before_commit"])
def test_failing_fast_is_repeated_after_a_transaction_that_failed(bench: Bench, moment: str) -> None:
    fill(bench)
    bench.add(1, fail_fast=1)
    setattr(bench.store, moment, fail(StoreBusyError))
    with pytest.raises(StoreBusyError):
        bench.engine.turn()
    assert waiting(bench, 1) == [("", 0, 0, 0)]

    setattr(bench.store, moment, lambda: None)
    bench.engine.turn()

    assert waiting(bench, 1) == [(NO_SLOT, SECOND // 10, 1, 0)]


def test_full_engine_looks_for_fail_fast_tasks_once_after_each_hint_and_opens_no_transaction(bench: Bench) -> None:
    fill(bench)
    bench.add(1)
    bench.engine.turn()
    looked = bench.store.looked

    until = [bench.engine.turn() for _ in range(3)]
    assert (bench.store.looked - looked, bench.store.begun) == (0, [])
    assert min(until) > bench.now + SECOND // 2, "the next look at the queues"

    bench.clock.move_to(bench.now + FAST_PAUSE)
    for _ in range(5):
        bench.engine.wake()
        until = [bench.engine.turn()]
    assert (bench.store.looked - looked, bench.store.begun) == (1, [])
    assert until == [bench.now + FAST_PAUSE], "hints one upon the other wait a moment"
    bench.clock.move_to(*until)
    bench.engine.turn()
    assert (bench.store.looked - looked, bench.store.begun) == (2, [])


def test_saturated_engine_takes_no_turn_of_its_own_to_look_for_fail_fast_tasks(bench: Bench) -> None:
    bench.carrier.slots = 2
    bench.add(*range(1, 9))

    for _ in range(3):
        bench.clock.move_to(bench.now + FAST_PAUSE)
        bench.engine.wake()
        assert bench.engine.turn() > bench.now + SECOND // 2, "looked up in the transaction that filled the slots"
        for delivery in list(bench.carrier.sent):
            bench.carrier.answer(delivery)

    assert len(bench.store.begun) == 3
    assert bench.store.looked == 1, "the queues' rows"


def test_observer_is_told_of_what_fails_fast(bench: Bench, notebook: Notebook) -> None:
    fill(bench)
    bench.add(1, fail_fast=1)

    bench.engine.turn()

    assert notebook.told == [Ended(1, 1, None, Action.RETRY)]


# --- stopping -------------------------------------------------------------------------------------------------------


def stop(bench: Bench, *graces: float) -> Callable[[], None]:
    def stopping() -> None:
        for grace in graces:
            bench.engine.stop(round(grace * SECOND))

    return stopping


def test_stop_releases_what_has_not_started_with_its_attempt_refunded(bench: Bench) -> None:
    bench.add(1)
    bench.carrier.during_wait.append(stop(bench, 25))

    bench.engine.run()

    row = bench.row(1)
    assert row is not None
    assert (row.state(bench.now), row.attempts, row.reason) == ("ready", 0, "")


def test_stop_finishes_what_runs_within_the_grace_time(bench: Bench) -> None:
    def answer() -> None:
        bench.clock.advance(5)
        bench.carrier.answer(bench.carrier.sent[0])

    begun = bench.now
    bench.add(1)
    bench.carrier.started.add(1)
    bench.carrier.during_wait += [stop(bench, 25), answer]

    bench.engine.run()

    assert bench.row(1) is None
    assert bench.now - begun == 5 * SECOND


def test_what_still_runs_after_the_grace_time_keeps_its_lease(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    begun = bench.now
    bench.add(1)
    bench.carrier.started.add(1)
    bench.carrier.during_wait.append(stop(bench, 25))

    bench.engine.run()

    row = bench.row(1)
    assert bench.now - begun == 25 * SECOND
    assert row is not None
    assert (row.state(bench.now), row.attempts) == ("leased", 1)
    assert "and run again: 1" in caplog.text


def test_second_stop_shortens_the_grace_time(bench: Bench) -> None:
    begun = bench.now
    bench.add(1)
    bench.carrier.started.add(1)
    bench.carrier.during_wait += [stop(bench, 25), stop(bench, 3)]

    bench.engine.run()

    assert bench.now - begun == 3 * SECOND


def test_later_stop_does_not_lengthen_the_grace_time(bench: Bench) -> None:
    begun = bench.now
    bench.add(1)
    bench.carrier.started.add(1)
    bench.carrier.during_wait += [stop(bench, 3, 25)]

    bench.engine.run()

    assert bench.now - begun == 3 * SECOND


def test_engine_that_has_finished_gives_its_queues_back(bench: Bench) -> None:
    bench.put(QueueConfig(name="narrow", max_concurrent=1))
    bench.add(1, queue="narrow")
    bench.carrier.during_wait.append(stop(bench, 25))

    bench.engine.run()

    with bench.store.real.begin() as tx:
        assert {row.owner for row in tx.queues()} == {""}


def test_drain_releases_what_a_failure_left_unsent(bench: Bench) -> None:
    bench.add(1)
    bench.at_step["send"] = fail(RuntimeError)
    with pytest.raises(RuntimeError):
        bench.engine.turn()

    bench.engine.drain()
    bench.engine.turn()

    row = bench.row(1)
    assert row is not None
    assert (row.state(bench.now), row.attempts, row.reason) == ("ready", 0, "the engine is stopping")


@pytest.mark.parametrize("error", [StoreBusyError, RuntimeError])
def test_run_goes_on_after_a_turn_that_failed(
    bench: Bench, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def heal() -> None:
        bench.store.before_begin = lambda: None

    def answer() -> None:
        bench.carrier.answer(bench.carrier.sent[0])

    bench.add(1)
    bench.store.before_begin = fail(error)
    bench.carrier.during_wait += [heal, answer, stop(bench, 25)]

    bench.engine.run()

    assert bench.row(1) is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_store_that_fails_to_the_end_does_not_keep_the_engine_from_stopping(bench: Bench) -> None:
    begun = bench.now
    bench.add(1)

    def breaking() -> None:
        bench.store.before_begin = fail(StoreBusyError)
        bench.engine.stop(2 * SECOND)

    bench.carrier.during_wait.append(breaking)

    bench.engine.run()

    assert bench.now - begun == 2 * SECOND


# --- the observer ---------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """What an observer was told of one delivery."""

    id: int
    attempt: int
    kind: Kind | None
    action: Action


class Notebook:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.told: list[Ended] = []

    def ended(self, now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        assert (claim.id, claim.claims) == (outcome.id, outcome.claims)
        self.told.append(Ended(claim.id, claim.attempts, None if result is None else result.kind, outcome.action))


@pytest.fixture
def notebook(bench: Bench) -> Notebook:
    notebook = Notebook()
    bench.engine = bench.boot("me", bench.carrier, observer=notebook)
    return notebook


def test_observer_is_told_of_every_ending_once(bench: Bench, notebook: Notebook) -> None:
    first, second = bench.deliver(1, 2)
    assert notebook.told == [], "nothing has ended"
    bench.carrier.answer(first)
    bench.carrier.answer(second, 500)

    for _ in range(3):
        bench.engine.turn()

    assert notebook.told == [Ended(1, 1, Kind.ANSWERED, Action.DONE), Ended(2, 1, Kind.ANSWERED, Action.RETRY)]


def test_observer_is_told_of_each_attempt(bench: Bench, notebook: Notebook) -> None:
    bench.put(QueueConfig(name="default", retry=RetryPolicy(retry_limit=1)))
    bench.add(1)
    for _ in range(2):
        bench.engine.turn()
        bench.carrier.answer(bench.carrier.sent[0], 500)
        bench.clock.move_to(bench.engine.turn())

    assert notebook.told == [Ended(1, 1, Kind.ANSWERED, Action.RETRY), Ended(1, 2, Kind.ANSWERED, Action.DEAD)]


@pytest.mark.parametrize(
    ("moment", "error"),
    [("before_begin", StoreBusyError), ("before_commit", StoreFullError), ("after_commit", EnqueueUnknownError)],
)
def test_observer_is_told_once_though_the_transaction_fails(
    bench: Bench, notebook: Notebook, moment: str, error: type[Exception]
) -> None:
    [delivery] = bench.deliver(1)
    bench.carrier.answer(delivery)
    setattr(bench.store, moment, fail(error))
    with pytest.raises(error):
        bench.engine.turn()

    setattr(bench.store, moment, lambda: None)
    bench.engine.turn()

    assert notebook.told == [Ended(1, 1, Kind.ANSWERED, Action.DONE)]


def test_observer_is_told_of_claims_that_are_refused(bench: Bench, notebook: Notebook) -> None:
    config = QueueConfig(name="default", target="nowhere")
    bench.store.real.run(lambda tx: tx.put_queues([config], QueueSource.COMMAND))

    bench.deliver(1, 2)
    bench.engine.turn()

    assert notebook.told == [Ended(1, 1, None, Action.RELEASE), Ended(2, 1, None, Action.RELEASE)]


def test_observer_is_told_of_a_refused_claim_only_once_that_is_committed(bench: Bench, notebook: Notebook) -> None:
    config = QueueConfig(name="default", target="nowhere")
    bench.store.real.run(lambda tx: tx.put_queues([config], QueueSource.COMMAND))
    bench.add(1)
    bench.store.before_commit = fail(StoreBusyError)
    with pytest.raises(StoreBusyError):
        bench.engine.turn()
    before = list(notebook.told)

    bench.store.before_commit = lambda: None
    bench.engine.turn()

    assert before == []
    assert notebook.told == [Ended(1, 1, None, Action.RELEASE)]


def test_observer_is_told_of_what_is_given_back(bench: Bench, notebook: Notebook) -> None:
    bench.deliver(1)

    bench.engine.drain()
    bench.engine.turn()

    assert notebook.told == [Ended(1, 1, Kind.UNSENT, Action.RELEASE)]


def test_observer_is_not_told_of_a_lease_that_was_lost(bench: Bench, notebook: Notebook) -> None:
    [delivery] = bench.deliver(1)
    bench.clock.advance(31)
    bench.store.real.run(lambda tx: tx.claim(bench.now, [ClaimSpec("default", 1, 1, bench.now + LEASE)]))
    bench.engine.turn()

    bench.carrier.found.append(Result(*delivery.claim[:2], Kind.ANSWERED, bench.now, bench.now, 200))
    bench.engine.turn()

    assert notebook.told == [], "whoever has it now tells its end"


def test_observer_is_told_of_what_the_transport_does_not_take(bench: Bench, notebook: Notebook) -> None:
    bench.add(1)
    bench.carrier.broken = True
    with pytest.raises(OSError, match="too many open files"):
        bench.engine.turn()

    bench.engine.turn()

    assert notebook.told == [Ended(1, 1, Kind.UNKNOWN, Action.RETRY)]


# --- taking over ----------------------------------------------------------------------------------------------------


def left_behind(bench: Bench) -> None:
    """Have a task that an engine which is gone was running, of a queue that it owned."""
    bench.put(QueueConfig(name="narrow", max_concurrent=1))
    bench.deliver(1, queue="narrow")
    bench.carrier.sent.clear()
    bench.clock.advance(1)


@pytest.mark.parametrize("take_over", [False, True])
def test_first_engine_ends_the_leases_it_finds_only_if_it_takes_over(
    bench: Bench, caplog: pytest.LogCaptureFixture, take_over: bool
) -> None:
    left_behind(bench)
    other = Carrier(bench.clock)
    successor = bench.boot("other", other, take_over=take_over)
    sent: list[tuple[int, int]] = []

    def look() -> None:
        sent.extend((delivery.claim.id, delivery.claim.lost) for delivery in other.sent)
        successor.stop(0)

    other.during_wait.append(look)
    successor.run()

    assert sent == ([(1, 1)] if take_over else [])
    assert ("killed, and run again now: 1" in caplog.text) is take_over


def test_engine_beside_another_one_takes_nothing_over(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    left_behind(bench)
    other = Carrier(bench.clock)
    successor = bench.boot("other", other, take_over=True)
    other.during_wait.append(lambda: successor.stop(0))

    with bench.store.real.serving(lambda: None):
        successor.run()

    row = bench.row(1, "narrow")
    assert row is not None
    assert (row.state(bench.now), row.lost) == ("leased", 0)
    assert caplog.records == []


def test_first_engine_that_finds_nothing_running_says_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.add(1)
    successor = bench.boot("other", Carrier(bench.clock), take_over=True)
    successor.stop(0)

    successor.run()

    assert caplog.records == []


def test_takeover_that_fails_leaves_the_leases_to_run_out(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    left_behind(bench)
    other = Carrier(bench.clock)
    successor = bench.boot("other", other, take_over=True)

    def heal() -> None:
        bench.store.before_begin = lambda: None
        bench.clock.advance(30)

    def answer() -> None:
        other.answer(other.sent[0])

    bench.store.before_begin = fail(StoreBusyError)
    other.during_wait += [heal, lambda: None, answer, lambda: successor.stop(0)]

    successor.run()

    assert "the leases that another engine left run out by themselves: on purpose" in caplog.text
    assert bench.row(1, "narrow") is None, "it ran in the end"


# --- gathering --------------------------------------------------------------------------------------------------------


def left(bench: Bench) -> int:
    """Return how many tasks aren't settled."""
    with bench.store.real.read() as tx:
        return tx.stats(bench.now, ["default"])[0].tasks


def gathering(bench: Bench) -> None:
    """Let the bench's engine gather, as an engine of the settings does."""
    bench.engine._gather = 4_000
    bench.engine._settled_at = bench.now - 4_000


def test_what_finishes_shortly_after_a_settle_waits_for_more(bench: Bench) -> None:
    gathering(bench)
    for id in range(1, 4):
        bench.add(id)
    bench.engine.turn()
    first, second, third = bench.carrier.sent[:]
    bench.carrier.answer(first)
    bench.engine.turn()
    assert left(bench) == 2, "the first is settled at once"

    bench.clock.move_to(bench.now + 1_000)
    bench.carrier.answer(second)
    until = bench.engine.turn()
    assert left(bench) == 2
    assert until == bench.now + 3_000

    bench.clock.move_to(until)
    bench.carrier.answer(third)
    bench.engine.turn()
    assert left(bench) == 0, "both in one"
    assert bench.engine.idle


def test_engine_that_stops_gathers_nothing(bench: Bench) -> None:
    gathering(bench)
    for id in range(1, 3):
        bench.add(id)
    bench.engine.turn()
    first, second = bench.carrier.sent[:]
    bench.carrier.started = {first.claim.id, second.claim.id}
    bench.engine.drain()
    for each in (first, second):
        bench.carrier.answer(each)
        bench.engine.turn()

    assert left(bench) == 0


def test_failed_settle_is_gathered_again_with_the_rest(bench: Bench) -> None:
    gathering(bench)
    bench.add(1)
    bench.engine.turn()
    bench.carrier.answer(bench.carrier.sent[0])

    def fail() -> None:
        raise StoreFullError

    bench.store.before_commit = fail
    with pytest.raises(StoreFullError):
        bench.engine.turn()
    bench.store.before_commit = lambda: None
    bench.engine.turn()

    assert left(bench) == 0


def test_clock_that_is_set_back_delays_neither_a_start_nor_a_settle_nor_a_pause(bench: Bench) -> None:
    gathering(bench)
    bench.add(1, 2)
    bench.engine.turn()
    [first, second] = bench.carrier.sent
    bench.carrier.answer(first)
    bench.clock.move_to(bench.now + 5_000)
    bench.engine.turn()
    assert left(bench) == 1

    bench.clock._now -= 3600 * SECOND
    bench.carrier.answer(second)
    until = bench.engine.turn()

    assert left(bench) == 0
    assert until <= bench.now + SECOND
    bench.store.run(lambda tx: tx.pause(["default"], True))
    bench.add(3)
    bench.clock.move_to(bench.now + SECOND)
    bench.engine.turn()
    assert not bench.carrier.sent, "the queue is paused"


def test_tasks_that_come_one_by_one_start_at_once(bench: Bench) -> None:
    gathering(bench)
    for id in range(1, 20):
        bench.add(id)
        bench.engine.wake()
        bench.engine.turn()
        assert len(bench.carrier.sent) == id
        bench.clock.move_to(bench.now + 1_200)
