"""A power cut at any moment: what was acknowledged is there, whatever of the unsynced writes has reached the disk."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random

import apsw
import pytest

from deferlib.core.model import Action, AddResult
from deferlib.store import sqlite
from deferlib.store.sqlite import SqliteStore
from deferlib.store.sqlite_log import Log
from deferlib.store.sqlite_tx import SqliteTx
from tests.store.disk import Recording, Sync, Wreck, Write, wrecks
from tests.store.stores import NOW, open_store, outcome, spec, task

STEPS = 400


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    path = str(tmp_path / "tasks.db")
    open_store(lambda _: SqliteStore(path), tmp_path).close()
    return Recording(path)


def work(recording: Recording, monkeypatch: pytest.MonkeyPatch, seed: int = 1, served: bool = False) -> None:
    """Have two stores add, claim and settle in turn, as two processes do; one of them serves, or neither."""
    monkeypatch.setattr(sqlite, "_CHECKPOINT_PAGES", 2_000 if served else 60)  # the log starts anew again and again
    monkeypatch.setattr(sqlite, "_COPIED_PAGES", 60)
    monkeypatch.setattr(SqliteStore, "_extend_log", lambda store: None)  # it would be most of what is recorded
    rng = Random(seed)
    with recording.on(monkeypatch), contextlib.ExitStack() as serving:
        stores = [SqliteStore(recording.path), SqliteStore(recording.path)]
        if served:
            serving.enter_context(stores[0].serving(lambda: None))
        unsynced: list[list[int]] = [[], []]
        for id in range(1, STEPS):
            which = rng.randrange(2)
            step = rng.choice((_add, _add, _add_heard_late, _run_some, _sync))
            step(recording, stores, which, id, rng, unsynced)
        serving.close()
        end = len(recording.events)
        for store in stores:
            store.close()
        del recording.events[end:]


def _name(id: int) -> str | None:
    return f"n{id}" if id % 2 else None


def _promise_added(recording: Recording, id: int) -> None:
    recording.promise("added", id)
    if _name(id):
        recording.promise("taken", id)


def _add(
    recording: Recording, stores: list[SqliteStore], which: int, id: int, rng: Random, unsynced: list[list[int]]
) -> None:
    body = rng.randbytes(rng.choice((10, 300, 6000)))
    assert stores[which].run(lambda tx: tx.add(NOW, [task(id, name=_name(id), body=body)])) == [AddResult.ADDED]
    _promise_added(recording, id)
    _promise_settled(recording, unsynced[which])


def _add_heard_late(
    recording: Recording, stores: list[SqliteStore], which: int, id: int, rng: Random, unsynced: list[list[int]]
) -> None:
    """One store has committed a name, and is about to sync it; the other hears of it, and tells its caller first."""
    id = 10_001 + 2 * id
    with stores[which].begin(durable=False) as tx:
        tx.add(NOW, [task(id, name=_name(id))])
    other = task(id + 100_000, name=_name(id))
    assert stores[1 - which].run(lambda tx: tx.add(NOW, [other])) == [AddResult.TAKEN]
    recording.promise("taken", id)
    _promise_settled(recording, unsynced[1 - which])


def _run_some(
    recording: Recording, stores: list[SqliteStore], which: int, id: int, rng: Random, unsynced: list[list[int]]
) -> None:
    """An engine's turns: it claims, and settles what it claimed before, without a sync."""
    with stores[which].begin(durable=False) as tx:
        claims = tx.claim(NOW, [spec(limit=rng.randrange(1, 9))])
    for claim in claims:
        recording.promise("settling", claim.id)  # from now on it may be gone
    with stores[which].begin(durable=False) as tx:
        action = rng.choice((Action.DONE, Action.DONE, Action.DEAD, Action.RETRY))
        settled = tx.settle(
            NOW, [outcome(claim, action, NOW if action is Action.RETRY else NOW + 10**12) for claim in claims]
        )
    assert all(settled)
    if action is not Action.RETRY:
        unsynced[which] += [claim.id for claim in claims]


def _sync(
    recording: Recording, stores: list[SqliteStore], which: int, id: int, rng: Random, unsynced: list[list[int]]
) -> None:
    stores[which].sync()
    _promise_settled(recording, unsynced[which])


