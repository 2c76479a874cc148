"""Checkpoints while the store is served: a thread's work, whatever fails, and nothing that a commit waits for."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import apsw
import pytest

from deferlib.store import checkpointer
from deferlib.store.checkpointer import Checkpointer
from deferlib.store.sqlite import SqliteStore
from tests.store.children import child, run
from tests.store.stores import NOW, add, ids, live, open_store, task
from tests.store.test_sqlite_processes import FAMILY

LONG = 20.0
PAGE = 4096
FRAME = PAGE + 24
LATE = 4_000  # pages: a commit copies so many after all
THREAD = "deferlib-checkpoints"
WIDE = 20  # pages that a wide commit writes, and some


class Disk(apsw.VFS):
    """Stands in for the disk of the database and its log: which threads write the former, and what fails in the thread."""

    def __init__(self) -> None:
        self.copied_by: set[str] = set()  # the threads that have written to the database
        self.failing: Callable[[str, str], int] = lambda operation, end: 0  # an error of SQLite's, in the thread only
        super().__init__("deferlib-checkpointer", "unix")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _File(self, name, flags)

    def before(self, operation: str, name: str | None) -> None:
        if name is None:  # what SQLite puts aside
            return
        thread = threading.current_thread().name
        end = "-wal" if name.endswith("-wal") else ""
        if thread == THREAD and (code := self.failing(operation, end)):
            raise apsw.exception_for(code)
        if operation == "write" and not end:
            self.copied_by.add(thread)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.before("write", self._name)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._disk.before("sync", self._name)
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    apsw.set_default_vfs("deferlib-checkpointer")
    yield disk
    apsw.set_default_vfs("unix")
    disk.unregister()


@pytest.fixture
def store(tmp_path: Path, disk: Disk) -> Iterator[SqliteStore]:
    store = open_store(lambda folder: SqliteStore(str(folder / "tasks.db"), busy_seconds=LONG), tmp_path)
    assert isinstance(store, SqliteStore)
    yield store
    store.close()


@contextlib.contextmanager
def served(store: SqliteStore) -> Iterator[None]:
    with store.serving(lambda: None):
        yield


def commit(store: SqliteStore, first: int, pages: int = WIDE) -> None:
    """Add as many tasks as fill *pages*, in one commit."""
    with store.begin(durable=False) as tx:
        tx.add(NOW, [task(id, body=bytes(3_000)) for id in range(first, first + pages)])


def write(store: SqliteStore, first: int, pages: int) -> int:
    """Write so many *pages* and some into the log; return the id behind the last of the tasks."""
    for id in range(first, first + pages, WIDE):
        commit(store, id)
        time.sleep(0.001)  # as what an engine does between its commits: the thread needs the interpreter, too
    return id + WIDE


def log_pages(store: SqliteStore) -> int:
    """Return how many pages the log has had at most."""
    return os.path.getsize(f"{store.path}-wal") // FRAME


def begun(store: SqliteStore) -> int:
    """Return how often the log has begun anew, as its header tells."""
    with open(f"{store.path}-wal", "rb") as log:
        return int.from_bytes(log.read(16)[12:], "big")


def until(done: Callable[[], bool], meanwhile: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + LONG
    while not done():
        assert time.monotonic() < deadline
        meanwhile()
        time.sleep(0.001)


def write_until_begun_anew(store: SqliteStore, first: int, pages: int = WIDE) -> int:
    """Commit until the log has begun anew; return the id behind the last of the tasks."""
    before, next = begun(store), first

    def once() -> None:
        nonlocal next
        commit(store, next, pages)
        next += pages

    until(lambda: begun(store) > before, once)
    return next


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def in_the_file(store: SqliteStore, folder: Path) -> list[int]:
    """Return the tasks that the database's file has without its log."""
    copy = folder / "copy.db"
    shutil.copy(store.path, copy)
    connection = apsw.Connection(str(copy), vfs="unix")
    try:
        assert connection.pragma("integrity_check") == "ok"
        return [id for (id,) in connection.execute("select id from tasks order by id")]
    finally:
        connection.close()


# --- served ---------------------------------------------------------------------------------------------------------

ADDER = """
store = SqliteStore(sys.argv[1], busy_seconds=20)
hear()
for id in range(1_000_000, 1_000_800):
    add(store, *(task(1000 * id + each, body=bytes(3_000)) for each in range(5)))
say("added")
hear()
"""


