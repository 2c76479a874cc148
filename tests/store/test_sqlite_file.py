"""The SQLite file: how it is made, what is refused and left as it is, and what happens when it goes away."""

from __future__ import annotations

import gc
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from deferlib import errors
from deferlib.core.model import Action
from deferlib.store import queries
from deferlib.store.sqlite import SqliteStore
from deferlib.store.sqlite_file import APPLICATION_ID
from deferlib.store.sqlite_tx import SqliteTx
from tests.store.children import child, run
from tests.store.stores import NOW, QUEUES, add, claim, ids, live, open_store, outcome, settle, spec, stats, task


def new_store(path: Path, busy_seconds: float = 2) -> SqliteStore:
    return SqliteStore(str(path), busy_seconds=busy_seconds)


def made(folder: Path, *tasks: int) -> Path:
    """Return the path of a store with *tasks* in it, closed."""
    store = open_store(lambda folder: new_store(folder / "tasks.db"), folder)
    add(store, *map(task, tasks))
    store.close()
    return folder / "tasks.db"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- making ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", ["0", "022", "077"])
def test_file_and_folders_are_private_whatever_the_umask(tmp_path: Path, umask: str) -> None:
    path = tmp_path / "one" / "two" / "tasks.db"
    code = """
        os.umask(int(sys.argv[2], 8))
        store = open_store(lambda _: SqliteStore(sys.argv[1]), None)
        add(store, task(1))
        live(store)
        say(*sorted(os.listdir(os.path.dirname(store.path))))
        say(*(oct(os.stat(f"{store.path}{end}").st_mode & 0o777) for end in ("", "-wal", "-shm")))
    """

    names, modes = run(_dedent(code), path, umask)

    assert names == "tasks.db tasks.db-shm tasks.db-wal", "no draft is left"
    assert modes == "0o600 0o600 0o600"
    assert (mode(tmp_path / "one"), mode(tmp_path / "one" / "two")) == (0o700, 0o700)


def test_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)

    made(folder)

    assert mode(folder) == 0o755


def test_file_is_an_sqlite_database_in_wal_mode_with_our_mark(tmp_path: Path) -> None:
    header = made(tmp_path).read_bytes()[:100]

    assert header[:16] == b"SQLite format 3\0"
    assert header[18:20] == b"\2\2", "WAL"
    assert header[68:72] == b"Defr"


@pytest.mark.parametrize("where", ["/proc/nowhere/tasks.db", "/dev/null/tasks.db", "{tmp}/file/tasks.db", "{tmp}"])
def test_where_nothing_can_be_made_is_unavailable(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"a file, not a folder")
    store = SqliteStore(where.format(tmp=tmp_path))

    with pytest.raises(errors.StoreError, match="DEFERLIB_STORE") as caught:
        store.migrate()

    assert isinstance(caught.value, errors.StoreUnavailableError)
    assert store.path in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "nothing is left behind"


def test_two_processes_make_one_store_at_once(tmp_path: Path) -> None:
    code = """
        while path := hear():
            store = open_store(lambda _: SqliteStore(path), None)
            add(store, task(int(sys.argv[1])))
            store.close()
            say("done")
    """
    with child(_dedent(code), 1) as one, child(_dedent(code), 2) as other:
        for number in range(50):
            path = tmp_path / str(number) / "tasks.db"
            one.tell(path)
            other.tell(path)
            assert (one.hear(), other.hear()) == ("done", "done")

            store = new_store(path)
            assert ids(live(store)) == [1, 2], number
            store.close()
            assert os.listdir(path.parent) == ["tasks.db"], "neither's draft is left"


# --- refusing -------------------------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def short_garbage(path: Path) -> None:
    path.write_bytes(b"hello\n")


def half(path: Path) -> None:
    made(path.parent, 1, 2)
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def header_only(path: Path) -> None:
    made(path.parent, 1, 2)
    os.truncate(path, 100)


