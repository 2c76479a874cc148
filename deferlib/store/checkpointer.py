"""A thread that copies what the log holds into the database, so that no commit has to wait for that.

SQLite does it within a commit, once the log is long: 3 to 9 ms of an engine's turn, of the disk mostly. Here it is another
connection's work. While it copies others go on writing, behind what it copies; the log begins anew only when all of it has
its place in the database. So what has come meanwhile is copied, too, and nobody writes while that is done (`_copy_log`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

import apsw

_LATE = 4_000  # pages: whoever finds so many copies them in its commit after all; only where a reader never ends
_PAUSE = 0.05  # seconds, after a try that has not copied all


class Checkpointer:
    """Calls *copy*, which returns how many pages the log has and how many of them are in the database, once it is long."""

    def __init__(self, copy: Callable[[], tuple[int, int]], pages: int) -> None:
        self._copy = copy
        self._pages = pages
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()  # put from commits, which may be interrupted anywhere
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deferlib-checkpoints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it is at is finished first."""
        self._ended.set()
        self._asked.put(False)
        self._thread.join()

    def committed(self, connection: apsw.Connection, name: str, pages: int) -> int:
        """Be a connection's hook: its commit has left so many *pages* in the log."""
        if pages >= _LATE:
            with contextlib.suppress(apsw.Error):  # the thread is at it
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        elif pages >= self._pages and self._asked.empty():
            self._asked.put(True)
        return apsw.SQLITE_OK

    def _run(self) -> None:
        while self._asked.get():
            pages, copied = self._copy()
            if copied < pages:
                self._ended.wait(_PAUSE)
