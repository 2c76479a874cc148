"""What every store does with tasks by order of people: delete, purge, reschedule, and what sweeps clear away."""

from __future__ import annotations

import pytest

from deferlib.core.model import DAY, MINUTE, Action, AddResult, DeleteResult, Micros
from deferlib.store import Store
from tests.store.stores import (
    LEASE,
    NOW,
    add,
    claim,
    dead,
    find,
    finish,
    ids,
    live,
    outcome,
    settle,
    spec,
    stats,
    task,
)

ADDED = AddResult.ADDED


def delete(store: Store, *names: str, queue: str = "default", now: Micros = NOW) -> list[DeleteResult]:
    return store.run(lambda tx: tx.delete(now, queue, names))


def purge(store: Store, limit: int = 1000, *, queue: str = "default", now: Micros = NOW) -> int:
    return store.run(lambda tx: tx.purge(now, queue, limit))


def reschedule(store: Store, *names: str, eta: Micros, now: Micros = NOW, queue: str = "default") -> int:
    return store.run(lambda tx: tx.reschedule(now, queue, names, eta))


def sweep(store: Store, limit: int = 1000, *, now: Micros) -> int:
    return store.run(lambda tx: tx.sweep(now, limit))


# --- delete, purge --------------------------------------------------------------------------------------------------


def test_delete_by_name_and_by_public_name(store: Store) -> None:
    add(store, task(1, name="n"), task(2), task(3, queue="other"))

    results = delete(store, "n", "2", "3", "n", "2", "never")

    gone, unknown = DeleteResult.DELETED, DeleteResult.UNKNOWN
    assert results == [gone, gone, unknown, DeleteResult.TOMBSTONED, unknown, unknown]
    assert (live(store), stats(store).tasks, stats(store, "other").tasks) == ([], 0, 1)


def test_deleted_name_is_tombstoned_for_its_queues_time(store: Store) -> None:
    add(store, task(1, name="n", queue="other"))

    delete(store, "n", queue="other")

    assert add(store, task(2, name="n", queue="other"), now=NOW + DAY - 1) == [AddResult.TOMBSTONED]
    assert add(store, task(2, name="n", queue="other"), now=NOW + DAY) == [ADDED]


def test_delete_takes_a_users_name_before_an_id(store: Store) -> None:
    add(store, task(7), task(8, name="7"))

    assert delete(store, "7") == [DeleteResult.DELETED]
    assert ids(live(store)) == [7]


@pytest.mark.parametrize("name", ["007", "+7", "7 ", "\u0667", "9" * 19, "9" * 40, "", "-7", "1_0"])
def test_what_is_no_public_name_is_unknown(store: Store, name: str) -> None:
    add(store, task(7), task(10))

    assert delete(store, name) == [DeleteResult.UNKNOWN]
    assert find(store, name) == find(store, name, queue=None) == []
    assert reschedule(store, name, eta=NOW) == 0
    assert stats(store).tasks == 2


def test_delete_removes_a_dead_letter_and_leaves_its_tombstone(store: Store) -> None:
    add(store, task(1, name="n"), task(2))
    finish(store, Action.DEAD)

    assert delete(store, "n", "2") == [DeleteResult.DELETED, DeleteResult.DELETED]

    assert (dead(store), stats(store).dead, stats(store).tasks) == ([], 0, 0)
    assert add(store, task(3, name="n")) == [AddResult.TOMBSTONED]
    assert delete(store, "n") == [DeleteResult.TOMBSTONED]


@pytest.mark.parametrize("how", ["delete", "purge"])
@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("name", [None, "n"])
def test_task_removed_while_it_runs_isnt_brought_back(store: Store, how: str, action: Action, name: str | None) -> None:
    add(store, task(1, name=name))
    [running] = claim(store)

    assert delete(store, name or "1") == [DeleteResult.DELETED] if how == "delete" else purge(store) == 1

    assert settle(store, outcome(running, action, NOW + 1, executed=1)) == [False]
    assert live(store) == dead(store) == claim(store, now=NOW + DAY) == []
    assert (stats(store).tasks, stats(store).dead, stats(store).executed_last_minute) == (0, 0, 0)


def test_purge_works_in_slices_until_nothing_is_left(store: Store) -> None:
    add(store, *(task(id, name=f"n{id}" if id % 2 else None, eta=NOW + id * DAY) for id in range(7)))
    add(store, task(50, queue="other"))
    claim(store, spec(limit=1))

    counts = [purge(store, 3) for _ in range(4)]

    assert counts == [3, 3, 1, 0]
    assert (live(store), stats(store).tasks) == ([], 0)
    assert ids(live(store, "other")) == [50]
    assert add(store, task(60, name="n1")) == [AddResult.TOMBSTONED]


def test_purge_leaves_dead_letters(store: Store) -> None:
    add(store, task(1))
    finish(store, Action.DEAD)

    assert purge(store) == 0
    assert ids(dead(store)) == [1]


# --- reschedule -----------------------------------------------------------------------------------------------------


