"""App Engine's counter sample: its app on a virtual clock, and for real, with processes that are killed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from flask.testing import FlaskClient

import deferlib
from deferlib import testing
from tests.system.processes import TIMEOUT, free_port, kill, listens, wait_until

EXAMPLE = Path(__file__).parent.parent / "examples" / "appengine_counter"
TENANTS = ("acme", "initech")
FORGED = {
    "X-AppEngine-QueueName": "counter",
    "X-AppEngine-TaskName": "1",
    "X-AppEngine-TaskRetryCount": "0",
    "X-AppEngine-Current-Namespace": "acme",
    "X-AppEngine-User-IP": "0.1.0.2",
}

# The app as a module of the real server, whose worker processes die: each "deadly" task kills the one it first runs in,
# after its count is on disk and before anybody hears of it.
DYING = """
import os
import main, models

increment = models.increment

def increment_and_die(key, amount, task):
    increment(key, amount, task)
    if key == "deadly":
        try:
            open("died-" + task.replace("/", "-"), "x").close()
        except FileExistsError:
            return
        os.kill(os.getpid(), 9)

models.increment = increment_and_die
app = main.app
"""


def said(answer: Any) -> str:
    """Return what a page says of the form that was posted to it."""
    assert answer.status_code == 303, answer.text
    [text] = parse_qs(urlsplit(answer.headers["Location"]).query)["said"]
    return str(text)


# --- the app on a virtual clock -------------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's app, imported as it is in its own folder."""
    monkeypatch.setenv("COUNTERS", str(tmp_path / "counters.db"))
    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("main", "models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("main").app
    for name in ("main", "models"):
        sys.modules.pop(name, None)


@pytest.fixture
def client(app: Any) -> FlaskClient:
    client: FlaskClient = app.test_client()
    return client


@pytest.fixture
def engine(app: Any) -> Iterator[testing.Harness]:
    with testing.engine(app, queues=str(EXAMPLE / "queue.yaml")) as harness:
        yield harness


def state(client: FlaskClient, tenant: str = "acme") -> dict[str, Any]:
    found: dict[str, Any] = client.get("/counters").get_json()[tenant]
    return found


def test_tasks_count_for_the_tenant_that_added_them(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/count", data={"tenant": "acme", "key": "apples"})
    client.post("/count", data={"tenant": "initech", "key": "apples"})
    client.post("/batch", data={"tenant": "initech", "keys": "apples pears"})

    engine.run_until_idle(raise_errors=True)

    assert state(client, "acme") == {"counters": {"apples": 1}, "notes": [], "rollups": {}}
    assert state(client, "initech")["counters"] == {"apples": 2, "pears": 1}
    assert state(client, "initech")["notes"] == ["a batch of 2"], "by the task without a URL"


def test_batch_may_be_larger_than_one_call_takes(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/batch", data={"keys": "a " * 250})

    engine.advance(10, raise_errors=True)

    assert state(client)["counters"] == {"a": 250}


def test_worker_is_refused_to_everybody_but_the_queue(client: FlaskClient, engine: testing.Harness) -> None:
    paths = ("/worker", "/worker/rollup", "/worker/flaky", "/worker/forget", "/_ah/queue/audit", "/_ah/queue/deferred")
    answers = [client.post(path, data={"key": "apples", "amount": 1_000}, headers=FORGED) for path in paths]

    assert [answer.status_code for answer in answers] == [403] * len(paths)
    assert state(client) == {"counters": {}, "notes": [], "rollups": {}}


def test_unknown_tenant_is_not_found(client: FlaskClient, engine: testing.Harness) -> None:
    assert client.post("/count", data={"tenant": "mallory", "key": "apples"}).status_code == 404
    assert engine.tasks("counter") == []


def test_rollup_is_added_once_a_day_and_tenant(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/batch", data={"keys": "a b b"})
    engine.run_until_idle(raise_errors=True)

    first, second = (said(client.post("/rollup")) for _ in range(2))
    other = said(client.post("/rollup", data={"tenant": "initech"}))
    attempts = engine.advance(5, raise_errors=True)
    third = said(client.post("/rollup"))

    name = first.split()[0]
    assert (first, second, third) == (
        f"{name} is added", f"{name} is waiting already", f"{name} has run, or was deleted"
    )  # fmt: skip
    assert other.endswith("is added")
    assert [attempt.name for attempt in attempts] == [name, other.split()[0]]
    assert list(state(client)["rollups"].values()) == [3]
    assert list(state(client, "initech")["rollups"].values()) == [0]


def test_failing_task_is_told_of_its_attempts(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/flaky")

    attempts = engine.advance(60)

    assert [attempt.status for attempt in attempts] == [500, 500, 204]
    assert state(client)["notes"] == [
        "flaky: retry 0, executions 0, previous None",
        "flaky: retry 1, executions 1, previous 500",
        "flaky: retry 2, executions 2, previous 500",
    ]
    waits = [later.at - earlier.at for earlier, later in pairwise(attempts)]
    assert [wait.total_seconds() for wait in waits] == [0.2, 0.4]


def test_announcement_waits_quietly_for_its_goal(
    client: FlaskClient, engine: testing.Harness, caplog: pytest.LogCaptureFixture
) -> None:
    client.post("/count", data={"key": "apples"})
    client.post("/announce", data={"key": "apples", "goal": "2"})
    attempts = engine.advance(1.5)
    assert [attempt.status for attempt in attempts] == [204, 408, 408]
    assert "Traceback" not in caplog.text

    client.post("/count", data={"key": "apples"})
    engine.advance(2)

    assert state(client)["notes"] == ["apples has reached 2"]
    assert engine.tasks("announcements") == []


def test_announcement_of_nothing_is_a_dead_letter(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/announce", data={"key": "melons", "goal": "1"})

    attempts = engine.advance(60)

    [letter] = engine.dead_letters("announcements")
    assert (len(attempts), letter.attempts, letter.call) == (1, 1, "main.announce")
    assert "there is no counter 'melons'" in letter.reason


def test_handler_of_its_own_runs_deferred_calls(client: FlaskClient, engine: testing.Harness, app: Any) -> None:
    models = sys.modules["models"]
    models.increment("apples", 1, "counter/old")
    with models.transaction() as db:
        db.execute("update applied set at = 0")
    client.post("/forget", data={"tenant": "initech"})

    [attempt] = engine.run_until_idle(raise_errors=True)

    assert (attempt.url, attempt.call, attempt.outcome) == ("/worker/forget", "models.forget", "ok")
    assert state(client, "initech")["notes"] == ["old tasks are forgotten"]
    with models.transaction() as db:
        assert db.execute("select * from applied").fetchall() == []


def test_task_is_deleted_by_its_name_and_a_queue_purged(client: FlaskClient, engine: testing.Harness) -> None:
    name = said(client.post("/rollup", data={"countdown": "60"})).split()[0]
    client.post("/batch", data={"keys": "a b"})

    gone = said(client.post("/delete", data={"queue": "rollup", "name": name}))
    absent = said(client.post("/delete", data={"queue": "rollup", "name": "never-there"}))
    client.post("/purge", data={"queue": "counter"})
    attempts = engine.advance(120)

    assert (gone, absent) == (f"{name} is deleted", "never-there was not there")
    assert said(client.post("/rollup")) == f"{name} has run, or was deleted"
    assert [attempt.queue for attempt in attempts] == ["audit"]


def test_statistics_are_those_of_the_queues(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/batch", data={"keys": "a b"})
    client.post("/rollup", data={"countdown": "3600"})
    before = engine.clock.now()

    waiting = client.get("/queues").get_json()
    engine.run_until_idle(raise_errors=True)
    done = client.get("/queues").get_json()

    counter = {"executed_last_minute": 0, "in_flight": 0, "enforced_rate": 100.0}
    assert waiting["counter"] == {**counter, "tasks": 2, "oldest_eta_usec": before}
    assert done["counter"] == {**counter, "tasks": 0, "oldest_eta_usec": None, "executed_last_minute": 2}
    assert waiting["rollup"]["tasks"] == done["rollup"]["tasks"] == 1
    assert done["rollup"]["oldest_eta_usec"] == before + 3_600_000_000
    assert done["audit"]["executed_last_minute"] == 1


def test_page_shows_tenants_and_queues_and_escapes_names(client: FlaskClient, engine: testing.Harness) -> None:
    client.post("/count", data={"key": "<b>apples</b>"})
    engine.run_until_idle(raise_errors=True)

    page = client.get("/", query_string={"tenant": "initech", "said": "<script>"}).text

    assert "<h1>Counters of initech</h1>" in page
    assert "<tr><th>&lt;b&gt;apples&lt;/b&gt;<td>1" in page
    assert "&lt;script&gt;" in page
    assert set(re.findall(r"<tr><td>(\w+)<td>", page)) == {"default", "counter", "rollup", "announcements", "audit"}


def test_engine_in_the_same_process_runs_it(client: FlaskClient, app: Any, tmp_path: Path) -> None:
    deferlib.configure(store=f"sqlite:///{tmp_path}/tasks.db", queues=str(EXAMPLE / "queue.yaml"))

    with deferlib.running(app):
        for tenant in TENANTS:
            client.post("/batch", data={"tenant": tenant, "keys": "a b b"})
        client.post("/forget")

    assert sorted(state(client)["notes"]) == ["a batch of 3", "old tasks are forgotten"]
    assert [state(client, tenant)["counters"] for tenant in TENANTS] == [{"a": 1, "b": 2}] * 2


# --- for real -------------------------------------------------------------------------------------------------------


class Site:
    """A copy of the example, where its processes run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "site"
        shutil.copytree(EXAMPLE, self.folder, ignore=shutil.ignore_patterns("__pycache__", ".deferlib"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        self.environ = {**clean, "PYTHONDONTWRITEBYTECODE": "1", "DEFERLIB_LEASE": "1"}

    @contextmanager
    def process(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.folder, env=self.environ, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            kill(process)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def cli(self, *arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "deferlib.cli", *arguments, "--json"],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def post(self, path: str, **form: Any) -> str:
        return said(requests.post(self.url + path, data=form, timeout=TIMEOUT, allow_redirects=False))

    def get(self, path: str) -> Any:
        return requests.get(self.url + path, timeout=TIMEOUT).json()

    def counters(self, tenant: str) -> dict[str, int]:
        found: dict[str, int] = self.get("/counters")[tenant]["counters"]
        return found

    def waits_for(self, seen: Any, what: str) -> None:
        """Wait until *seen*, called with no arguments, is true; requests that meet a dying process are made again."""

        def look() -> object:
            try:
                return seen()
            except requests.ConnectionError:
                return False

        deadline = time.monotonic() + TIMEOUT
        while not look():
            assert time.monotonic() < deadline, f"in vain: {what}\n{self.log[-3_000:]}"
            time.sleep(0.05)

    def drained(self) -> bool:
        return not any(queue["tasks"] for queue in self.get("/queues").values())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_counts_are_exact_though_processes_are_killed(site: Site) -> None:
    (site.folder / "dying.py").write_text(DYING)
    options = ("--workers", "2", "--threads", "4", "--bind", f"127.0.0.1:{site.port}")
    engine = ("deferlib.cli", "engine", "--app-url", site.url)

    with site.process("gunicorn", *options, "dying:app") as server:
        wait_until(lambda: listens(site.port) or server.poll() is not None, "the server listens")
        for tenant in TENANTS:
            site.post("/batch", tenant=tenant, keys="apples " * 100 + "deadly " * 2 + "pears " * 60)
            for _ in range(10):
                site.post("/count", tenant=tenant, key="apples")
        with site.process(*engine) as first:
            site.waits_for(lambda: site.counters("acme").get("apples", 0) >= 20, "some are counted")
            kill(first)
        midway = sum(sum(site.counters(tenant).values()) for tenant in TENANTS)
        with site.process(*engine):
            site.waits_for(site.drained, "all are done")
            exact = [site.counters(tenant) for tenant in TENANTS]

    assert midway < 344, "the engine was killed in the middle"
    assert len(list(site.folder.glob("died-*"))) == 4, "each deadly task has killed a worker, having counted"
    assert exact == [{"apples": 110, "deadly": 2, "pears": 60}] * 2
    assert site.cli("tasks", "list", "--state", "dead")["tasks"] == []


def test_everything_on_the_page_works_in_dev(site: Site) -> None:
    with site.process("deferlib.cli", "dev", "main:app", "--port", str(site.port)):
        wait_until(lambda: listens(site.port), "the app is served")
        site.waits_for(lambda: site.get("/counters"), "the app answers")
        site.post("/batch", tenant="initech", keys="apples pears")
        site.post("/flaky")
        site.post("/forget")
        dead = site.post("/announce", key="melons", goal=1).split()[1]
        rollups = [site.post("/rollup", tenant="initech") for _ in range(5)]
        # Whoever sits at this machine may set them by hand, as on App Engine's development server; nobody else may.
        theirs = {**FORGED, "X-Forwarded-For": "198.51.100.7"}
        forged = requests.post(f"{site.url}/worker", data={"key": "apples", "amount": 1}, headers=theirs, timeout=TIMEOUT)
        site.waits_for(site.drained, "all are done")
        rollups.append(site.post("/rollup", tenant="initech"))
        queues, counters = site.get("/queues"), site.get("/counters")
        page = requests.get(site.url, timeout=TIMEOUT)
        letters = site.cli("tasks", "list", "announcements", "--state", "dead")["tasks"]

    assert forged.status_code == 403
    assert counters["acme"]["counters"] == {}
    assert counters["initech"]["counters"] == {"apples": 1, "pears": 1}
    assert counters["initech"]["notes"] == ["a batch of 2"]
    assert [note for note in counters["acme"]["notes"] if note.startswith("flaky")] == [
        "flaky: retry 0, executions 0, previous None",
        "flaky: retry 1, executions 1, previous 500",
        "flaky: retry 2, executions 2, previous 500",
    ]
    assert "old tasks are forgotten" in counters["acme"]["notes"]
    assert sum(text.endswith("is added") for text in rollups) == 1
    assert rollups[-1].endswith("has run, or was deleted")
    assert [letter["name"] for letter in letters] == [dead]
    assert "there is no counter 'melons'" in letters[0]["reason"]
    executed = {name: queue["executed_last_minute"] for name, queue in queues.items()}
    assert executed == {"counter": 2, "default": 4, "rollup": 1, "announcements": 1, "audit": 1}
    assert page.status_code == 200


# --- its README -----------------------------------------------------------------------------------------------------


def test_only_imports_are_deferlibs_and_the_readme_shows_them() -> None:
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    _, after = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)

    lines = set()
    for path in EXAMPLE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines |= {line for line in text.splitlines() if re.search(r"(?<!\.)deferlib", line)}

    assert lines == set(after.splitlines())
    files = {path.name for path in EXAMPLE.iterdir() if not path.name.startswith((".", "__"))}
    assert {name.rstrip("/") for name in re.findall(r"^\| `(\S+)` \|", readme, re.MULTILINE)} == files - {"README.md"}
