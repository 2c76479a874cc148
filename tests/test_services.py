"""Two services of one system: its demo as it is run, and its parts as real processes that are stopped and misled."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
import requests

import deferlib
from deferlib import taskqueue
from examples.services.demo import STEPS
from tests.system.processes import free_port, kill, listens

PROJECT = Path(__file__).parents[1]
EXAMPLE = PROJECT / "examples" / "services"
TIMEOUT = 60
NOTICED = 1.5  # seconds until an engine has seen that a queue's row has changed: it looks each second
QUEUES = (EXAMPLE / "queue.yaml").read_text()
ONCE = """
- name: once
  retry_parameters:
    task_retry_limit: 0
    max_backoff_seconds: 0.5
"""


# --- the demo -------------------------------------------------------------------------------------------------------


@contextmanager
def running_demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process; if the test fails it is told to end, which ends what it started."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "examples.services.demo"],
        cwd=PROJECT, env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with demo:
        try:
            yield demo
        finally:
            demo.terminate()


def started(printed: str) -> list[str]:
    return re.findall(r"^(?:web|worker|engine) (\d+) started", printed, re.MULTILINE)


def is_gone(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


def test_demo_does_each_task_once_by_its_own_service(tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo:
        printed, _ = demo.communicate(timeout=2 * TIMEOUT)

    assert demo.returncode == 0, printed
    _, end = printed.split("The end")
    facts = dict(re.findall(r"^  ([a-z ]+?) +(\d+)$", end, re.MULTILINE))
    rows = {step: (by, int(count)) for step, by, count in re.findall(r"^  (\w+) .*? (\w+) +(\d+)$", end, re.MULTILINE)}
    assert {step: rows[step] for step in STEPS} == {step: (service, 92) for step, (service, _) in STEPS.items()}
    assert {name: facts[name] for name in ("photos", "tasks", "done", "lost", "done twice", "dead letters")} == {
        "photos": "92", "tasks": "552", "done": "552", "lost": "0", "done twice": "0", "dead letters": "0"
    }  # fmt: skip
    assert re.search(r"^  thumb\S* +push +paused +10 ", printed, re.MULTILINE), printed
    assert re.search(r"^  state +\w+: .*connection refused by http://127.0.0.1:\d+$", printed, re.MULTILINE | re.DOTALL), (
        printed
    )
    assert max(map(len, printed.splitlines())) < 80
    assert len(started(printed)) == 4
    assert all(map(is_gone, started(printed)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_that_is_ended_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    printed = []
    with running_demo(tmp_path) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            printed.append(line)
            if line.startswith("POST"):
                demo.send_signal(number)
    text = "".join(printed)

    assert demo.returncode == code, text
    assert "Traceback" not in text
    assert len(started(text)) == 3
    assert all(map(is_gone, started(text)))
    assert list(tmp_path.iterdir()) == []


# --- its parts ------------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    task: str
    step: str
    photo: str
    service: str
    pid: int
    attempt: int
    runs: int


class System:
    """A copy of the example, its processes, and the test's own process as one more that adds tasks."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder / "system"
        shutil.copytree(EXAMPLE, self.folder, ignore=shutil.ignore_patterns("__pycache__", ".deferlib", "demo.py"))
        self.ports = {name: free_port() for name in ("web", "worker")}
        urls = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        self.environ = {
            **clean,
            "PYTHONDONTWRITEBYTECODE": "1",
            "DEFERLIB_TARGETS": ",".join(f"{name}={url}" for name, url in urls.items()),
            "DEFERLIB_APP": urls["web"],
        }
        self._stack = stack

    def start(self, *names: str) -> dict[str, subprocess.Popen[bytes]]:
        """Start services, by their names, and an engine; they are killed when the test ends."""
        processes = {}
        for name in names:
            arguments = ["deferlib.cli", "engine"]
            if name in self.ports:
                arguments = ["waitress", f"--listen=127.0.0.1:{self.ports[name]}", "--threads=8", f"{name}:app"]
            with (self.folder / f"{name}.log").open("ab") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    cwd=self.folder, env=self.environ, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            self._stack.callback(kill, processes[name])
        for name in names:
            if name in self.ports:
                self.until(lambda port=self.ports[name]: listens(port), f"{name} listens")  # type: ignore[misc]  # mypy
            else:
                self.until(lambda: "deferlib engine: store" in self.log("engine"), "the engine runs")
        runtime = deferlib.configure(
            store=f"sqlite:///{self.folder}/.deferlib/tasks.db", queues=str(self.folder / "queue.yaml")
        )
        self._stack.callback(runtime.close)
        return processes

    def until(self, condition: Callable[[], object], what: str, seconds: float = TIMEOUT) -> float:
        """Return after how many seconds *condition* held."""
        began = time.monotonic()
        while not condition():
            logs = "\n".join(self.log(name)[-2_000:] for name in (*self.ports, "engine"))
            assert time.monotonic() - began < seconds, f"in vain: {what}\n{logs}"
            time.sleep(0.02)
        return time.monotonic() - began

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def post(self, service: str, path: str, host: str | None = None, **form: str) -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", self.ports[service], timeout=TIMEOUT)) as connection:
            headers = {"Content-Type": "application/x-www-form-urlencoded", **({"Host": host} if host is not None else {})}
            connection.request("POST", path, urlencode(form), headers)
            return connection.getresponse().status

    def rewrite(self, text: str) -> None:
        """Replace queue.yaml as an editor does: whole."""
        (self.folder / "new.yaml").write_text(text)
        os.replace(self.folder / "new.yaml", self.folder / "queue.yaml")

    def cli(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "deferlib.cli", *arguments],
            cwd=self.folder, env={**self.environ, "COLUMNS": "200"},
            capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def queues(self) -> dict[str, Any]:
        return {queue["name"]: queue for queue in json.loads(self.cli("queues", "list", "--json").stdout)["queues"]}

    def tasks(self, queue: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.cli("tasks", "list", queue, "--json").stdout)["tasks"]
        return found

    def done(self) -> list[Done]:
        path = self.folder / ".deferlib" / "photos.db"
        if not path.exists():
            return []
        with closing(sqlite3.connect(path, timeout=TIMEOUT)) as db:
            if not db.execute("select 1 from sqlite_schema").fetchone():  # its first task has begun, and done nothing yet
                return []
            return [Done(*row) for row in db.execute("select * from done order by rowid")]

    def count(self, step: str) -> int:
        return sum(each.step == step for each in self.done())


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with ExitStack() as stack:
        yield System(tmp_path, stack)


