"""The store seam: what the library and the engine ask of a database.

Every verb takes many and takes *now*: one task is a list of length one, and no statement reads a clock. A store is
opened with `deferlib.config.connect`; nobody else imports the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from deferlib.core.model import (
    AddResult,
    Claim,
    ClaimSpec,
    DeleteResult,
    Limiter,
    Micros,
    NewTask,
    Outcome,
    Page,
    QueueConfig,
    QueueRow,
    QueueSource,
    QueueStats,
    Signed,
    TaskRow,
    TaskState,
)

T = TypeVar("T")


class Tx(Protocol):
    """One transaction: the engine's, the library's own, or the caller's.

    Its verbs end with it, and when one of them fails: then everything is rolled back.
    """

    def add(self, now: Micros, tasks: Sequence[NewTask]) -> list[AddResult]:
        """Insert *tasks*; each one's result stands at its place, and a refused one touches no other.

        Of two with one id in *tasks* one is inserted, usually the first.
        """

    def delete(self, now: Micros, queue: str, names: Sequence[str]) -> list[DeleteResult]:
        """Delete tasks and dead letters; a name is the user's or the public one. A named task leaves its tombstone."""

    def purge(self, now: Micros, queue: str, limit: int) -> int:
        """Delete up to *limit* live tasks; return how many. Repeat until 0."""

    def claim(self, now: Micros, specs: Sequence[ClaimSpec]) -> list[Claim]:
        """Lease due tasks, the longest due first, and raise their fence; spends the tokens of a limited queue.

        A spec with *fail_fast* takes only tasks that ask for it; it has no tag.
        """

    def settle(self, now: Micros, outcomes: Sequence[Outcome]) -> list[bool]:
        """Apply *outcomes* one after another, each where its fence still holds; False where it is lost.

        A lease that has expired still holds until somebody claims, reschedules or removes the task.
        """

    def reschedule(self, now: Micros, queue: str, names: Sequence[str], eta: Micros) -> int:
        """Move waiting tasks to *eta*, and bring dead letters back with their attempts at 0; return how many."""

    def ahead(self, queue: str, due: Micros, id: int, most: int) -> int:
        """Return how many live tasks of *queue* are due before that one; *most* if there are more."""

    def next_due(self, queues: Sequence[str], *, fail_fast: bool = False) -> dict[str, Micros]:
        """Return when something is due next; a queue with nothing live is left out.

        With *fail_fast*, only tasks that ask to fail fast are looked at.
        """

    def queues(self) -> list[QueueRow]:
        """Return every queue."""

    def put_queues(
        self,
        configs: Sequence[QueueConfig],
        source: QueueSource,
        *,
        said: Mapping[str, str] = {},
        disabled: Collection[str] = (),
    ) -> None:
        """Insert or update queues, with what is *said* of them; LIBRARY only inserts. Enables all but the *disabled*."""

    def pause(self, queues: Sequence[str], paused: bool) -> int:
        """Pause or resume *queues*; return how many there are."""

    def own(self, now: Micros, node: str, ttl: Micros, queues: Sequence[str]) -> dict[str, Limiter]:
        """Take or renew ownership for *ttl*; return the limiters of those owned now.

        An owner's leases end with its ownership, because both are given for the same time in the same transaction: who
        takes a queue over finds nothing of the former owner in flight.
        """

    def cap(self, tats: Mapping[str, Micros]) -> None:
        """Lower the limiters of these queues to no more than that: one of another rate, or of a clock that went back."""

    def refund(self, spent: Mapping[str, Micros]) -> None:
        """Give the limiters of these queues back what this transaction's claims spent, and nothing was sent for."""

    def fly(self, node: str, until: Micros, tasks: Mapping[str, int]) -> None:
        """Say how many tasks of which queue *node* has in flight; that counts until *until*."""

    def notes(self) -> dict[str, str]:
        """Return the notes that engines leave for people and for each other."""

    def put_note(self, name: str, value: str) -> None:
        """Leave a note; '' takes it away."""

    def disown(self, node: str) -> None:
        """Give back every queue that *node* owns: it has nothing in flight."""

    def take_over(self, now: Micros, until: Micros) -> int:
        """End the leases of push tasks that end by *until*, and every ownership; return how many tasks are due by it.

        For an engine that knows that there is no other: what was leased was lost with the engine that had it, and counts
        as lost.
        """

    def find(self, queue: str | None, names: Sequence[str]) -> list[TaskRow]:
        """Return the tasks, tombstones and dead letters of these names: the user's first, then the public ones."""

    def tasks(self, queue: str, page: Page) -> list[TaskRow]:
        """Return a page of a queue's live tasks (the next to run first) or dead letters."""

    def signed(self, after: int, limit: int, state: TaskState) -> Signed:
        """Count by their keys the live tasks, or the dead letters, among the next *limit* rows whose ids follow *after*."""

    def stats(self, now: Micros, queues: Sequence[str]) -> list[QueueStats]:
        """Return the counts of *queues*."""

    def sweep(self, now: Micros, limit: int) -> int:
        """Remove up to *limit* expired tombstones and minutes of old statistics; return how many. Repeat until 0."""


class Store(Protocol):
    """A database that holds tasks. Safe to share between threads, and across a fork outside of its transactions.

    A thread has one transaction of a store at a time; a second one within it is refused.
    """

    commits: int  # how many transactions of this process have ended in a commit: unchanged, nothing of its own has changed

    def migrate(self) -> None:
        """Bring the schema to this version; refuse a newer one."""

    def begin(self, *, durable: bool = True) -> AbstractContextManager[Tx]:
        """Open a write transaction, committed at the end of the block, rolled back if it raises.

        If *durable*, what it wrote and what it read survive a power cut when the block has ended. If not, a power cut may
        undo the commit (never tear it) until `sync` or any later durable one; a killed process undoes nothing.
        """

    @property
    def unsynced(self) -> bool:
        """Whether a power cut may undo a commit of this process. From any thread."""

    def sync(self) -> None:
        """Make durable what this process has committed; free where `unsynced` is False. Takes no lock of the database's."""

    def read(self) -> AbstractContextManager[Tx]:
        """Open a snapshot, as of its first verb, that takes no write lock and can't write."""

    def run(self, work: Callable[[Tx], T]) -> T:
        """Run *work* in a durable transaction, again if the database asks for it, and wake the engines after commit."""

    def join(self, connection: object) -> Tx:
        """Return the verbs inside the caller's own transaction on *connection*."""

    def watch(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """Call *wake* from some thread when tasks may have come. A hint: may lie, may miss; the clock is the truth."""

    def serving(self, first: Callable[[], None]) -> AbstractContextManager[None]:
        """Show that an engine serves the store while the block lasts; before it, call *first* if no other one does."""

    def served(self) -> bool:
        """Tell whether an engine serves the store now."""

    def close(self) -> None:
        """Close every connection; a later use opens them again."""


def names_and_ids(names: Iterable[str]) -> list[tuple[str, int | None]]:
    """Pair each name with the id it would be the public name of, if any."""
    return [(name, _id(name)) for name in names]


def _id(name: str) -> int | None:
    if len(name) <= 19 and name.isascii() and name.isdigit():
        id = int(name)
        return id if id < 2**63 and str(id) == name else None
    return None
