"""Millions of rows, written by SQL in bulk: as many `defer` calls would take an hour."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import apsw

import deferlib
from benchmarks import app
from benchmarks.stage import fresh_store

_CHUNK = 500_000
_HOUR = 3_600_000_000
_TOMBSTONE = 9 * 24 * _HOUR  # how long a name stays taken: App Engine's nine days
_SELECT = """
with recursive numbers(i) as (select :start union all select i + 1 from numbers where i + 1 < :stop)
insert into tasks ({columns})
select {values}
from numbers, tasks as sample
where sample.id = :sample
"""
_LIVE = {"id": ":first + i", "nonce": "random()", "eta": ":eta + i", "due": ":eta + i"}
_DEAD = {
    **_LIVE,
    "name": "'order-' || i",
    "due": "null",
    "expires": ":eta + i",
    "body": "x''",
    "headers": "''",
    "size": "0",
}


def make_store(path: Path, *, ready: int, scheduled: int, tombstones: int) -> None:
    """Make a store at *path* with so many no-op calls that are due, that are due in an hour or later, and used names."""
    with fresh_store(path):
        deferlib.defer(app.noop, *app.ARGS, _countdown=3600)
    connection = apsw.Connection(str(path))
    try:
        connection.pragma("synchronous", 0)  # nobody minds if the machine loses a store half made
        sample = _column(connection, "select id from tasks")[0]
        now = time.time_ns() // 1000
        _insert(connection, sample, _LIVE, ready, first=1, eta=now - ready)
        _insert(connection, sample, _LIVE, scheduled, first=10**9, eta=now + _HOUR)
        _insert(connection, sample, _DEAD, tombstones, first=2 * 10**9, eta=now + _TOMBSTONE)
        connection.execute("delete from tasks where id = ?", (sample,))
        connection.execute("update counts set tasks = ?", (ready + scheduled,))
        connection.execute("pragma wal_checkpoint(truncate)").fetchall()
    finally:
        connection.close()


def add_ready(path: Path, count: int) -> None:
    """Add *count* more that are due, with the bodies of any that is there."""
    connection = apsw.Connection(str(path))
    try:
        connection.pragma("synchronous", 0)
        sample = _column(connection, "select id from tasks where due is not null limit 1")[0]
        _insert(connection, sample, _LIVE, count, first=10**8, eta=time.time_ns() // 1000 - count)
        connection.execute("update counts set tasks = tasks + ?", (count,))
        connection.execute("pragma wal_checkpoint(truncate)").fetchall()
    finally:
        connection.close()


def _insert(connection: apsw.Connection, sample: int, values: dict[str, str], count: int, *, first: int, eta: int) -> None:
    columns = _column(connection, "select name from pragma_table_info('tasks')")
    selected = (values.get(name, f"sample.{name}") for name in columns)
    sql = _SELECT.format(columns=", ".join(columns), values=", ".join(selected))
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        connection.execute(sql, {"start": start, "stop": stop, "sample": sample, "first": first, "eta": eta})


def _column(connection: apsw.Connection, sql: str) -> list[Any]:
    return [row[0] for row in connection.execute(sql)]
