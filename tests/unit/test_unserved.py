"""The warning to whoever adds tasks that nothing runs: when it comes, and when it doesn't."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import deferlib
from deferlib import config, taskqueue
from deferlib.core.model import Mode, QueueConfig
from deferlib.taskqueue import unserved
from deferlib.testing import VirtualClock

QUEUES = [QueueConfig(name="default"), QueueConfig(name="pulled", mode=Mode.PULL)]
PATIENCE = 10.0  # seconds that a test waits for what comes in milliseconds


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A store of this test's own that nothing serves, in a project without settings."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    caplog.set_level(logging.WARNING, "deferlib")
    (tmp_path / "queue.yaml").write_text("queue: []\n")
    monkeypatch.chdir(tmp_path)
    former = config.install(None)
    deferlib.configure(queues=QUEUES)
    yield
    for timer in timers(config.runtime()):
        timer.cancel()
        timer.join()
    config.runtime().close()
    config.install(former)


def timers(runtime: config.Runtime) -> list[threading.Timer]:
    """Return the timers that wait for *runtime*'s minute to pass."""
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    return [timer for timer in waiting if timer.name == "deferlib-unserved" and runtime in timer.args]


def let_the_minute_pass() -> None:
    """Do now what the timer would do in a minute."""
    [timer] = timers(config.runtime())
    timer.cancel()
    timer.join()
    timer.function(*timer.args, **timer.kwargs)


def add(queue: str = "default", countdown: float = 0.0) -> None:
    method = "PULL" if queue == "pulled" else "POST"
    taskqueue.Queue(queue).add(taskqueue.Task(b"", method=method, countdown=countdown))


class Told(logging.Handler):
    """Knows when something was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.event.set()


def test_tasks_that_nothing_runs_are_warned_of_from_a_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    unserved.log.addHandler(told)
    monkeypatch.setattr(unserved, "PATIENCE", 0.05)
    add()  # may be committed after the first look

    for timer in timers(config.runtime()):
        timer.join()
    add()

    assert told.event.wait(PATIENCE)
    unserved.log.removeHandler(told)
    [record] = caplog.records
    assert (record.name, record.levelno, record.threadName) == ("deferlib.client", logging.WARNING, "deferlib-unserved")
    assert record.getMessage() == (
        f"nothing has served {config.runtime().store_name} for a minute, and tasks wait: start `deferlib engine`, or "
        "`deferlib dev` while you work; `deferlib doctor` looks further"
    )


def test_warning_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    runtime = config.runtime()
    add()
    let_the_minute_pass()

    for _ in range(3):
        add()

    assert len(caplog.records) == 1
    assert runtime.look_at == float("inf")
    assert timers(runtime) == []


def test_minute_after_which_nothing_was_due_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(countdown=3600)
    let_the_minute_pass()
    assert caplog.records == []

    config.runtime().look_at = 0.0  # a minute later
    add()
    let_the_minute_pass()

    assert len(caplog.records) == 1


def test_further_adds_in_the_minute_look_at_nothing() -> None:
    runtime = config.runtime()
    add()
    [timer] = timers(runtime)
    again = runtime.look_at

    for _ in range(20):
        add()

    assert timers(runtime) == [timer]
    assert runtime.look_at == again


def test_timer_keeps_no_process_alive() -> None:
    add()

    [timer] = timers(config.runtime())
    assert timer.daemon
    assert timer.interval == 60


def test_store_that_an_engine_serves_is_not_looked_at_again_for_a_minute() -> None:
    runtime = config.runtime()

    with runtime.store.serving(lambda: None):
        add()

    assert timers(runtime) == []
    assert 0 < runtime.look_at < float("inf")


def test_engine_that_came_within_the_minute_is_none_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    add()

    with config.runtime().store.serving(lambda: None):
        let_the_minute_pass()

    assert caplog.records == []


def test_paused_queue_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    add()
    config.runtime().store.run(lambda tx: tx.pause(["default"], True))

    let_the_minute_pass()

    assert caplog.records == []


def test_pull_queue_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    add("pulled")

    let_the_minute_pass()

    assert caplog.records == []


def test_tasks_of_the_future_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    add(countdown=60)

    let_the_minute_pass()

    assert caplog.records == []


def test_tasks_that_were_run_meanwhile_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    add()
    taskqueue.Queue().purge()

    let_the_minute_pass()

    assert caplog.records == []


def test_store_in_memory_is_never_looked_at() -> None:
    runtime = deferlib.configure(store="sqlite:///:memory:", queues=QUEUES)

    add()

    assert timers(runtime) == []
    assert runtime.look_at == float("inf")


def test_clock_of_a_test_is_never_waited_for() -> None:
    runtime = deferlib.configure(queues=QUEUES, clock=VirtualClock())

    add()

    assert timers(runtime) == []
    assert runtime.look_at == float("inf")


def test_runtime_that_was_replaced_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    former = config.runtime()
    add()
    [timer] = timers(former)
    timer.cancel()
    timer.join()

    deferlib.configure(queues=QUEUES)
    timer.function(*timer.args, **timer.kwargs)

    assert caplog.records == []


def test_store_that_fails_at_the_end_of_the_minute_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    add()
    store = config.runtime().store
    store.close()
    Path(".deferlib/tasks.db").write_text("x" * 5000)

    let_the_minute_pass()

    assert caplog.records == []
