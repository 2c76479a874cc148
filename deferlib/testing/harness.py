"""An engine for tests: run what is due, move the clock, look at what is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

from deferlib import config, payload
from deferlib.context import moment
from deferlib.core.model import SECOND, Delivery, Micros, Page, QueueConfig, QueueSource, Result, TaskRow, TaskState
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.engine.engine import Engine
from deferlib.engine.inprocess import served
from deferlib.engine.local import WsgiApp
from deferlib.errors import Error
from deferlib.store import Store
from deferlib.targets import Targets
from deferlib.testing.clock import VirtualClock, span
from deferlib.testing.inline import InlineTransport

if TYPE_CHECKING:
    from deferlib.contrib.asgi import AsgiApp

_NODE = "testing"
_MEMORY = "sqlite:///:memory:"


class TaskFailedError(Error):
    """A task failed while a test wanted none to."""


class NeverIdleError(Error):
    """The engine isn't idle after as many attempts as the test allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt that the engine made."""

    name: str
    queue: str
    call: str  # the deferred callable, as `module.name`; '' for a task with a body of its own
    url: str
    number: int  # of this task's attempts, from 1
    at: datetime  # aware, UTC
    status: int
    outcome: str  # what the handler of deferred calls said: ok, retry, permanent, …; '' from a view of your own
    error: str

    @property
    def ok(self) -> bool:
        """Whether the task is done."""
        return 200 <= self.status <= 299 and self.outcome in ("", "ok")

    def __str__(self) -> str:
        what = f" ({self.call})" if self.call else ""
        end = "succeeded" if self.ok else f"failed: {self.error or f'HTTP {self.status}'}"
        return f"attempt {self.number} of task {self.name}{what} of queue {self.queue} {end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """A task that waits, or a dead letter."""

    name: str
    queue: str
    call: str
    url: str
    method: str
    body: bytes = field(repr=False)
    eta: datetime  # aware, UTC
    attempts: int
    failures: int  # those that count against the retry limit
    reason: str  # why the last attempt failed, or why the task was given up


class Harness:
    """The engine that `engine` yields."""

    def __init__(self, store: Store, clock: VirtualClock, app: WsgiApp) -> None:
        self.clock = clock
        self._store = store
        lease: Micros = 30 * SECOND
        self._transport = InlineTransport(app, clock)
        rules = Rules(node=_NODE, lease=lease, in_process=True, target=Targets().get)
        self._scheduler = Scheduler(rules, Random(0))
        self._engine = Engine(store, self._transport, self._scheduler, clock, node=_NODE, lease=lease)

    def run_until_idle(self, *, raise_errors: bool = False, limit: int = 1_000) -> list[Attempt]:
        """Run what is due now, and what that defers, until nothing is; return the attempts in their order.

        The clock stands still: retries, countdowns and what a queue's rate holds back wait for `advance`. With
        *raise_errors* the first failed attempt raises `TaskFailedError`. `NeverIdleError` after *limit* attempts.
        """
        return self._run(self.clock.now(), raise_errors, limit)

    def advance(self, by: timedelta | float, *, raise_errors: bool = False, limit: int = 10_000) -> list[Attempt]:
        """Move the clock *by* a timedelta or a number of seconds, and run what becomes due at the time it is due.

        Like `run_until_idle` otherwise: a task that fails at 0:00:10.0 is tried again at 0:00:10.1.
        """
        return self._run(self.clock.now() + span(by), raise_errors, limit)

    def tasks(self, queue: str = "default") -> list[TaskView]:
        """Return the tasks that wait in *queue*, the next to run first."""
        return self._page(queue, TaskState.LIVE)

    def dead_letters(self, queue: str = "default") -> list[TaskView]:
        """Return the tasks of *queue* that were given up, the oldest first."""
        return self._page(queue, TaskState.DEAD)

    # --- running ----------------------------------------------------------------------------------------------------

    def _run(self, end: Micros, raise_errors: bool, limit: int) -> list[Attempt]:
        if end < self.clock.now():
            raise ValueError("the clock moves forward only")
        if limit < 1:
            raise ValueError("a limit is at least one attempt")
        attempts: list[Attempt] = []
        self._reread()
        self._engine.wake()  # the block between two runs may have deferred something
        with self._store.watch(self._engine.wake):
            while True:
                self._run_due(attempts, raise_errors, limit)
                next_at = self._scheduler.wake_at(self.clock.now(), self._transport.room)
                if next_at > end:
                    self.clock.move_to(max(end, self.clock.now()))  # a call may have moved it
                    return attempts
                self.clock.move_to(max(next_at, self.clock.now()))

    def _run_due(self, attempts: list[Attempt], raise_errors: bool, limit: int) -> None:
        """Run what is due at the clock's time, one attempt at a time."""
        while True:
            until = self._engine.turn()
            if self._transport.pending:
                if len(attempts) >= limit:
                    self._transport.give_back()
                    self._settle()
                    raise NeverIdleError(
                        f"{limit} attempts were made and more are due at {self.clock.moment()}; the last was "
                        f"{attempts[-1]}. Does a task defer itself for ever? Give limit=… to allow more."
                    )
                self._transport.wait(until)
                attempt = _attempt(*self._transport.ended.pop())
                attempts.append(attempt)
                if raise_errors and not attempt.ok:
                    self._settle()
                    raise TaskFailedError(f"{attempt}. The log of deferlib.handler has the traceback.")
                continue
            self._store.sync()  # an engine does so soon by its clock, and this one stands still
            if until > self.clock.now() and self._engine.idle:
                return

    def _settle(self) -> None:
        """Let the engine settle the last attempt and claim nothing more."""
        self._transport.full = True
        self._engine.turn()
        self._transport.full = False

    def _reread(self) -> None:
        """Take the queues as they are now: the engine by itself looks once a second, and this clock stands still."""
        self._engine.reread()

    def _page(self, queue: str, state: TaskState) -> list[TaskView]:
        views: list[TaskView] = []
        page = Page(state=state)
        while True:
            with self._store.read() as tx:
                rows = tx.tasks(queue, page)
            if not rows:
                return views
            views += map(_view, rows)
            page = page._replace(after=(rows[-1].due or 0, rows[-1].id))


