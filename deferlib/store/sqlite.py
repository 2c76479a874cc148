"""The embedded store: one SQLite file, shared by any number of processes on one machine, or `:memory:` for tests.

WAL, with `synchronous=FULL` for whatever acknowledges or settles. One write connection a process behind a fair lock, and
one for reading. apsw brings its own current SQLite; two copies of SQLite must never open one file in one process
(closing one drops the other's locks), so nothing else here opens it.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import apsw

from deferlib import errors
from deferlib.store import queries
from deferlib.store.datagram import Hints
from deferlib.store.sqlite_file import SCHEMA, check_file, create, translated
from deferlib.store.sqlite_tx import SqliteTx

T = TypeVar("T")

MEMORY = ":memory:"
_POLL_SECONDS = 0.5  # how late a missed hint is noticed; one `pragma data_version` costs 3 µs
_CHECKPOINT_PAGES = 16_384  # 64 MB of WAL: where processes without an engine checkpoint by themselves
_ENGINE_CHECKPOINT_PAGES = 2_000
_BUSY_STEP = 100e-6  # SQLite's own busy handler waits up to 100 ms and cuts a shared drain to a third


class SqliteStore:
    """A `deferlib.store.Store` on the SQLite file at *path*."""

    def __init__(self, path: str, *, busy_seconds: float = 10.0) -> None:
        self.path = path if path == MEMORY else os.path.realpath(path)
        self._busy_seconds = busy_seconds
        self._memory = path == MEMORY
        self._lock = FairLock()
        self._read_lock = threading.Lock()
        self._writer: apsw.Connection | None = None
        self._reader: apsw.Connection | None = None
        self._durable = True
        self._forking = False
        self._watchers: list[Callable[[], None]] = []
        self._hints = None if self._memory else Hints(self.path)
        _stores.add(self)

    # --- the protocol -----------------------------------------------------------------------------------------------

    def migrate(self) -> None:
        with self._lock, translated(self.path):
            self._open_writer()

    @contextlib.contextmanager
    def begin(self, *, durable: bool = True) -> Iterator[SqliteTx]:
        with self._lock:
            with translated(self.path):
                connection = self._writer or self._open_writer()
                if durable is not self._durable:
                    connection.pragma("synchronous", 2 if durable else 1)
                    self._durable = durable
                connection.execute("begin immediate")
            try:
                with translated(self.path):
                    yield SqliteTx(connection)
            except BaseException:
                self._rollback(connection)
                raise
            self._commit(connection)

    @contextlib.contextmanager
    def read(self) -> Iterator[SqliteTx]:
        if self._memory:  # one connection: it is the database
            with self.begin() as tx:
                yield tx
            return
        with self._read_lock, translated(self.path):
            connection = self._reader or self._open_reader()
            connection.execute("begin")
            try:
                yield SqliteTx(connection)
            finally:
                connection.execute("rollback")

    def run(self, work: Callable[[SqliteTx], T]) -> T:
        with self.begin() as tx:
            result = work(tx)
        self._wake()
        return result

    def join(self, connection: object) -> SqliteTx:
        if isinstance(connection, apsw.Connection):
            return SqliteTx(connection)
        if isinstance(connection, sqlite3.Connection):
            raise errors.StoreError(
                "a sqlite3 connection can't carry tasks: it is another copy of SQLite than apsw's, and two copies "
                "that open one file in one process lose each other's locks; use an apsw.Connection"
            )
        raise errors.StoreError(f"the SQLite store joins an apsw.Connection, not {type(connection).__name__}")

    @contextlib.contextmanager
    def watch(self, wake: Callable[[], None]) -> Iterator[None]:
        self._watchers.append(wake)
        try:
            if self._memory:
                yield
            else:
                with self._lock, translated(self.path):
                    (self._writer or self._open_writer()).wal_autocheckpoint(_ENGINE_CHECKPOINT_PAGES)
                with _Watch(self, wake):
                    yield
        finally:
            self._watchers.remove(wake)

    def close(self) -> None:
        with self._lock, self._read_lock:
            self._close_connections()
            if self._hints is not None:
                self._hints.close()

    # --- transactions -----------------------------------------------------------------------------------------------

    def _commit(self, connection: apsw.Connection) -> None:
        try:
            connection.execute("commit")
        except (apsw.FullError, apsw.BusyError, apsw.ReadOnlyError) as error:
            self._rollback(connection)  # the commit frame wasn't written
            with translated(self.path):
                raise error
        except apsw.Error as error:
            # A failed fsync: the frames may or may not be on the disk, and a second fsync would lie. Start afresh.
            self._rollback(connection)
            self._close_connections()
            raise errors.EnqueueUnknownError(f"{self.path}: the commit failed with an unknown outcome: {error}") from error

    def _rollback(self, connection: apsw.Connection) -> None:
        # An error in a statement may have rolled back already; what can't be rolled back is closed.
        try:
            if connection.in_transaction:
                connection.execute("rollback")
        except apsw.Error:
            self._close_connections()

    def _wake(self) -> None:
        for wake in self._watchers:
            wake()
        if self._hints is not None:
            self._hints.send()

    # --- connections ------------------------------------------------------------------------------------------------

    def _open_writer(self) -> apsw.Connection:
        if not self._memory:
            create(self.path)
        connection = self._connect()
        connection.wal_autocheckpoint(_ENGINE_CHECKPOINT_PAGES if self._watchers else _CHECKPOINT_PAGES)
        if self._memory:
            connection.execute(queries.migrations("sqlite")[SCHEMA])
        else:
            try:
                check_file(self.path, connection)
            except BaseException:
                connection.close()
                raise
        self._writer, self._durable = connection, True
        return connection

    def _open_reader(self) -> apsw.Connection:
        if self._writer is None:
            with self._lock:
                if self._writer is None:
                    self._open_writer()
        self._reader = self._connect()
        return self._reader

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if self._memory else 0)
        connection = apsw.Connection(self.path, flags=flags, statementcachesize=200)
        connection.set_busy_handler(self._busy_handler())
        if not self._memory:
            connection.pragma("journal_size_limit", 64 * 1024 * 1024)
            connection.pragma("synchronous", 2)
            connection.pragma("mmap_size", 0)
        return connection

    def _busy_handler(self) -> Callable[[int], bool]:
        deadline = 0.0

        def wait(calls: int) -> bool:
            nonlocal deadline
            now = time.monotonic()
            if calls == 0:
                deadline = now + self._busy_seconds
            if now >= deadline:
                return False
            time.sleep(_BUSY_STEP * random.uniform(0.5, 1.5))
            return True

        return wait

    def _close_connections(self) -> None:
        for connection in (self._writer, self._reader):
            if connection is not None:
                connection.close()
        self._writer = self._reader = None

    # --- fork -------------------------------------------------------------------------------------------------------

    def _before_fork(self) -> None:
        # A connection carried across a fork corrupts the file: close it first, and let both sides open their own.
        self._forking = not self._lock.mine()
        if not self._forking:
            return  # forked inside a transaction: the parent goes on with it, the child abandons it
        self._lock.acquire()
        self._read_lock.acquire()
        if not self._memory:
            self._close_connections()

    def _after_fork_in_parent(self) -> None:
        if self._forking:
            self._read_lock.release()
            self._lock.release()

    def _after_fork_in_child(self) -> None:
        if not self._memory:
            _abandoned.append((self._writer, self._reader))  # closing them here would drop the parent's locks
            self._writer = self._reader = None
            self._hints = Hints(self.path)
        self._lock = FairLock()
        self._read_lock = threading.Lock()
        self._watchers = []


class FairLock:
    """A lock that serves its waiters in the order they came (threading.Lock starves them under load)."""

    __slots__ = ("_gate", "_holder", "_waiting")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._holder = 0

    def acquire(self) -> None:
        with self._gate:
            if not self._holder and not self._waiting:
                self._holder = threading.get_ident()
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()
        self._holder = threading.get_ident()

    def release(self) -> None:
        with self._gate:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._holder = 0

    def mine(self) -> bool:
        """Tell whether the calling thread holds the lock."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Watch:
    """A thread that turns datagrams, and changes that sent none, into calls of *wake*."""

    def __init__(self, store: SqliteStore, wake: Callable[[], None]) -> None:
        assert store._hints is not None
        self._store, self._hints, self._wake = store, store._hints, wake
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._receiver = self._hints.bind()
        if self._receiver is not None:
            self._receiver.settimeout(_POLL_SECONDS)
        self._poller = self._store._connect()
        self._thread = threading.Thread(target=self._run, name="deferlib-watch", daemon=True)
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._receiver is not None:
            with contextlib.suppress(OSError):
                self._receiver.shutdown(2)
        self._thread.join()
        if self._receiver is not None:
            self._hints.unbind(self._receiver)
        self._poller.close()

    def _run(self) -> None:
        version = self._version()
        while not self._stop.is_set():
            if self._hinted():
                self._wake()
            elif not self._stop.is_set() and (now := self._version()) != version:
                version = now
                self._wake()

    def _hinted(self) -> bool:
        if self._receiver is None:
            self._stop.wait(_POLL_SECONDS)
            return False
        try:
            self._receiver.recv(1)
        except OSError:
            return False
        return not self._stop.is_set()

    def _version(self) -> object:
        try:
            return self._poller.pragma("data_version")
        except apsw.Error:
            return None


_stores: weakref.WeakSet[SqliteStore] = weakref.WeakSet()
_abandoned: list[object] = []


def _each_store(step: Callable[[SqliteStore], None]) -> Callable[[], None]:
    def run() -> None:
        for store in list(_stores):
            step(store)

    return run


os.register_at_fork(
    before=_each_store(SqliteStore._before_fork),
    after_in_parent=_each_store(SqliteStore._after_fork_in_parent),
    after_in_child=_each_store(SqliteStore._after_fork_in_child),
)
