"""What every store does beside tasks' lives: queues and their owners, looking, counting, transactions."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from deferlib import keys, payload
from deferlib.core.model import DAY, MINUTE, SECOND, Action, Mode, Page, QueueConfig, QueueRow, QueueSource, TaskState
from deferlib.errors import StoreError
from deferlib.store import Store, Tx
from tests.store.stores import (
    KEEP,
    LEASE,
    NOW,
    QUEUES,
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

LIBRARY, FILE, COMMAND = QueueSource.LIBRARY, QueueSource.FILE, QueueSource.COMMAND


def rows(store: Store) -> dict[str, QueueRow]:
    with store.read() as tx:
        return {row.name: row for row in tx.queues()}


def put(store: Store, source: QueueSource, *configs: QueueConfig) -> None:
    store.run(lambda tx: tx.put_queues(configs, source))


# --- queues ---------------------------------------------------------------------------------------------------------


def test_queues_come_back_as_put(store: Store) -> None:
    full = QueueConfig(name="full", mode=Mode.PULL, rate=2.5, bucket_size=7, max_concurrent=3, target="worker")
    put(store, LIBRARY, full)

    found = rows(store)

    assert list(found) == ["default", "full", "other", "pull"]
    assert found["full"] == QueueRow(config=full)
    assert [found[config.name].config for config in QUEUES] == QUEUES


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        *((LIBRARY, LIBRARY, 1), (LIBRARY, FILE, 2), (LIBRARY, COMMAND, 2)),
        *((FILE, LIBRARY, 1), (FILE, FILE, 2), (FILE, COMMAND, 2)),
        *((COMMAND, LIBRARY, 1), (COMMAND, FILE, 2), (COMMAND, COMMAND, 2)),
    ],
)
def test_later_source_wins_but_the_library(store: Store, first: QueueSource, second: QueueSource, wins: int) -> None:
    put(store, first, QueueConfig(name="q", rate=1))
    put(store, second, QueueConfig(name="q", rate=2))

    row = rows(store)["q"]
    assert (row.config.rate, row.source) == (wins, (first, second)[wins - 1])


def test_put_changes_the_mode_and_keeps_pause_and_limiter(store: Store) -> None:
    add(store, task(1))
    claim(store, spec(interval=SECOND))
    store.run(lambda tx: tx.pause(["default"], True))

    put(store, FILE, QueueConfig(name="default", mode=Mode.PULL))

    row = rows(store)["default"]
    assert (row.paused, row.tat, row.config.mode) == (True, NOW + SECOND, Mode.PULL)
    assert [str(result) for result in add(store, task(2), task(3, mode="pull"))] == ["wrong_mode", "added"]


def test_pause_and_resume(store: Store) -> None:
    assert store.run(lambda tx: tx.pause(["default", "pull", "nowhere"], True)) == 2
    assert {name: row.paused for name, row in rows(store).items()} == {"default": True, "other": False, "pull": True}

    assert store.run(lambda tx: tx.pause(["default"], True)) == 1, "how many there are, not how many changed"
    assert store.run(lambda tx: tx.pause(["default"], False)) == 1
    assert not rows(store)["default"].paused


def test_owner_keeps_its_queue_until_its_time_is_over(store: Store) -> None:
    def own(node: str, now: int, *queues: str) -> dict[str, tuple[int, int]]:
        return {name: tuple(limiter) for name, limiter in store.run(lambda tx: tx.own(now, node, 10, queues)).items()}

    claims = spec(interval=SECOND)
    add(store, task(1))
    claim(store, claims)
    tat = NOW + SECOND

    assert own("a", NOW, "default", "other", "nowhere") == {"default": (tat, NOW + 10), "other": (0, NOW + 10)}
    assert own("b", NOW + 9, "default") == {}, "owned"
    assert own("a", NOW + 5, "default") == {"default": (tat, NOW + 15)}, "renewed"
    assert own("b", NOW + 10, "default", "other") == {"other": (0, NOW + 20)}, "taken over where it ran out"
    assert own("a", NOW + 15, "other", "default") == {"default": (tat, NOW + 25)}
    assert (rows(store)["default"].owner, rows(store)["default"].owned_until) == ("a", NOW + 25)


def test_disowned_queue_is_free_at_once(store: Store) -> None:
    store.run(lambda tx: tx.own(NOW, "a", DAY, ["default"]))
    store.run(lambda tx: tx.own(NOW, "b", DAY, ["other"]))

    store.run(lambda tx: tx.disown("a"))

    assert set(store.run(lambda tx: tx.own(NOW, "c", DAY, ["default", "other"]))) == {"default"}


# --- engines that come and go ----------------------------------------------------------------------------------------


def test_takeover_makes_what_a_dead_engine_ran_due_and_counts_it_as_lost(store: Store) -> None:
    add(store, task(1), task(2), task(3, eta=NOW + MINUTE))
    add(store, task(4, queue="pull", mode="pull"))
    claim(store, spec(limit=1), spec("pull", 1))
    store.run(lambda tx: tx.own(NOW, "gone", DAY, ["default"]))

    taken = store.run(lambda tx: tx.take_over(NOW + 1, NOW + 1 + LEASE))

    assert taken == 1, "only the push task that was leased"
    assert rows(store)["default"].owner == ""
    again = claim(store, spec(limit=9), now=NOW + 1)
    assert sorted((each.id, each.attempts, each.lost) for each in again) == [(1, 2, 1), (2, 1, 0)]
    assert claim(store, spec("pull", 9), now=NOW + 1) == [], "a worker's lease is the worker's"
    assert live(store)[-1].eta == NOW + MINUTE, "what is scheduled stays so"


def test_settle_of_an_engine_whose_lease_was_taken_over_still_counts_until_the_next_claim(store: Store) -> None:
    add(store, task(1))
    (first,) = claim(store, spec(limit=1))
    store.run(lambda tx: tx.take_over(NOW + 1, NOW + 1 + LEASE))

    (second,) = claim(store, spec(limit=1), now=NOW + 2)

    assert settle(store, outcome(first, Action.DONE)) == [False]
    assert settle(store, outcome(second, Action.DONE)) == [True]


def test_first_engine_is_told_so_and_is_seen_serving_while_it_does(store: Store) -> None:
    told: list[str] = []
    assert not store.served()

    with store.serving(lambda: told.append("first")):
        assert store.served()
        with store.serving(lambda: told.append("second")):
            assert store.served()
        assert store.served()

    assert not store.served()
    assert told == ["first"]


# --- looking --------------------------------------------------------------------------------------------------------


def test_next_due_is_the_next_eta_or_end_of_a_lease(store: Store) -> None:
    def next_due(*queues: str) -> dict[str, int]:
        with store.read() as tx:
            return tx.next_due(queues)

    add(store, task(1, eta=NOW + DAY), task(2, name="n"), task(3, queue="other", eta=NOW - DAY))

    assert next_due("default", "other", "pull", "nowhere") == {"default": NOW, "other": NOW - DAY}
    [running] = claim(store)
    assert next_due("default") == {"default": NOW + LEASE}
    settle(store, outcome(running, Action.DONE))
    assert next_due("default") == {"default": NOW + DAY}, "a tombstone is never due"


def test_next_due_of_what_fails_fast_looks_at_nothing_else(store: Store) -> None:
    def next_due(*queues: str) -> dict[str, int]:
        with store.read() as tx:
            return tx.next_due(queues, fail_fast=True)

    add(store, task(1), task(2, eta=NOW + 5, name="n", fail_fast=1), task(3, eta=NOW + DAY, fail_fast=1))
    add(store, task(4, queue="other"))

    assert next_due("default", "other", "nowhere") == {"default": NOW + 5}
    [_, running] = claim(store, now=NOW + 5)
    assert next_due("default") == {"default": NOW + 5 + LEASE}
    settle(store, outcome(running, Action.DONE))
    assert next_due("default") == {"default": NOW + DAY}, "a tombstone is never due"


def test_find_takes_the_users_name_first_then_the_id(store: Store) -> None:
    add(store, task(7), task(8, name="7"), task(9, name="n"), task(10, queue="other", name="n"))

    assert ids(find(store, "7")) == [8]
    assert ids(find(store, "8", "n", "never")) == [8, 9]
    assert ids(find(store, "10")) == [], "of another queue"
    assert ids(find(store, "10", queue=None)) == [10]
    assert sorted(ids(find(store, "n", queue=None))) == [9, 10]
    assert ids(find(store, "7", queue=None)) == [8]


def test_find_shows_a_dead_letter_instead_of_its_tombstone(store: Store) -> None:
    add(store, task(1, name="n"), task(2))
    settle(store, *(outcome(each, Action.DEAD) for each in claim(store)))

    assert [(row.id, row.state(NOW)) for row in find(store, "n", "2", "1")] == [(1, "dead"), (2, "dead"), (1, "dead")]


def test_find_shows_every_task_of_a_name_used_again(store: Store) -> None:
    add(store, task(1, name="n"))
    settle(store, *(outcome(each, Action.DEAD, NOW + 1) for each in claim(store)))
    add(store, task(2, name="n"), now=NOW + 1)

    assert sorted((row.id, row.state(NOW)) for row in find(store, "n")) == [(1, "dead"), (2, "ready")]


def test_states_are_told_from_the_row(store: Store) -> None:
    add(store, task(1), task(2, eta=NOW + 1), task(3, name="n"), task(4))
    by_id = {each.id: each for each in claim(store)}
    settle(store, outcome(by_id[3], Action.DONE), outcome(by_id[4], Action.RETRY, NOW))

    states = [row.state(NOW) for row in find(store, "1", "2", "n", "4")]

    assert states == ["leased", "scheduled", "tombstone", "ready"]


def test_pages_of_live_tasks_go_by_due_and_id(store: Store) -> None:
    etas = [NOW + 5, NOW - 5, NOW, NOW, NOW, -5, NOW + 5]
    add(store, *(task(id, eta=eta) for id, eta in enumerate(etas)), task(20, queue="other"))
    everything = sorted(range(7), key=lambda id: (etas[id], id))

    seen: list[int] = []
    page = Page(limit=2)
    with store.read() as tx:
        while found := tx.tasks("default", page):
            seen += ids(found)
            page = page._replace(after=(found[-1].due or 0, found[-1].id))

    assert seen == everything


def test_pages_of_dead_letters_go_by_id(store: Store) -> None:
    add(store, *(task(id, eta=NOW - id) for id in range(1, 6)), task(20, queue="other"))
    settle(store, *(outcome(each, Action.DEAD) for each in claim(store, spec(), spec("other"))))

    seen: list[list[int]] = []
    page = Page(limit=2, state=TaskState.DEAD)
    with store.read() as tx:
        while found := tx.tasks("default", page):
            seen.append(ids(found))
            page = page._replace(after=(0, found[-1].id))

    assert seen == [[1, 2], [3, 4], [5]]
    assert ids(dead(store, "other")) == [20]


# --- counting -------------------------------------------------------------------------------------------------------


def test_counters_stay_exact_through_every_verb(store: Store) -> None:
    def check(tasks: int, letters: int) -> None:
        assert (stats(store).tasks, stats(store).dead) == (tasks, letters)
        assert (len(live(store)), len(dead(store))) == (tasks, letters)

    check(0, 0)
    add(store, *(task(id, name=f"n{id}" if id % 2 else None) for id in range(10)))
    add(store, task(1), task(2, nonce=9), task(30, name="n3"), task(31, mode="pull"))
    check(10, 0)
    claims = {each.id: each for each in claim(store, spec(limit=8))}
    check(10, 0)
    settle(
        store,
        *(outcome(claims[id], Action.DONE) for id in (0, 1)),
        *(outcome(claims[id], Action.DEAD) for id in (2, 3)),
        outcome(claims[4], Action.RETRY, NOW),
        outcome(claims[5], Action.RELEASE, NOW),
        outcome(claims[6], Action.RENEW, NOW + DAY),
    )
    check(6, 2)
    store.run(lambda tx: tx.delete(NOW, "default", ["2", "n5", "n5", "n1", "never"]))
    check(5, 1)
    store.run(lambda tx: tx.reschedule(NOW, "default", ["n3", "4", "n1"], NOW))
    check(6, 0)
    store.run(lambda tx: tx.sweep(NOW + 100 * DAY, 100))
    check(6, 0)
    store.run(lambda tx: tx.purge(NOW, "default", 4))
    check(2, 0)
    store.run(lambda tx: tx.purge(NOW, "default", 100))
    check(0, 0)
    assert stats(store, "other") == stats(store, "other", now=NOW + DAY)


def test_stats_tell_the_last_minute(store: Store) -> None:
    minute = NOW // MINUTE * MINUTE
    add(store, *(task(id, eta=minute) for id in range(8)))
    claims = claim(store, now=minute)
    settle(store, *(outcome(each, Action.DONE, executed=1) for each in claims[:4]), now=minute + 1)

    def seen(now: int) -> tuple[int, int]:
        found = stats(store, now=now)
        return found.executed_last_minute, found.failed_last_minute

    assert seen(minute + 2) == (4, 0)
    settle(store, *(outcome(each, Action.RETRY, NOW + DAY, executed=1) for each in claims[4:6]), now=minute + MINUTE)
    settle(store, outcome(claims[6], Action.RETRY, NOW + DAY), now=minute + MINUTE)
    assert seen(minute + MINUTE) == (6, 3)
    assert seen(minute + MINUTE + MINUTE // 2) == (4, 3), "half of the former minute lies within the last 60 seconds"
    assert seen(minute + 3 * MINUTE) == (0, 0)


def test_stats_tell_what_engines_have_in_flight(store: Store) -> None:
    def in_flight(queue: str = "default", now: int = NOW) -> int:
        return stats(store, queue, now=now).in_flight

    def fly(node: str, until: int, **tasks: int) -> None:
        store.run(lambda tx: tx.fly(node, until, tasks))

    assert in_flight() == 0
    fly("a", NOW + 10, default=3, other=1)
    fly("b", NOW + 20, default=2)
    assert (in_flight(), in_flight("other")) == (5, 1)

    fly("a", NOW + 30, default=4)
    assert (in_flight(), in_flight("other")) == (6, 1), "said anew; the other queue as before"
    assert [in_flight(now=NOW + at) for at in (19, 20, 29, 30)] == [6, 4, 4, 0], "what an engine said ends with its leases"
    fly("a", NOW + 30, default=0)
    assert in_flight() == 2
    store.run(lambda tx: tx.sweep(NOW + 15, 10))
    assert (in_flight(), in_flight("other")) == (2, 0)
    store.run(lambda tx: tx.take_over(NOW, NOW))
    assert in_flight() == 0


def test_notes_are_kept_until_they_are_empty(store: Store) -> None:
    def notes() -> dict[str, str]:
        with store.read() as tx:
            return tx.notes()

    assert notes() == {}
    store.run(lambda tx: tx.put_note("queue_file", "x"))
    store.run(lambda tx: tx.put_note("queue_file", "é"))
    store.run(lambda tx: tx.put_note("other", "y"))
    assert notes() == {"queue_file": "é", "other": "y"}
    store.run(lambda tx: tx.put_note("other", ""))
    assert notes() == {"queue_file": "é"}


def test_queue_says_where_it_comes_from_and_whether_it_is_disabled(store: Store) -> None:
    config = QueueConfig(name="q")
    store.run(lambda tx: tx.put_queues([config], FILE, said={"q": "text", "x": "y"}, disabled=["q"]))
    assert (rows(store)["q"].said, rows(store)["q"].disabled) == ("text", True)
    put(store, LIBRARY, config)
    assert (rows(store)["q"].said, rows(store)["q"].disabled) == ("text", True)

    put(store, FILE, config)
    assert (rows(store)["q"].said, rows(store)["q"].disabled) == ("", False)


def test_stats_of_queues_in_the_order_asked(store: Store) -> None:
    add(store, task(1, eta=NOW + 5), task(2, queue="other"))

    with store.read() as tx:
        found = tx.stats(NOW, ["other", "nowhere", "default"])

    assert [(each.queue, each.tasks, each.oldest_due) for each in found] == [
        *(("other", 1, NOW), ("nowhere", 0, None), ("default", 1, NOW + 5))
    ]


def test_signed_counts_live_tasks_and_dead_letters_by_their_keys(store: Store) -> None:
    one, two = b"key-one-", b"key-two-"
    add(
        store,
        task(1, key_id=one, eta=NOW + 1),
        task(2, key_id=two),
        task(3, key_id=two, queue="other"),
        task(4, key_id=b""),
    )
    add(store, task(5, key_id=one, name="gone"), task(6, key_id=one, queue="pull"))
    store.run(lambda tx: tx.delete(NOW, "default", ["gone"]))
    finish(store, Action.DEAD)

    with store.read() as tx:
        tasks, letters = tx.signed(-1, 10, TaskState.LIVE), tx.signed(-1, 10, TaskState.DEAD)

    assert tasks == ({one: 2, two: 1}, None)
    assert letters == ({two: 1}, None)


def test_signed_takes_the_key_of_a_payload_that_was_made_by_hand_from_its_envelope(store: Store) -> None:
    by_hand = payload.seal(payload.dump_call(len, ("x",), {}), keys.parse("0123456789abcdef").signing, None)
    add(store, task(1, key_id=b"", body=by_hand), task(2, key_id=b"", body=b"no envelope"), task(3, key_id=b"", body=b""))

    with store.read() as tx:
        before = tx.signed(-1, 10, TaskState.LIVE)
    finish(store, Action.DEAD)
    with store.read() as tx:
        after = tx.signed(-1, 10, TaskState.DEAD)

    assert before == after == ({bytes.fromhex("5f6db7f73725ced6"): 1}, None)


def test_signed_goes_through_all_in_slices_of_ids_whatever_lies_between(store: Store) -> None:
    key = b"key-one-"
    add(store, *(task(id, key_id=key, name=f"n{id}") for id in (0, 3, 4, 8, 9, 2**63 - 1)))
    store.run(lambda tx: tx.delete(NOW, "default", ["n3", "n4"]))

    with store.read() as tx:
        first = tx.signed(-1, 2, TaskState.LIVE)
        second = tx.signed(3, 2, TaskState.LIVE)
        third = tx.signed(8, 2, TaskState.LIVE)
        end = tx.signed(2**63 - 1, 2, TaskState.LIVE)

    assert (first, second, third) == (({key: 1}, 3), ({key: 1}, 8), ({key: 2}, 2**63 - 1))
    assert end == ({}, None)


# --- transactions ---------------------------------------------------------------------------------------------------


def all_verbs(tx: Tx) -> None:
    """Change everything that can be changed."""
    tx.add(NOW, [task(50), task(51, name="n51"), task(52, queue="other")])
    claims = tx.claim(NOW, [spec(interval=SECOND)])
    actions = [Action.DONE, Action.RETRY, Action.DEAD, Action.RENEW, Action.RELEASE]
    tx.settle(NOW, [outcome(each, actions[i % 5], NOW + KEEP, executed=1) for i, each in enumerate(claims)])
    tx.delete(NOW, "default", ["50"])
    tx.reschedule(NOW, "default", ["n51", "1"], NOW + 3)
    tx.purge(NOW, "other", 5)
    tx.put_queues([QueueConfig(name="default", rate=9), QueueConfig(name="new")], COMMAND)
    tx.pause(["default"], True)
    tx.own(NOW, "node", DAY, ["default"])
    tx.sweep(NOW + 100 * DAY, 100)


def picture(store: Store) -> object:
    queues = ["default", "other", "pull"]
    with store.read() as tx:
        return (
            [tx.tasks(queue, Page(state=state)) for queue in queues for state in TaskState],
            tx.stats(NOW, queues),
            tx.queues(),
            tx.next_due(queues),
        )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_block_that_raises_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    add(store, *(task(id, name=f"n{id}" if id % 2 else None) for id in range(6)))
    before = picture(store)

    def work(tx: Tx) -> None:
        all_verbs(tx)
        raise error

    with pytest.raises(error):
        store.run(work)
    assert picture(store) == before
    with pytest.raises(error), store.begin() as tx:
        work(tx)

    assert picture(store) == before
    assert [str(result) for result in add(store, task(50))] == ["added"], "and the store goes on"


def test_block_that_ends_keeps_everything(store: Store) -> None:
    add(store, *(task(id, name=f"n{id}" if id % 2 else None) for id in range(6)))
    before = picture(store)

    store.run(all_verbs)

    assert picture(store) != before


def test_verb_that_failed_ends_its_transaction(store: Store) -> None:
    def work(tx: Tx) -> None:
        tx.add(NOW, [task(1)])
        with pytest.raises(OverflowError):
            tx.add(NOW, [task(2), task(2**63)])

    with pytest.raises(StoreError, match="rolled back"):
        store.run(work)

    assert (live(store), stats(store).tasks) == ([], 0), "half of a verb's work is never committed"


def test_verbs_end_with_their_transaction(store: Store) -> None:
    with store.begin() as tx:
        tx.add(NOW, [task(1)])
    with store.read() as reading:
        reading.queues()

    with pytest.raises(StoreError):
        tx.add(NOW, [task(2)])
    with pytest.raises(StoreError):
        reading.queues()

    assert ids(live(store)) == [1]


def test_transaction_in_a_transaction_is_refused_not_a_deadlock(store: Store) -> None:
    with store.begin(), pytest.raises(StoreError, match="within a transaction"), store.begin():
        pass
    with store.begin(), pytest.raises(StoreError, match="within a transaction"), store.read():
        pass
    with store.read(), pytest.raises(StoreError, match="within a transaction"), store.begin():
        pass
    with store.begin(), pytest.raises(StoreError, match="within a transaction"):
        store.close()

    assert add(store, task(1)) == ["added"]


def test_reading_cant_write(store: Store) -> None:
    with pytest.raises(StoreError), store.read() as tx:
        tx.add(NOW, [task(1)])

    assert live(store) == []
    assert add(store, task(1)) == ["added"]


def test_run_returns_what_the_work_returns(store: Store) -> None:
    assert store.run(lambda tx: [str(result) for result in tx.add(NOW, [task(1)])]) == ["added"]


@pytest.mark.parametrize("durable", [True, False])
def test_both_kinds_of_commit_are_seen_at_once(store: Store, durable: bool) -> None:
    with store.begin(durable=durable) as tx:
        tx.add(NOW, [task(1)])

    assert ids(live(store)) == [1]


def test_closed_store_opens_again(store: Store) -> None:
    store.close()
    store.close()
    put(store, LIBRARY, *QUEUES)

    assert add(store, task(1)) == ["added"]


def in_thread(work: Callable[[], object]) -> None:
    """Run *work* in a thread of its own and wait for it."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    if failed:
        raise failed[0]


def test_many_threads_add_and_claim_without_loss_or_double(store: Store) -> None:
    claimed: list[int] = []

    def work(first: int) -> None:
        for id in range(first, first + 20):
            add(store, task(id))
            claimed.extend(ids(claim(store, spec(limit=1))))

    threads = [threading.Thread(target=work, args=(number * 100,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    claimed += ids(claim(store))
    assert sorted(claimed) == sorted(number * 100 + id for number in range(6) for id in range(20))


def test_run_wakes_the_watchers_after_commit(store: Store) -> None:
    seen: list[int] = []
    awake = threading.Event()

    def wake() -> None:
        seen.append(stats(store).tasks)
        awake.set()

    with store.watch(wake):
        add(store, task(1))
        assert awake.wait(5)
    assert seen[0] == 1

    awake.clear()
    add(store, task(2))
    assert not awake.is_set(), "no watch, no wake"


def test_wake_that_fails_doesnt_fail_the_add(store: Store) -> None:
    def wake() -> None:
        raise RuntimeError("the watcher's own trouble")

    with store.watch(wake):
        assert add(store, task(1)) == ["added"]

    assert ids(live(store)) == [1]
