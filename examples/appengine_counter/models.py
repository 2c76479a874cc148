"""The counters, in SQLite. On App Engine these were ndb models; as there, each namespace has its own."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from deferlib import namespaces as namespace_manager

PATH = os.environ.get("COUNTERS", ".deferlib/counters.db")
SCHEMA = """
create table if not exists counters (namespace text, key text, value integer, primary key (namespace, key));
create table if not exists applied (task text primary key, at real);
create table if not exists rollups (namespace text, day text, total integer, primary key (namespace, day));
create table if not exists notes (namespace text, id text, text text, primary key (namespace, id));
"""


@contextmanager
def transaction() -> Iterator[sqlite3.Connection]:
    """Give the `with` block a transaction, which its end commits and its error rolls back."""
    os.makedirs(os.path.dirname(PATH) or ".", mode=0o700, exist_ok=True)
    with closing(sqlite3.connect(PATH, timeout=60, isolation_level="IMMEDIATE")) as db, db:
        db.executescript(SCHEMA)
        yield db


def increment(key: str, amount: int, task: str) -> None:
    """Add *amount* to a counter, once for each *task*: it runs again if its worker dies before the answer is out."""
    with transaction() as db:  # that it was applied, and what it did: both or neither
        if db.execute("insert or ignore into applied values (?, ?)", [task, time.time()]).rowcount:
            add = "insert into counters values (?, ?, ?) on conflict do update set value = value + excluded.value"
            db.execute(add, [namespace_manager.get_namespace(), key, amount])


def roll_up(day: str) -> None:
    """Keep the sum of the counters as that of *day*."""
    with transaction() as db:
        db.execute(
            "insert or replace into rollups select ?1, ?2, coalesce(sum(value), 0) from counters where namespace = ?1",
            [namespace_manager.get_namespace(), day],
        )


def note(id: str, text: str) -> None:
    """Keep a line of text, once for each *id*."""
    with transaction() as db:
        db.execute("insert or ignore into notes values (?, ?, ?)", [namespace_manager.get_namespace(), id, text])


def forget(before: float) -> None:
    """Forget which tasks were applied before a time that no task in the queues is older than."""
    with transaction() as db:
        db.execute("delete from applied where at < ?", [before])


def state() -> dict[str, Any]:
    """Return what the namespace has: its counters, its rollups and its notes."""
    with transaction() as db:
        mine = [namespace_manager.get_namespace()]
        notes = db.execute("select text from notes where namespace = ? order by rowid", mine)
        return {
            "counters": dict(db.execute("select key, value from counters where namespace = ? order by key", mine)),
            "rollups": dict(db.execute("select day, total from rollups where namespace = ? order by day", mine)),
            "notes": [text for (text,) in notes],
        }
