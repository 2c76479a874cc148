"""Requests in the background: when they begin, what they wait for, and what they say."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

import deferlib
from deferlib import config
from deferlib.errors import RPCDeadlineExceededError
from deferlib.store.sqlite import SqliteStore
from deferlib.taskqueue import (
    DuplicateTaskNameError,
    InvalidDeadlineError,
    InvalidTaskError,
    Queue,
    QueueStatistics,
    Task,
    TaskAlreadyExistsError,
    TransientError,
    UnknownQueueError,
    UserRPC,
    create_rpc,
)

NAMES = [f"q{number}" for number in range(10)]


@pytest.fixture(autouse=True)
def path(tmp_path: Path) -> Iterator[Path]:
    former = config.install(None)
    path = tmp_path / "tasks.db"
    deferlib.configure(store=f"sqlite:///{path}", queues=[{"name": name} for name in NAMES])
    assert config.runtime().store.served() is False  # opened
    yield path
    config.runtime().close()
    config.install(former)


@contextmanager
def busy(path: Path) -> Iterator[None]:
    """Hold the store's write lock, as another process would."""
    with ThreadPoolExecutor(1) as other:  # a connection belongs to its thread
        connection = other.submit(apsw.Connection, str(path)).result()
        other.submit(connection.execute, "begin immediate").result()
        try:
            yield
        finally:
            other.submit(connection.execute, "rollback").result()
            other.submit(connection.close).result()