def _promise_settled(recording: Recording, ids: list[int]) -> None:
    for id in ids:
        recording.promise("settled", id)
    ids.clear()


def broken(wreck: Wreck, folder: Path) -> str:
    """Open what is left as SQLite does after a crash; return which promise it breaks, if any."""
    path = str(folder / "wreck.db")
    for file in (path, f"{path}-wal", f"{path}-shm"):
        Path(file).unlink(missing_ok=True)  # to overwrite one makes ext4 flush it: a millisecond each
    for file, content in wreck.files.items():
        Path(file.replace("tasks.db", "wreck.db")).write_bytes(content)
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        if connection.pragma("integrity_check") != "ok":
            return "not sound"
        rows = connection.execute("select id, name, due from tasks union all select id, name, 0 from dead").fetchall()
        live = {id for (id,) in connection.execute("select id from tasks where due is not null")}
    except apsw.Error as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    there, names = {id for id, _, _ in rows}, {name for _, name, _ in rows}
    said = {
        kind: {each.id for each in wreck.promised if each.kind == kind}
        for kind in ("added", "taken", "settling", "settled")
    }
    if lost := said["added"] - said["settling"] - there:
        return f"lost {lost}"
    if free := {id for id in said["taken"] if f"n{id}" not in names}:
        return f"free again {free}"
    if again := said["settled"] & live:
        return f"come back {again}"
    return ""


def broken_ones(recording: Recording, folder: Path, share: float, seed: int = 1) -> list[str]:
    found = []
    for wreck in wrecks(recording, Random(seed), share):
        if what := broken(wreck, folder):
            found.append(f"{wreck.how}: {what}")
    return found


@pytest.mark.parametrize(("served", "share"), [(False, 0.08), (True, 0.05)])
def test_power_cut_loses_nothing_that_was_acknowledged(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: bool, share: float
) -> None:
    work(recording, monkeypatch, served=served)

    file = [event for event in recording.events if event.__class__ in (Write, Sync) and event[0] == recording.path]
    assert sum(isinstance(event, Sync) for event in file) > 10, "checkpoints are a part of it"
    assert broken_ones(recording, tmp_path, share) == []


def early(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acknowledge before the sync."""
    monkeypatch.setattr(Log, "sync", lambda log, commit: None)


def own_writes_only(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't sync what a transaction has only read."""
    sync, transaction = Log.sync, SqliteStore._transaction
    began = 0

    def begin(store: SqliteStore) -> AbstractContextManager[SqliteTx]:
        nonlocal began
        began = len(recording.events)
        return transaction(store)

    def sync_writes(log: Log, commit: int) -> None:
        if any(isinstance(event, Write) for event in recording.events[began:]):
            sync(log, commit)

    monkeypatch.setattr(SqliteStore, "_transaction", begin)
    monkeypatch.setattr(Log, "sync", sync_writes)


def unordered(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite sync nothing by itself."""
    set_up = SqliteStore._set_up

    def off(store: SqliteStore, connection: apsw.Connection) -> None:
        set_up(store, connection)
        connection.pragma("synchronous", 0)

    monkeypatch.setattr(SqliteStore, "_set_up", off)


def unordered_thread(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite sync nothing in the thread that does the checkpoints."""
    set_up = SqliteStore._set_up

    def off(store: SqliteStore, connection: apsw.Connection) -> None:
        set_up(store, connection)
        if threading.current_thread().name == "deferlib-checkpoints":
            connection.pragma("synchronous", 0)

    monkeypatch.setattr(SqliteStore, "_set_up", off)


@pytest.mark.parametrize(
    ("sabotage", "shown"),
    [(early, "lost"), (early, "come back"), (own_writes_only, "free again"), (unordered, ""), (unordered_thread, "")],
)
def test_power_cut_shows_that_a_sync_is_missing(
    recording: Recording,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[[Recording, pytest.MonkeyPatch], None],
    shown: str,
) -> None:
    sabotage(recording, monkeypatch)

    work(recording, monkeypatch, served=sabotage is unordered_thread)

    found = broken_ones(recording, tmp_path, share=0.03)
    assert [what for what in found if shown in what]
