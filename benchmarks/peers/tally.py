"""How the tasks of every contender are counted: in a file that all of its processes share.

Each process counts in a slot of its own, so that counting costs a fraction of a microsecond and no two wait for each
other; the sum is what ran. What needs more than a count is appended to a second file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from pathlib import Path

SLOTS = 65_536  # one for each process; RQ's default worker is a new one for each task
_SIZE = SLOTS * 8


def create(folder: Path) -> dict[str, str]:
    """Make the files of a new count in *folder*; return the environment that points to them."""
    counts, notes = folder / "counts", folder / "notes"
    with counts.open("wb") as file:
        file.truncate(_SIZE)
    notes.write_bytes(b"")
    return {"BENCH_COUNTS": str(counts), "BENCH_NOTES": str(notes)}


class Tally:
    """The count in the file at *path*: slot 0 says how many slots are taken, each other one is a process's."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR)
        self._slots = memoryview(mmap.mmap(self._file, _SIZE)).cast("Q")
        self._mine = 0
        self._lock = threading.Lock()

    def count(self) -> None:
        """Count one task that ran."""
        with self._lock:
            mine = self._mine or self._take()
            self._slots[mine] += 1

    def total(self) -> int:
        """Return how many have run so far."""
        return sum(self._slots[1 : self._slots[0] + 1])

    def forget(self) -> None:
        """Take a slot of its own for this process, which was forked."""
        self._mine = 0
        self._lock = threading.Lock()

    def _take(self) -> int:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._slots[0] += 1
            self._mine = int(self._slots[0])
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return self._mine