def other_application(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("create table theirs (id integer primary key)")
    connection.close()


def other_application_in_wal_mode(path: Path) -> None:
    """Leave a log that its owner, killed, hadn't written back."""
    connection = apsw.Connection(str(path.parent / "theirs"))
    connection.pragma("journal_mode", "wal")
    connection.execute("create table theirs (id integer primary key)")
    connection.execute("insert into theirs values (1)")
    for end in ("", "-wal"):
        shutil.copy(path.parent / f"theirs{end}", f"{path}{end}")
    connection.close()


def altered(sql: str) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        made(path.parent, 1)
        connection = apsw.Connection(str(path))
        connection.execute(sql)
        connection.close()

    return alter


newer_schema = altered("update meta set value = '99' where key = 'min_writer'; pragma user_version = 99")
no_schema = altered("drop table meta")
no_version = altered("delete from meta")
odd_version = altered("update meta set value = 'x'")

Corrupt, Version = errors.StoreCorruptError, errors.StoreVersionError


@pytest.mark.parametrize(
    ("make", "error", "remedy"),
    [
        (empty, Corrupt, "restore it from a backup; if it didn't, delete it"),
        (garbage, Corrupt, "Restore it from a backup"),
        (short_garbage, Corrupt, "Restore it from a backup"),
        (half, Corrupt, "Restore it from a backup"),
        (header_only, Corrupt, "Restore it from a backup"),
        (other_application, Corrupt, "Name another file with DEFERLIB_STORE"),
        (other_application_in_wal_mode, Corrupt, "Name another file with DEFERLIB_STORE"),
        (newer_schema, Version, "Upgrade deferlib"),
        (no_schema, Corrupt, "Restore it from a backup"),
        (no_version, Corrupt, "Restore it from a backup"),
        (odd_version, Corrupt, "Restore it from a backup"),
    ],
)
def test_file_that_isnt_ours_is_refused_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], None], error: type[errors.StoreError], remedy: str
) -> None:
    path = tmp_path / "tasks.db"
    make(path)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir() if not each.name.endswith("-shm")}
    store = new_store(path)

    for use in (store.migrate, lambda: add(store, task(9)), lambda: live(store), lambda: claim(store)):
        with pytest.raises(error, match=remedy) as caught:
            use()
        assert str(path) in str(caught.value)
    store.close()

    after = {each.name: each.read_bytes() for each in tmp_path.iterdir() if not each.name.endswith("-shm")}
    assert after == before


def test_file_truncated_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    whole = made(tmp_path, *range(100)).read_bytes()

    for size in range(4096, len(whole), 4096):
        path = tmp_path / f"{size}.db"
        path.write_bytes(whole[:size])
        store = new_store(path)
        with pytest.raises(errors.StoreCorruptError):
            store.migrate()
        store.close()
        assert path.read_bytes() == whole[:size]


def test_schema_with_a_newer_version_that_we_may_write_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "tasks.db"
    altered("update meta set value = '99' where key = 'schema'; pragma user_version = 99")(path)

    assert ids(live(new_store(path))) == [1]


# --- migrating ------------------------------------------------------------------------------------------------------


def old(path: Path) -> SqliteTx:
    """Make a store as deferlib with schema 1 made it; return the verbs of a process that still writes to it."""
    connection = apsw.Connection(str(path))
    connection.pragma("application_id", APPLICATION_ID)
    connection.pragma("user_version", 1)
    connection.execute(queries.migrations("sqlite")[1])
    connection.pragma("journal_mode", "wal")
    insert = "insert into queues (name, mode, config, source) values (?, ?, ?, 'library')"  # as schema 1's process does
    connection.executemany(insert, [(queue.name, str(queue.mode), queue.to_json()) for queue in QUEUES])
    tx = SqliteTx(connection, str(path))
    tx.add(NOW, [task(1, fail_fast=1), task(2)])
    return tx


def schema(path: Path) -> list[object]:
    connection = apsw.Connection(str(path))
    try:
        objects = connection.execute("select name, sql from sqlite_master order by name").fetchall()
        return [connection.pragma("user_version"), *objects, *connection.execute("select * from meta order by key")]
    finally:
        connection.close()


