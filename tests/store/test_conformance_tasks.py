"""What every store does with a task that runs its course, through the verbs of `deferlib.store.Tx` alone."""

from __future__ import annotations

import pytest

from deferlib.core.model import DAY, MINUTE, SECOND, Action, AddResult, Micros, Outcome
from deferlib.store import Store
from tests.store.stores import (
    KEEP,
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

ADDED, EXISTS, COLLIDED = AddResult.ADDED, AddResult.EXISTS, AddResult.COLLIDED


# --- add ------------------------------------------------------------------------------------------------------------


def test_added_task_is_kept_with_all_its_fields(store: Store) -> None:
    given = task(1, name="n", eta=NOW + SECOND, body=bytes(range(256)), tag="t")

    assert add(store, given) == [ADDED]

    [row] = live(store)
    same = [name for name in given._fields if hasattr(row, name)]
    assert len(same) == 15
    assert [getattr(row, name) for name in same] == [getattr(given, name) for name in same]
    assert (row.due, row.claims, row.attempts, row.executions, row.failures, row.lost) == (NOW + SECOND, 0, 0, 0, 0, 0)
    assert (row.first_try, row.expires, row.died, row.status, row.reason, row.history) == (None, None, None, 0, "", "")


@pytest.mark.parametrize("id", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("nonce", [-(2**63), 0, 2**63 - 1])
def test_extreme_ids_and_nonces_fit(store: Store, id: int, nonce: int) -> None:
    assert add(store, task(id, nonce=nonce)) == [ADDED]
    assert add(store, task(id, nonce=nonce)) == [EXISTS]
    assert find(store, str(id))[0].id == id


def test_add_repeated_exists_and_is_stored_once(store: Store) -> None:
    add(store, task(1), task(2, name="n"))

    assert add(store, task(1), task(2, name="n")) == [EXISTS, EXISTS]

    assert ids(live(store)) == [1, 2]
    assert stats(store).tasks == 2


def test_add_repeated_within_one_call_exists(store: Store) -> None:
    assert add(store, task(1), task(1)) == [ADDED, EXISTS]
    assert stats(store).tasks == 1


def test_id_of_another_task_collides(store: Store) -> None:
    add(store, task(1))

    assert add(store, task(1, nonce=99)) == [COLLIDED]

    assert stats(store).tasks == 1


def test_id_of_a_dead_letter_collides_and_its_own_add_exists(store: Store) -> None:
    add(store, task(1), task(2, name="n"))
    finish(store, Action.DEAD)

    assert add(store, task(1, nonce=99), task(2, nonce=99)) == [COLLIDED, COLLIDED]
    assert add(store, task(1), task(2, name="n")) == [EXISTS, EXISTS]
    assert stats(store).tasks == 0


def test_name_in_use_is_taken(store: Store) -> None:
    add(store, task(1, name="n"))

    assert add(store, task(2, name="n")) == [AddResult.TAKEN]
    assert add(store, task(3, name="n", queue="other")) == [ADDED], "a name belongs to its queue"


def test_name_in_use_within_one_call_is_taken(store: Store) -> None:
    assert add(store, task(1, name="n"), task(2, name="n")) == [ADDED, AddResult.TAKEN]


def test_name_is_tombstoned_until_the_tombstone_expires(store: Store) -> None:
    add(store, task(1, name="n"))
    finish(store, Action.DONE, at=NOW + KEEP)

    assert add(store, task(2, name="n"), now=NOW + KEEP - 1) == [AddResult.TOMBSTONED]
    assert add(store, task(2, name="n"), now=NOW + KEEP) == [ADDED], "it makes way before a sweep removes it"
    assert ids(live(store)) == [2]
    assert stats(store).tasks == 1


def test_named_add_repeated_after_the_task_is_done_exists(store: Store) -> None:
    add(store, task(1, name="n"))
    finish(store, Action.DONE)

    assert add(store, task(1, name="n")) == [EXISTS]
    assert stats(store).tasks == 0


def test_unknown_queue_is_refused(store: Store) -> None:
    assert add(store, task(1, queue="nowhere")) == [AddResult.NO_QUEUE]


def test_queue_of_the_other_mode_is_refused(store: Store) -> None:
    assert add(store, task(1, mode="pull"), task(2, queue="pull", mode="push")) == [AddResult.WRONG_MODE] * 2
    assert add(store, task(3, queue="pull", mode="pull")) == [ADDED]


def test_refused_task_touches_no_other(store: Store) -> None:
    add(store, task(1), task(2, name="used"), task(3, name="taken"))
    settle(store, *(outcome(each, Action.DONE) for each in claim(store) if each.id == 2))

    results = add(
        store,
        task(10),
        task(1, nonce=99),
        task(11, queue="nowhere"),
        task(12, name="used"),
        task(13, name="taken"),
        task(14, mode="pull"),
        task(1),
        task(15, queue="other"),
    )

    assert [str(result) for result in results] == [
        *("added", "collided", "no_queue", "tombstoned", "taken", "wrong_mode", "exists", "added")
    ]
    assert sorted(ids(live(store))) == [1, 3, 10]
    assert ids(live(store, "other")) == [15]
    assert (stats(store).tasks, stats(store, "other").tasks) == (3, 1)


def test_nothing_to_do_is_done(store: Store) -> None:
    with store.begin() as tx:
        assert tx.add(NOW, []) == tx.delete(NOW, "default", []) == tx.claim(NOW, []) == tx.settle(NOW, []) == []
        assert tx.purge(NOW, "default", 10) == tx.reschedule(NOW, "default", [], NOW) == tx.sweep(NOW, 10) == 0
        assert tx.next_due([]) == {}
        assert tx.find("default", []) == tx.stats(NOW, []) == []


# --- claim ----------------------------------------------------------------------------------------------------------


def test_claim_takes_what_is_due_in_order_of_eta(store: Store) -> None:
    add(store, task(1, eta=NOW - 1), task(2, eta=NOW - 3), task(3, eta=NOW), task(4, eta=NOW + 1), task(5, eta=NOW - 3))

    assert ids(claim(store)) == [2, 5, 1, 3]
    assert ids(claim(store)) == [], "what is leased isn't due"


def test_claim_takes_the_longest_due_up_to_its_limit(store: Store) -> None:
    add(store, *(task(id, eta=NOW - id) for id in range(10)))

    assert ids(claim(store, spec(limit=3))) == [9, 8, 7]
    assert claim(store, spec(limit=0)) == []
    assert ids(claim(store, spec(limit=100))) == [6, 5, 4, 3, 2, 1, 0]


def test_claim_takes_each_queue_by_its_own_spec(store: Store) -> None:
    add(store, task(1), task(2), task(3, queue="other"), task(4, queue="other"))

    claims = claim(store, spec(limit=1), spec("other", lease=MINUTE), spec("nowhere"))

    assert [(each.id, each.queue, each.until) for each in claims] == [
        (1, "default", NOW + LEASE),
        (3, "other", NOW + MINUTE),
        (4, "other", NOW + MINUTE),
    ]


def test_claim_carries_what_a_delivery_needs(store: Store) -> None:
    given = task(1, name="n", tag="t", body=b"\x00\xff", fail_fast=1)
    add(store, given)

    [taken] = claim(store)

    same = ["id", "queue", "name", "eta", "method", "url", "target", "headers", "namespace", "tag", "retry"]
    for field in [*same, "deadline", "fail_fast", "created", "body"]:
        assert getattr(taken, field) == getattr(given, field), field
    assert (taken.until, taken.attempts, taken.executions, taken.failures, taken.lost) == (NOW + LEASE, 1, 0, 0, 0)
    assert (taken.first_try, taken.status, taken.reason, taken.history) == (NOW, 0, "", "")


@pytest.mark.parametrize(
    ("sizes", "budget", "taken"),
    [
        ([40, 40, 40], 80, 2),
        ([40, 40, 40], 119, 2),
        ([40, 40, 40], 120, 3),
        ([500, 10], 100, 1),  # the first is taken whatever its size
        ([500, 10], 0, 1),
        ([10, 500, 10], 100, 1),  # and nothing overtakes what doesn't fit
        ([0, 0, 0], 1, 3),
        ([0, 500, 10], 100, 2),  # the first that has any
    ],
)
def test_claim_keeps_its_byte_budget(store: Store, sizes: list[int], budget: int, taken: int) -> None:
    add(store, *(task(id, body=b"x" * size) for id, size in enumerate(sizes)))

    assert ids(claim(store, spec(bytes=budget))) == list(range(taken))
    assert len(live(store)) == len(sizes)
    assert ids(claim(store)) == list(range(taken, len(sizes)))


def test_task_takes_the_id_that_an_earlier_one_of_its_call_made_free(store: Store) -> None:
    add(store, task(1, name="n"))
    store.run(lambda tx: tx.delete(NOW, "default", ["n"]))
    later = NOW + KEEP + 1

    results = store.run(lambda tx: tx.add(later, [task(2, name="n"), task(1, nonce=99)]))

    assert results == ["added", "added"]
    assert ids(live(store)) == [1, 2]


def test_lost_is_counted_only_after_an_expired_lease(store: Store) -> None:
    add(store, task(1))

    [first] = claim(store)
    again = NOW + LEASE
    assert claim(store, now=again - 1) == []
    [second] = claim(store, now=again)
    settle(store, outcome(second, Action.RETRY, again + SECOND), now=again)
    [third] = claim(store, now=again + SECOND)

    assert (first.lost, second.lost, third.lost) == (0, 1, 1)
    assert (first.attempts, second.attempts, third.attempts) == (1, 2, 3)


def test_fence_is_now_or_one_more_and_always_grows(store: Store) -> None:
    add(store, task(1))

    [first] = claim(store)
    settle(store, outcome(first, Action.RETRY, NOW - DAY))
    [second] = claim(store)  # the clock stands still
    settle(store, outcome(second, Action.RETRY, NOW - DAY))
    [third] = claim(store, now=NOW - MINUTE)  # and goes back
    settle(store, outcome(third, Action.RETRY, NOW - DAY))
    [fourth] = claim(store, now=NOW + MINUTE)

    assert [each.claims for each in (first, second, third, fourth)] == [NOW, NOW + 1, NOW + 2, NOW + MINUTE]


def test_first_try_is_kept(store: Store) -> None:
    add(store, task(1))

    [first] = claim(store)
    settle(store, outcome(first, Action.RETRY, NOW + SECOND))
    [second] = claim(store, now=NOW + SECOND)

    assert (first.first_try, second.first_try) == (NOW, NOW)


def test_claim_by_tag_takes_only_that_tag(store: Store) -> None:
    add(store, *(task(id, queue="pull", tag="ab"[id % 2], body=b"x" * 10) for id in range(6)), task(9, queue="pull"))

    assert ids(claim(store, spec("pull", 2, tag="b"))) == [1, 3]
    assert ids(claim(store, spec("pull", tag="a", bytes=20))) == [0, 2]
    assert ids(claim(store, spec("pull", tag=""))) == [9]
    assert ids(claim(store, spec("pull"))) == [4, 5]


def test_claim_to_fail_fast_takes_only_the_tasks_that_ask_for_it(store: Store) -> None:
    add(store, *(task(id, eta=NOW - id, fail_fast=id % 2, body=b"x" * 10) for id in range(8)))
    add(store, task(9, eta=NOW + 1, fail_fast=1), task(11, queue="other", fail_fast=1))

    assert ids(claim(store, spec(fail_fast=True, limit=2))) == [7, 5]
    assert ids(claim(store, spec(fail_fast=True, bytes=10))) == [3]
    [last] = claim(store, spec(fail_fast=True))
    assert (last.id, last.until, last.attempts, last.claims, last.first_try) == (1, NOW + LEASE, 1, NOW, NOW)
    assert ids(claim(store)) == [6, 4, 2, 0], "and the others are still there for any claim"


def test_claim_to_fail_fast_finds_what_was_retried_replayed_or_lost(store: Store) -> None:
    add(store, *(task(id, name=f"n{id}", fail_fast=1) for id in range(4)))
    fates = [Action.RETRY, Action.RELEASE, Action.DEAD]
    settle(store, *(outcome(each, fates[each.id], NOW + 1) for each in claim(store) if each.id < 3))
    store.run(lambda tx: tx.reschedule(NOW, "default", ["n2"], NOW + 1))

    claims = claim(store, spec(fail_fast=True, now=NOW + LEASE), now=NOW + LEASE)

    assert [(each.id, each.lost) for each in claims] == [(3, 1), (0, 0), (1, 0), (2, 0)]


def test_claim_from_a_queue_with_a_rate_spends_its_tokens(store: Store) -> None:
    add(store, *(task(id) for id in range(5)))

    def tat() -> Micros:
        with store.read() as tx:
            return next(row.tat for row in tx.queues() if row.name == "default")

    claim(store, spec(limit=2, interval=SECOND))
    assert tat() == NOW + 2 * SECOND
    claim(store, spec(limit=1, interval=SECOND, now=NOW + SECOND), now=NOW + SECOND)
    assert tat() == NOW + 3 * SECOND, "a bucket that isn't full goes on from where it was"
    claim(store, spec(limit=9, interval=SECOND, now=NOW + DAY), now=NOW + DAY)
    claim(store, spec(limit=9, interval=SECOND, now=NOW + DAY), now=NOW + DAY)
    assert tat() == NOW + DAY + 5 * SECOND, "what was idle starts at now, and every task taken costs one token"


# --- settle ---------------------------------------------------------------------------------------------------------


def test_done_removes_an_unnamed_task(store: Store) -> None:
    add(store, task(1))

    finish(store, Action.DONE)

    assert live(store) == find(store, "1") == []
    assert (stats(store).tasks, stats(store).dead) == (0, 0)


def test_done_leaves_the_tombstone_of_a_named_task(store: Store) -> None:
    add(store, task(1, name="n"))

    finish(store, Action.DONE, at=NOW + 5)

    [row] = find(store, "n")
    assert (row.state(NOW), row.due, row.expires, row.body, row.headers) == ("tombstone", None, NOW + 5, b"", "")
    assert (live(store), stats(store).tasks, stats(store).oldest_due) == ([], 0, None)


def test_retry_waits_for_its_new_eta_with_its_counters(store: Store) -> None:
    add(store, task(1))
    [taken] = claim(store)

    retry = outcome(taken, Action.RETRY, NOW + 7, charged=1, executed=1, status=503, reason="busy", history="[1]")
    assert settle(store, retry) == [True]

    [row] = live(store)
    assert (row.eta, row.due, row.attempts, row.claims) == (NOW + 7, NOW + 7, 1, taken.claims)
    assert (row.executions, row.failures, row.status, row.reason, row.history) == (1, 1, 503, "busy", "[1]")
    [again] = claim(store, now=NOW + 7)
    assert (again.attempts, again.executions, again.failures, again.status, again.reason) == (2, 1, 1, 503, "busy")


def test_dead_task_becomes_a_dead_letter_with_its_counters(store: Store) -> None:
    add(store, task(1, body=b"kept"), task(2, name="n"))
    claims = claim(store)

    letters = [outcome(each, Action.DEAD, charged=1, executed=1, status=500, reason="no", history="[2]") for each in claims]
    assert settle(store, *letters, now=NOW + 3) == [True, True]

    rows = dead(store)
    assert [(row.id, row.name, row.body, row.state(NOW)) for row in rows] == [
        *((1, None, b"kept", "dead"), (2, "n", b"body", "dead"))
    ]
    for row in rows:
        assert (row.died, row.attempts, row.executions, row.failures, row.lost) == (NOW + 3, 1, 1, 1, 0)
        assert (row.claims, row.first_try, row.status, row.reason, row.history) == (NOW, NOW, 500, "no", "[2]")
        assert (row.headers, row.retry, row.key_id) == ('[["X-One","1"]]', '{"retry_limit":3}', b"key1")
    assert live(store) == []
    assert (stats(store).tasks, stats(store).dead) == (0, 2)
    assert add(store, task(3, name="n")) == [AddResult.TOMBSTONED]


def test_renew_moves_the_end_of_the_lease_and_nothing_else(store: Store) -> None:
    add(store, task(1))
    [taken] = claim(store)
    [before] = live(store)

    assert settle(store, outcome(taken, Action.RENEW, NOW + 3 * LEASE)) == [True]

    [after] = live(store)
    assert after.due == NOW + 3 * LEASE
    assert {f: getattr(before, f) for f in before.__slots__ if f != "due"} == {
        f: getattr(after, f) for f in after.__slots__ if f != "due"
    }
    assert claim(store, now=NOW + 2 * LEASE) == []
    assert settle(store, outcome(taken, Action.DONE)) == [True], "the fence is the same"


def test_release_refunds_the_attempt_and_not_the_claim(store: Store) -> None:
    add(store, task(1))
    [taken] = claim(store)

    assert settle(store, outcome(taken, Action.RELEASE, NOW, reason="stopping")) == [True]

    [row] = live(store)
    assert (row.attempts, row.claims, row.eta, row.due, row.reason) == (0, taken.claims, NOW, NOW, "stopping")
    [again] = claim(store)
    assert (again.attempts, again.claims, again.lost) == (1, taken.claims + 1, 0)


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("name", [None, "n"])
def test_late_settle_is_refused_after_a_new_claim(store: Store, action: Action, name: str | None) -> None:
    add(store, task(1, name=name))
    [stale] = claim(store)
    [current] = claim(store, now=NOW + LEASE)
    before = live(store), dead(store), stats(store)

    assert settle(store, outcome(stale, action, NOW + DAY, charged=1, executed=1)) == [False]

    assert (live(store), dead(store), stats(store)) == before
    assert settle(store, outcome(current, Action.DONE)) == [True]


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("name", [None, "n"])
def test_late_settle_holds_while_nobody_claimed_again(store: Store, action: Action, name: str | None) -> None:
    add(store, task(1, name=name))
    [late] = claim(store)

    assert settle(store, outcome(late, action, NOW + DAY), now=NOW + 2 * LEASE) == [True]


@pytest.mark.parametrize("action", [Action.DONE, Action.RETRY, Action.DEAD, Action.RELEASE])
@pytest.mark.parametrize("name", [None, "n"])
def test_settle_repeated_after_an_unknown_commit_changes_nothing(store: Store, action: Action, name: str | None) -> None:
    add(store, task(1, name=name))
    [taken] = claim(store)
    once = outcome(taken, action, NOW + DAY, charged=1, executed=1)
    settle(store, once)
    before = live(store), dead(store), stats(store), find(store, "n")

    assert settle(store, once) == [False]

    assert (live(store), dead(store), stats(store), find(store, "n")) == before


def test_settle_twice_in_one_call_counts_once(store: Store) -> None:
    add(store, task(1), task(2), task(3))
    first, second, third = claim(store)

    done = [outcome(first, Action.DONE), outcome(first, Action.DONE)]
    mixed = [outcome(second, Action.RETRY, NOW + DAY), outcome(second, Action.DONE)]
    both = [outcome(third, Action.RENEW, NOW + DAY), outcome(third, Action.DEAD)]
    assert settle(store, *done, *mixed, *both) == [True, False, True, False, True, True]

    assert ids(live(store)) == [2]
    assert (stats(store).tasks, stats(store).dead) == (1, 1)


def test_stale_and_current_answers_in_one_call_are_told_apart(store: Store) -> None:
    add(store, task(1))
    [stale] = claim(store)
    [current] = claim(store, now=NOW + LEASE)

    assert settle(store, outcome(stale, Action.DONE), outcome(current, Action.RENEW, NOW + DAY)) == [False, True]

    assert ids(live(store)) == [1]
    assert stats(store).tasks == 1, "an answer that didn't count isn't counted"


def test_settle_of_what_never_was_or_isnt_leased_is_false(store: Store) -> None:
    add(store, task(1))
    waiting = Outcome(1, 0, "default", Action.DONE, NOW)
    unknown = Outcome(404, NOW, "default", Action.RETRY, NOW)

    assert settle(store, waiting, unknown) == [False, False]
    assert ids(live(store)) == [1]


def test_settle_answers_in_the_order_asked(store: Store) -> None:
    add(store, *(task(id, name=f"n{id}" if id % 3 else None) for id in range(12)))
    claims = claim(store)
    settle(store, *(outcome(each, Action.DONE) for each in claims[::2]))

    actions = [Action.DONE, Action.RETRY, Action.DEAD, Action.RENEW, Action.RELEASE]
    again = [outcome(each, actions[index % 5], NOW + DAY) for index, each in enumerate(claims)]

    assert settle(store, *again) == [index % 2 == 1 for index in range(12)]
