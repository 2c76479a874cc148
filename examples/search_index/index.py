"""The full-text index: one SQLite file, with the FTS5 extension. It knows nothing of deferlib."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

DEFAULT = ".deferlib/search_index.db"
BUSY = 60.0  # seconds to wait for another writer: SQLite has one at a time

# `deferred` is the journal of what deferlib took, `documents` gives each path its one row of `pages`.
SCHEMA = """
create table if not exists deferred (task text primary key, path text not null);
create table if not exists documents (id integer primary key, path text not null unique);
create table if not exists failures (path text primary key, task text, tries integer, error text);
create virtual table if not exists pages using fts5 (path, text, tokenize = "unicode61 tokenchars '_'");
"""

# What surrounds a match in a snippet. Not HTML, which whoever escapes the snippet would escape as well.
MATCH, END_MATCH = "\x02", "\x03"

_lock = threading.Lock()
_prepared: set[Path] = set()


class Progress(NamedTuple):
    """How many files were deferred, are in the index, and were given up."""

    deferred: int
    indexed: int
    dead: int


class Hit(NamedTuple):
    """A file that matches, and a few words of it."""

    path: str
    snippet: str


def location() -> Path:
    """Return the index's file, from the environment's SEARCH_INDEX."""
    return Path(os.environ.get("SEARCH_INDEX", DEFAULT)).absolute()


def require_fts5() -> None:
    """End the process, with one line, if this Python's SQLite was built without FTS5."""
    with closing(sqlite3.connect(":memory:")) as db:
        try:
            db.execute("create virtual table probe using fts5 (text)")
        except sqlite3.OperationalError as error:
            raise SystemExit(f"this Python's SQLite {sqlite3.sqlite_version} has no FTS5 ({error}); use another") from None


@contextmanager
def connect() -> Iterator[sqlite3.Connection]:
    """Give the `with` block a connection and a transaction, which its end commits and its error rolls back.

    SQLite's default of syncing every commit is left alone: deferlib forgets a call that returned, so what the call did
    must be as durable as the call was.
    """
    path = location()
    with closing(sqlite3.connect(_made(path), timeout=BUSY)) as db, db:
        yield db


def _made(path: Path) -> Path:
    """Make the file at *path* if this process hasn't seen it yet."""
    with _lock:
        if path not in _prepared:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=BUSY)) as db:
                db.execute("pragma journal_mode = wal")  # the pages read while a task writes
                db.executescript(SCHEMA)
            _prepared.add(path)
    return path


# --- writing --------------------------------------------------------------------------------------------------------


def put(path: str, text: str) -> None:
    """Store *text* as what is in the file at *path*: once, however often this is called.

    A deferred call runs at least once, so a second run must change nothing. The path is the key: it always leads to the
    same row, which the second run replaces. Both statements are one transaction, so that there is no half of it either.
    """
    with connect() as db:
        db.execute("insert or ignore into documents (path) values (?)", [path])
        [id] = db.execute("select id from documents where path = ?", [path]).fetchone()
        db.execute("insert or replace into pages (rowid, path, text) values (?, ?, ?)", [id, path, text])
        db.execute("delete from failures where path = ?", [path])


def note_deferred(tasks: Iterable[tuple[str, str]]) -> None:
    """Keep which task is to index which path."""
    pairs = list(tasks)  # before the transaction begins: whoever yields them may take a while
    with connect() as db:
        db.executemany("insert or ignore into deferred (task, path) values (?, ?)", pairs)


def note_failure(path: str, task: str, error: str) -> None:
    """Keep that the file at *path* could not be indexed, and count how often the same task has tried."""
    with connect() as db:
        db.execute(
            "insert into failures (path, task, tries, error) values (?, ?, 1, ?) on conflict (path) do update set"
            " tries = iif(task = excluded.task, tries + 1, 1), task = excluded.task, error = excluded.error",
            [path, task, error],
        )


def note_start(task: str, attempt: int) -> None:
    """Append a line to the journal of starts, beside the index: in one write, so that lines never mix."""
    with starts().open("a", encoding="utf-8") as journal:
        journal.write(f"{task} {attempt}\n")


def starts() -> Path:
    """Return the file that `note_start` appends to: a line a start, with the task and the attempt."""
    return location().with_suffix(".starts")


# --- reading --------------------------------------------------------------------------------------------------------


def progress(retries: int) -> Progress:
    """Count the files; one that failed more often than it has *retries* is dead."""
    with connect() as db:
        counts = db.execute(
            "select (select count(distinct path) from deferred),"
            " (select count(*) from documents where path not in (select path from failures)),"
            " (select count(*) from failures where tries > ?)",
            [retries],
        ).fetchone()
    return Progress(*counts)


def failures() -> list[tuple[str, int, str]]:
    """Return path, tries and last error of the files that could not be indexed so far."""
    with connect() as db:
        return db.execute("select path, tries, error from failures order by path").fetchall()


def search(words: str, limit: int = 20) -> tuple[int, list[Hit]]:
    """Return how many files have all the *words*, and the best of them with `MATCH` and `END_MATCH` in their snippets."""
    # Each word in quotes: FTS5 has a query language, in which what people type is mostly a syntax error.
    query = " ".join('"' + word.replace('"', '""') + '"' for word in words.replace("\0", " ").split())
    if not query:
        return 0, []
    with connect() as db:
        [count] = db.execute("select count(*) from pages where pages match ?", [query]).fetchone()
        rows = db.execute(
            "select path, snippet(pages, 1, ?, ?, ' … ', 20) from pages where pages match ? order by rank limit ?",
            [MATCH, END_MATCH, query, limit],
        ).fetchall()
    return count, [Hit(path, " ".join(snippet.split())) for path, snippet in rows]