def names(count: int) -> str:
    return " ".join(map(str, range(count)))


# --- pausing, stopping ----------------------------------------------------------------------------------------------


def test_tasks_of_a_paused_queue_wait_and_others_run(system: System) -> None:
    system.start("web", "worker", "engine")
    system.cli("queues", "pause", "thumbnails")
    time.sleep(NOTICED)

    system.post("web", "/photos", names=names(10))
    system.until(lambda: all(system.count(step) == 10 for step in ("labels", "backup", "activity", "mail")), "others run")
    during, paused = system.count("thumbnail"), system.queues()["thumbnails"]
    shown = system.cli("tasks", "show", system.tasks("thumbnails")[0]["name"]).stdout
    system.cli("queues", "resume", "thumbnails")
    system.until(lambda: system.count("publish") == 10, "they run once the queue is resumed")

    assert (during, paused["state"], paused["tasks"], paused["in_flight"]) == (0, "paused", 10, 0)
    assert "but its queue is paused" in shown
    assert all(each.runs == each.attempt == 1 for each in system.done())


def test_tasks_of_a_stopped_service_wait_uncharged_and_block_no_other(system: System) -> None:
    system.rewrite(QUEUES + ONCE)
    worker = system.start("web", "worker", "engine")["worker"]
    worker.terminate()
    worker.wait(TIMEOUT)

    for number in range(20):  # by turns, so that whatever is stuck is before and after the others
        taskqueue.add(url="/tasks/publish", params={"photo": number}, queue_name="once", target="worker")
        taskqueue.add(url="/tasks/activity", params={"photo": number}, queue_name="once", target="web")
    others = system.until(lambda: system.count("activity") == 20, "web's tasks run", 10)
    refused = f"connection refused by http://127.0.0.1:{system.ports['worker']}"
    system.until(lambda: all(refused in task["reason"] for task in system.tasks("once")), "the worker's say why they wait")
    system.until(lambda: max(task["attempts"] for task in system.tasks("once")) >= 3, "one or the other is tried again")
    waiting = system.tasks("once")
    before = {each.task: each.attempt for each in system.done()}
    new = system.start("worker")["worker"]
    system.until(lambda: system.count("publish") == 20, "the worker's run")

    assert others < 5, "nobody waited for the worker"
    assert len(waiting) == 20
    assert {(task["target"], task["failures"], task["executions"]) for task in waiting} == {("worker", 0, 0)}
    assert set(before.values()) == {1}
    late = [each for each in system.done() if each.step == "publish"]
    assert {each.photo for each in late} == set(names(20).split())
    assert {(each.service, each.pid, each.runs) for each in late} == {("worker", new.pid, 1)}
    assert max(each.attempt for each in late) >= 4, "RetryCount has risen with each attempt"
    system.until(lambda: not system.tasks("once"), "all is settled")
    assert system.queues()["once"]["dead"] == 0


