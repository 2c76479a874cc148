"""The named statements, run in one transaction of an apsw connection; one that fails ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import apsw

from deferlib.errors import StoreError
from deferlib.store import queries
from deferlib.store.sqlite_file import translation

SQL = queries.load("sqlite")
_MANY = 4  # rows that are worth a savepoint
_RELEASE = "release deferlib_many"
_UNDO = f"rollback to deferlib_many; {_RELEASE}"


class Statements:
    """What runs statements for the verbs of a transaction, until one fails or `close` is called."""

    __slots__ = ("_connection", "_cursor", "_path", "failure")

    def __init__(self, connection: apsw.Connection, path: str) -> None:
        self._connection = connection
        self._cursor: apsw.Cursor | _Ended = connection.cursor()
        self._path = path
        self.failure: BaseException | None = None

    def close(self) -> object:
        """End the verbs; return what carried them, for a forked child that mustn't touch it but keep it."""
        cursor, self._cursor = self._cursor, _ENDED
        return cursor

    def _run(self, query: str, values: Mapping[str, Any]) -> None:
        self._rows(query, values)

    def _column(self, query: str, values: Mapping[str, Any]) -> list[Any]:
        return [row[0] for row in self._rows(query, values)]

    def _value(self, query: str, values: Mapping[str, Any]) -> Any:
        rows = self._rows(query, values)
        return rows[0][0] if rows else None

    def _rows(self, query: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        try:
            return self._cursor.execute(SQL[query], values).fetchall()
        except BaseException as error:
            self._fail(error)

    def _rows_within(self, query: str, values: Mapping[str, Any], budget: int) -> list[tuple[Any, ...]]:
        """Return the rows whose last columns together have at most *budget* bytes; the first that has any, whatever it has.

        Summed up here, where at most one row is read in vain: a window function takes 1 µs a row.
        """
        rows: list[tuple[Any, ...]] = []
        taken = 0
        try:
            for row in self._cursor.execute(SQL[query], values):
                size = len(row[-1])
                if taken and taken + size > budget:
                    break
                taken += size
                rows.append(row)
        except BaseException as error:
            self._fail(error)
        return rows

    def _many(self, statement: queries.Many, values: Sequence[tuple[Any, ...]]) -> Sequence[int]:
        """Run *statement* with each of *values*; return the places of those for which it has changed a row.

        First without asking for which: to return a row costs 1.5 µs, and nearly always it is all of them. Few are run one
        by one: to return the only one costs 10 µs.
        """
        if len(values) < _MANY:
            return [place for place, value in enumerate(values) if self._changes(statement.silent, value)]
        if self._all_change(statement.silent, values):
            return range(len(values))
        return self._each(statement.telling, [(*value, place) for place, value in enumerate(values)])

    def _changes(self, sql: str, values: tuple[Any, ...]) -> bool:
        """Run *sql* and tell whether it has changed a row."""
        try:
            before = self._connection.total_changes()
            self._cursor.execute(sql, values)
            return self._connection.total_changes() > before
        except BaseException as error:
            self._fail(error)

    def _all_change(self, sql: str, values: Sequence[tuple[Any, ...]]) -> bool:
        """Run *sql* with each of *values* and tell whether each has changed a row; if not, nothing is done."""
        try:
            self._cursor.execute("savepoint deferlib_many")
            before = self._connection.total_changes()
            self._cursor.executemany(sql, values)
            all_changed = self._connection.total_changes() - before == len(values)
            self._cursor.execute(_RELEASE if all_changed else _UNDO)
        except BaseException as error:
            if self._connection.in_transaction:  # the caller's may go on: nothing of this stays in it
                with contextlib.suppress(apsw.Error):  # it never came to that
                    self._connection.execute(_UNDO)
            self._fail(error)
        return all_changed

    def _each(self, sql: str, values: Sequence[Mapping[str, Any] | tuple[Any, ...]]) -> list[int]:
        """Run a statement once for each of *values*; return the first column of what it returns."""
        try:
            return [row[0] for row in self._cursor.executemany(sql, values)]
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        if self.failure is None and self._cursor is not _ENDED:
            self.failure = error
        self.close()
        if isinstance(error, apsw.Error):
            raise translation(self._path, error, self._connection.system_errno) from error
        raise error


class _Ended:
    """Stands in for the cursor of a transaction that is over."""

    def execute(self, sql: str, values: object = None) -> NoReturn:
        raise StoreError("the transaction is over: use its verbs within the block, and not after one of them has failed")

    executemany = execute


_ENDED = _Ended()