@contextmanager
def nothing_begins() -> Iterator[None]:
    """Keep every thread that makes requests at work."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    blockers = [create_rpc() for _ in range(8)]
    for blocker in blockers:
        blocker.make_call("Block", None, lambda: (begun.release(), gate.wait()))
    for _ in blockers:
        begun.acquire()
    try:
        yield
    finally:
        gate.set()
        UserRPC.wait_all(blockers)


def tasks_in(name: str) -> int:
    return Queue(name).fetch_statistics().tasks


# --- what the …_async functions do ------------------------------------------------------------------------------------


def test_ten_adds_to_ten_queues_return_while_the_store_is_busy_and_complete_when_it_is_free(path: Path) -> None:
    tasks = [Task(url="/x") for _ in NAMES]

    with busy(path):
        calls = [Queue(name).add_async(task) for name, task in zip(NAMES, tasks, strict=True)]
        assert [call.state for call in calls] == [1] * 10
        assert not any(task.was_enqueued for task in tasks)

    assert [call.get_result() for call in calls] == tasks
    assert [call.state for call in calls] == [2] * 10
    assert [(task.was_enqueued, task.queue_name) for task in tasks] == [(True, name) for name in NAMES]
    assert [tasks_in(name) for name in NAMES] == [1] * 10


def test_task_changes_only_when_its_result_is_asked_for() -> None:
    task = Task(name="a")

    call = Queue("q1").add_async(task)
    call.wait()

    assert tasks_in("q1") == 1
    assert (task.was_enqueued, task.queue_name) == (False, None)
    assert call.get_result() is task
    assert (task.was_enqueued, task.queue_name) == (True, "q1")


def test_arguments_are_refused_at_once_and_the_store_is_heard_later() -> None:
    Queue("q1").add(Task(name="a"))

    with pytest.raises(InvalidTaskError):
        Queue("q1").add_async("a")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(DuplicateTaskNameError):
        Queue("q1").add_async([Task(name="b"), Task(name="b")])
    for call, error in (
        (Queue("q1").add_async(Task(name="a")), TaskAlreadyExistsError),
        (Queue("nowhere").add_async(Task()), UnknownQueueError),
        (Queue("nowhere").delete_tasks_by_name_async("a"), UnknownQueueError),
        (Queue("nowhere").fetch_statistics_async(), UnknownQueueError),
    ):
        for _ in range(2):  # it may be asked again, and says the same
            with pytest.raises(error):
                call.get_result()


def test_every_request_has_its_twin() -> None:
    task = Task(name="a")

    assert task.add_async("q1").get_result() is task
    assert Queue("q1").add_async([]).get_result() == []
    assert Queue("q1").fetch_statistics_async().get_result().tasks == 1
    both = QueueStatistics.fetch_async(["q1", "q2"])
    assert [each.tasks for each in both.get_result()] == [1, 0]
    assert [each.tasks for each in both.get_result()] == [1, 0]
    deleting = Queue("q1").delete_tasks_async(task)
    deleting.wait()
    assert not task.was_deleted
    assert deleting.get_result() is task
    assert task.was_deleted
    assert deleting.get_result() is task
    assert Queue("q1").delete_tasks_by_name_async(["a"]).get_result()[0].was_deleted is False
    assert Queue("q1").delete_tasks_async([]).get_result() == []


def test_request_keeps_to_the_store_it_was_made_for(path: Path) -> None:
    with nothing_begins():
        call = Queue("q1").add_async(Task())
        deferlib.configure(store="sqlite:///:memory:", queues=[{"name": "q1"}])

    call.get_result()

    assert tasks_in("q1") == 0
    store = SqliteStore(str(path))
    with store.read() as tx:
        assert tx.stats(0, ["q1"])[0].tasks == 1
    store.close()


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_request_that_outlasts_its_deadline_fails_and_stays_failed(path: Path) -> None:
    task = Task(url="/x")
    with busy(path):
        call = Queue("q1").add_async(task, rpc=create_rpc(deadline=0.05))
        with pytest.raises(RPCDeadlineExceededError, match=r"BulkAdd took longer than its deadline of 0\.05 s"):
            call.get_result()
        assert call.state == 2

    call.future.result()
    with pytest.raises(TransientError):
        call.get_result()
    assert not task.was_enqueued
    Queue("q1").add(task)  # the same object: added once, whatever became of the first call
    assert tasks_in("q1") == 1


def test_request_that_was_never_begun_is_not_done_later() -> None:
    with nothing_begins():
        call = Queue("q1").add_async(Task(), rpc=create_rpc(deadline=0.02))
        with pytest.raises(RPCDeadlineExceededError, match="never begun"):
            call.check_success()

    assert tasks_in("q1") == 0
    assert call.response is None


def test_statistics_wait_no_longer_than_their_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr("deferlib.taskqueue.statistics._read", lambda *_: gate.wait())
    try:
        with pytest.raises(RPCDeadlineExceededError):
            Queue("q1").fetch_statistics(deadline=0.02)
    finally:
        gate.set()


# --- the object -------------------------------------------------------------------------------------------------------


def test_object_tells_what_it_is() -> None:
    rpc = create_rpc(deadline=7)
    assert (rpc.service, rpc.deadline, rpc.state, rpc.method, rpc.request, rpc.response) == (
        "taskqueue", 7, 0, None, None, None,
    )  # fmt: skip
    task = Task()

    assert Queue("q1").add_async(task, rpc=rpc) is rpc
    rpc.wait()

    assert (rpc.method, rpc.request, rpc.state, repr(rpc)) == ("BulkAdd", [task], 2, "<UserRPC BulkAdd, done>")
    assert rpc.response is not None
    assert callable(rpc.get_result_hook)
    assert rpc.user_data is None
    assert repr(create_rpc()) == "<UserRPC not called, idle>"


def test_callback_is_called_once_by_whoever_waits() -> None:
    threads: list[int] = []
    rpc = create_rpc(callback=lambda: threads.append(threading.get_ident()))
    Queue("q1").add_async(Task(), rpc=rpc)
    rpc.future.result()
    assert threads == []

    rpc.wait()
    rpc.check_success()
    rpc.get_result()

    assert threads == [threading.get_ident()]


def test_callback_may_ask_for_the_result() -> None:
    found: list[Any] = []
    rpc = create_rpc()
    rpc.callback = lambda: found.append(rpc.get_result())
    task = Task()

    Queue("q1").add_async(task, rpc=rpc).wait()

    assert found == [task]


def test_hook_makes_the_result_each_time_and_knows_its_data() -> None:
    rpc = create_rpc()
    calls: list[object] = []

    def hook(done: UserRPC) -> int:
        done.check_success()
        calls.append(done.user_data)
        return len(calls)

    rpc.make_call("Own", "request", lambda: "answer", hook, user_data="mine")

    assert (rpc.get_result(), rpc.get_result(), calls) == (1, 2, ["mine", "mine"])
    assert (rpc.response, rpc.request) == ("answer", "request")
    plain = create_rpc()
    plain.make_call("Own", None, lambda: "answer")
    assert plain.get_result() == "answer"


@pytest.mark.parametrize(
    ("rpc", "error"), [("rpc", TypeError), (5, TypeError), (UserRPC("urlfetch"), ValueError)], ids=["text", "int", "other"]
)
def test_rpc_of_another_kind_is_refused(rpc: Any, error: type[Exception]) -> None:
    for call in (
        lambda: Queue("q1").add_async(Task(), rpc=rpc),
        lambda: Queue("q1").delete_tasks_by_name_async("a", rpc),
        lambda: Queue("q1").fetch_statistics_async(rpc),
        lambda: Queue("q1").lease_tasks_async(1, 1, rpc),
        lambda: Queue("q1").lease_tasks_by_tag_async(1, 1, rpc=rpc),
    ):
        with pytest.raises(error):
            call()


def test_rpc_is_used_once() -> None:
    rpc = Queue("q1").add_async(Task())

    with pytest.raises(ValueError, match="used before"):
        Queue("q1").add_async(Task(), rpc=rpc)
    with pytest.raises(ValueError, match="used before"):
        rpc.make_call("Own", None, lambda: None)
    with pytest.raises(ValueError, match="no call yet"):
        create_rpc().wait()
    with pytest.raises(InvalidDeadlineError):
        create_rpc(deadline=-1)
    with pytest.raises(TypeError):
        create_rpc(deadline="soon")  # type: ignore[arg-type]  # what is tested


# --- several ----------------------------------------------------------------------------------------------------------


def test_any_of_several_is_the_first_that_is_done() -> None:
    gate = threading.Event()
    slow, quick = create_rpc(), create_rpc()
    slow.make_call("Slow", None, gate.wait)
    quick.make_call("Quick", None, lambda: "done")

    assert UserRPC.wait_any([slow, quick]) is quick
    gate.set()
    assert UserRPC.wait_any([slow]) is slow
    UserRPC.wait_all([slow, quick])
    assert UserRPC.wait_any([]) is None


def test_any_of_several_may_be_one_whose_deadline_passes() -> None:
    gate = threading.Event()
    slow, short = create_rpc(), create_rpc(deadline=0.02)
    slow.make_call("Slow", None, gate.wait)
    short.make_call("Short", None, gate.wait)
    try:
        assert UserRPC.wait_any(iter([slow, short])) is short
        with pytest.raises(RPCDeadlineExceededError):
            short.get_result()
    finally:
        gate.set()


def test_answer_can_be_awaited() -> None:
    async def main() -> Any:
        call = Queue("q1").add_async(Task(name="a"))
        await asyncio.wrap_future(call.future)
        return call.get_result()

    assert asyncio.run(main()).name == "a"


# --- processes --------------------------------------------------------------------------------------------------------


def test_what_was_begun_is_done_before_the_program_ends(path: Path) -> None:
    script = (
        "import deferlib\nfrom deferlib.taskqueue import Queue, Task\n"
        f"deferlib.configure(store='sqlite:///{path}')\nQueue('q1').add_async(Task(url='/x'))\n"
    )
    with busy(path):
        child = subprocess.Popen([sys.executable, "-c", script])
        time.sleep(0.5)  # it waits for the store; nothing can be seen of that
        assert child.poll() is None
    assert child.wait(30) == 0

    assert tasks_in("q1") == 1


def test_forked_child_has_threads_of_its_own(path: Path) -> None:
    script = (
        "import os, deferlib\nfrom deferlib.taskqueue import Queue, Task\n"
        f"deferlib.configure(store='sqlite:///{path}')\nQueue('q1').add_async(Task(url='/x')).get_result()\n"
        "child = os.fork()\n"
        "Queue('q1').add_async(Task(url='/x')).get_result()\n"
        "if child: os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "os._exit(0)\n"
    )

    assert subprocess.run([sys.executable, "-c", script], timeout=30, env={**os.environ}).returncode == 0
    assert tasks_in("q1") == 3


def test_request_of_the_parent_is_told_so_in_the_child(path: Path) -> None:
    script = (
        "import os, deferlib\nfrom deferlib.taskqueue import Queue, Task\n"
        f"deferlib.configure(store='sqlite:///{path}')\n"
        "gate = __import__('threading').Event()\n"
        "call = deferlib.taskqueue.create_rpc()\ncall.make_call('Own', None, gate.wait)\n"
        "child = os.fork()\n"
        "if child:\n gate.set()\n call.get_result()\n os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "try:\n call.wait_any([call])\nexcept deferlib.taskqueue.Error as error:\n os._exit('forked' not in str(error))\n"
        "os._exit(9)\n"
    )

    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 0


def test_add_at_the_very_end_of_the_program_is_done(path: Path) -> None:
    script = (
        "import atexit, deferlib\nfrom deferlib.taskqueue import Queue, Task\n"
        f"deferlib.configure(store='sqlite:///{path}')\n"
        "atexit.register(lambda: Queue('q1').add_async(Task(url='/x')).get_result())\n"
    )

    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 0
    assert tasks_in("q1") == 1


def test_whoever_stops_waiting_cancels_no_request(path: Path) -> None:
    task = Task()
    with busy(path):
        call = Queue("q1").add_async(task)
        waiting = call.future
        assert waiting.cancel()

    assert call.get_result() is task
    assert tasks_in("q1") == 1


def test_future_of_a_request_that_is_never_begun_is_cancelled() -> None:
    with nothing_begins():
        call = Queue("q1").add_async(Task(), rpc=create_rpc(deadline=0.02))
        future = call.future
        with pytest.raises(RPCDeadlineExceededError):
            call.get_result()

    assert future.cancelled()
