"""A queue, by its name in the configured store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

from deferlib import config, deadline
from deferlib.core.model import AddResult, DeleteResult
from deferlib.errors import (
    BadTaskStateError,
    DuplicateTaskNameError,
    EnqueueUnknownError,
    Error,
    InvalidLeaseTimeError,
    InvalidMaxTasksError,
    InvalidQueueModeError,
    InvalidQueueNameError,
    InvalidTaskError,
    NotAvailableError,
    TaskAlreadyExistsError,
    TaskQueueError,
    TombstonedTaskError,
    TooManyTasksError,
    UnknownQueueError,
)
from deferlib.store import Tx
from deferlib.taskqueue import limits, rules, unserved
from deferlib.taskqueue.options import shown
from deferlib.taskqueue.rpc import UserRPC, check_deadline, check_rpc, create_rpc
from deferlib.taskqueue.statistics import QueueStatistics
from deferlib.taskqueue.task import Task

log = logging.getLogger("deferlib.client")

_SLICE = 500  # tasks deleted in one transaction
_ADD_TRIES = 16  # ids collide once in millions of pairs; sixteen in a row is a broken random source
_NOT_LEASED = "leasing from pull queues isn't available in this version; use a push queue and a handler"


class Queue:
    """A queue of the configured store. Making one touches nothing.

    `InvalidQueueNameError` unless *name* is 1 to 100 letters, digits and hyphens; TypeError if it is no string.
    """

    def __init__(self, name: str = "default") -> None:
        if not isinstance(name, str):
            raise TypeError(f"a queue's name is a string, not {type(name).__name__}")
        longest = limits.MAX_QUEUE_NAME_LENGTH
        if len(name) > longest:  # only then: making a queue touches nothing
            longest = config.runtime().limits.queue_name_length
        if not limits.QUEUE_NAME.match(name) or len(name) > longest:
            raise InvalidQueueNameError(f"queue name {shown(name)}: 1 to {longest} letters, digits and hyphens are allowed")
        self._name = name
        self._app: str | None = None  # App Engine's queues may be another app's

    @property
    def name(self) -> str:
        """The queue's name."""
        return self._name

    # --- adding -----------------------------------------------------------------------------------------------------

    @overload
    def add(self, task: Task, transactional: bool = False) -> Task: ...
    @overload
    def add(self, task: Iterable[Task], transactional: bool = False) -> list[Task]: ...
    def add(self, task: Task | Iterable[Task], transactional: bool = False) -> Task | list[Task]:
        """Add one task or up to 100, in one transaction; return what was given, with `was_enqueued` set.

        Durable when it returns. A name in use raises `TaskAlreadyExistsError`, a used one `TombstonedTaskError`; the
        other tasks of the call are added all the same. Adding the same object again after `EnqueueUnknownError` adds it
        once. Raises `InvalidTaskError` for push and pull tasks in one call, `InvalidQueueModeError` for tasks of the
        other kind than the queue's, `TooManyTasksError`, `DuplicateTaskNameError`, `BadTaskStateError` for a task that
        was added before, `UnknownQueueError`, and a `StoreError` if the store can't take them.
        """
        return deadline.shielded(self._add, task, transactional)

    def _add(self, task: Task | Iterable[Task], transactional: bool) -> Task | list[Task]:
        operation = self._adding(task, transactional)
        return operation.run() if operation else []

    def add_async(self, task: Task | Iterable[Task], transactional: bool = False, rpc: UserRPC | None = None) -> UserRPC:
        """Do what `add` does in the background: `get_result()` returns the tasks, or raises what the store says."""
        return (self._adding(task, transactional) or _NOTHING).start("BulkAdd", rpc)

    def _adding(self, task: Task | Iterable[Task], transactional: bool) -> _Operation | None:
        tasks, alone = _tasks(task)
        self._check(tasks)
        if not tasks:
            return None
        if transactional:
            raise NotAvailableError("transactional=True isn't available in this version; add the task after the commit")
        runtime = config.runtime()
        _ = runtime.store  # first: a mistake in queue.yaml shall not leave a new key behind
        key = runtime.ring.signing
        rows = [task._row(self._name, key) for task in tasks]

        def work() -> list[AddResult]:
            return self._store(runtime, tasks, rows)

        def finish(results: list[AddResult]) -> Task | list[Task]:
            self._report(runtime, tasks, results)
            return tasks[0] if alone else tasks

        return _Operation(tasks, work, finish)

    def _check(self, tasks: Sequence[Task]) -> None:
        if len({task._method == "PULL" for task in tasks}) > 1:
            raise InvalidTaskError("one call adds push tasks or pull tasks, not both")
        most = config.runtime().limits.tasks_per_add
        if len(tasks) > most:
            raise TooManyTasksError(f"{len(tasks)} tasks in one call, at most {most} are allowed")
        names: set[str] = set()
        objects: set[int] = set()
        for task in tasks:
            if task._name is not None:
                _refuse_twin(task._name, names)
            if task._enqueued or id(task) in objects:
                raise BadTaskStateError(f"{task!r} was added before; build a new Task to add it again")
            objects.add(id(task))

    def _store(self, runtime: config.Runtime, tasks: Sequence[Task], rows: list[Any]) -> list[AddResult]:
        def work(tx: Tx) -> list[AddResult]:
            now = runtime.clock.now()
            results = tx.add(now, rows)
            for _ in range(_ADD_TRIES):
                if AddResult.COLLIDED not in results:
                    break
                again = [index for index, result in enumerate(results) if result is AddResult.COLLIDED]
                for index in again:
                    tasks[index]._renew_id(now)
                    rows[index] = tasks[index]._row(self._name, runtime.ring.signing)
                for index, result in zip(again, tx.add(now, [rows[index] for index in again]), strict=True):
                    results[index] = result
            return results

        if time.monotonic() >= runtime.look_at:
            unserved.look(runtime)
        try:
            return runtime.store.run(work)
        except EnqueueUnknownError as error:
            error.tasks = list(tasks)
            raise

    def _report(self, runtime: config.Runtime, tasks: Sequence[Task], results: Sequence[AddResult]) -> None:
        """Mark what was added; raise what went wrong, a name in use last, as App Engine does."""
        problems: list[Error] = []
        collisions: list[Error] = []
        stored = (AddResult.ADDED, AddResult.EXISTS)  # each time they are looked up takes 0.08 µs
        for task, result in zip(tasks, results, strict=True):
            if result in stored:
                task._added(self._name)
                continue
            match result:
                case AddResult.NO_QUEUE:
                    with runtime.store.read() as tx:
                        problems.append(unknown_queue(self._name, (row.name for row in tx.queues())))
                case AddResult.WRONG_MODE:
                    kind = "pull" if task.method == "PULL" else "push"
                    problems.append(InvalidQueueModeError(f"queue {self._name!r} doesn't take {kind} tasks"))
                case AddResult.COLLIDED:
                    problems.append(TaskQueueError("no free id was found: this machine's random source repeats itself"))
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
        if log.isEnabledFor(logging.DEBUG):
            for each in tasks:
                log.debug("task %s added to queue %s", each.name, self._name, extra={"task_id": each._id})

    # --- deleting ---------------------------------------------------------------------------------------------------

    @overload
    def delete_tasks(self, task: Task) -> Task: ...
    @overload
    def delete_tasks(self, task: Iterable[Task]) -> list[Task]: ...
    def delete_tasks(self, task: Task | Iterable[Task]) -> Task | list[Task]:
        """Delete tasks by their names; return what was given, with `was_deleted` set on those that were there.

        A task that is gone already is no error; one that runs goes on running. Names stay taken until their tombstones
        expire. Raises `BadTaskStateError` for a task without a name or deleted before, `DuplicateTaskNameError`,
        `UnknownQueueError`, and a `StoreError` if the store can't do it.
        """
        operation = self._deleting(task)
        return deadline.shielded(operation.run) if operation else []

    def delete_tasks_async(self, task: Task | Iterable[Task], rpc: UserRPC | None = None) -> UserRPC:
        """Do what `delete_tasks` does in the background."""
        return (self._deleting(task) or _NOTHING).start("Delete", rpc)

    @overload
    def delete_tasks_by_name(self, task_name: str) -> Task: ...  # type: ignore[overload-overlap]  # a str is an iterable, too
    @overload
    def delete_tasks_by_name(self, task_name: Iterable[str]) -> list[Task]: ...
    def delete_tasks_by_name(self, task_name: str | Iterable[str]) -> Task | list[Task]:
        """Do what `delete_tasks` does, of the tasks of these names; return new `Task` objects for them."""
        operation = self._deleting(_named(task_name))
        return deadline.shielded(operation.run) if operation else []

    def delete_tasks_by_name_async(self, task_name: str | Iterable[str], rpc: UserRPC | None = None) -> UserRPC:
        """Do what `delete_tasks_by_name` does in the background."""
        return self.delete_tasks_async(_named(task_name), rpc)

    def _deleting(self, task: Task | Iterable[Task]) -> _Operation | None:
        tasks, alone = _tasks(task)
        names: list[str] = []
        seen: set[str] = set()
        for each in tasks:
            if each.name is None:
                raise BadTaskStateError(f"{each!r} has no name to be deleted by")
            if each.was_deleted:
                raise BadTaskStateError(f"{each!r} was deleted before")
            _refuse_twin(each.name, seen)
            names.append(each.name)
        if not tasks:
            return None
        runtime = config.runtime()

        def work() -> list[DeleteResult]:
            results: list[DeleteResult] = []
            for start in range(0, len(names), _SLICE):
                results += runtime.store.run(partial(self._delete, runtime, names[start : start + _SLICE]))
            return results

        def finish(results: list[DeleteResult]) -> Task | list[Task]:
            for each, result in zip(tasks, results, strict=True):
                if result is DeleteResult.DELETED:
                    each._deleted = True
            return tasks[0] if alone else tasks

        return _Operation(names, work, finish)

    def _delete(self, runtime: config.Runtime, names: Sequence[str], tx: Tx) -> list[DeleteResult]:
        self._check_known(tx)
        return tx.delete(runtime.clock.now(), self._name, names)

    def purge(self) -> None:
        """Delete every task that waits in the queue.

        Dead letters stay, and names stay taken until their tombstones expire. Tasks that run finish, and change nothing
        any more. Raises `UnknownQueueError`, and a `StoreError` if the store can't do it.
        """
        runtime = config.runtime()

        def work(tx: Tx) -> int:
            self._check_known(tx)
            return tx.purge(runtime.clock.now(), self._name, _SLICE)

        while deadline.shielded(runtime.store.run, work):
            pass

    def _check_known(self, tx: Tx) -> None:
        """Raise `UnknownQueueError` if the store has no such queue."""
        names = [row.name for row in tx.queues()]
        if self._name not in names:
            raise unknown_queue(self._name, names)

    # --- leasing: not there yet -------------------------------------------------------------------------------------

    def lease_tasks(self, lease_seconds: float, max_tasks: int, deadline: float = 10) -> list[Task]:
        """Lease tasks of a pull queue. Not available in this version: `NotAvailableError`, once the arguments are right.

        Raises TypeError, `InvalidLeaseTimeError`, `InvalidMaxTasksError`, `InvalidDeadlineError`.
        """
        raise _not_leased(lease_seconds, max_tasks, deadline)

    def lease_tasks_async(self, lease_seconds: float, max_tasks: int, rpc: UserRPC | None = None) -> UserRPC:
        """Do what `lease_tasks` does in the background."""
        raise _not_leased(lease_seconds, max_tasks, rpc=rpc)

    def lease_tasks_by_tag(
        self, lease_seconds: float, max_tasks: int, tag: str | None = None, deadline: float = 10
    ) -> list[Task]:
        """Lease tasks of one tag. Not available in this version: `NotAvailableError`, once the arguments are right.

        Raises TypeError, `InvalidLeaseTimeError`, `InvalidMaxTasksError`, `InvalidTagError`, `InvalidDeadlineError`.
        """
        raise _not_leased(lease_seconds, max_tasks, deadline, tag=tag)

    def lease_tasks_by_tag_async(
        self, lease_seconds: float, max_tasks: int, tag: str | None = None, rpc: UserRPC | None = None
    ) -> UserRPC:
        """Do what `lease_tasks_by_tag` does in the background."""
        raise _not_leased(lease_seconds, max_tasks, rpc=rpc, tag=tag)

    def modify_task_lease(self, task: Task, lease_seconds: float) -> None:
        """Change how long a task is leased. Not available in this version: `NotAvailableError`.

        Raises TypeError and `InvalidLeaseTimeError`.
        """
        _check_lease(lease_seconds)
        if not isinstance(task, Task):
            raise TypeError(f"a Task is needed, not {type(task).__name__}")
        raise NotAvailableError(_NOT_LEASED)

    # --- statistics -------------------------------------------------------------------------------------------------

    def fetch_statistics(self, deadline: float = 10) -> QueueStatistics:
        """Return the queue's numbers. Raises what `QueueStatistics.fetch` raises."""
        statistics: QueueStatistics = QueueStatistics.fetch(self, deadline)
        return statistics

    def fetch_statistics_async(self, rpc: UserRPC | None = None) -> UserRPC:
        """Do what `fetch_statistics` does in the background."""
        return QueueStatistics.fetch_async(self, rpc)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Queue):
            return NotImplemented
        return self._name == other._name and self._app == other._app

    __hash__ = None  # type: ignore[assignment]  # unhashable, as App Engine's

    def __repr__(self) -> str:
        return f"Queue<name={self._name!r}>"


