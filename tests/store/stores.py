"""The stores that the conformance suite and the model run over, and short ways to make what the verbs take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from deferlib.core.model import (
    DAY,
    SECOND,
    Action,
    AddResult,
    Claim,
    ClaimSpec,
    Micros,
    Mode,
    NewTask,
    Outcome,
    Page,
    QueueConfig,
    QueueSource,
    QueueStats,
    TaskRow,
    TaskState,
)
from deferlib.store import Store
from deferlib.store.sqlite import MEMORY, SqliteStore

Factory: TypeAlias = Callable[[Path], Store]

# A new database joins both suites with one line here.
FACTORIES: dict[str, Factory] = {
    "sqlite-memory": lambda folder: SqliteStore(MEMORY),
    "sqlite-file": lambda folder: SqliteStore(str(folder / "tasks.db"), busy_seconds=2),
}

NOW: Micros = 1_800_000_000 * SECOND
LEASE: Micros = 30 * SECOND
KEEP: Micros = 9 * DAY  # how long a tombstone stays by default

QUEUES = [
    QueueConfig(name="default"),
    QueueConfig(name="other", tombstone=DAY),
    QueueConfig(name="pull", mode=Mode.PULL),
]


def open_store(factory: Factory, folder: Path) -> Store:
    """Return a new store with `QUEUES` in it."""
    store = factory(folder)
    store.migrate()
    store.run(lambda tx: tx.put_queues(QUEUES, QueueSource.LIBRARY))
    return store


def task(
    id: int,
    *,
    nonce: int | None = None,
    queue: str = "default",
    name: str | None = None,
    eta: Micros = NOW,
    body: bytes = b"body",
    tag: str = "",
    mode: str | None = None,
    fail_fast: int = 0,
    key_id: bytes = b"key1",
) -> NewTask:
    """Return a task to add; unless given, its nonce follows from its id."""
    return NewTask(
        id=id,
        nonce=-id if nonce is None else nonce,
        queue=queue,
        name=name,
        mode=mode or ("pull" if queue == "pull" else "push"),
        eta=eta,
        created=NOW,
        method="POST",
        url="/_ah/queue/deferred?x=1",
        target="worker",
        headers='[["X-One","1"]]',
        namespace="tenant",
        tag=tag,
        retry='{"retry_limit":3}',
        deadline=600 * SECOND,
        fail_fast=fail_fast,
        key_id=key_id,
        body=body,
    )


def spec(
    queue: str = "default",
    limit: int = 100,
    *,
    now: Micros = NOW,
    bytes: int = 1 << 30,
    lease: Micros = LEASE,
    interval: Micros = 0,
    tag: str | None = None,
    fail_fast: bool = False,
) -> ClaimSpec:
    return ClaimSpec(queue, limit, bytes, now + lease, interval, tag, fail_fast)


def outcome(
    claim: Claim,
    action: Action,
    at: Micros = NOW + KEEP,
    *,
    charged: int = 0,
    executed: int = 0,
    status: int = 0,
    reason: str = "",
    history: str = "",
) -> Outcome:
    """Return the fate of *claim*; *at* suits DONE and DEAD."""
    named = claim.name is not None
    return Outcome(claim.id, claim.claims, claim.queue, action, at, named, charged, executed, status, reason, history)


def add(store: Store, *tasks: NewTask, now: Micros = NOW) -> list[AddResult]:
    return store.run(lambda tx: tx.add(now, tasks))


def claim(store: Store, *specs: ClaimSpec, now: Micros = NOW) -> list[Claim]:
    with store.begin() as tx:
        return tx.claim(now, specs or [spec(now=now)])


def settle(store: Store, *outcomes: Outcome, now: Micros = NOW) -> list[bool]:
    with store.begin() as tx:
        return tx.settle(now, outcomes)


def live(store: Store, queue: str = "default", limit: int = 10_000) -> list[TaskRow]:
    with store.read() as tx:
        return tx.tasks(queue, Page(limit=limit))


def dead(store: Store, queue: str = "default", limit: int = 10_000) -> list[TaskRow]:
    with store.read() as tx:
        return tx.tasks(queue, Page(limit=limit, state=TaskState.DEAD))


def find(store: Store, *names: str, queue: str | None = "default") -> list[TaskRow]:
    with store.read() as tx:
        return tx.find(queue, names)


def stats(store: Store, queue: str = "default", *, now: Micros = NOW) -> QueueStats:
    with store.read() as tx:
        return tx.stats(now, [queue])[0]


def ids(rows: Sequence[TaskRow | Claim]) -> list[int]:
    return [row.id for row in rows]


def finish(store: Store, action: Action, *, now: Micros = NOW, at: Micros = NOW + KEEP) -> list[Claim]:
    """Claim everything due in `default` and settle it with *action*."""
    claims = claim(store, now=now)
    assert all(settle(store, *(outcome(each, action, at) for each in claims), now=now))
    return claims
