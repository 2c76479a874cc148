"""One commit for all who wait for one: the first in line does the work of those behind it, too.

A commit waits for the disk, and threads that defer at once would wait one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from deferlib.errors import EnqueueUnknownError

T = TypeVar("T")

MOST = 64  # works in one transaction: with more of them the first one would wait long for the last


class Job:
    """One thread's work, done by itself or by whoever is before it in line."""

    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None

    def outcome(self) -> Any:
        """Return what the work has returned, or raise what it has raised."""
        if self.error is not None:
            raise self.error
        return self.result


class Savepoints(Protocol):
    """A transaction that can undo a part of itself."""

    failure: BaseException | None  # what has undone all of it

    def attempt(self, work: Callable[[Any], T]) -> T:
        """Return what *work* makes of the transaction; what it raises comes through, and nothing of it stays."""


class Line:
    """The works that wait for a turn to write."""

    __slots__ = ("_jobs",)

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def join(self, work: Callable[[Any], Any]) -> Job:
        """Put *work* into the line."""
        job = Job(work)
        self._jobs.append(job)
        return job

    def take(self, own: Job) -> list[Job]:
        """Return what to do in one transaction: *own*, and those that wait with it."""
        jobs = [own]
        while self._jobs and len(jobs) < MOST:
            job = self._jobs.popleft()
            if job is not own:
                jobs.append(job)
        return jobs

    def leave(self, job: Job) -> None:
        """Take a work out of the line that waits no more: it is done, or its thread was interrupted."""
        if self._jobs:
            with suppress(ValueError):  # taken
                self._jobs.remove(job)


def do(jobs: list[Job], tx: Savepoints) -> None:
    """Do *jobs* in *tx*: the first, whose turn it is, with all consequences; of the others each for itself."""
    own, *others = jobs
    own.result = tx.attempt(own.work) if others else own.work(tx)
    for job in others:
        try:
            job.result = tx.attempt(job.work)
        except Exception as error:  # its thread's to raise
            if tx.failure is not None:
                raise
            job.error = error


def end(jobs: Iterable[Job], unknown: EnqueueUnknownError | None = None) -> None:
    """Let the threads of *jobs* go on: the works are committed, or may be, so doing them again could end otherwise."""
    for job in jobs:
        if unknown is not None:
            job.error = job.error or EnqueueUnknownError(str(unknown))
        job.done = True