@pytest.mark.parametrize("reader", [True, False])
def test_older_store_is_brought_to_the_schema_of_a_new_one_at_its_first_use(tmp_path: Path, reader: bool) -> None:
    path = tmp_path / "tasks.db"
    old(path)
    store = new_store(path)

    if reader:
        live(store)
    else:
        store.migrate()

    (tmp_path / "new").mkdir()
    assert schema(path) == schema(made(tmp_path / "new"))
    assert ids(live(store)) == [1, 2]
    assert ids(claim(store, spec(fail_fast=True))) == [1]
    store.close()


def test_older_process_goes_on_beside_the_migrated_store(tmp_path: Path) -> None:
    path = tmp_path / "tasks.db"
    older = old(path)
    store = new_store(path)
    store.migrate()

    older.add(NOW, [task(3, fail_fast=1)])

    assert ids(claim(store, spec(fail_fast=True))) == [1, 3]
    store.close()


def test_migration_that_fails_leaves_the_older_store_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tasks.db"
    old(path)
    before = schema(path)
    broken = {**queries.migrations("sqlite"), 2: queries.migrations("sqlite")[2] + "; select nonsense"}
    store = new_store(path)
    with monkeypatch.context() as patch:
        patch.setattr(queries, "migrations", lambda dialect: broken)
        with pytest.raises(errors.StoreError, match="nonsense"):
            store.migrate()

    assert schema(path) == before
    store.migrate()
    assert ids(live(store)) == [1, 2]
    store.close()


def test_two_processes_migrate_one_store_at_once(tmp_path: Path) -> None:
    code = """
        while path := hear():
            store = SqliteStore(path)
            add(store, task(int(sys.argv[1])))
            store.close()
            say("done")
    """
    with child(_dedent(code), 3) as one, child(_dedent(code), 4) as other:
        for number in range(20):
            path = tmp_path / f"{number}.db"
            old(path)
            one.tell(path)
            other.tell(path)
            assert (one.hear(), other.hear()) == ("done", "done")

            store = new_store(path)
            assert ids(live(store)) == [1, 2, 3, 4], number
            store.close()


# --- going away -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [True, False])
def test_removed_file_is_an_error_and_isnt_made_anew(tmp_path: Path, reader: bool) -> None:
    path = made(tmp_path, 1)
    store = new_store(path)
    add(store, task(2))
    assert not reader or live(store)

    os.rename(path, tmp_path / "away.db")

    for _ in range(2):
        with pytest.raises(errors.StoreUnavailableError, match="removed"):
            add(store, task(3))
        with pytest.raises(errors.StoreUnavailableError, match="removed"):
            live(store)
    assert not path.exists()
    os.rename(tmp_path / "away.db", path)
    assert add(store, task(3)) == ["added"]
    assert ids(live(store)) == [1, 2, 3]
    store.close()


@pytest.mark.parametrize("reader", [True, False])
def test_replaced_file_is_an_error_and_isnt_written(tmp_path: Path, reader: bool) -> None:
    (tmp_path / "backup").mkdir()
    backup = made(tmp_path / "backup", 7)
    content = backup.read_bytes()
    path = made(tmp_path, 1)
    store = new_store(path)
    add(store, task(2))
    assert not reader or live(store)

    os.rename(path, tmp_path / "away.db")
    os.rename(backup, path)  # beside a log that isn't its own: SQLite would mix the two

    for _ in range(2):
        with pytest.raises(errors.StoreUnavailableError, match="replaced"):
            add(store, task(3))
        with pytest.raises(errors.StoreUnavailableError, match="replaced"):
            live(store)
    assert path.read_bytes() == content
    os.rename(tmp_path / "away.db", path)
    assert ids(live(store)) == [1, 2]
    store.close()


# --- aliases --------------------------------------------------------------------------------------------------------


def test_log_of_a_served_store_has_its_full_size_and_is_overwritten(tmp_path: Path) -> None:
    store, log = new_store(made(tmp_path, 1)), tmp_path / "tasks.db-wal"
    file = (tmp_path / "tasks.db").stat().st_size

    with store.serving(lambda: None):
        size = log.stat().st_size
        assert 8_000_000 < size < 12_000_000
        with store.serving(lambda: None):  # another engine's start
            for id in range(2, 200):
                add(store, task(id))
            assert log.stat().st_size == size, "no commit made it grow"
            for id in range(200, 1_000):
                add(store, task(id))
        assert log.stat().st_size < 2 * size, "nor do many, by more than what a slow disk's checkpoint is late"
        assert ids(live(store)) == list(range(1, 1_000)), "what was rolled back is nowhere in it"

    store.close()
    tables = apsw.Connection(str(tmp_path / "tasks.db")).execute("select name from sqlite_schema where type = 'table'")
    assert "filler" not in {name for [name] in tables}
    assert (tmp_path / "tasks.db").stat().st_size < file + 1_000_000, "nor in the file"