def test_commits_of_a_served_store_copy_nothing_and_the_log_stays_short(
    store: SqliteStore, disk: Disk, tmp_path: Path
) -> None:
    with served(store), child(ADDER, store.path) as adder:
        disk.copied_by.clear()
        adder.tell()
        for id in range(0, 4_000, 5):
            add(store, *(task(id + each, body=bytes(3_000)) for each in range(5)))
        assert adder.hear() == "added"

        assert begun(store) >= 3
        assert log_pages(store) <= LATE
        assert disk.copied_by == {THREAD}
        adder.tell()
        assert adder.end() == 0

    store.close()
    expected = [*range(4_000), *(1000 * id + each for id in range(1_000_000, 1_000_800) for each in range(5))]
    assert in_the_file(store, tmp_path) == expected


READER = """
store = SqliteStore(sys.argv[1])
with store.read() as tx:
    tx.queues()
    say("reads")
    hear()
say("read")
hear()
"""


def test_log_grows_while_a_reader_reads_and_begins_anew_when_it_has_ended(store: SqliteStore, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(served(store))
        next = write_until_begun_anew(store, 1)
        reader = stack.enter_context(child(READER, store.path))
        assert reader.hear() == "reads"
        next = write(store, next, 100)  # once more it may begin anew: where it was copied, the reader reads the file alone
        before = begun(store)

        next = write(store, next, LATE + 1_000)

        assert begun(store) == before
        assert log_pages(store) > LATE
        assert ids(live(store)) == list(range(1, next))
        reader.tell()
        assert reader.hear() == "read"
        write_until_begun_anew(store, next)
        assert in_the_file(store, tmp_path)[: next - 1] == list(range(1, next))


def test_commits_copy_a_log_that_the_thread_is_late_with(store: SqliteStore, disk: Disk) -> None:
    with served(store):
        disk.copied_by.clear()
        turn = store._copier.lock.acquire()
        write(store, 1, 2 * LATE)
        store._copier.lock.release(turn)

        assert threading.current_thread().name in disk.copied_by
        assert LATE <= log_pages(store) <= LATE + 10 * WIDE


# --- the end --------------------------------------------------------------------------------------------------------


def test_thread_and_its_connection_end_with_the_serving_and_commits_copy_again(store: SqliteStore, disk: Disk) -> None:
    next = 1
    for _ in range(2):
        with served(store):
            disk.copied_by.clear()
            next = write_until_begun_anew(store, next)
            assert store._copier.connection is not None
            assert disk.copied_by == {THREAD}
            assert len(threads()) == 1

        assert threads() == []
        assert store._copier.connection is None
        disk.copied_by.clear()
        next = write(store, next, LATE)
        assert disk.copied_by == {threading.current_thread().name}
        assert log_pages(store) <= LATE - 1_000


@pytest.mark.parametrize("first", [0, 1])
def test_two_engines_of_a_process_may_end_in_any_order(store: SqliteStore, disk: Disk, first: int) -> None:
    engines = [contextlib.ExitStack(), contextlib.ExitStack()]
    for engine in engines:
        engine.enter_context(served(store))

    engines[first].close()
    disk.copied_by.clear()
    next = write(store, 1, LATE)
    assert disk.copied_by == {THREAD}, "for the one that goes on"
    engines[1 - first].close()

    assert threads() == []
    assert store._copier.connection is None
    disk.copied_by.clear()
    write(store, next, LATE)
    assert disk.copied_by == {threading.current_thread().name}
    assert log_pages(store) <= LATE - 1_000


def test_closed_store_that_is_gone_isnt_made_anew_by_the_end_of_the_serving(store: SqliteStore, tmp_path: Path) -> None:
    with served(store):
        write_until_begun_anew(store, 1)
        store.close()
        for file in tmp_path.glob("tasks.db*"):
            file.unlink()

    assert list(tmp_path.iterdir()) == []


def test_writer_of_a_file_that_was_away_at_the_end_of_the_serving_copies_again(
    store: SqliteStore, disk: Disk, tmp_path: Path
) -> None:
    with served(store):
        next = write_until_begun_anew(store, 1)
        os.rename(store.path, tmp_path / "away.db")
    os.rename(tmp_path / "away.db", store.path)
    disk.copied_by.clear()

    write(store, next, LATE)

    assert disk.copied_by == {threading.current_thread().name}
    assert log_pages(store) <= LATE - 1_000


def test_served_store_that_is_closed_is_used_again(store: SqliteStore, disk: Disk) -> None:
    with served(store):
        next = write_until_begun_anew(store, 1)
        store.close()
        disk.copied_by.clear()

        next = write(store, next, LATE)

        assert disk.copied_by == {THREAD}
        assert log_pages(store) <= LATE
        assert ids(live(store)) == list(range(1, next))


def test_program_ends_while_the_thread_works(tmp_path: Path) -> None:
    code = """
from tests.store.test_checkpointer import write
serving = store.serving(lambda: None)
serving.__enter__()
write(store, 1, 2_000)
say("end")
"""
    assert run(FAMILY + code, tmp_path / "tasks.db") == ["end"]


# --- fork -----------------------------------------------------------------------------------------------------------


def test_forked_child_copies_in_its_commits_and_the_parents_thread_goes_on(tmp_path: Path) -> None:
    code = """
from tests.store.test_checkpointer import LATE, log_pages, threads, write
with store.serving(lambda: None):
    write(store, 1, 2_000)
    pid = os.fork()
    if not pid:
        try:
            assert threads() == []
            write(store, 10_001, LATE)
            assert store._copier.opened == opened, "the last one has been closed"
            say("child", log_pages(store) < LATE - 1_000)
        except BaseException as error:
            say(repr(error))
            os._exit(1)
    else:
        assert os.waitpid(pid, 0)[1] == 0
        opened = store._copier.opened
        write(store, 30_001, LATE)
        say("parent", log_pages(store) <= LATE, len(threads()), store._copier.opened - opened)
if not pid:
    say("child", *add(store, task(1_000_000)), store._copier.connection)
    os._exit(0)
say(len(threads()), *add(store, task(1_000_001)))
"""
    code = code.replace("    pid = os.fork()", "    opened = store._copier.opened\n    pid = os.fork()")

    told = run(FAMILY + code, tmp_path / "tasks.db")

    assert told == ["child True", "child added None", "parent True 1 1", "0 added"]


def test_serving_ends_and_closing_and_forks_beside_commits_and_checkpoints(tmp_path: Path) -> None:
    code = """
from deferlib.store import sqlite
sqlite._COPIED_PAGES = 20  # the thread is always at it
stop, counts = threading.Event(), [0, 0]
def adder(number):
    while not stop.is_set():
        add(store, task(1_000_000 * number + counts[number - 1], body=bytes(3_000)))
        counts[number - 1] += 1
def closer():
    while not stop.wait(0.01):
        store.close()
def server():
    while not stop.is_set():
        with store.serving(lambda: None):
            stop.wait(0.02)
works = [(adder, 1), (adder, 2), (closer,), (server,), (server,)]
threads = [threading.Thread(target=work, args=args) for work, *args in works]
for thread in threads:
    thread.start()
for id in range(30):
    reap([spawn(lambda: (add(store, task(id)), live(store, limit=1)))])
stop.set()
for thread in threads:
    thread.join(20)
assert threading.active_count() == 1, threading.enumerate()
say(sum(counts) + 30, stats(store).tasks)
"""
    [line] = run(FAMILY + code, tmp_path / "tasks.db")

    expected, found = map(int, line.split())
    assert found == expected > 50


# --- failures -------------------------------------------------------------------------------------------------------

DATABASE, LOG = "", "-wal"


@pytest.mark.parametrize(
    ("operation", "file", "code"),
    [
        ("write", DATABASE, apsw.SQLITE_FULL),
        ("write", DATABASE, apsw.SQLITE_IOERR_WRITE),
        ("sync", DATABASE, apsw.SQLITE_IOERR_FSYNC),
        ("sync", LOG, apsw.SQLITE_IOERR_FSYNC),
    ],
)
def test_checkpoint_that_fails_fails_nothing_else(
    store: SqliteStore, disk: Disk, operation: str, file: str, code: int
) -> None:
    failed = threading.Event()

    def failing(what: str, end: str) -> int:
        if (what, end) != (operation, file):
            return 0
        failed.set()
        return code

    with served(store):
        [thread] = threads()
        next = write_until_begun_anew(store, 1)
        disk.failing = failing
        next = write(store, next, 1_300)
        assert failed.wait(LONG)
        assert add(store, task(next)) == ["added"]
        disk.failing = lambda operation, end: 0
        disk.copied_by.clear()

        next = write_until_begun_anew(store, next + 1, pages=1)

        assert threads() == [thread]
        assert disk.copied_by == {THREAD}
        assert ids(live(store)) == list(range(1, next))


def test_log_begins_anew_at_once_where_its_sync_has_failed_before_a_checkpoint(store: SqliteStore, disk: Disk) -> None:
    """A second sync would lie; and others would write behind frames that never reach the disk."""
    syncs = 0

    def failing(operation: str, end: str) -> int:
        nonlocal syncs
        if (operation, end) != ("sync", LOG):
            return 0
        syncs += 1
        return int(apsw.SQLITE_IOERR_FSYNC) if syncs == 1 else 0

    with served(store):
        next = write_until_begun_anew(store, 1)
        disk.failing = failing
        until(lambda: syncs > 0, lambda: commit(store, int(time.monotonic() * 1e6) * 1000))
        before = store.commits

        until(lambda: log_pages(store) == 0)

        assert store.commits == before, "nobody had to write for that"
        assert add(store, task(next)) == ["added"]


BUSY = """
import fcntl
log = open(sys.argv[1] + "-shm", "rb+")
fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 121)  # as a checkpoint does (sqlite.org/walformat.html: WAL_CKPT_LOCK)
say("busy")
hear()
"""


def test_thread_waits_where_another_process_is_at_it(
    store: SqliteStore, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, copy = 0, SqliteStore._copy_log

    def counted(store: SqliteStore) -> tuple[int, int]:
        nonlocal tries
        tries += 1
        return copy(store)

    monkeypatch.setattr(SqliteStore, "_copy_log", counted)
    with served(store):
        next = write_until_begun_anew(store, 1)
        with child(BUSY, store.path) as busy:
            assert busy.hear() == "busy"
            disk.copied_by.clear()
            tries, began = 0, time.monotonic()

            next = write(store, next, 1_200)
            for id in range(next, next + 300):
                commit(store, id, 1)

            pauses = (time.monotonic() - began) / checkpointer._PAUSE
            assert 0 < tries <= pauses + 2
            assert disk.copied_by == set()

        write_until_begun_anew(store, next + 300, pages=1)
        assert disk.copied_by == {THREAD}


def test_commits_that_are_to_copy_go_on_where_another_process_is_at_it(store: SqliteStore, disk: Disk) -> None:
    with served(store):
        next = write_until_begun_anew(store, 1)
        with child(BUSY, store.path) as busy:
            assert busy.hear() == "busy"
            disk.copied_by.clear()

            next = write(store, next, LATE)

            assert log_pages(store) > LATE
            assert disk.copied_by == set()
        next = write_until_begun_anew(store, next)
        assert ids(live(store)) == list(range(1, next))


def test_commit_that_is_interrupted_anywhere_in_its_hook_lets_the_next_one_pass() -> None:
    """A task's deadline is an exception raised between any two steps of the thread that runs it (DESIGN section 5)."""

    class Interrupted(BaseException):
        pass

    def interrupt(step: int) -> bool:
        left = step
        copied = threading.Event()

        def copy() -> tuple[int, int]:
            copied.set()
            return 1, 1

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal left
            frame.f_trace_opcodes = True
            left -= event == "opcode"
            if not left:
                left = -1
                raise Interrupted
            return trace

        worker = Checkpointer(copy, 1)
        worker.start()
        connection = apsw.Connection(":memory:")
        tracer = sys.gettrace()
        sys.settrace(trace)
        try:
            worker.committed(connection, "main", 1)
            interrupted = False
        except Interrupted:
            interrupted = True
        finally:
            sys.settrace(tracer)
        after = threading.Thread(target=worker.committed, args=(connection, "main", 1), daemon=True)
        after.start()
        after.join(LONG / 4)
        assert not after.is_alive(), step
        assert copied.wait(LONG), step
        worker.stop()
        return interrupted

    steps = 0
    while interrupt(steps + 1):
        steps += 1

    assert steps > 10
