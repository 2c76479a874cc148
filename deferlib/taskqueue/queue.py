"""A queue, by its name in the configured store."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from deferlib import config
from deferlib.core.model import AddResult
from deferlib.errors import (
    BadTaskStateError,
    DuplicateTaskNameError,
    EnqueueUnknownError,
    Error,
    InvalidQueueModeError,
    InvalidQueueNameError,
    InvalidTaskError,
    NotAvailableError,
    TaskAlreadyExistsError,
    TombstonedTaskError,
    TooManyTasksError,
    UnknownQueueError,
)
from deferlib.store import Tx
from deferlib.taskqueue import limits, unserved
from deferlib.taskqueue.task import Task

log = logging.getLogger("deferlib.client")

_PURGE_SLICE = 500
_ADD_TRIES = 16  # ids collide once in millions of pairs; sixteen in a row is a broken random source


class Queue:
    """A queue of the configured store. Making one touches nothing."""

    def __init__(self, name: str = "default") -> None:
        if not isinstance(name, str) or not limits.QUEUE_NAME.match(name):
            raise InvalidQueueNameError(f"queue name {name!r}: 1 to 100 letters, digits and hyphens are allowed")
        self._name = name

    @property
    def name(self) -> str:
        """The queue's name."""
        return self._name

    def add(self, task: Task | Iterable[Task], transactional: bool = False) -> Task | list[Task]:
        """Add one task or up to 100, in one transaction; return what was given, with `was_enqueued` set.

        Durable when it returns. A name in use raises `TaskAlreadyExistsError`, a used one `TombstonedTaskError`; the
        other tasks of the call are added all the same. Adding the same object again after `EnqueueUnknownError` adds it
        once.
        """
        if transactional:
            raise NotAvailableError("transactional=True isn't available in this version; add the task after the commit")
        tasks = [task] if isinstance(task, Task) else list(task or ())
        if not tasks:
            return []
        self._check(tasks)
        self._report(tasks, self._store(tasks))
        if log.isEnabledFor(logging.DEBUG):
            for each in tasks:
                log.debug("task %s added to queue %s", each.name or each._id, self._name, extra={"task_id": each._id})
        return task if isinstance(task, Task) else tasks

    def purge(self) -> None:
        """Delete every task that waits in the queue.

        Dead letters stay, and names stay taken until their tombstones expire. Tasks that run finish, and change nothing
        any more.
        """
        runtime = config.runtime()
        while runtime.store.run(lambda tx: tx.purge(runtime.clock.now(), self._name, _PURGE_SLICE)):
            pass

    def _check(self, tasks: Sequence[Task]) -> None:
        if len(tasks) > limits.MAX_TASKS_PER_ADD:
            raise TooManyTasksError(f"{len(tasks)} tasks in one call, at most {limits.MAX_TASKS_PER_ADD} are allowed")
        names = set()
        objects = set()
        for task in tasks:
            if not isinstance(task, Task):
                raise InvalidTaskError(f"a queue takes Task objects, not {type(task).__name__}")
            if task.was_enqueued or id(task) in objects:
                raise BadTaskStateError(f"{task!r} was added before; build a new Task to add it again")
            objects.add(id(task))
            if task.name is not None:
                if task.name in names:
                    raise DuplicateTaskNameError(f"two tasks of this call are named {task.name!r}")
                names.add(task.name)
        if len({task.method == "PULL" for task in tasks}) > 1:
            raise InvalidTaskError("one call adds push tasks or pull tasks, not both")

    def _store(self, tasks: Sequence[Task]) -> list[AddResult]:
        runtime = config.runtime()
        store, ring = runtime.store, runtime.ring
        rows = [task._row(self._name, ring) for task in tasks]

        def work(tx: Tx) -> list[AddResult]:
            now = runtime.clock.now()
            results = tx.add(now, rows)
            for _ in range(_ADD_TRIES):
                again = [index for index, result in enumerate(results) if result is AddResult.COLLIDED]
                if not again:
                    break
                for index in again:
                    tasks[index]._renew_id(now)
                    rows[index] = tasks[index]._row(self._name, ring)
                for index, result in zip(again, tx.add(now, [rows[index] for index in again]), strict=True):
                    results[index] = result
            return results

        if time.monotonic() >= runtime.look_at:
            unserved.look(runtime)
        try:
            return store.run(work)
        except EnqueueUnknownError as error:
            error.tasks = list(tasks)
            raise

    def _report(self, tasks: Sequence[Task], results: Sequence[AddResult]) -> None:
        """Mark what was added; raise what went wrong, a name in use last, as App Engine does."""
        problems: list[Error] = []
        collisions: list[Error] = []
        for task, result in zip(tasks, results, strict=True):
            match result:
                case AddResult.ADDED | AddResult.EXISTS:
                    task._added(self._name)
                case AddResult.NO_QUEUE:
                    problems.append(self._unknown())
                case AddResult.WRONG_MODE:
                    kind = "pull" if task.method == "PULL" else "push"
                    problems.append(InvalidQueueModeError(f"queue {self._name!r} doesn't take {kind} tasks"))
                case AddResult.COLLIDED:
                    problems.append(Error("no free id was found; the random source of this machine repeats itself"))
                case AddResult.TAKEN:
                    collisions.append(
                        TaskAlreadyExistsError(f"queue {self._name!r} has a task named {task.name!r} already")
                    )
                case AddResult.TOMBSTONED:
                    collisions.append(
                        TombstonedTaskError(
                            f"queue {self._name!r} had a task named {task.name!r}; the name is free again when its "
                            "tombstone expires"
                        )
                    )
        for problem in (*problems, *collisions):
            raise problem

    def _unknown(self) -> UnknownQueueError:
        with config.runtime().store.read() as tx:
            known = ", ".join(row.name for row in tx.queues())
        return UnknownQueueError(
            f"there is no queue {self._name!r}; known are: {known}. Add it to queue.yaml (`- name: {self._name}`) or to "
            "configure(queues=…)"
        )

    def __eq__(self, other: object) -> bool:
        return self._name == other._name if isinstance(other, Queue) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # unhashable, as App Engine's

    def __repr__(self) -> str:
        return f"Queue<name={self._name!r}>"


def add(
    payload: bytes | str | None = None, *, queue_name: str = "default", transactional: bool = False, **options: object
) -> Task:
    """Build a `Task` of the arguments and add it to a queue; return it.

    *options* are those of `Task`; raises what `Task` and `Queue.add` raise.
    """
    task = Task(payload, **options)  # type: ignore[arg-type]  # Task checks its own arguments
    Queue(queue_name).add(task, transactional)
    return task
