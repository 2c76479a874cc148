"""Queues: what is added, deleted and counted, and what each refusal says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import config, testing
from deferlib.core.model import Micros
from deferlib.store.sqlite import SqliteStore
from deferlib.taskqueue import (
    BadTaskStateError,
    DuplicateTaskNameError,
    InvalidDeadlineError,
    InvalidLeaseTimeError,
    InvalidMaxTasksError,
    InvalidQueueNameError,
    InvalidTagError,
    InvalidTaskError,
    Queue,
    QueueStatistics,
    Task,
    TooManyTasksError,
    UnknownQueueError,
    add,
    create_rpc,
)

NAMESPACE = len("X-AppEngine-Current-Namespace: \r\n")
NOW: Micros = 1_763_700_000_000_000


class Clock:
    def now(self) -> Micros:
        return NOW


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    former = config.install(None)
    deferlib.configure(
        store="sqlite:///:memory:", clock=Clock(), queues=[{"name": "mail"}, {"name": "shelf", "mode": "pull"}]
    )
    yield
    config.install(former)


def waiting(queue: str) -> int:
    with config.runtime().store.read() as tx:
        return tx.stats(NOW, [queue])[0].tasks


@pytest.mark.parametrize("name", ["", "a_b", "a b", "a\n", "é", "x" * 101])
def test_name_that_no_queue_has_is_refused(name: str) -> None:
    with pytest.raises(InvalidQueueNameError, match="1 to 100"):
        Queue(name)


@pytest.mark.parametrize("name", [None, 5, b"mail"])
def test_name_that_is_no_string_is_a_type_error(name: Any) -> None:
    with pytest.raises(TypeError, match="string"):
        Queue(name)


def test_length_of_a_queues_name_can_be_set() -> None:
    deferlib.configure(store="sqlite:///:memory:", limits="queue_name_length=101", queues=[{"name": "x" * 101}])

    assert Queue("x" * 101).add(Task())
    with pytest.raises(InvalidQueueNameError, match="1 to 101"):
        Queue("x" * 102)


def test_queues_are_equal_by_name_and_not_hashable() -> None:
    assert Queue("mail") == Queue("mail") != Queue()
    assert repr(Queue("mail")) == "Queue<name='mail'>"
    with pytest.raises(TypeError):
        hash(Queue())


def test_added_task_knows_its_queue_and_name() -> None:
    task = Task(url="/x")

    assert Queue("mail").add(task) is task

    assert (task.was_enqueued, task.queue_name, task.name) == (True, "mail", str(task._id))


def test_many_are_added_in_one_call_from_any_iterable() -> None:
    tasks = [Task(url="/x") for _ in range(100)]

    assert Queue().add(iter(tasks)) == tasks
    assert all(task.was_enqueued for task in tasks)
    assert Queue().add([]) == []
    assert Queue().add(None) == []  # type: ignore[arg-type]  # as on App Engine


def test_more_than_a_hundred_are_too_many() -> None:
    with pytest.raises(TooManyTasksError, match="101 tasks"):
        Queue().add([Task() for _ in range(101)])


def test_same_task_is_added_once() -> None:
    task = Task(url="/x")
    with pytest.raises(BadTaskStateError):
        Queue().add([task, task])

    task.add("mail")
    with pytest.raises(BadTaskStateError, match="added before"):
        Queue().add(task)


def test_call_with_one_name_twice_adds_nothing() -> None:
    tasks = [Task(name="a"), Task(name="a"), Task(name="b")]

    with pytest.raises(DuplicateTaskNameError, match="'a'"):
        Queue().add(tasks)

    assert not any(task.was_enqueued for task in tasks)


def test_call_mixes_no_push_and_pull_tasks() -> None:
    with pytest.raises(InvalidTaskError, match="not both"):
        Queue().add([Task(), Task(b"", method="PULL")])


def test_first_mistake_of_a_call_in_app_engines_order_is_told() -> None:
    done, pull = Task(name="a"), Task(b"", method="PULL", name="a")
    Queue().add(done)

    with pytest.raises(InvalidTaskError, match="not both"):
        Queue().add([done, pull] * 60)
    with pytest.raises(TooManyTasksError):
        Queue().add([done] * 101)
    with pytest.raises(BadTaskStateError):
        Queue().add([Task(), done, Task(name="a")])
    with pytest.raises(DuplicateTaskNameError):
        Queue().add([Task(name="a"), done])
    with pytest.raises(InvalidLeaseTimeError):
        Queue("shelf").lease_tasks_by_tag(-1, 0, "x" * 501)
    with pytest.raises(InvalidTagError):
        Queue("shelf").lease_tasks_by_tag_async(1, 1, "x" * 501, rpc=5)  # type: ignore[arg-type]  # what is tested


def test_only_tasks_are_added() -> None:
    with pytest.raises(InvalidTaskError, match="not str"):
        Queue().add(["a"])  # type: ignore[list-item]  # what is tested


def test_wrong_kind_of_queue_says_so() -> None:
    with pytest.raises(deferlib.taskqueue.InvalidQueueModeError, match="'shelf' doesn't take push tasks"):
        Queue("shelf").add(Task())
    with pytest.raises(deferlib.taskqueue.InvalidQueueModeError, match="'default' doesn't take pull tasks"):
        Queue().add(Task(b"", method="PULL"))


def test_unknown_queue_is_named_with_the_known_ones_and_the_remedy() -> None:
    with pytest.raises(UnknownQueueError, match=r"no queue 'nowhere'; known are: .*mail.*queue\.yaml.*- name: nowhere"):
        Queue("nowhere").add(Task())


def test_taken_name_fails_alone() -> None:
    first, other = Task(name="a"), Task(name="b")
    Queue().add(Task(name="a"))

    with pytest.raises(deferlib.taskqueue.TaskAlreadyExistsError, match="'a'"):
        Queue().add([first, other])

    assert (first.was_enqueued, other.was_enqueued) == (False, True)


def test_transactional_add_says_that_it_is_not_there_yet() -> None:
    with pytest.raises(deferlib.NotAvailableError):
        Queue().add(Task(), transactional=True)


def test_add_builds_and_adds() -> None:
    task = add("text", url="/x", queue_name="mail", countdown=5)

    assert (task.queue_name, task.payload) == ("mail", b"text")


# --- deleting ---------------------------------------------------------------------------------------------------------


def test_deleted_task_says_so_and_is_gone() -> None:
    named, unnamed = Task(name="a"), Task()
    Queue("mail").add([named, unnamed])

    assert Queue("mail").delete_tasks(named) is named
    assert Queue("mail").delete_tasks([unnamed]) == [unnamed]

    assert (named.was_deleted, unnamed.was_deleted) == (True, True)
    assert waiting("mail") == 0
    with pytest.raises(deferlib.taskqueue.TombstonedTaskError, match="'a'"):
        Queue("mail").add(Task(name="a"))


def test_task_that_is_gone_already_is_no_error() -> None:
    Queue("mail").add([Task(name="a"), Task(name="b")])
    Queue("mail").delete_tasks_by_name("a")

    again = Queue("mail").delete_tasks_by_name(["a", "b", "never"])

    assert [task.was_deleted for task in again] == [False, True, False]  # type: ignore[union-attr]  # it is a list
    assert Queue("mail").delete_tasks([]) == []
    assert Queue("mail").delete_tasks_by_name([]) == []


def test_one_name_gives_one_task() -> None:
    Queue("mail").add(Task(name="a"))

    found = Queue("mail").delete_tasks_by_name("a")

    assert isinstance(found, Task)
    assert (found.name, found.was_deleted) == ("a", True)


def test_tasks_of_any_number_are_deleted() -> None:
    deferlib.configure(store="sqlite:///:memory:", clock=Clock(), limits="deferlib", queues=[{"name": "mail"}])
    tasks = [Task() for _ in range(1_234)]
    Queue("mail").add(tasks)

    Queue("mail").delete_tasks(tasks)

    assert waiting("mail") == 0
    assert all(task.was_deleted for task in tasks)


def test_what_cannot_be_deleted_is_refused() -> None:
    gone = Task(name="a")
    Queue("mail").add(gone)
    Queue("mail").delete_tasks(gone)

    with pytest.raises(BadTaskStateError, match="no name"):
        Queue("mail").delete_tasks(Task())
    with pytest.raises(BadTaskStateError, match="deleted before"):
        Queue("mail").delete_tasks(gone)
    with pytest.raises(DuplicateTaskNameError):
        Queue("mail").delete_tasks_by_name(["b", "b"])
    with pytest.raises(deferlib.taskqueue.InvalidTaskNameError):
        Queue("mail").delete_tasks_by_name("a b")
    with pytest.raises(InvalidTaskError, match="not str"):
        Queue("mail").delete_tasks(["a"])  # type: ignore[list-item]  # what is tested
    with pytest.raises(TypeError):
        Queue("mail").delete_tasks(5)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    "work", [lambda q: q.purge(), lambda q: q.delete_tasks_by_name("a"), lambda q: q.fetch_statistics()]
)
def test_every_request_names_an_unknown_queue(work: Any) -> None:
    with pytest.raises(UnknownQueueError, match=r"'nowhere'; known are: .*mail"):
        work(Queue("nowhere"))


def test_purge_empties_the_queue() -> None:
    Queue("mail").add([Task() for _ in range(10)])

    Queue("mail").purge()

    assert waiting("mail") == 0


# --- leasing, which isn't there yet -----------------------------------------------------------------------------------

LEASES: list[Any] = [
    lambda seconds, count: Queue("shelf").lease_tasks(seconds, count),
    lambda seconds, count: Queue("shelf").lease_tasks_async(seconds, count),
    lambda seconds, count: Queue("shelf").lease_tasks_by_tag(seconds, count, "t"),
    lambda seconds, count: Queue("shelf").lease_tasks_by_tag_async(seconds, count),
]


@pytest.mark.parametrize("lease", LEASES)
@pytest.mark.parametrize(
    ("seconds", "count", "error"),
    [
        (-1, 1, InvalidLeaseTimeError), (604_801, 1, InvalidLeaseTimeError), (math.nan, 1, InvalidLeaseTimeError),
        (10**400, 1, InvalidLeaseTimeError), ("60", 1, TypeError), (None, 1, TypeError),
        (60, 0, InvalidMaxTasksError), (60, 1_001, InvalidMaxTasksError), (60, 1.0, TypeError), (60, "1", TypeError),
        (60, 1, deferlib.NotAvailableError), (0, 1_000, deferlib.NotAvailableError),
        (604_800, 1, deferlib.NotAvailableError), (0.5, 1, deferlib.NotAvailableError),
    ],
)  # fmt: skip
def test_lease_is_checked_and_then_not_available(lease: Any, seconds: Any, count: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        lease(seconds, count)


@pytest.mark.parametrize(
    ("deadline", "error"),
    [(0, InvalidDeadlineError), (-1, InvalidDeadlineError), (math.nan, InvalidDeadlineError), (None, TypeError)],
)
def test_deadline_is_a_time_to_wait(deadline: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Queue("shelf").lease_tasks(60, 1, deadline=deadline)
    with pytest.raises(error):
        Queue("shelf").lease_tasks_by_tag(60, 1, deadline=deadline)
    with pytest.raises(error):
        Queue("shelf").fetch_statistics(deadline=deadline)
    if deadline is not None:
        with pytest.raises(error):
            create_rpc(deadline=deadline)


def test_tag_of_a_lease_is_checked() -> None:
    with pytest.raises(InvalidTagError):
        Queue("shelf").lease_tasks_by_tag(60, 1, "x" * 501)
    with pytest.raises(InvalidTagError):
        Queue("shelf").lease_tasks_by_tag_async(60, 1, "x" * 501)


def test_lease_cannot_be_modified_yet() -> None:
    with pytest.raises(InvalidLeaseTimeError):
        Queue("shelf").modify_task_lease(Task(b"", method="PULL"), -1)
    with pytest.raises(TypeError):
        Queue("shelf").modify_task_lease("a", 1)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(deferlib.NotAvailableError):
        Queue("shelf").modify_task_lease(Task(b"", method="PULL"), 1)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_count_what_waits() -> None:
    Queue("mail").add([Task(countdown=5), Task(countdown=3)])

    statistics = Queue("mail").fetch_statistics()

    assert statistics == QueueStatistics(Queue("mail"), 2, NOW + 3_000_000, 0, 0, None)
    assert statistics != QueueStatistics(Queue("mail"), 2, NOW + 3_000_000, 0, 1, None)
    assert "tasks=2, oldest_eta_usec=1763700003000000" in repr(statistics)
    with pytest.raises(TypeError):
        hash(statistics)


def test_statistics_of_several_queues_come_in_their_order() -> None:
    Queue("mail").add(Task())

    found = QueueStatistics.fetch(["shelf", "mail"])

    assert [(each.queue, each.tasks, each.oldest_eta_usec) for each in found] == [
        (Queue("shelf"), 0, None),
        (Queue("mail"), 1, NOW),
    ]
    assert QueueStatistics.fetch([Queue("mail")]) == [found[1]]
    assert QueueStatistics.fetch("mail") == QueueStatistics.fetch(Queue("mail")) == found[1]
    assert QueueStatistics.fetch([]) == QueueStatistics.fetch_async([]).get_result() == []


def test_statistics_of_a_paused_queue_are_enforced_to_nothing() -> None:
    config.runtime().store.run(lambda tx: tx.pause(["mail"], True))

    assert Queue("mail").fetch_statistics().enforced_rate == 0


def test_statistics_are_kept_for_a_second_unless_this_process_changes_something(tmp_path: Path) -> None:
    path = tmp_path / "tasks.db"
    clock = testing.VirtualClock()
    deferlib.configure(store=f"sqlite:///{path}", clock=clock, queues=[{"name": "mail"}])
    queue = Queue("mail")

    def tasks() -> int:
        return queue.fetch_statistics().tasks

    assert tasks() == 0
    other = SqliteStore(str(path))  # as another process has it
    other.run(lambda tx: tx.add(clock.now(), [Task()._row("mail", config.runtime().ring)]))
    clock.advance(0.9)
    assert (tasks(), QueueStatistics.fetch(["mail", "default"])[0].tasks) == (0, 1)
    clock.advance(0.2)
    assert tasks() == 1
    queue.add(Task())
    assert tasks() == 2, "its own changes are seen at once"
    queue.purge()
    assert tasks() == 0
    other.close()
    config.runtime().close()


@pytest.mark.parametrize("wrong", [5, ["mail", Queue("mail")], [5]])
def test_statistics_of_no_queue_are_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError):
        QueueStatistics.fetch(wrong)
