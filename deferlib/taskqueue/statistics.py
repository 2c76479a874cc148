"""What a queue holds, in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from deferlib import config
from deferlib.core.model import SECOND, Micros, QueueRow, QueueStats
from deferlib.errors import InvalidQueueError
from deferlib.store import Tx
from deferlib.taskqueue.rpc import UserRPC, check_deadline, check_rpc, create_rpc

if TYPE_CHECKING:
    from deferlib.taskqueue.queue import Queue

_FIELDS = ("queue", "tasks", "oldest_eta_usec", "executed_last_minute", "in_flight", "enforced_rate")


class QueueStatistics:
    """The numbers of one queue at one moment.

    Exact when they are read, and kept for up to a second unless this process changes anything of the store.

    *tasks* wait or run, scheduled ones included; *oldest_eta_usec* is the earliest ETA in microseconds since 1970, None
    without tasks; *in_flight* run now; *enforced_rate* is in dispatches per second, None without a rate.
    """

    def __init__(
        self,
        queue: Queue,
        tasks: int,
        oldest_eta_usec: int | None = None,
        executed_last_minute: int | None = None,
        in_flight: int | None = None,
        enforced_rate: float | None = None,
    ) -> None:
        self.queue = queue
        self.tasks = tasks
        self.oldest_eta_usec = oldest_eta_usec
        self.executed_last_minute = executed_last_minute
        self.in_flight = in_flight
        self.enforced_rate = enforced_rate

    @classmethod
    def fetch(cls, queue_or_queues: str | Queue | Iterable[str] | Iterable[Queue], deadline: float = 10) -> Any:
        """Return the statistics of one queue, given by name or as a `Queue`, or of several as a list in their order.

        Raises `UnknownQueueError`; TypeError for anything that is no queue, or names and queues mixed;
        `RPCDeadlineExceededError` after *deadline* seconds.
        """
        check_deadline(deadline)
        if _is_empty(queue_or_queues):
            return []
        return cls.fetch_async(queue_or_queues, create_rpc(deadline)).get_result()

    @classmethod
    def fetch_async(
        cls, queue_or_queues: str | Queue | Iterable[str] | Iterable[Queue], rpc: UserRPC | None = None
    ) -> UserRPC:
        """Do what `fetch` does in the background."""
        queues, several = _queues(queue_or_queues)
        if len({queue._app for queue in queues}) > 1:
            raise InvalidQueueError("the queues of one call belong to one application")
        names = [queue.name for queue in queues]
        runtime = config.runtime()

        def work() -> list[tuple[QueueStats, QueueRow]]:
            return _fetch(runtime, names)

        def result(done: UserRPC) -> QueueStatistics | list[QueueStatistics]:
            done.check_success()
            found: Any = done.response
            statistics = [_of(queue, *each) for queue, each in zip(queues, found, strict=True)]
            return statistics if several else statistics[0]

        check_rpc(rpc)
        call = rpc or create_rpc()
        call.make_call("FetchQueueStats", names, work, result)
        return call

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QueueStatistics):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _FIELDS)

    __hash__ = None  # type: ignore[assignment]  # as a queue's

    def __repr__(self) -> str:
        return f"QueueStatistics({', '.join(f'{name}={getattr(self, name)!r}' for name in _FIELDS)})"


def _is_empty(given: object) -> bool:
    return given is None or (isinstance(given, Sequence) and not given)


def _queues(given: object) -> tuple[list[Queue], bool]:
    """Return the queues that *given* means, and whether they are a list."""
    from deferlib.taskqueue.queue import Queue

    if isinstance(given, Queue):
        return [given], False
    if isinstance(given, str):
        return [Queue(given)], False
    if not isinstance(given, Iterable):
        raise TypeError(f"a queue, its name, or several of them are needed, not {type(given).__name__}")
    several = list(given)
    if all(isinstance(each, str) for each in several):
        return [Queue(each) for each in several], True
    if all(isinstance(each, Queue) for each in several):
        return several, True
    raise TypeError("give queues or names of queues, not both, and nothing else")


class _Fetched(NamedTuple):
    at: Micros
    commits: int
    found: list[tuple[QueueStats, QueueRow]]


def _fetch(runtime: config.Runtime, names: Sequence[str]) -> list[tuple[QueueStats, QueueRow]]:
    """Return the numbers of the queues; read anew once they are a second old, or this process has changed anything."""
    key, store, now = tuple(names), runtime.store, runtime.clock.now()
    commits = store.commits  # before the read: what is committed meanwhile isn't known to be in it
    known: _Fetched | None = runtime.statistics.get(key)
    if known is None or known.commits != commits or not 0 <= now - known.at < SECOND:
        with store.read() as tx:
            known = runtime.statistics[key] = _Fetched(now, commits, _read(tx, now, names))
    return known.found


def _read(tx: Tx, now: int, names: Sequence[str]) -> list[tuple[QueueStats, QueueRow]]:
    from deferlib.taskqueue.queue import unknown_queue

    rows = {row.name: row for row in tx.queues()}
    for name in names:
        if name not in rows:
            raise unknown_queue(name, rows)
    return [(stats, rows[stats.queue]) for stats in tx.stats(now, names)]


def _of(queue: Queue, stats: QueueStats, row: QueueRow) -> QueueStatistics:
    return QueueStatistics(
        queue,
        stats.tasks,
        stats.oldest_due,
        stats.executed_last_minute,
        stats.in_flight,
        0.0 if row.held else row.config.rate,
    )