def test_reschedule_moves_a_waiting_task(store: Store) -> None:
    add(store, task(1, eta=NOW + DAY), task(2, name="n", eta=NOW + DAY))

    assert reschedule(store, "1", "n", "never", eta=NOW) == 2

    assert ids(claim(store)) == [1, 2]


def test_reschedule_leaves_a_leased_task_alone(store: Store) -> None:
    add(store, task(1))
    [running] = claim(store)
    before = live(store)

    assert reschedule(store, "1", eta=NOW - DAY) == 0

    assert live(store) == before
    assert settle(store, outcome(running, Action.DONE)) == [True]


def test_reschedule_of_an_expired_lease_ends_it(store: Store) -> None:
    add(store, task(1))
    [late] = claim(store)

    assert reschedule(store, "1", eta=NOW + DAY, now=NOW + LEASE) == 1

    assert settle(store, outcome(late, Action.DONE)) == [False]
    [row] = live(store)
    assert (row.eta, row.due) == (NOW + DAY, NOW + DAY)


@pytest.mark.parametrize("name", [None, "n"])
def test_reschedule_replays_a_dead_letter(store: Store, name: str | None) -> None:
    add(store, task(1, name=name))
    [dying] = claim(store)
    settle(store, outcome(dying, Action.DEAD, charged=1, executed=1, status=500, reason="no"))

    assert reschedule(store, name or "1", eta=NOW + 5) == 1

    assert dead(store) == []
    assert (stats(store).tasks, stats(store).dead) == (1, 0)
    [again] = claim(store, now=NOW + 5)
    assert (again.attempts, again.executions, again.failures, again.lost, again.first_try) == (1, 0, 0, 0, NOW + 5)
    assert again.claims == dying.claims + 5, "its claims went on"
    assert (again.name, again.body, again.headers) == (name, b"body", '[["X-One","1"]]')
    assert settle(store, outcome(dying, Action.DONE)) == [False], "no old fence holds"
    assert settle(store, outcome(again, Action.DONE)) == [True]


def test_replay_keeps_the_claims_even_without_time_passing(store: Store) -> None:
    add(store, task(1))
    [dying] = finish(store, Action.DEAD)

    reschedule(store, "1", eta=NOW)

    assert claim(store)[0].claims == dying.claims + 1


def test_dead_letter_whose_name_is_in_use_again_stays(store: Store) -> None:
    add(store, task(1, name="n"))
    finish(store, Action.DEAD, at=NOW + 1)
    add(store, task(2, name="n", eta=NOW + DAY), now=NOW + 1)

    assert reschedule(store, "1", eta=NOW, now=NOW + 2) == 0

    assert (ids(dead(store)), ids(live(store)), stats(store).tasks, stats(store).dead) == ([1], [2], 1, 1)


def test_replay_finds_an_expired_tombstone_of_its_name_out_of_the_way(store: Store) -> None:
    add(store, task(1, name="n"))
    finish(store, Action.DEAD, at=NOW + 1)
    add(store, task(2, name="n"), now=NOW + 1)
    finish(store, Action.DONE, now=NOW + 1, at=NOW + 10)

    assert reschedule(store, "1", eta=NOW, now=NOW + 9) == 0
    assert reschedule(store, "1", eta=NOW, now=NOW + 10) == 1, "swept or not, the name is free"
    assert ids(live(store)) == [1]


def test_tombstone_cant_be_rescheduled(store: Store) -> None:
    add(store, task(1, name="n"))
    finish(store, Action.DONE)

    assert reschedule(store, "n", "1", eta=NOW) == 0
    assert claim(store) == []


# --- sweep ----------------------------------------------------------------------------------------------------------


def test_sweep_removes_expired_tombstones_in_slices(store: Store) -> None:
    add(store, *(task(id, name=f"n{id}") for id in range(5)), task(8, eta=NOW + DAY))
    for each in claim(store):
        settle(store, outcome(each, Action.DONE, NOW + each.id))

    assert sweep(store, now=NOW - 1) == 0
    assert [sweep(store, 2, now=NOW + 3) for _ in range(3)] == [2, 2, 0]

    assert ids(live(store)) == [8]
    assert ids(find(store, "n4")) == [4], "not expired"
    assert find(store, "n3") == []


def test_sweep_never_takes_more_than_its_limit(store: Store) -> None:
    later = NOW + 2 * DAY
    add(store, *(task(id, name=f"n{id}", queue=("default", "other")[id % 2]) for id in range(4)))
    for each in claim(store, spec(), spec("other")):
        settle(store, outcome(each, Action.DONE, NOW + 1, executed=1), now=NOW + (each.id // 2) * MINUTE)

    counts = [sweep(store, 3, now=later) for _ in range(4)]

    assert counts == [3, 3, 2, 0], "four tombstones, and two minutes of statistics in each of two queues"


def test_sweep_leaves_dead_letters_and_their_tombstones_until_they_expire(store: Store) -> None:
    add(store, task(1, name="n"))
    finish(store, Action.DEAD, at=NOW + DAY)

    assert sweep(store, now=NOW + DAY - 1) == 0
    assert sweep(store, now=NOW + 100 * DAY) == 2, "the tombstone and the minute"
    assert ids(dead(store)) == ids(find(store, "n")) == [1]
