"""Which keys the tasks in a store need."""

from __future__ import annotations

from typing import NamedTuple

from deferlib.cli.show import count
from deferlib.core.model import TaskState
from deferlib.store import Tx

_SLICE = 10_000  # rows: 3 ms, and 0.3 s for a million


class Use(NamedTuple):
    """How much a key signed that is still there."""

    tasks: int
    dead: int

    def __str__(self) -> str:
        """Return it for people: "2 tasks", "1 task and 3 dead letters", "" for nothing."""
        parts = [count(self.tasks, "task")] if self.tasks else []
        if self.dead:
            parts.append(count(self.dead, "dead letter"))
        return " and ".join(parts)


NO_USE = Use(0, 0)


def used(tx: Tx) -> dict[bytes, Use]:
    """Return how many live tasks and dead letters each key signed, by its id.

    Exact, because it is one snapshot: a task that ends as a dead letter meanwhile, or is brought back, is counted once.
    """
    tasks, dead = _counted(tx, TaskState.LIVE), _counted(tx, TaskState.DEAD)
    return {id: Use(tasks.get(id, 0), dead.get(id, 0)) for id in sorted(tasks.keys() | dead.keys())}


def _counted(tx: Tx, state: TaskState) -> dict[bytes, int]:
    totals: dict[bytes, int] = {}
    after: int | None = -1
    while after is not None:
        found = tx.signed(after, _SLICE, state)
        for id, tasks in found.counts.items():
            totals[id] = totals.get(id, 0) + tasks
        after = found.last
    return totals
