"""What both services share: the deferred functions, and a record of which process did what for which photo."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import deferlib

SCHEMA = """
create table if not exists done (
  task text primary key, step text, photo text, service text, pid integer, attempt integer, runs integer
)
"""

service = ""  # which one this process is; web.py and worker.py say it


class Done(NamedTuple):
    """What one task has done; *runs* is how often it came to its end."""

    task: str
    step: str
    photo: str
    service: str
    pid: int
    attempt: int
    runs: int


def send_mail(photo: str) -> None:
    """Tell the photographer. Deferred by web, so it runs there."""
    record("mail", photo)


def back_up(photo: str) -> None:
    """Keep a copy. Deferred by the worker, so it runs there."""
    record("backup", photo)


def record(step: str, photo: str) -> None:
    """Note that the present task has done *step*: once for each task, however often it runs."""
    task = deferlib.current_task()
    assert task is not None, "only a task does this"
    with _transaction() as db:
        db.execute(
            "insert into done values (?, ?, ?, ?, ?, ?, 1) on conflict (task) do update set runs = runs + 1",
            [task.name, step, photo, service, os.getpid(), task.attempt],
        )


def done() -> list[Done]:
    """Return what was done, in its order."""
    with _transaction() as db:
        return [Done(*row) for row in db.execute("select * from done order by rowid")]


@contextmanager
def _transaction() -> Iterator[sqlite3.Connection]:
    path = os.environ.get("PHOTOS", ".deferlib/photos.db")
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=60, isolation_level="IMMEDIATE")) as db, db:
        db.execute("pragma journal_mode = wal")  # who looks keeps nobody from writing
        db.execute(SCHEMA)
        yield db
