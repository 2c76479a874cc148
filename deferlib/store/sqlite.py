"""The embedded store: one SQLite file, shared by any number of processes on one machine, or `:memory:` for tests.

WAL, which is synced after the commit, beside the database's locks (`sqlite_log`). One write connection a process behind a
fair lock, one for reading and, while watched, one that polls. apsw brings its own current SQLite; two copies of SQLite must
never open one file in one process (closing one drops the other's locks), so nothing else here opens it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import apsw

from deferlib import errors
from deferlib.store import sqlite_forks
from deferlib.store.checkpointer import Checkpointer
from deferlib.store.datagram import Hints
from deferlib.store.fairlock import FairLock
from deferlib.store.presence import Presence
from deferlib.store.shared_commit import Job, Line, do, end
from deferlib.store.sqlite_file import (
    check_file,
    create,
    definite,
    extend_log,
    migrate,
    translated,
    translation,
    unsynced,
    upgrade,
)
from deferlib.store.sqlite_log import Log
from deferlib.store.sqlite_seat import Seat
from deferlib.store.sqlite_tx import SqliteTx
from deferlib.store.watch import Watch

T = TypeVar("T")

MEMORY = ":memory:"
# 8 MB of WAL: from then on it is overwritten in place, which the disk acknowledges in 90 to 130 µs. One that grows takes
# 190 to 300, because its new size has to be written as well. At 64 MB defer() did 2,400/s, so 4,500. An engine gives it
# this size when it starts: the first 800 defer() after that took 330 µs each, so 225.
_CHECKPOINT_PAGES = 2_000
_COPIED_PAGES = 1_500  # where an engine has a thread for that: it is done before the log is longer
_INSTANT = 0.01  # seconds for which the thread may keep others from writing, beside what it takes to copy some pages
_A_MOMENT = 0.25  # seconds to wait for others with what is for speed only
_TORN = (
    "{}: this process was forked within a transaction of its parent, and shares locks with it that SQLite can't part. "
    "Fork outside of transactions, or start a new program"
)
_NESTED = "{}: this thread is within a transaction of this store already; use its verbs, or end it first"


class SqliteStore:
    """A `deferlib.store.Store` on the SQLite file at *path*.

    A thread has one transaction at a time. A transaction of another thread is waited for, one of another process up to
    *busy_seconds*.
    """

    def __init__(self, path: str, *, busy_seconds: float = 10.0) -> None:
        self.path = path if path == MEMORY else os.path.realpath(path)
        self._memory = path == MEMORY
        self._inode: tuple[int, int] | None = None  # of the file in use: another in its place is an error
        self._writer = Seat(busy_seconds)
        self._reader = self._writer if self._memory else Seat(busy_seconds)  # in memory the connection is the database
        self._poller = Seat(0)
        self._copier = Seat(0)
        self._checkpointers: list[Checkpointer] = []  # one for each engine of this process; the first one works
        self._line = Line()
        self._leaders = FairLock()  # of who writes for the line: from its turn on *writer* until that is synced
        self._watches: list[Watch] = []
        self._hints = None if self._memory else Hints(self.path)
        self._presence = None if self._memory else Presence(self.path)
        self._engines = 0  # that serve a store in memory
        self.commits = 0
        sqlite_forks.attend(self)

    # --- the protocol -----------------------------------------------------------------------------------------------

    def migrate(self) -> None:
        with self._turn(self._writer):
            pass  # opening makes the file and checks it

    @contextlib.contextmanager
    def begin(self, *, durable: bool = True) -> Iterator[SqliteTx]:
        with self._turn(self._writer):
            with self._transaction() as tx:
                yield tx
            log, commit = self._last_commit()
        if durable:
            self._sync(log, commit)

    @property
    def unsynced(self) -> bool:
        log = self._writer.log
        return log is not None and log.synced < log.committed

    def sync(self) -> None:
        self._sync(*self._last_commit())  # of a log that is closed all is synced

    @contextlib.contextmanager
    def read(self) -> Iterator[SqliteTx]:
        seat = self._reader
        with self._turn(seat):
            connection = seat.connection
            assert connection is not None
            tx = seat.tx = SqliteTx(connection, self.path)
            try:
                with translated(self.path):
                    connection.pragma("query_only", 1)
                    connection.execute("begin")
                yield tx
            finally:
                tx.close()
                self._rollback(seat)

    def run(self, work: Callable[[SqliteTx], T]) -> T:
        until = self._patience(self._writer)
        job = self._line.join(work)
        try:
            place = None if self._leaders.mine() else self._leaders.acquire()  # a watcher that is woken may write, too
            try:
                if not job.done:
                    self._lead(job, until)
            finally:
                if place is not None:
                    self._leaders.release(place)
        finally:
            self._line.leave(job)
        result: T = job.outcome()
        return result

    def _lead(self, job: Job, until: float) -> None:
        """Do the works of all who wait in one transaction. If it fails, each of the others tries by itself."""
        jobs, log, commit = [job], None, -1
        try:
            with self._turn(self._writer, until):
                jobs = self._line.take(job)
                with self._transaction() as tx:
                    do(jobs, tx)
                log, commit = self._last_commit()
            self._wake()  # now: the engine begins while the disk works (its turns need no leader's place)
            self._sync(log, commit)
        except BaseException as error:
            if commit < 0 and not isinstance(error, errors.EnqueueUnknownError):
                for each in jobs:
                    each.error = None
                raise
            end(jobs[1:], self._sync_others(log, commit, error))
            raise
        end(jobs)

    def _sync_others(self, log: Log | None, commit: int, error: BaseException) -> errors.EnqueueUnknownError | None:
        """Sync a commit whose leader *error* has ended. Return the others' error, if the outcome is unknown."""
        if isinstance(error, errors.EnqueueUnknownError):
            return error
        try:
            self._sync(log, commit)  # Ctrl-C while the disk worked
        except errors.EnqueueUnknownError as unknown:
            return unknown
        return None

    def _last_commit(self) -> tuple[Log | None, int]:
        log = self._writer.log
        return log, 0 if log is None else log.committed

    def _sync(self, log: Log | None, commit: int) -> None:
        """Return when that commit to *log* is on the disk. Also one that wrote nothing: what it has read must be there."""
        if log is None:
            return
        try:
            log.sync(commit)
        except OSError as error:
            with contextlib.suppress(errors.StoreError), self._turn(self._writer):
                pass  # starts afresh, and at once: other processes write behind what may be lost
            raise errors.EnqueueUnknownError(
                f"{self.path}: the commit has an unknown outcome, its log can't be synced: {error}"
            ) from error

    def join(self, connection: object) -> SqliteTx:
        if isinstance(connection, apsw.Connection):
            return SqliteTx(connection, self.path)
        if isinstance(connection, sqlite3.Connection):
            raise errors.StoreError(
                "a sqlite3 connection can't carry tasks: it is another copy of SQLite than apsw's, and two copies "
                "that open one file in one process lose each other's locks; use an apsw.Connection"
            )
        raise errors.StoreError(f"the SQLite store joins an apsw.Connection, not {type(connection).__name__}")

    @contextlib.contextmanager
    def watch(self, wake: Callable[[], None]) -> Iterator[None]:
        receiver = None
        if self._hints is not None:
            receiver = self._hints.bind()
        watch = Watch(wake, receiver, self._version)
        self._watches.append(watch)
        try:
            if self._hints is not None:
                watch.start()
            yield
        finally:
            ours = watch.stop()
            self._unwatch(watch)
            if ours and self._hints is not None and receiver is not None:
                self._hints.unbind(receiver)

    @contextlib.contextmanager
    def serving(self, first: Callable[[], None]) -> Iterator[None]:
        if self._presence is not None:
            with self._presence.serving(first):
                with contextlib.suppress(errors.StoreError):  # whoever uses it next will tell
                    self._extend_log()
                with self._copying():
                    yield
            return
        if not self._engines:
            first()
        self._engines += 1
        try:
            yield
        finally:
            self._engines -= 1

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Have a thread that does the checkpoints while the block lasts."""
        checkpointer = Checkpointer(self._copy_log, _COPIED_PAGES)
        checkpointer.start()
        try:
            self._checkpointers.append(checkpointer)
            self._tell_writer()
            yield
        finally:
            if checkpointer in self._checkpointers:  # a forked child has none
                self._checkpointers.remove(checkpointer)
                self._tell_writer()
                checkpointer.stop()
                if not self._checkpointers:
                    self._close(self._copier)

    def _tell_writer(self) -> None:
        if self._within():
            return
        turn = self._writer.lock.acquire()
        try:
            if self._writer.connection is not None:  # else whoever opens it does this
                self._attend_log(self._writer.connection)
        finally:
            self._writer.lock.release(turn)

    def _attend_log(self, connection: apsw.Connection) -> None:
        """See to it that what *connection* writes into the log is copied into the database."""
        checkpointer = next(iter(self._checkpointers), None)
        if checkpointer is not None:
            connection.set_wal_hook(checkpointer.committed)
        else:
            connection.wal_autocheckpoint(_CHECKPOINT_PAGES)

    def _copy_log(self) -> tuple[int, int]:
        """Do a checkpoint; return how many pages the log has, and how many of them are in the database by now.

        Then another one, which keeps others from writing: it has little to copy, and without it two processes that write
        all the time had a log of 7,000 pages. One of them always commits while the pages of the one before are synced.
        """
        seat = self._copier
        turn = seat.lock.acquire()
        try:
            if self._writer.connection is None:  # closed: its next commit will tell, and must make the file if it is gone
                return 0, 0
            connection = self._connection(seat)
            pages, copied = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            if copied < pages:  # somebody reads what the rest would overwrite
                return pages, copied
            seat.until = time.monotonic() + _INSTANT
            return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
        except (apsw.Error, errors.StoreError) as error:  # busy, mostly: another process is at it
            lost = unsynced(error)
        finally:
            seat.lock.release(turn)
        if lost:
            self._start_log_anew()
        return 1, 0

    def _start_log_anew(self) -> None:
        """Do as a failed sync of our own does: others write behind what may be lost, and a second sync would lie."""
        with contextlib.suppress(errors.StoreError):
            with self._turn(self._writer):
                self._writer.close()
                self._writer.suspect = True
            with self._turn(self._writer):
                pass

    def _extend_log(self) -> None:
        with self._turn(self._writer):
            connection = self._writer.connection
            assert connection is not None
            self._writer.until = min(self._writer.until, time.monotonic() + _A_MOMENT)
            extend_log(self.path, connection, _CHECKPOINT_PAGES)

    def served(self) -> bool:
        return bool(self._engines) if self._presence is None else self._presence.served()

    def close(self) -> None:
        """Close every connection; a later use opens them again, and makes the file if it is gone."""
        self._refuse_nesting()
        with self._all_turns():
            self._close_connections()
            self._inode = None
        if self._hints is not None:
            self._hints.close()

    # --- transactions -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, seat: Seat, until: float = 0) -> Iterator[None]:
        """Wait for a turn on *seat*'s connection; see to it that it is in place, and in no transaction."""
        until = until or self._patience(seat)
        turn = seat.lock.acquire()
        try:
            seat.until = until
            with translated(self.path):
                self._connection(seat)
            yield
        finally:
            seat.lock.release(turn)

    def _patience(self, seat: Seat) -> float:
        """Return until when a thread that begins now waits. Those before it count: each of them has waited that long."""
        self._refuse_nesting()
        return time.monotonic() + seat.patience

    def _refuse_nesting(self) -> None:
        if self._within():
            raise errors.StoreError(_NESTED.format(self.path))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[SqliteTx]:
        """Open a write transaction in this thread's turn, and commit it at the end of the block."""
        seat = self._writer
        connection = seat.connection
        assert connection is not None
        tx = seat.tx = SqliteTx(connection, self.path)
        try:
            with translated(self.path):
                if self._memory:
                    connection.pragma("query_only", 0)
                connection.execute("begin immediate")
            yield tx
            self._commit(connection, tx)
        finally:
            tx.close()
            self._rollback(seat)  # what wasn't committed

    def _within(self) -> bool:
        """Tell whether the calling thread is in a transaction, or syncs one: a handler of signals may ask."""
        log = self._writer.log
        return self._writer.lock.mine() or self._reader.lock.mine() or (log is not None and log.lock.mine())

    def _commit(self, connection: apsw.Connection, tx: SqliteTx) -> None:
        if connection is not self._writer.connection:
            raise errors.StoreError(_TORN.format(self.path))
        if tx.failure is not None:
            raise errors.StoreError(f"{self.path}: rolled back, because of: {tx.failure}") from tx.failure
        self.commits += 1  # before it is known to have succeeded: too many do no harm
        try:
            connection.execute("commit")
        except apsw.Error as error:
            if definite(error):
                raise translation(self.path, error, connection.system_errno) from error
            # A failed fsync: the frames may or may not be on the disk, and a second fsync would lie. Start afresh.
            self._rollback(self._writer)
            self._writer.close()
            self._writer.suspect = True
            raise errors.EnqueueUnknownError(f"{self.path}: the commit failed with an unknown outcome: {error}") from error
        if self._writer.log is not None:
            self._writer.log.committed += 1

    def _rollback(self, seat: Seat) -> None:
        # An error in a statement may have rolled back already; what can't be rolled back is closed.
        try:
            if seat.connection is not None and seat.connection.in_transaction:
                seat.connection.execute("rollback")
        except apsw.Error:
            seat.close()

    def _wake(self) -> None:
        for watch in tuple(self._watches):
            watch.wake()
        if self._hints is not None:
            self._hints.send()

    # --- watching ---------------------------------------------------------------------------------------------------

    def _version(self) -> object:
        """Return something that changes when another connection commits."""
        seat = self._poller
        turn = seat.lock.acquire()
        try:
            version = self._connection(seat).pragma("data_version")
            return seat.opened, version  # each connection counts from its own beginning
        except (apsw.Error, errors.StoreError):
            return None
        finally:
            seat.lock.release(turn)

    def _unwatch(self, watch: Watch) -> None:
        if watch in self._watches:  # a forked child has none
            self._watches.remove(watch)
        if not self._watches:
            self._close(self._poller)

    @property
    def _seats(self) -> tuple[Seat, ...]:
        """Return them in the order in which who takes several takes their locks."""
        return self._writer, self._reader, self._poller, self._copier

    def _close(self, seat: Seat) -> None:
        turn = seat.lock.acquire()
        try:
            seat.close()
        finally:
            seat.lock.release(turn)

    # --- connections ------------------------------------------------------------------------------------------------

    def _connection(self, seat: Seat) -> apsw.Connection:
        """Return *seat*'s connection, opened if need be, on the file that *path* names now."""
        if seat.log is not None and seat.log.failure is not None:
            seat.close()
        connection = seat.connection
        if connection is None:
            return self._open(seat)
        if connection.in_transaction:  # left by a thread that was interrupted
            connection.execute("rollback")
        if not self._memory:
            self._check_in_place()
        return connection

    def _open(self, seat: Seat) -> apsw.Connection:
        if not self._memory:
            self._find_file()
        flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if self._memory else 0)
        connection = apsw.Connection(self.path, flags=flags, statementcachesize=200)
        # Otherwise the planner looks at bound values and plans a range query anew at each run: 300 µs a claim, not 80.
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        log = None
        try:
            connection.set_busy_handler(seat.wait)
            if self._memory:
                upgrade(connection, 0)
            else:
                self._set_up(connection)
            if seat is self._writer:
                self._attend_log(connection)
                if seat.suspect:  # start a new log: what follows a lost frame in the old one would be lost with it
                    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                    seat.suspect = False
                if not self._memory:
                    log = Log(self.path)
        except BaseException:
            connection.close()
            raise
        seat.take(connection, log)
        return connection

    def _find_file(self) -> None:
        if self.path in sqlite_forks.torn:
            raise errors.StoreError(_TORN.format(self.path))
        if self._inode is None:
            create(self.path)
            self._inode = _inode(self.path)
        self._check_in_place()

    def _check_in_place(self) -> None:
        if _inode(self.path) != self._inode:
            raise errors.StoreUnavailableError(
                f"{self.path}: was removed or replaced while this process used it; nothing was written. Put it back; or "
                "stop every process that uses it, remove what is left of it (-wal and -shm too), and start again"
            )

    def _set_up(self, connection: apsw.Connection) -> None:
        check_file(self.path, connection)
        connection.pragma("journal_size_limit", 64 * 1024 * 1024)
        connection.pragma("synchronous", 1)
        connection.pragma("mmap_size", 0)
        migrate(connection)

    @contextlib.contextmanager
    def _all_turns(self) -> Iterator[None]:
        """Wait until nobody uses a connection."""
        with contextlib.ExitStack() as stack:
            if not self._leaders.mine():
                stack.callback(self._leaders.release, self._leaders.acquire())
            for lock in dict.fromkeys(seat.lock for seat in self._seats):
                stack.callback(lock.release, lock.acquire())
            yield

    def _close_connections(self) -> None:
        for seat in self._seats:
            seat.close()

    # --- fork -------------------------------------------------------------------------------------------------------

    def before_fork(self) -> contextlib.AbstractContextManager[None]:
        # A connection carried across a fork corrupts the file: close it first, and let both sides open their own.
        if self._within():
            return contextlib.nullcontext()  # forked within a transaction: the parent goes on with it
        turns = self._all_turns()
        turns.__enter__()
        if not self._memory:
            self._close_connections()
        return turns

    def after_fork_in_child(self) -> None:
        if not self._memory:
            if self._writer.connection is not None or self._reader.connection is not None:
                sqlite_forks.torn.add(self.path)
                for seat in self._seats:
                    seat.abandon()
            self._hints = Hints(self.path)
        if self._presence is not None:
            self._presence.abandon()
        for seat in self._seats:
            seat.lock = FairLock()
        self._checkpointers = []
        for watch in self._watches:
            watch.abandon()
        self._watches = []
        self._line, self._leaders = Line(), FairLock()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
