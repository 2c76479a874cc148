"""Names: unique in their queue, and taken for a while after the task, however it ended; and adds of many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

import deferlib
from deferlib import testing
from deferlib.taskqueue import (
    InvalidQueueModeError,
    Queue,
    Task,
    TaskAlreadyExistsError,
    TaskRetryOptions,
    TombstonedTaskError,
    UnknownQueueError,
)

CALLS: list[object] = []
QUEUES = [
    {"name": "mail"},
    {"name": "brief", "deferlib": {"tombstone": "1h"}},
    {"name": "shelf", "mode": "pull"},
]
ONCE = TaskRetryOptions(task_retry_limit=0)


def note(value: object = None) -> None:
    CALLS.append(value)


def fail(error: type[Exception] = ValueError) -> None:
    raise error("no")


@pytest.fixture
def engine() -> Iterator[testing.Harness]:
    CALLS.clear()
    with testing.engine(queues=QUEUES) as engine:
        yield engine


def succeed(engine: testing.Harness, queue: str) -> None:
    deferlib.defer(note, _name="a", _queue=queue)
    engine.run_until_idle()


def delete(engine: testing.Harness, queue: str) -> None:
    deferlib.defer(note, _name="a", _queue=queue)
    Queue(queue).delete_tasks_by_name("a")


def purge(engine: testing.Harness, queue: str) -> None:
    deferlib.defer(note, _name="a", _queue=queue)
    Queue(queue).purge()


def fail_for_good(engine: testing.Harness, queue: str) -> None:
    deferlib.defer(fail, deferlib.PermanentTaskFailure, _name="a", _queue=queue)
    engine.run_until_idle()


def fail_too_often(engine: testing.Harness, queue: str) -> None:
    deferlib.defer(fail, _name="a", _queue=queue, _retry_options=ONCE)
    engine.run_until_idle()


@pytest.mark.parametrize("end", [succeed, delete, purge, fail_for_good, fail_too_often], ids=lambda end: end.__name__)
@pytest.mark.parametrize(("queue", "life"), [("mail", timedelta(days=9)), ("brief", timedelta(hours=1))])
def test_name_is_taken_until_its_tombstone_expires(
    engine: testing.Harness, end: Callable[[testing.Harness, str], None], queue: str, life: timedelta
) -> None:
    end(engine, queue)

    for wait in (timedelta(0), life - timedelta(seconds=2)):
        engine.advance(wait)
        with pytest.raises(TombstonedTaskError, match=r"'a'.*expires"):
            deferlib.defer(note, "again", _name="a", _queue=queue)
    engine.advance(timedelta(seconds=3))
    deferlib.defer(note, "again", _name="a", _queue=queue)
    engine.run_until_idle()

    assert CALLS[-1] == "again"


def test_name_belongs_to_its_queue(engine: testing.Harness) -> None:
    deferlib.defer(note, 1, _name="a")
    deferlib.defer(note, 2, _name="a", _queue="mail")
    with pytest.raises(TaskAlreadyExistsError, match=r"'mail'.*'a'"):
        deferlib.defer(note, 3, _name="a", _queue="mail")

    engine.run_until_idle()

    assert sorted(CALLS) == [1, 2]  # type: ignore[type-var]  # numbers


def test_collisions_touch_only_their_own_tasks(engine: testing.Harness) -> None:
    deferlib.defer(note, _name="done")
    engine.run_until_idle()
    deferlib.defer(note, _name="waits", _countdown=60)
    tasks = [Task(url="/x", name=name) for name in ("new", "done", "waits", "other")]

    with pytest.raises(TombstonedTaskError, match="'done'"):  # the first of them is told
        Queue().add(tasks)

    assert [task.was_enqueued for task in tasks] == [True, False, False, True]
    assert {task.name for task in engine.tasks()} == {"new", "waits", "other"}


def test_other_mistake_is_told_before_a_collision_and_adds_nothing(engine: testing.Harness) -> None:
    with pytest.raises(UnknownQueueError):
        Queue("nowhere").add([Task(name="a"), Task(name="b")])
    with pytest.raises(InvalidQueueModeError):
        Queue("shelf").add([Task(name="a"), Task(name="b")])
    tasks = [Task(name="a"), Task(name="b")]

    assert not any(task.was_enqueued for task in tasks)
    assert engine.tasks("shelf") == []
    assert Queue().add(tasks) == tasks  # they can be added elsewhere
