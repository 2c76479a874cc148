"""A connection to the SQLite file, and the line of the threads that take turns on it."""

from __future__ import annotations

import ctypes
import random
import time

import apsw

from deferlib.store.fairlock import FairLock
from deferlib.store.sqlite_log import Log
from deferlib.store.sqlite_tx import SqliteTx

_BUSY_STEP = 100e-6  # SQLite's own busy handler waits up to 100 ms and cuts a shared drain to a third


class Seat:
    """A connection and the lock of the threads that take turns on it."""

    __slots__ = ("connection", "lock", "log", "opened", "patience", "suspect", "tx", "until")

    def __init__(self, patience: float) -> None:
        self.lock = FairLock()
        self.connection: apsw.Connection | None = None
        self.patience = patience  # how many seconds to wait for another process
        self.until = 0.0  # when this turn's patience ends
        self.opened = 0  # how often
        self.log: Log | None = None  # if it writes, and to a file
        self.suspect = False  # a sync failed: what the log held then may never reach the disk
        self.tx: SqliteTx | None = None  # the last one

    def take(self, connection: apsw.Connection, log: Log | None) -> None:
        self.connection, self.log = connection, log
        self.opened += 1

    def close(self) -> None:
        connection, self.connection = self.connection, None
        log, self.log = self.log, None
        if log is not None:
            log.close()  # first: the last connection to be closed deletes the file
            self.suspect = self.suspect or log.failure is not None
        if connection is not None:
            connection.close(True)

    def abandon(self) -> None:
        """Give the parent's connection up in a forked child, and keep it for ever.

        Even to close it would undo, in memory shared with the parent, what the parent is about to commit. And while it is
        open, SQLite believes that this process has the parent's locks: it can't open the file a second time (`torn`).
        """
        for kept in (self.connection, self.tx and self.tx.close()):
            if kept is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # or the interpreter's end would close it
        self.connection = None
        if self.log is not None:
            self.log.abandon()
            self.log = None

    def wait(self, calls: int) -> bool:
        """Be SQLite's busy handler."""
        if time.monotonic() >= self.until:
            return False
        time.sleep(_BUSY_STEP * random.uniform(0.5, 1.5))
        return True