@contextmanager
def engine(
    app: WsgiApp | AsgiApp | None = None,
    *,
    queues: str | Iterable[QueueConfig | Mapping[str, Any]] | None = None,
    start: datetime | None = None,
) -> Iterator[Harness]:
    """Give the `with` block a store in memory, a clock that stands still at *start* (or now), and an engine on them.

    Everything that the block defers goes there, and runs only in `Harness.run_until_idle` and `Harness.advance`, in the
    calling thread (an ASGI app's on its loop's). *app* is the WSGI or ASGI app that tasks with a URL of their own are for.
    *queues* as for `deferlib.configure`; by default the project's queue.yaml. What was configured before is back at the
    end.
    """
    clock = VirtualClock(start)
    former = config.install(None)
    try:
        runtime = config.configure(store=_MEMORY, queues=queues, clock=clock)
        configs = runtime.queues()
        runtime.store.run(lambda tx: tx.put_queues(configs, QueueSource.FILE))
        with ExitStack() as stack:
            yield Harness(runtime.store, clock, served(app, stack))
        runtime.close()
    finally:
        config.install(former)


def _attempt(delivery: Delivery, result: Result) -> Attempt:
    claim = delivery.claim
    return Attempt(
        name=claim.public_name,
        queue=claim.queue,
        call=payload.describe(claim.body),
        url=claim.url,
        number=claim.attempts,
        at=moment(result.started),
        status=result.status,
        outcome=result.outcome,
        error=result.error,
    )


def _view(row: TaskRow) -> TaskView:
    return TaskView(
        name=row.public_name,
        queue=row.queue,
        call=payload.describe(row.body),
        url=row.url,
        method=row.method,
        body=row.body,
        eta=moment(row.eta),
        attempts=row.attempts,
        failures=row.failures,
        reason=row.reason,
    )