class _Operation(NamedTuple):
    """A request to the store: *work* runs in any thread, *finish* turns its answer into the result in the caller's."""

    request: object
    work: Callable[[], Any]
    finish: Callable[[Any], Any]

    def run(self) -> Any:
        return self.finish(self.work())

    def start(self, method: str, rpc: UserRPC | None) -> UserRPC:
        def result(done: UserRPC) -> Any:
            done.check_success()
            return self.finish(done.response)

        check_rpc(rpc)
        call = rpc or create_rpc()
        call.make_call(method, self.request, self.work, result)
        return call


_NOTHING = _Operation([], list, list)


def _tasks(given: Task | Iterable[Task]) -> tuple[list[Task], bool]:
    """Return the tasks that *given* means, and whether it is one alone."""
    if isinstance(given, Task):
        return [given], True
    if given and not isinstance(given, Iterable):
        raise TypeError(f"a queue takes a Task or several, not {type(given).__name__}")
    tasks = list(given or ())
    for task in tasks:
        if not isinstance(task, Task):
            raise InvalidTaskError(f"a queue takes Task objects, not {type(task).__name__}")
    return tasks, False


def _named(names: str | Iterable[str]) -> Task | list[Task]:
    return Task(name=names) if isinstance(names, str) else [Task(name=name) for name in names]


