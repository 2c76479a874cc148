"""`deferlib.testing` as its users use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import config, namespaces, taskqueue, testing
from deferlib.core.model import Claim, Delivery, QueueConfig, QueueSource
from deferlib.errors import ConfigError
from deferlib.testing.failpoints import FailpointError, from_environ

START = datetime(2030, 1, 1, tzinfo=UTC)

ran: list[Any] = []


def note(what: Any) -> None:
    ran.append(what)


def note_time() -> None:
    ran.append(config.runtime().clock.now())


def note_attempt_until(last: int) -> None:
    task = deferlib.current_task()
    assert task is not None
    ran.append(task.attempt)
    if task.attempt < last:
        raise ValueError(f"attempt {task.attempt}")


def fail() -> None:
    raise ValueError("on purpose")


def give_up() -> None:
    raise deferlib.PermanentTaskFailure("never")


def move_clock(seconds: float) -> None:
    clock = config.runtime().clock
    assert isinstance(clock, testing.VirtualClock)
    clock.advance(seconds)


def defer_another(countdown: float) -> None:
    deferlib.defer(note, "another", _countdown=countdown)


def defer_itself() -> None:
    deferlib.defer(defer_itself)


def interrupt() -> None:
    raise KeyboardInterrupt


def note_namespace() -> None:
    ran.append(namespaces.get_namespace())


@pytest.fixture(autouse=True)
def _forget() -> None:
    ran.clear()


@pytest.fixture
def engine() -> Iterator[testing.Harness]:
    with testing.engine(start=START) as harness:
        yield harness


# --- running --------------------------------------------------------------------------------------------------------


def test_deferred_call_runs_when_the_test_says_so(engine: testing.Harness) -> None:
    task = deferlib.defer(note, 1)
    assert ran == []

    [attempt] = engine.run_until_idle()

    assert ran == [1]
    assert (attempt.name, attempt.queue, attempt.number, attempt.at) == (task.name, "default", 1, START)
    assert (attempt.status, attempt.outcome, attempt.error, attempt.ok) == (200, "ok", "", True)
    assert attempt.call.endswith("test_testing.note")
    assert engine.tasks() == []


def test_calls_run_in_the_order_they_were_deferred(engine: testing.Harness) -> None:
    for number in range(20):
        deferlib.defer(note, number)

    engine.run_until_idle()

    assert ran == list(range(20))


def test_what_a_call_defers_runs_too(engine: testing.Harness) -> None:
    deferlib.defer(defer_another, 0)

    attempts = engine.run_until_idle()

    assert ran == ["another"]
    assert len(attempts) == 2


def test_countdown_waits_for_the_clock(engine: testing.Harness) -> None:
    deferlib.defer(note_time, _countdown=60)

    assert engine.run_until_idle() == []
    assert engine.advance(59.9) == []
    [attempt] = engine.advance(timedelta(days=1))

    assert attempt.at == START + timedelta(seconds=60)
    assert ran == [round((START.timestamp() + 60) * 1e6)]
    assert engine.clock.moment() == START + timedelta(days=1, seconds=59.9)


@pytest.mark.parametrize("limit", [{}, {"rate": "20/s"}, {"max_concurrent_requests": 1}])
def test_retries_in_a_limited_queue_run_at_their_times(limit: dict[str, Any]) -> None:
    with testing.engine(queues=[{"name": "default", **limit}], start=START) as engine:
        deferlib.defer(fail)

        attempts = engine.advance(1.5)

    assert [(each.at - START).total_seconds() for each in attempts] == [0, 0.1, 0.3, 0.7, 1.5]


def test_rate_that_is_lifted_lets_calls_through_at_once() -> None:
    """What the old rate had spent would take as long as the old rate takes."""
    with testing.engine(queues=[{"name": "default", "rate": "1/h", "bucket_size": 2}], start=START) as engine:
        for number in range(10):
            deferlib.defer(note, number)
        engine.run_until_idle()
        assert ran == [0, 1]

        faster = QueueConfig(name="default", rate=10.0, bucket_size=2)
        config.runtime().store.run(lambda tx: tx.put_queues([faster], QueueSource.FILE))
        engine.advance(1)
        engine.advance(1)

    assert len(ran) == 10


def test_call_may_move_the_clock_past_the_end_of_a_run() -> None:
    with testing.engine(start=START) as engine:
        deferlib.defer(move_clock, 90)
        deferlib.defer(note, "after", _countdown=60)

        engine.run_until_idle(raise_errors=True)

        assert engine.clock.moment() == START + timedelta(seconds=90)
        engine.run_until_idle()
    assert ran == ["after"]


def test_retries_run_at_their_times(engine: testing.Harness) -> None:
    deferlib.defer(note_attempt_until, 4)

    attempts = engine.run_until_idle() + engine.advance(10)

    assert ran == [1, 2, 3, 4]
    assert [(each.at - START).total_seconds() for each in attempts] == [0, 0.1, 0.3, 0.7]
    assert [each.error for each in attempts] == [*(f"ValueError: attempt {n}" for n in (1, 2, 3)), ""]
    assert [each.outcome for each in attempts] == ["retry", "retry", "retry", "ok"]


def test_a_quiet_year_passes_quickly(engine: testing.Harness) -> None:
    deferlib.defer(note, "late", _countdown=30 * 86_400)

    assert len(engine.advance(timedelta(days=365))) == 1


def test_eta_by_the_machine_clock_works_because_that_is_the_default_start() -> None:
    with testing.engine() as engine:
        deferlib.defer(note, "later", _eta=datetime.now(UTC) + timedelta(hours=1))

        assert engine.advance(3500) == []
        assert len(engine.advance(200)) == 1


def test_rate_of_a_queue_is_kept_in_virtual_time() -> None:
    queues = [{"name": "slow", "rate": "1/s", "bucket_size": 2}]
    with testing.engine(queues=queues, start=START) as engine:
        for number in range(5):
            deferlib.defer(note, number, _queue="slow")

        at_once, later = engine.run_until_idle(), engine.advance(60)

    assert len(at_once) == 2
    assert [(each.at - START).total_seconds() for each in later] == [1, 2, 3]


def test_paused_queue_waits(engine: testing.Harness) -> None:
    store = config.runtime().store
    deferlib.defer(note, 1)
    store.run(lambda tx: tx.pause(["default"], True))

    assert engine.advance(3600) == []

    store.run(lambda tx: tx.pause(["default"], False))
    assert len(engine.run_until_idle()) == 1


def test_clock_moves_forward_only(engine: testing.Harness) -> None:
    with pytest.raises(ValueError, match="forward only"):
        engine.advance(-1)
    with pytest.raises(ValueError, match="forward only"):
        engine.clock.advance(-1)


def test_clock_can_be_moved_without_running_anything(engine: testing.Harness) -> None:
    deferlib.defer(note, 1, _countdown=10)

    engine.clock.advance(timedelta(seconds=10))

    assert ran == []
    assert len(engine.run_until_idle()) == 1


def test_call_runs_outside_the_namespace_of_the_test(engine: testing.Harness) -> None:
    deferlib.defer(note_namespace)

    with namespaces.namespace("of-the-test"):
        engine.run_until_idle()

    assert ran == [""]


def test_interrupt_ends_the_test_and_not_the_engine(engine: testing.Harness) -> None:
    deferlib.defer(interrupt)
    deferlib.defer(note, 1)

    with pytest.raises(KeyboardInterrupt):
        engine.run_until_idle()

    engine.run_until_idle()
    assert ran == [1]


# --- failures -------------------------------------------------------------------------------------------------------


def test_failure_is_raised_on_demand_and_names_the_task(engine: testing.Harness) -> None:
    deferlib.defer(fail, _name="import-7")
    deferlib.defer(note, 1)

    with pytest.raises(testing.TaskFailedError, match=r"import-7 .*test_testing\.fail.* default .*ValueError: on purpose"):
        engine.run_until_idle(raise_errors=True)

    failed, waiting = sorted(engine.tasks(), key=lambda task: -task.attempts)
    assert (failed.name, failed.attempts, failed.failures, failed.reason) == (
        "import-7", 1, 1, "ValueError: on purpose",
    )  # fmt: skip
    assert (waiting.attempts, ran) == (0, [])


def test_endless_task_is_a_clear_error(engine: testing.Harness) -> None:
    deferlib.defer(defer_itself)

    with pytest.raises(testing.NeverIdleError, match=r"50 attempts .*defer_itself.* for ever"):
        engine.run_until_idle(limit=50)

    [waiting] = engine.tasks()
    assert waiting.attempts == 0


def test_limit_that_is_just_reached_is_no_error(engine: testing.Harness) -> None:
    for number in range(5):
        deferlib.defer(note, number)

    assert len(engine.run_until_idle(limit=5)) == 5


def test_permanent_failure_is_a_dead_letter(engine: testing.Harness) -> None:
    deferlib.defer(give_up, _name="hopeless")

    [attempt] = engine.run_until_idle()

    [dead] = engine.dead_letters()
    assert (attempt.ok, attempt.outcome) == (False, "permanent")
    assert (dead.name, dead.reason) == ("hopeless", "permanent: PermanentTaskFailure: never")
    assert engine.tasks() == []


def test_waiting_tasks_are_shown_the_next_one_first(engine: testing.Harness) -> None:
    for number in range(150):
        deferlib.defer(note, number, _countdown=1000 - number)

    tasks = engine.tasks()

    assert len(tasks) == 150
    assert tasks[0].eta == START + timedelta(seconds=851)
    assert tasks[0].call.endswith("test_testing.note")
    assert engine.tasks("default") == tasks


# --- views ----------------------------------------------------------------------------------------------------------


def teapot(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    ran.append((environ["PATH_INFO"], environ["HTTP_X_APPENGINE_TASKNAME"], environ["wsgi.input"].read()))
    if environ["PATH_INFO"] == "/crash":
        raise RuntimeError("no view")
    start_response("418 I'm a teapot" if environ["PATH_INFO"] == "/tea" else "204 No Content", [])
    return []


def test_tasks_with_a_url_go_to_the_app() -> None:
    with testing.engine(teapot) as engine:
        taskqueue.add(b"x", url="/tea", name="a")
        taskqueue.add(b"y", url="/coffee", name="b")
        taskqueue.add(b"z", url="/crash", name="c")
        deferlib.defer(note, "deferred")

        attempts = engine.run_until_idle()

    assert ran == [("/tea", "a", b"x"), ("/coffee", "b", b"y"), ("/crash", "c", b"z"), "deferred"]
    assert [(each.url, each.status, each.ok) for each in attempts[:3]] == [
        ("/tea", 418, False), ("/coffee", 204, True), ("/crash", 500, False),
    ]  # fmt: skip
    assert attempts[2].error == "RuntimeError: no view"


# --- what was configured before -------------------------------------------------------------------------------------


def test_former_runtime_is_back_at_the_end() -> None:
    with testing.engine() as outer:
        deferlib.defer(note, "outer")
        with testing.engine() as inner:
            deferlib.defer(note, "inner")
            inner.run_until_idle()
        assert ran == ["inner"]

        outer.run_until_idle()

    assert ran == ["inner", "outer"]


def test_bad_queues_leave_the_former_runtime_alone() -> None:
    with testing.engine() as engine:
        runtime = config.runtime()
        with pytest.raises(deferlib.Error), testing.engine(queues=[{"name": "no spaces"}]):
            pass

        assert config.runtime() is runtime
        assert engine.tasks() == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        testing.nonsense  # noqa: B018


# --- the transport --------------------------------------------------------------------------------------------------


def test_inline_transport_takes_one_delivery_at_a_time_and_gives_it_back(engine: testing.Harness) -> None:
    transport = testing.InlineTransport(teapot, engine.clock)
    values = dict.fromkeys(Claim._fields, 0) | {"id": 7, "claims": 8}
    delivery = Delivery(Claim(**values), "", 0)  # type: ignore[arg-type]  # it is never looked at

    transport.send(delivery)

    assert transport.room("") == 0
    assert [(result.id, result.claims, result.kind) for result in transport.withdraw()] == [(7, 8, "unsent")]
    assert transport.room("") == 1

    transport.send(delivery)
    transport.cancel(7, 8)
    transport.wait(0)
    assert transport.results() == []


# --- the plugin -----------------------------------------------------------------------------------------------------

SUITE = """
import deferlib