def test_service_that_hangs_holds_up_its_own_tasks_only(system: System) -> None:
    hanging, other = "worker", "web"
    system.environ["DEFERLIB_CONCURRENCY"] = "4"
    process = system.start("web", "worker", "engine")[hanging]
    steps = {"web": "activity", "worker": "publish"}
    os.kill(process.pid, signal.SIGSTOP)

    for service, count in ((hanging, 40), (other, 20)):
        for number in range(count):
            taskqueue.add(url=f"/tasks/{steps[service]}", params={"photo": number}, target=service)
    system.until(lambda: system.count(steps[other]) == 20, "the other service's tasks run", 3)
    during = system.count(steps[hanging])
    os.kill(process.pid, signal.SIGCONT)
    system.until(lambda: system.count(steps[hanging]) == 40, "those of the one that hung run")

    assert during == 0
    assert {each.runs for each in system.done()} == {1}


# --- whose task it is -----------------------------------------------------------------------------------------------


def test_task_stays_with_the_service_that_adds_it(system: System) -> None:
    processes = system.start("web", "worker", "engine")

    answers = [system.post("web", "/photos", names=names(3)), system.post("worker", "/backups", names="again")]
    system.until(lambda: len(system.done()) == 3 * len(STEPS) + 1, "all is done")

    assert answers == [202, 202]
    found = Counter((each.step, each.service, each.pid) for each in system.done())
    expected = {(step, service, processes[service].pid): 3 for step, (service, _) in STEPS.items()}
    expected["backup", "worker", processes["worker"].pid] += 1
    assert found == expected


def test_forged_host_chooses_among_the_targets_and_is_no_address(system: System) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        port = trap.getsockname()[1]
        web = system.start("web", "worker", "engine")["web"]
        forged = [f"127.0.0.1:{port}", "evil.example", "worker", f"127.0.0.1:{system.ports['worker']}@127.0.0.1:{port}"]
        answers = [system.post("web", "/photos", host, names=f"{number}") for number, host in enumerate(forged)]
        system.until(lambda: len(system.done()) == len(forged) * len(STEPS), "all is done")
        with pytest.raises(BlockingIOError):
            trap.accept()

    assert answers == [202] * len(forged)
    stayed = [each for each in system.done() if each.step in ("activity", "mail")]
    assert {(each.service, each.pid) for each in stayed} == {("web", web.pid)}
    assert system.post("web", "/photos", f"127.0.0.1:{system.ports['worker']}", names="chosen") == 202
    system.until(lambda: any(each[1:4] == ("mail", "chosen", "worker") for each in system.done()), "by the other target")


@pytest.mark.parametrize("service", ["web", "worker"])
def test_tasks_are_refused_to_everybody_but_the_engine(system: System, service: str) -> None:
    system.start(service)
    url = f"http://127.0.0.1:{system.ports[service]}"
    headers = {"X-AppEngine-QueueName": "thumbnails", "X-AppEngine-TaskName": "1"}

    paths = [f"/tasks/{step}" for step in STEPS] + ["/_ah/queue/deferred"]
    answers = {requests.post(url + path, {"photo": "x"}, headers=headers, timeout=TIMEOUT).status_code for path in paths}

    assert answers == {403}
    assert system.done() == []


# --- queue.yaml -----------------------------------------------------------------------------------------------------