def _refuse_twin(name: str, seen: set[str]) -> None:
    if name in seen:
        raise DuplicateTaskNameError(f"two tasks of this call are named {name!r}")
    seen.add(name)


def _not_leased(
    lease_seconds: object, max_tasks: object, deadline: object = 1, *, rpc: object = None, tag: object = None
) -> NotAvailableError:
    """Return the error of leasing, once the arguments are right."""
    check_deadline(deadline)
    _check_lease(lease_seconds)
    if not isinstance(max_tasks, int):
        raise TypeError(f"max_tasks is a whole number, not {type(max_tasks).__name__}")
    most = config.runtime().limits.tasks_per_lease
    if not 0 < max_tasks <= most:
        raise InvalidMaxTasksError(f"max_tasks is {shown(max_tasks)}; 1 to {most} are allowed")
    rules.tag_of(tag, config.runtime().limits)
    check_rpc(rpc)
    return NotAvailableError(_NOT_LEASED)


def _check_lease(seconds: object) -> None:
    if not isinstance(seconds, int | float):
        raise TypeError(f"lease_seconds is a number of seconds, not {type(seconds).__name__}")
    most = config.runtime().limits.lease_seconds
    if not 0 <= seconds <= most:
        raise InvalidLeaseTimeError(f"lease_seconds is {shown(seconds)}; 0 to {most} are allowed")


def unknown_queue(name: str, known: Iterable[str]) -> UnknownQueueError:
    """Return the error of a queue that the store doesn't have."""
    return UnknownQueueError(
        f"there is no queue {name!r}; known are: {', '.join(known)}. Add it to queue.yaml (`- name: {name}`) or to "
        "configure(queues=…)"
    )


def add(
    payload: bytes | str | None = None, *, queue_name: str = "default", transactional: bool = False, **options: Any
) -> Task:
    """Build a `Task` of the arguments and add it to a queue; return it.

    *options* are those of `Task`; raises what `Task` and `Queue.add` raise.
    """
    task = Task(payload, **options)
    Queue(queue_name).add(task, transactional)
    return task
