"""The SQLite store in several processes: across forks, and waking each other."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from deferlib.store import watch
from deferlib.store.sqlite import SqliteStore
from tests.store.children import child, run
from tests.store.stores import add, ids, live, open_store, stats, task

FAMILY = """
def spawn(work):
    # Fork a child that works and ends without ceremony; return its pid.
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(1)
def reap(pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
store = open_store(lambda _: SqliteStore(sys.argv[1], busy_seconds=20), None)
"""


def opened(folder: Path) -> SqliteStore:
    store = open_store(lambda folder: SqliteStore(str(folder / "tasks.db")), folder)
    assert isinstance(store, SqliteStore)
    return store


def check(path: Path, expected: int) -> None:
    """Check that the store is sound and holds *expected* tasks."""
    store = SqliteStore(str(path))
    assert (len(live(store)), stats(store).tasks) == (expected, expected)
    store.close()
    connection = apsw.Connection(str(path))
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


# --- engines --------------------------------------------------------------------------------------------------------


def test_killed_engine_no_longer_serves_even_while_a_child_it_forked_lives(tmp_path: Path) -> None:
    store = opened(tmp_path)
    code = """
with store.serving(lambda: None):
    pid = os.fork()
    if not pid:
        say("forked")
        hear()
        say("alive")
        os._exit(0)
    os.waitpid(pid, 0)
"""
    with child(FAMILY + code, tmp_path / "tasks.db") as engine:
        assert engine.hear() == "forked"
        assert store.served()

        engine.kill()

        assert not store.served()
        engine.tell()
        assert engine.hear() == "alive", "the forked child outlived it"
    store.close()


def test_engine_is_seen_by_another_process(tmp_path: Path) -> None:
    store = opened(tmp_path)
    ask = FAMILY + "say(store.served())"

    with store.serving(lambda: None):
        assert run(ask, tmp_path / "tasks.db") == ["True"]

    assert run(ask, tmp_path / "tasks.db") == ["False"]
    store.close()


# --- fork -----------------------------------------------------------------------------------------------------------


def test_parent_and_eight_children_add_at_once(tmp_path: Path) -> None:
    code = """
live(store)
add(store, *map(task, range(5)))
def work(number):
    for id in range(15):
        assert add(store, task(number * 100 + id)) == ["added"]
        live(store, limit=1)
pids = [spawn(lambda: work(number)) for number in range(1, 9)]
work(9)
reap(pids)
"""
    run(FAMILY + code, tmp_path / "tasks.db")

    check(tmp_path / "tasks.db", 5 + 9 * 15)


def test_children_of_children(tmp_path: Path) -> None:
    code = """
def work(depth):
    add(store, task(depth))
    if depth < 4:
        reap([spawn(lambda: work(depth + 1))])
    add(store, task(10 + depth))
work(0)
"""
    run(FAMILY + code, tmp_path / "tasks.db")

    check(tmp_path / "tasks.db", 10)


def test_fork_while_other_threads_are_in_transactions(tmp_path: Path) -> None:
    code = """
stop = threading.Event()
counts = [0, 0]
def adder(number):
    while not stop.is_set():
        add(store, task(1_000_000 * number + counts[number - 1]))
        counts[number - 1] += 1
def reader():
    while not stop.is_set():
        live(store, limit=5)
works = [(adder, 1), (adder, 2), (reader,)]
threads = [threading.Thread(target=work, args=args) for work, *args in works]
for thread in threads:
    thread.start()
for id in range(20):
    reap([spawn(lambda: (add(store, task(id)), live(store, limit=1)))])
stop.set()
for thread in threads:
    thread.join(20)
say(sum(counts) + 20)
"""
    [count] = run(FAMILY + code, tmp_path / "tasks.db")

    assert int(count) > 22
    store = SqliteStore(str(tmp_path / "tasks.db"))
    assert stats(store).tasks == int(count)
    store.close()


@pytest.mark.parametrize("kind", ["begin", "read"])
@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)"])
def test_fork_within_a_transaction_leaves_it_to_the_parent(tmp_path: Path, kind: str, end: str) -> None:
    code = """
def refused(work):
    try:
        work()
    except errors.StoreError as error:
        assert "over" in str(error) or "forked within a transaction" in str(error), error
        return True
add(store, task(1))
try:
    with getattr(store, sys.argv[2])() as tx:
        if sys.argv[2] == "begin":
            assert tx.add(NOW, [task(2)]) == ["added"]
        pid = os.fork()
        if not pid:
            assert refused(lambda: tx.queues())
            assert refused(lambda: tx.add(NOW, [task(3)]))
except errors.StoreError as error:
    assert not pid and "forked within" in str(error), error
if not pid:
    other = SqliteStore(store.path)
    assert refused(lambda: add(store, task(4))) and refused(lambda: live(store)) and refused(lambda: add(other, task(5)))
    assert refused(lambda: spawn(lambda: None) and store.migrate())
    END
assert os.waitpid(pid, 0)[1] == 0
add(store, task(6))
"""
    run(FAMILY + code.replace("END", end), tmp_path / "tasks.db", kind)

    check(tmp_path / "tasks.db", 3 if kind == "begin" else 2)


def test_fork_beside_a_watch_keeps_the_childs_own_locks(tmp_path: Path) -> None:
    """A connection carried into the child would pass for the child's lock; the parent's last close then drops its log."""
    code = """
reader, writer = os.pipe()
with store.watch(lambda: None):
    # until the watch's thread has its connection, and is back in its wait
    while store._poller.connection is None or store._poller.lock._holder:
        threading.Event().wait(0.001)
    def work():
        assert add(store, task(1)) == ["added"]
        say("ready")
        os.read(reader, 1)
        assert add(store, task(2)) == ["added"]
    pid = spawn(work)
    hear()
store.close()
os.write(writer, b"x")
reap([pid])
"""
    with child(FAMILY + code, tmp_path / "tasks.db") as parent:
        assert parent.hear() == "ready"
        parent.tell()
        assert parent.end() == 0

    check(tmp_path / "tasks.db", 2)


def test_forked_child_that_leaves_the_watch_leaves_the_parents_alone(tmp_path: Path) -> None:
    code = """
from deferlib.store import watch
watch.POLL_SECONDS = 60
awake = threading.Event()
with store.watch(awake.set):
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        assert add(SqliteStore(store.path), task(1)) == ["added"]
        assert awake.wait(10), "the parent's socket is still there and open"
if pid:
    say("woken")
"""
    assert run(FAMILY + code, tmp_path / "tasks.db") == ["woken"]


def test_memory_is_copied_by_a_fork(tmp_path: Path) -> None:
    code = """
memory = open_store(FACTORIES["sqlite-memory"], None)
add(memory, task(1))
def work():
    assert ids(live(memory)) == [1]
    add(memory, task(2))
    assert ids(live(memory)) == [1, 2]
reap([spawn(work)])
assert ids(live(memory)) == [1]
"""
    run(FAMILY + code, tmp_path / "tasks.db")


# --- wake -----------------------------------------------------------------------------------------------------------

ADDER = """
store = SqliteStore(sys.argv[1])
while id := hear():
    add(store, task(int(id)))
    say("added")
"""

WATCHER = """
store = SqliteStore(sys.argv[1])
with store.watch(lambda: None):
    say(*os.listdir(store._hints._folder))
    hear()
"""


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the sockets a folder of this test's own, and no poll to help them; return the folder's folder."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 60)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # below tmp_path a socket's path would be too long
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def sockets(hints: Path) -> list[str]:
    return [path.name for path in hints.glob("deferlib-*/*")]


def test_add_in_another_process_wakes_by_datagram(tmp_path: Path, hints: Path) -> None:
    store = opened(tmp_path)
    awake = threading.Event()

    with store.watch(awake.set), child(ADDER, store.path) as adder:
        for id in range(3):
            adder.tell(id)
            assert adder.hear() == "added"
            assert awake.wait(10), "well before the poll"
            awake.clear()

    assert sockets(hints) == [], "the socket goes with the watch"
    store.close()


def test_watch_ends_at_once(tmp_path: Path, hints: Path) -> None:
    store, other = opened(tmp_path), SqliteStore(str(tmp_path / "tasks.db"))
    awake = threading.Event()
    start = time.monotonic()

    for id in range(5):
        with store.watch(awake.set):
            add(other, task(id))
            assert awake.wait(10)
            awake.clear()

    assert time.monotonic() - start < 10, "it doesn't wait for the poll"
    store.close()
    other.close()


def test_watcher_that_comes_within_one_tick_of_the_folders_clock_is_found(tmp_path: Path, hints: Path) -> None:
    store = opened(tmp_path)
    sender = SqliteStore(store.path)
    awake = threading.Event()
    with store.watch(lambda: None):
        add(sender, task(1))  # it has seen the folder
        [folder] = hints.iterdir()
        before = folder.stat()
        other = SqliteStore(store.path)
        with other.watch(awake.set):
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))

            add(sender, task(2))

            assert awake.wait(10)
    for each in (store, sender, other):
        each.close()


def test_socket_of_a_killed_watcher_is_removed(tmp_path: Path, hints: Path) -> None:
    store = opened(tmp_path)
    with child(WATCHER, store.path) as watcher:
        name = watcher.hear()
        assert sockets(hints) == [name]
        watcher.kill()

    add(store, task(1))

    assert sockets(hints) == []
    store.close()


def test_socket_of_a_killed_watcher_isnt_kept_by_its_forked_child(tmp_path: Path, hints: Path) -> None:
    store = opened(tmp_path)
    code = """
store = SqliteStore(sys.argv[1])
with store.watch(lambda: None):
    if not os.fork():
        say("forked")
        hear()
        os._exit(0)
    os.waitpid(-1, 0)
"""
    with child(code, store.path) as watcher:
        watcher.hear()
        assert len(sockets(hints)) == 1
        os.kill(watcher.pid, 9)
        os.waitid(os.P_PID, watcher.pid, os.WEXITED | os.WNOWAIT)

        add(store, task(1))

        assert sockets(hints) == []
    store.close()


def test_watcher_without_a_trusted_folder_notices_by_polling(
    tmp_path: Path, hints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    with store.watch(lambda: None):
        [folder] = hints.iterdir()
    assert not folder.exists(), "the last watcher removes it"
    folder.mkdir(0o755)  # as if another user had made it
    (folder / "trap").write_bytes(b"")
    awake = threading.Event()

    with store.watch(awake.set), child(ADDER, store.path) as adder:
        for id in range(3):
            awake.clear()
            adder.tell(id)
            assert adder.hear() == "added"
            assert awake.wait(10)

    assert sockets(hints) == ["trap"], "nothing of ours was put there"
    store.close()


@pytest.mark.parametrize("spoil", ["file", "readonly", "long"])
def test_no_folder_for_sockets_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    places = {"file": tmp_path / "file", "readonly": Path("/proc"), "long": tmp_path / ("x" * 120)}
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / ("x" * 120)).mkdir()
    monkeypatch.setenv("TMPDIR", str(places[spoil]))
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    store = opened(tmp_path)
    awake = threading.Event()

    with store.watch(awake.set):
        add(SqliteStore(store.path), task(1))
        assert awake.wait(10)

    store.close()


def test_watch_survives_a_close_and_a_failing_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    store, other = opened(tmp_path), SqliteStore(str(tmp_path / "tasks.db"))
    awake = threading.Event()

    def wake() -> None:
        awake.set()
        raise RuntimeError("the watcher's own trouble")

    with store.watch(wake):
        for id in range(3):
            add(other, task(id))
            assert awake.wait(10)
            store.close()
            awake.clear()

    assert ids(live(store)) == [0, 1, 2]
    store.close()
    other.close()


def test_many_threads_close_and_use_one_store(tmp_path: Path) -> None:
    store = opened(tmp_path)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for id in range(15):
                match number % 3:
                    case 0:
                        add(store, task(number * 100 + id))
                    case 1:
                        live(store)
                    case _:
                        store.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
    with store.watch(lambda: None):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert not [thread for thread in threads if thread.is_alive()]
    assert failures == []
    assert stats(store).tasks == 45
    store.close()