def test_changed_file_is_in_force_within_a_second_and_a_broken_one_changes_nothing(system: System) -> None:
    slow = QUEUES.replace("rate: 10/s", "rate: 1/s").replace("bucket_size: 10", "bucket_size: 1")
    system.rewrite(slow)
    system.start("web", "worker", "engine")
    system.post("web", "/photos", names=names(40))
    system.until(lambda: system.count("thumbnail") >= 1, "the first one is done")

    system.rewrite(slow.replace("rate: 1/s", "rate: fast"))
    system.until(lambda: "the queues stay as they are" in system.log("engine"), "the engine tells of the mistake", 5)
    told = system.cli("queues", "list")
    document = json.loads(system.cli("queues", "list", "--json").stdout)
    before = system.count("thumbnail")
    kept = system.until(lambda: system.count("thumbnail") > before, "its queue goes on", 5)
    system.rewrite(slow.replace("rate: 1/s", "rate: 1000/s").replace("bucket_size: 1", "bucket_size: 100"))
    applied = system.until(lambda: "queue.yaml is applied" in system.log("engine"), "the engine applies it", 5)
    left = 40 - system.count("thumbnail")
    finished = system.until(lambda: system.count("thumbnail") == 40, "the rate is lifted")

    place = f"{system.folder}/queue.yaml:7:9: queue 'thumbnails': rate 'fast'"
    [line] = [line for line in system.log("engine").splitlines() if "the queues stay as they are" in line]
    assert place in line
    assert f"queue.yaml isn't applied: {place}" in told.stderr
    assert place in document["problem"]
    assert "of 1/s" in next(line for line in told.stdout.splitlines() if line.startswith("thumbnails"))
    assert kept < 3, "at the old rate"
    assert applied < 2
    assert left > 20
    assert finished < 5, f"{left} thumbnails: {left} s at the old rate"
    assert "isn't applied" not in system.cli("queues", "list").stderr


def test_rate_is_lifted_at_once_though_the_old_one_has_no_token_for_a_minute(system: System) -> None:
    slow = QUEUES.replace("rate: 10/s", "rate: 1/m").replace("bucket_size: 10", "bucket_size: 2")
    system.rewrite(slow)
    system.start("web", "worker", "engine")
    system.post("web", "/photos", names=names(10))
    system.until(lambda: system.count("thumbnail") == 2, "the bucket is empty")

    system.rewrite(QUEUES.replace("rate: 10/s", "rate: 1000/s"))

    system.until(lambda: system.count("thumbnail") == 10, "the rate is lifted", 3)


def test_queue_that_leaves_the_file_is_disabled_until_it_is_back(system: System) -> None:
    system.start("web", "worker", "engine")
    system.rewrite(QUEUES.replace("- name: mail\n", ""))
    system.until(lambda: "these queues have left the configuration" in system.log("engine"), "the engine tells", 5)

    system.post("web", "/photos", names=names(5))
    system.until(lambda: all(system.count(step) == 5 for step in STEPS.keys() - {"mail"}), "the others run")
    during, row = system.count("mail"), system.queues()["mail"]
    line = next(line for line in system.cli("queues", "list").stdout.splitlines() if line.startswith("mail"))
    system.rewrite(QUEUES)
    seconds = system.until(lambda: system.count("mail") == 5, "they run once it is back")

    assert (during, row["disabled"], row["tasks"]) == (0, True, 5)
    assert "disabled: left queue.yaml" in line
    assert seconds < 3
    assert system.queues()["mail"]["state"] == "active"


def test_task_for_a_target_that_nobody_configured_waits_and_says_so(system: System) -> None:
    system.rewrite(f"{QUEUES}- name: lost\n  target: nowhere\n{ONCE}")
    system.start("web", "worker", "engine")

    queues = taskqueue.add(url="/tasks/publish", params={"photo": 1}, queue_name="lost", target="worker")
    own = taskqueue.add(url="/tasks/publish", params={"photo": 1}, queue_name="once", target="elsewhere")
    taskqueue.add(url="/tasks/publish", params={"photo": 2}, queue_name="once", target="worker")
    system.until(lambda: system.count("publish") == 1, "the one behind it runs")
    system.until(lambda: all(task["reason"] for name in ("lost", "once") for task in system.tasks(name)), "they say so")
    shown = {name: system.cli("tasks", "show", str(name)).stdout for name in (queues.name, own.name)}
    told = system.cli("doctor", code=1).stdout

    assert "target 'nowhere' is not configured" in shown[queues.name]
    assert "target 'elsewhere' is not configured" in shown[own.name]
    assert [task["attempts"] for name in ("lost", "once") for task in system.tasks(name)] == [0, 0], "nothing is charged"
    assert re.search(r"queue lost\b.*its target 'nowhere' is unknown", told), told
    assert "DEFERLIB_TARGETS=nowhere=http://HOST:PORT" in told


def test_doctor_tells_of_a_task_whose_own_target_nobody_configured(system: System) -> None:
    system.start("web", "worker", "engine")
    taskqueue.add(url="/tasks/publish", params={"photo": 1}, target="elsewhere")
    system.until(lambda: system.tasks("default")[0]["reason"], "it waits")

    doctor = subprocess.run(
        [sys.executable, "-m", "deferlib.cli", "doctor"],
        cwd=system.folder, env=system.environ, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip

    assert "elsewhere" in doctor.stdout