def test_aliases_of_one_path_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    path = made(tmp_path / "real")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "link.db").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = [str(path), "real/tasks.db", "folder/tasks.db", "link.db", "./real/../folder/tasks.db"]
    stores = [SqliteStore(name, busy_seconds=1) for name in names]

    assert {store.path for store in stores} == {str(path)}
    for id, store in enumerate(stores * 3):
        add(store, task(id))
    stores[0].close()  # which must not drop the others' locks
    taken = [each for store in stores * 3 for each in claim(store)]
    assert settle(stores[1], *(outcome(each, Action.DONE) for each in taken)) == [True] * 15

    assert [stats(store).tasks for store in stores] == [0] * 5
    assert sorted(each.name for each in path.parent.iterdir()) == ["tasks.db", "tasks.db-shm", "tasks.db-wal"]
    for store in stores:
        store.close()


def test_errors_of_the_callers_own_database_are_its_own(tmp_path: Path) -> None:
    store = new_store(made(tmp_path))
    theirs = apsw.Connection(":memory:")

    with pytest.raises(apsw.SQLError), store.begin():
        theirs.execute("select no such thing")
    theirs.pragma("query_only", 1)
    with pytest.raises(apsw.ReadOnlyError), store.read():
        theirs.execute("create table t (x)")

    store.close()


@pytest.mark.parametrize("begun", [True, False])
def test_failed_add_leaves_nothing_in_the_callers_transaction(tmp_path: Path, begun: bool) -> None:
    store = new_store(made(tmp_path))
    connection = apsw.Connection(store.path)
    connection.execute("create table theirs (x)")
    if begun:
        connection.execute("begin; insert into theirs values (1); savepoint mine; insert into theirs values (2)")
    pages = connection.pragma("page_count")
    connection.pragma("max_page_count", pages + 2)

    with pytest.raises(errors.StoreFullError):
        store.join(connection).add(NOW, [task(id, body=b"x" * 3000) for id in range(1, 40)])

    assert connection.in_transaction is begun
    if begun:
        connection.execute("rollback to mine; release mine; commit")
        assert connection.execute("select x from theirs").fetchall() == [(1,)]
    assert connection.execute("select count(*) from tasks").fetchall() == [(0,)]
    connection.close()
    store.close()


def test_join_is_the_callers_transaction(tmp_path: Path) -> None:
    path = made(tmp_path)
    store = new_store(path)
    theirs = apsw.Connection(str(path))

    theirs.execute("begin immediate")
    assert store.join(theirs).add(NOW, [task(1)]) == ["added"]
    theirs.execute("rollback")
    with theirs:
        store.join(theirs).add(NOW, [task(2)])

    assert ids(live(store)) == [2]
    theirs.execute("drop table counts")
    with pytest.raises(errors.StoreError, match=path.name):
        store.join(theirs).add(NOW, [task(3)])
    theirs.close()
    store.close()


def test_connections_and_descriptors_are_given_back(tmp_path: Path) -> None:
    path = made(tmp_path, 1)

    def use() -> None:
        store = new_store(path)
        with store.watch(lambda: None):
            live(store)
            add(store, task(2))
        with pytest.raises(ZeroDivisionError):
            store.run(lambda tx: 1 / 0)
        store.close()
        garbage(tmp_path / "garbage")
        with pytest.raises(errors.StoreCorruptError):
            new_store(tmp_path / "garbage").migrate()

    use()
    gc.collect()  # what other tests left behind
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        use()

    assert len(os.listdir("/proc/self/fd")) == len(before)


def _dedent(code: str) -> str:
    return "\n".join(line[8:] for line in code.splitlines())
