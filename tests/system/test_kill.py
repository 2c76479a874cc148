"""SIGKILL in real life: engines, web servers and clients die at any moment, and no task is lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

import deferlib
from deferlib import deferred, taskqueue
from tests.system.processes import LEASE, Site, free_port, kill, wait_until, whole_lines

SEED = 20_261_121


def defer_many(count: int, seconds: float = 0.0, queue: str = "default") -> None:
    import systemapp

    for start in range(0, count, 100):
        calls = [
            deferred.payload.dump_call(systemapp.note, (number, seconds), {})
            for number in range(start, min(start + 100, count))
        ]
        taskqueue.Queue(queue).add([taskqueue.Task.of_call(call, url=deferred.DEFAULT_URL) for call in calls])


def test_engine_killed_five_times_in_process_loses_nothing(site: Site) -> None:
    rng = random.Random(SEED)
    defer_many(2_000, 0.001)

    for round in range(5):
        goal = 100 + round * 150 + rng.randrange(100)
        with site.engine("--app", "systemapp:application") as engine:
            wait_until(lambda goal=goal: len(site.finished()) >= goal, f"{goal} tasks ran")
            kill(engine)
    with site.engine("--app", "systemapp:application"):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert set(site.finished()) == {str(number) for number in range(2_000)}
    doubled = sum(count - 1 for count in site.runs().values())
    assert doubled <= 5 * 300, "a kill repeats at most what was in flight"


def test_engine_and_server_killed_over_http_lose_nothing(site: Site) -> None:
    rng = random.Random(SEED)
    port = free_port()
    target = {"DEFERLIB_APP": f"http://127.0.0.1:{port}"}
    defer_many(1_500, 0.0005)

    for round in range(6):
        goal = 50 + round * 120 + rng.randrange(100)
        with site.server(port) as server, site.engine(**target) as engine:
            wait_until(lambda goal=goal: len(site.finished()) >= goal, f"{goal} tasks ran")
            kill(server if round % 2 else engine)
    with site.server(port), site.engine(**target):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert set(site.finished()) == {str(number) for number in range(1_500)}


def test_killed_engine_charges_no_task_even_with_retry_limit_0(site: Site) -> None:
    defer_many(4, 30.0, queue="patient")

    with site.engine("--app", "systemapp:application") as engine:
        wait_until(lambda: len(site.runs()) == 4, "all tasks have started")
        kill(engine)
    site.journal.unlink()
    with site.engine("--app", "systemapp:application"):
        wait_until(lambda: len(site.runs()) == 4, "all tasks run again")


def test_task_that_kills_its_process_becomes_a_dead_letter_and_the_others_run(site: Site) -> None:
    import systemapp

    deferlib.defer(systemapp.kill_own_process, _name="killer")
    defer_many(20, 0.01)

    def dead() -> bool:
        with deferlib.config.runtime().store.read() as tx:
            return any(row.died for row in tx.find("default", ["killer"]))

    for _ in range(12):
        if not site.waiting():
            break
        with site.engine("--app", "systemapp:application") as engine:
            wait_until(lambda engine=engine: engine.poll() is not None or not site.waiting(), "the engine died, or all ran")

    assert dead()
    assert site.runs()["killer"] == 3
    assert set(site.finished()) >= {str(number) for number in range(20)}


@pytest.mark.parametrize("step", ["answer", "settle", "claim", "commit", "committed", "send"])
@pytest.mark.parametrize("transport", ["in-process", "http"])
def test_engine_killed_at_any_step_of_a_turn_loses_nothing(site: Site, step: str, transport: str) -> None:
    port = free_port()
    options = ["--app", "systemapp:application"] if transport == "in-process" else []
    environ = {} if options else {"DEFERLIB_APP": f"http://127.0.0.1:{port}"}
    defer_many(60)

    with site.server(port):
        with site.engine(*options, DEFERLIB_FAILPOINT=f"{step}:2:kill", **environ) as engine:
            assert engine.wait(30) == -signal.SIGKILL
        with site.engine(*options, **environ):
            wait_until(lambda: not site.waiting(), "the queue is empty")

    assert set(site.finished()) == {str(number) for number in range(60)}


@pytest.mark.parametrize("step", ["answer", "settle", "claim", "commit", "committed", "send"])
def test_engine_that_fails_at_any_step_of_a_turn_goes_on(site: Site, step: str) -> None:
    defer_many(60)

    with site.engine("--app", "systemapp:application", DEFERLIB_FAILPOINT=f"{step}:2:raise") as engine:
        wait_until(lambda: not site.waiting(), "the queue is empty")
        assert engine.poll() is None, site.log()

    assert "a turn failed" in site.log()
    assert set(site.finished()) == {str(number) for number in range(60)}


@pytest.mark.parametrize("step", ["answer", "settle", "claim", "commit", "committed", "send"])
def test_engine_that_stalls_at_any_step_beyond_its_lease_loses_nothing(site: Site, step: str) -> None:
    defer_many(60)
    stall = {"DEFERLIB_FAILPOINT": f"{step}:2:stall", "DEFERLIB_FAILPOINT_STALL": str(LEASE * 1.5)}
    started = time.monotonic()

    with site.engine("--app", "systemapp:application", **stall) as engine:
        wait_until(lambda: not site.waiting(), "the queue is empty")
        assert engine.poll() is None, site.log()

    assert time.monotonic() - started > LEASE * 1.5, "it did stall"
    assert set(site.finished()) == {str(number) for number in range(60)}


def test_sigterm_finishes_what_runs_and_repeats_nothing(site: Site) -> None:
    defer_many(200, 0.02)

    for _ in range(3):
        before = len(site.finished())
        with site.engine("--app", "systemapp:application") as engine:
            wait_until(lambda before=before: len(site.finished()) > before + 5, "some tasks ran")
            engine.terminate()
            assert engine.wait(30) == 0, site.log()
    with site.engine("--app", "systemapp:application"):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert site.finished() == {str(number): 1 for number in range(200)}
    assert site.runs() == site.finished()


def test_two_engines_on_one_file_double_nothing(site: Site) -> None:
    defer_many(1_000, 0.001)

    with site.engine("--app", "systemapp:application"), site.engine("--app", "systemapp:application"):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert site.runs() == {str(number): 1 for number in range(1_000)}
    pids = {line.split()[3] for line in whole_lines(site.journal)}
    assert len(pids) == 2, "both engines worked"


def test_long_task_is_renewed_and_runs_once_while_two_engines_look(site: Site) -> None:
    defer_many(2, 4 * LEASE)

    with site.engine("--app", "systemapp:application"), site.engine("--app", "systemapp:application"):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert site.runs() == {"0": 1, "1": 1}


def test_stalled_engine_is_fenced(site: Site) -> None:
    defer_many(1, 2.5 * LEASE)

    with site.engine("--app", "systemapp:application") as first:
        wait_until(lambda: len(site.runs()) == 1, "the task has started")
        first.send_signal(signal.SIGSTOP)
        with site.engine("--app", "systemapp:application"):
            wait_until(lambda: site.runs()["0"] == 2, "the other engine took the task over")
            first.send_signal(signal.SIGCONT)
            wait_until(lambda: not site.waiting(), "the queue is empty")
            wait_until(lambda: "lost its lease" in site.log(), "the stalled engine noticed")

    assert site.runs()["0"] == 2


def test_killed_client_leaves_every_acknowledged_call(site: Site) -> None:
    rng = random.Random(SEED)
    code = (
        "import sys, deferlib, systemapp\n"
        "for n in range(int(sys.argv[1]), int(sys.argv[1]) + 10_000):\n"
        "    deferlib.defer(systemapp.note, n)\n"
        "    print(n, flush=True)\n"
    )
    acknowledged: set[str] = set()
    for round in range(8):
        client = subprocess.Popen(
            [sys.executable, "-c", code, str(round * 10_000)],
            cwd=site.folder, env=site.environ, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert client.stdout is not None
        with client.stdout as lines:
            for _ in range(rng.randrange(1, 60)):
                acknowledged.add(next(lines).strip())
            client.kill()
            acknowledged.update(line.strip() for line in lines if line.endswith("\n"))
        client.wait(30)

    with site.engine("--app", "systemapp:application"):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert acknowledged <= set(site.finished())
    assert set(site.finished().values()) == {1}


def test_restarted_engine_runs_at_once_what_died_with_the_killed_one(site: Site) -> None:
    long_lease = {"DEFERLIB_LEASE": "600"}
    defer_many(1, 0.5)
    with site.engine("--app", "systemapp:application", **long_lease) as engine:
        wait_until(lambda: site.runs(), "the call runs")
        kill(engine)

    with site.engine("--app", "systemapp:application", **long_lease):
        wait_until(lambda: not site.waiting(), "the call ran again long before its lease ended", timeout=20)

    assert site.runs() == {"0": 2}
