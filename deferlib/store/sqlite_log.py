"""The write-ahead log's way to the disk: after the commit, beside the database's locks, once for all who wait for it.

SQLite commits at `synchronous=NORMAL`: the frames are in the log, and nothing has waited for the disk. The log is synced
here, while other processes write: two that insert a row a commit do 2,350 commits a second each, and 1,400 to 1,900
where SQLite syncs (`FULL`) and keeps the database locked meanwhile. What comes back from a sync is on the disk:

- A sync of a file flushes all of it, whoever wrote it through whichever descriptor. So it covers all commits before it,
  those of other processes too: an answer that follows from what another one has just committed is as safe as its own.
- What leaves the log was synced before: "the WAL file is synchronized before each checkpoint and the database file is
  synchronized after each completed checkpoint and the WAL file header is synchronized when a WAL file begins to be reused"
  (sqlite.org/pragma.html#pragma_synchronous, of NORMAL). In wal.c `walCheckpoint` syncs the log before it copies, and says
  that all is copied (`nBackfill`) only once the database is synced; `walRestartLog` begins anew only where that was said;
  `sqlite3WalFrames` syncs a new header before the first frame, and with a new log's first sync goes that of its folder. The
  last connection to be closed does a checkpoint, by the same rules, before it deletes the log.
- The descriptor is of the log that SQLite writes: a connection that has read holds the database's shared lock until it is
  closed, and only who has the exclusive one deletes the log. To close it drops no lock: those are on the database and -shm.

`tests/store/test_power_cut.py` cuts the power after each of these, and sees it fail where one of them is left out.
"""

from __future__ import annotations

import contextlib
import os

from deferlib.errors import StoreUnavailableError
from deferlib.store.fairlock import FairLock

flush = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync


class Log:
    """The log of one connection: how many commits have gone into it, and how many of them are on the disk.

    *committed* is counted by whoever has the turn to write. A sync covers what was committed before it began, so of threads
    that wait at once one syncs for all.

    They take turns for another reason, too: Linux tells each descriptor once of a write that failed. Of two syncs at once
    one would be told, and the other acknowledge what was lost.
    """

    __slots__ = ("_descriptor", "committed", "failure", "lock", "synced")

    def __init__(self, path: str) -> None:
        """Open the log of the database at *path*; a connection has read from it."""
        try:
            self._descriptor = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:  # too many open files, say
            raise StoreUnavailableError(f"{path}-wal: can't be opened: {error.strerror}. Nothing was written") from error
        self.lock = FairLock()
        self.committed = self.synced = 0
        self.failure: OSError | None = None

    def sync(self, commit: int) -> None:
        """Return when the *commit*-th is on the disk. After an OSError it is always that: a second sync would lie."""
        turn = self.lock.acquire()
        try:
            if self.failure is not None:
                raise self.failure
            if self.synced < commit:
                self._sync()
        finally:
            self.lock.release(turn)

    def _sync(self) -> None:
        committed = self.committed
        try:
            flush(self._descriptor)
        except OSError as error:
            self.failure = error
            raise
        self.synced = committed

    def close(self) -> None:
        """Close the descriptor; what isn't synced is synced first, so whoever is about to ask for that finds it done."""
        turn = self.lock.acquire()
        try:
            if self.failure is None and self.synced < self.committed:
                with contextlib.suppress(OSError):  # whoever waits for it is told
                    self._sync()
            os.close(self._descriptor)
        finally:
            self.lock.release(turn)

    def abandon(self) -> None:
        """Close a forked child's copy of the descriptor. Without the lock: a thread that had it doesn't exist here."""
        os.close(self._descriptor)