ran = []

def test_deferred_call(deferlib_engine):
    deferlib.defer(ran.append, 1)
    deferlib.defer(int, "x")
    first, second = deferlib_engine.run_until_idle()
    assert first.ok
    assert not second.ok

def test_store_is_new_for_each_test(deferlib_engine):
    assert deferlib_engine.tasks() == []
    assert deferlib_engine.advance(60) == []
"""


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("DEFERLIB_", "PYTEST_", "COVERAGE_"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def test_plugin_gives_every_test_an_engine(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)

    done = run_python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")

    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_plugin_takes_the_app_of_an_overridden_fixture(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(
        "import pytest\n"
        "from deferlib import taskqueue\n"
        "@pytest.fixture\n"
        "def deferlib_app():\n"
        "    return lambda environ, start: start('204 No Content', []) and []\n"
        "def test_view(deferlib_engine):\n"
        "    taskqueue.add(url='/mine')\n"
        "    [attempt] = deferlib_engine.run_until_idle(raise_errors=True)\n"
        "    assert attempt.status == 204\n"
    )

    done = run_python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")

    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_plugin_loads_neither_engine_nor_store(tmp_path: Path) -> None:
    heavy = "{'apsw', 'pycurl', 'yaml', 'cloudpickle', 'requests', 'deferlib.engine', 'deferlib.store.sqlite'}"

    done = run_python(tmp_path, "-c", f"import sys, deferlib.testing.plugin; print(sorted({heavy} & set(sys.modules)))")

    assert done.stdout == "[]\n", done.stderr


# --- failpoints -----------------------------------------------------------------------------------------------------


def test_no_failpoint_unless_one_is_set() -> None:
    assert from_environ({}) is None


def test_failpoint_raises_at_the_nth_time_its_step_is_reached() -> None:
    step = from_environ({"DEFERLIB_FAILPOINT": "commit:2:raise"})
    assert step is not None

    for name in ("commit", "claim", "claim"):
        step(name)
    with pytest.raises(FailpointError, match="commit:2:raise"):
        step("commit")
    step("commit")


def test_failpoint_stalls() -> None:
    step = from_environ({"DEFERLIB_FAILPOINT": "send:1:stall", "DEFERLIB_FAILPOINT_STALL": "0"})

    assert step is not None
    step("send")


def test_failpoint_kills(tmp_path: Path) -> None:
    code = (
        "from deferlib.testing.failpoints import from_environ\n"
        "step = from_environ({'DEFERLIB_FAILPOINT': 'answer:3:kill'})\n"
        "for n in range(9): print(n, flush=True); step('answer')\n"
    )

    done = run_python(tmp_path, "-c", code)

    assert (done.returncode, done.stdout) == (-9, "0\n1\n2\n")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("DEFERLIB_FAILPOINT", "nonsense", "steps are answer, settle, claim, commit, committed, send"),
        ("DEFERLIB_FAILPOINT", "commit:0:kill", "N counts from 1"),
        ("DEFERLIB_FAILPOINT", "commit:x:kill", "N counts from 1"),
        ("DEFERLIB_FAILPOINT", "commit:1:explode", "actions are kill, raise, stall"),
        ("DEFERLIB_FAILPOINT", "commit:1:kill:more", "actions are kill, raise, stall"),
        ("DEFERLIB_FAILPOINT_STALL", "long", "a number of seconds from 0 to 86400"),
        ("DEFERLIB_FAILPOINT_STALL", "nan", "a number of seconds from 0 to 86400"),
    ],
)
def test_bad_failpoint_says_what_is_allowed(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        from_environ({"DEFERLIB_FAILPOINT": "commit:1:stall", name: value})
