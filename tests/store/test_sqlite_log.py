"""The log's sync: after the commit and beside the locks, once for all who wait, and never twice where it has failed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from deferlib import errors
from deferlib.core.model import AddResult
from deferlib.store import sqlite_log
from deferlib.store.sqlite import MEMORY, SqliteStore
from tests.store.children import run
from tests.store.stores import NOW, add, ids, live, open_store, task
from tests.store.test_shared_commit import adding, in_line

LONG = 20.0


class Disk:
    """Stands in for the disk: counts the syncs, and does at one what it was told."""

    def __init__(self) -> None:
        self.syncs = 0
        self.at: dict[int, Callable[[], None]] = {}  # the number of a sync: what happens before it

    def flush(self, descriptor: int) -> None:
        os.fstat(descriptor)  # it is open
        self.syncs += 1
        self.at.pop(self.syncs, lambda: None)()
        os.fstat(descriptor)

    def fail(self) -> None:
        raise OSError(5, "on purpose")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(sqlite_log, "flush", disk.flush)
    return disk


@pytest.fixture
def store(tmp_path: Path, disk: Disk) -> Iterator[SqliteStore]:
    store = open_store(lambda folder: SqliteStore(str(folder / "tasks.db"), busy_seconds=2), tmp_path)
    assert isinstance(store, SqliteStore)
    disk.syncs = 0
    yield store
    store.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


class Pause:
    """A sync that takes its time: reached, and ended by `end`."""

    def __init__(self) -> None:
        self.reached, self._end = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._end.wait(LONG)

    def end(self) -> None:
        self._end.set()


def add_without_sync(store: SqliteStore, id: int) -> None:
    with store.begin(durable=False) as tx:
        tx.add(NOW, [task(id)])


def add_in_block(store: SqliteStore, id: int) -> None:
    with store.begin() as tx:
        tx.add(NOW, [task(id)])


def test_engines_are_woken_before_the_sync(store: SqliteStore, disk: Disk) -> None:
    woken = threading.Event()
    seen: list[bool] = []
    disk.at[1] = lambda: seen.append(woken.is_set())

    with store.watch(woken.set):
        add(store, task(1))

    assert seen == [True]


def test_others_write_while_the_disk_works(store: SqliteStore, disk: Disk, pool: ThreadPoolExecutor) -> None:
    other = SqliteStore(store.path, busy_seconds=0)
    pause = disk.at[1] = Pause()
    first = pool.submit(add, store, task(1))
    assert pause.reached.wait(LONG)

    add_without_sync(store, 2)
    other.migrate()
    added = add(other, task(3))
    unfinished = not first.done()
    pause.end()

    assert added == [AddResult.ADDED]
    assert unfinished, "it isn't acknowledged before it is on the disk"
    assert first.result() == [AddResult.ADDED]
    assert ids(live(store)) == [1, 2, 3]
    other.close()


def test_threads_that_wait_at_once_share_a_sync(store: SqliteStore, disk: Disk, pool: ThreadPoolExecutor) -> None:
    pause = disk.at[1] = Pause()
    first = pool.submit(add, store, task(1))
    assert pause.reached.wait(LONG)
    before = store.commits
    rest = [pool.submit(add, store, task(id)) for id in range(2, 12)]
    while len(store._line._jobs) < 10:
        pass
    pause.end()

    assert [future.result() for future in (first, *rest)] == [[AddResult.ADDED]] * 11
    assert disk.syncs == 2, "the one that had begun doesn't count for those that came then"
    assert store.commits - before == 1


def test_what_a_transaction_has_only_read_is_synced_too(store: SqliteStore, disk: Disk) -> None:
    other = SqliteStore(store.path)
    with other.begin(durable=False) as tx:
        tx.add(NOW, [task(1, name="one")])
    disk.syncs = 0

    assert add(store, task(2, name="one")) == [AddResult.TAKEN]

    assert disk.syncs == 1
    other.close()


def test_commit_that_isnt_durable_is_synced_when_asked_or_with_the_next_durable_one(store: SqliteStore, disk: Disk) -> None:
    assert not store.unsynced
    add_without_sync(store, 1)
    assert (store.unsynced, disk.syncs) == (True, 0)
    store.sync()
    assert (store.unsynced, disk.syncs) == (False, 1)
    store.sync()
    assert disk.syncs == 1, "nothing to do"

    add_without_sync(store, 2)
    add(store, task(3))

    assert (store.unsynced, disk.syncs) == (False, 2)


def test_store_in_memory_has_nothing_to_sync(disk: Disk) -> None:
    store = open_store(lambda _: SqliteStore(MEMORY), Path())
    with store.begin(durable=False) as tx:
        tx.add(NOW, [task(1)])
    store.sync()

    assert (store.unsynced, disk.syncs) == (False, 0)
    store.close()


# --- failures -------------------------------------------------------------------------------------------------------


def test_failed_sync_is_an_unknown_outcome_for_all_who_share_the_commit(store: SqliteStore, disk: Disk) -> None:
    disk.at[2] = disk.fail  # the first is that of the block

    with in_line(store, [adding(id) for id in range(1, 6)]) as futures:
        pass

    for future in futures:
        with pytest.raises(errors.EnqueueUnknownError, match=r"tasks\.db.*on purpose"):
            future.result()
    assert disk.syncs == 2, "never again, as if nothing had happened"
    assert add(store, task(1)) == [AddResult.EXISTS]
    assert ids(live(store)) == [1, 2, 3, 4, 5]


def test_failed_sync_is_an_unknown_outcome_of_a_block_and_of_a_sync(store: SqliteStore, disk: Disk) -> None:
    disk.at[1] = disk.at[2] = disk.fail

    with pytest.raises(errors.EnqueueUnknownError), store.begin() as tx:
        tx.add(NOW, [task(1)])
    add_without_sync(store, 2)
    with pytest.raises(errors.EnqueueUnknownError):
        store.sync()

    assert not store.unsynced
    assert add(store, task(3)) == [AddResult.ADDED]
    assert ids(live(store)) == [1, 2, 3]


def test_who_waits_for_a_sync_that_fails_isnt_acknowledged(
    store: SqliteStore, disk: Disk, pool: ThreadPoolExecutor
) -> None:
    """The kernel tells of a lost write once for each descriptor: a second sync there would succeed."""
    pause = Pause()

    def failing() -> None:
        pause()
        disk.fail()

    disk.at[1] = failing
    first = pool.submit(add, store, task(1))
    assert pause.reached.wait(LONG)
    rest = [pool.submit(add_in_block, store, id) for id in range(2, 6)]
    while len(ids(live(store))) < 5:
        pass
    pause.end()

    assert [type(future.exception(LONG)) for future in [first, *rest]] == [errors.EnqueueUnknownError] * 5
    assert disk.syncs == 1


def test_leader_that_is_interrupted_while_it_syncs_leaves_the_others_a_synced_commit(
    store: SqliteStore, disk: Disk
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    disk.at[2] = interrupt
    with in_line(store, [adding(id) for id in range(1, 4)]) as futures:
        pass

    assert isinstance(futures[0].exception(), KeyboardInterrupt)
    assert [future.result() for future in futures[1:]] == [[AddResult.ADDED]] * 2, "not done again: that would be EXISTS"
    assert disk.syncs == 3


def test_watcher_that_is_woken_may_write(store: SqliteStore) -> None:
    woken: list[AddResult] = []

    def wake() -> None:
        if not woken:
            woken.append(AddResult.ADDED)
            woken[:] = add(store, task(2))

    with store.watch(wake):
        add(store, task(1))

    assert woken == [AddResult.ADDED]
    assert ids(live(store)) == [1, 2]


def test_log_starts_anew_after_a_failed_sync(store: SqliteStore, disk: Disk) -> None:
    add(store, task(1))
    disk.at[2] = disk.fail

    with pytest.raises(errors.EnqueueUnknownError):
        add(store, task(2))

    assert os.path.getsize(f"{store.path}-wal") == 0, "at once: others would write behind what may be lost"


# --- the descriptor -------------------------------------------------------------------------------------------------


def descriptors(path: str) -> int:
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(path) for link in links if os.path.islink(link))


def test_closing_closes_the_log(store: SqliteStore) -> None:
    add(store, task(1))
    assert descriptors(store.path)

    store.close()

    assert descriptors(store.path) == 0


def test_closing_while_another_thread_syncs_waits_for_it(store: SqliteStore, disk: Disk, pool: ThreadPoolExecutor) -> None:
    pause = disk.at[1] = Pause()
    first: Future[list[AddResult]] = pool.submit(add, store, task(1))
    assert pause.reached.wait(LONG)
    second = pool.submit(add_in_block, store, 2)
    while len(ids(live(store))) < 2:
        pass
    closing = pool.submit(store.close)
    pause.end()

    closing.result(LONG)
    assert (first.result(LONG), second.result(LONG)) == ([AddResult.ADDED], None)
    assert disk.syncs == 2
    assert ids(live(store)) == [1, 2]


def test_fork_while_another_thread_syncs(tmp_path: Path) -> None:
    code = """
from deferlib.store import sqlite_log
from tests.store.test_sqlite_log import descriptors
store = open_store(lambda _: SqliteStore(sys.argv[1]), None)
reached, end, flush = threading.Event(), threading.Event(), sqlite_log.flush
def slow(descriptor):
    reached.set()
    end.wait(20)
    flush(descriptor)
sqlite_log.flush = slow
answers = []
def adding(id):
    with store.begin() as tx:
        tx.add(NOW, [task(id)])
    answers.append(id)
threads = [threading.Thread(target=adding, args=(id,)) for id in (1, 2)]
for thread in threads:
    thread.start()
reached.wait(20)
while len(ids(live(store))) < 2:
    pass
threading.Timer(0.1, end.set).start()
pid = os.fork()
if pid == 0:
    try:
        say("child has", descriptors(store.path))
        say("child", *add(store, task(3)))
    finally:
        os._exit(0)
os.waitpid(pid, 0)
for thread in threads:
    thread.join(20)
say("parent", *sorted(answers), *add(store, task(4)))
say(*ids(live(store)))
"""

    told = run(code, tmp_path / "tasks.db")

    assert told == ["child has 0", "child added", "parent 1 2 added", "1 2 3 4"]
