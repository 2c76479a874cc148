"""Keys are replaced while real engines, servers and producers run: every call runs, none is charged or quarantined."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import deferlib
from deferlib import config, keys
from tests.system.processes import TIMEOUT, Site, end, free_port, listens, wait_until

OLD, NEW = "old-key-0123456789abcdef", "new-key-0123456789abcdef"
OLD_ID, NEW_ID = (keys.Key(secret.encode()).id.hex() for secret in (OLD, NEW))
# Whoever charges a failure makes a dead letter: nothing here may be one.
QUEUES = """\
queue:
- name: default
  retry_parameters:
    task_retry_limit: 0
    min_backoff_seconds: 0.05
    max_backoff_seconds: 0.2
- name: patient
"""
PRODUCER = '''
"""Defers calls until it is ended, and writes down what it has deferred."""
import sys, time
import deferlib, systemapp

name = sys.argv[1]
with open(f"added-{name}", "a", buffering=1) as added:
    number = 0
    while True:
        number += 1
        call = f"{name}-{number}"
        deferlib.using(countdown=1 if number % 10 == 0 else 0).defer(systemapp.note, call)
        print(call, file=added)
        time.sleep(0.01)
'''


class Installation:
    """A site whose instances are started with keys, and ended, one by one."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.ports = [free_port(), free_port()]
        self._running: dict[str, ExitStack] = {}
        self._starts = 0
        (site.folder / "queue.yaml").write_text(QUEUES)
        (site.folder / "producer.py").write_text(PRODUCER)

    def start(self, role: str, **environ: str) -> None:
        """Start `server-0`, `engine-1` (which pushes to the other server) or any other name: a producer."""
        self._starts += 1
        kind, _, number = role.partition("-")
        stack = self._running[role] = ExitStack()
        match kind:
            case "server":
                port = self.ports[int(number)]
                command = f"-m granian --interface wsgi --port {port} --no-ws --log-level error systemapp:application"
                process = stack.enter_context(self.site.process([sys.executable, *command.split()], **environ))
                wait_until(lambda: listens(port), "the server listens")
            case "engine":
                app = {"DEFERLIB_APP": f"http://127.0.0.1:{self.ports[1 - int(number)]}"}
                process = stack.enter_context(self.site.engine(**app, **environ))
            case _:
                command = [sys.executable, "producer.py", f"{role}-{self._starts}"]
                process = stack.enter_context(self.site.process(command, **environ))
        stack.callback(end, process)

    def stop(self, role: str) -> None:
        self._running.pop(role).close()

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].close()

    def added(self) -> set[str]:
        return {call for path in self.site.folder.glob("added-*") for call in path.read_text().split()}

    def goes_on(self) -> None:
        """Wait until calls have run that were added after now."""
        before = self.added()
        done = lambda: len(self.site.finished().keys() - before) >= 10  # noqa: E731  # read once
        wait_until(done, "what is added now runs")

    def dead(self) -> int:
        runtime = config.runtime()
        with runtime.store.read() as tx:
            return sum(stats.dead for stats in tx.stats(runtime.clock.now(), ["default"]))

    def keys(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.deferlib("keys", *arguments, **environ)

    def deferlib(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deferlib.cli", *arguments]
        env = {**self.site.environ, **environ}
        return subprocess.run(
            command, cwd=self.site.folder, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )

    def uses(self, **environ: str) -> dict[str, int]:
        """Return how much of what is left each key has signed, also those that are missing."""
        document = json.loads(self.keys("list", "--json", **environ).stdout)
        return {key["id"]: key["tasks"] + key["dead"] for key in [*document["keys"], *document["missing"]]}


@pytest.fixture
def installation(site: Site) -> Iterator[Installation]:
    installation = Installation(site)
    yield installation
    installation.close()


def test_key_file_is_rotated_while_all_runs_and_nothing_is_lost(installation: Installation, site: Site) -> None:
    import systemapp  # type: ignore[import-not-found]  # the site writes it

    file = Path(f"{site.folder}/tasks.db.key")
    old = config.runtime().ring.signing.id
    for role in ("server-0", "server-1", "engine-0", "engine-1", "alice", "bob"):
        installation.start(role)
    installation.goes_on()
    for number in range(20):
        deferlib.using(queue="patient", countdown=8).defer(systemapp.note, f"later-{number}")
    installation.deferlib("queues", "pause", "patient").check_returncode()
    runs = {call for call, count in site.runs().items() if count}

    added = installation.keys("rotate", "--json")
    installation.goes_on()
    signs = installation.keys("rotate", "--json")
    rotated = time.monotonic()
    refusals = [installation.keys("retire", old.hex()).stderr]
    installation.goes_on()
    new = json.loads(signs.stdout)["key"]
    while (done := installation.keys("retire", old.hex())).returncode == 1:
        refusals.append(done.stderr)
        if "would never run without it" in done.stderr:
            installation.deferlib("queues", "resume", "patient").check_returncode()
        assert time.monotonic() - rotated < TIMEOUT
    installation.goes_on()
    for role in ("alice", "bob"):
        installation.stop(role)
    wait_until(lambda: not site.waiting(), "the queue is empty")

    assert [json.loads(each.stdout)["step"] for each in (added, signs)] == ["added", "signs"]
    assert runs, "something ran before"
    assert any("others may still sign" in text for text in refusals)
    assert any(f"signed with key {old.hex()} would never run without it" in text for text in refusals)
    assert done.returncode == 0, done.stderr
    assert [keys.Key(secret).id.hex() for secret in keys.split(file.read_text())] == [new]
    assert installation.added() | {f"later-{number}" for number in range(20)} <= set(site.finished())
    assert installation.dead() == 0
    assert f"key {new} signs now" in site.log(), "the engines have noticed by themselves"


def test_keys_of_the_environment_are_rotated_in_rolling_restarts(installation: Installation, site: Site) -> None:
    roles = ["server-0", "engine-0", "alice", "server-1", "engine-1", "bob"]
    for role in roles:
        installation.start(role, DEFERLIB_KEY=OLD)
    installation.goes_on()

    for ring in (f"{OLD},{NEW}", f"{NEW},{OLD}", NEW):
        if ring == NEW:
            both = {"DEFERLIB_KEY": f"{NEW},{OLD}"}
            wait_until(
                lambda both=both: not installation.keys("retire", OLD_ID, **both).returncode, "OLD has done its duty"
            )
        for role in roles:  # old and new instances work side by side until the last one
            installation.stop(role)
            installation.start(role, DEFERLIB_KEY=ring)
        installation.goes_on()
    for role in ("alice", "bob"):
        installation.stop(role)
    wait_until(lambda: not site.waiting(), "the queue is empty")

    assert installation.added() <= set(site.finished())
    assert installation.dead() == 0
    assert "isn't in the ring here" not in site.log(), "nobody met a key that it didn't know"


def test_new_key_that_signs_at_once_costs_no_attempt_and_its_calls_run_when_it_is_known(
    installation: Installation, site: Site
) -> None:
    installation.start("server-0", DEFERLIB_KEY=OLD)
    installation.start("engine-1", DEFERLIB_KEY=OLD)
    installation.start("alice", DEFERLIB_KEY=OLD)
    installation.start("bob", DEFERLIB_KEY=NEW)
    wait_until(lambda: "isn't in the ring here" in site.log(), "the server meets a key that it doesn't know")
    installation.goes_on()
    bobs = {call for call in installation.added() if call.startswith("bob")}
    before = set(site.finished())
    uses = installation.uses(DEFERLIB_KEY=OLD)

    installation.stop("server-0")
    installation.start("server-0", DEFERLIB_KEY=f"{OLD},{NEW}")
    wait_until(lambda: bobs <= set(site.finished()), "what the new key signed runs as well")
    for role in ("alice", "bob"):
        installation.stop(role)
    wait_until(lambda: not site.waiting(), "the queue is empty")

    assert bobs
    assert not {call for call in before if call.startswith("bob")}, "none ran unverified"
    assert uses[NEW_ID] >= len(bobs)
    assert installation.added() <= set(site.finished())
    assert installation.dead() == 0


def test_engine_whose_key_the_app_does_not_know_loses_nothing_until_it_does(installation: Installation, site: Site) -> None:
    installation.start("server-0", DEFERLIB_KEY=OLD)
    installation.start("alice", DEFERLIB_KEY=OLD)
    installation.start("engine-1", DEFERLIB_KEY=f"{NEW},{OLD}")
    wait_until(lambda: "a request with an invalid dispatch token was refused" in site.log(), "its token is refused")
    ran = set(site.runs())

    installation.stop("server-0")
    installation.start("server-0", DEFERLIB_KEY=f"{OLD},{NEW}")
    installation.goes_on()
    installation.stop("alice")
    wait_until(lambda: not site.waiting(), "the queue is empty")

    assert not ran
    assert installation.added() <= set(site.finished())
    assert installation.dead() == 0


@contextmanager
def adding() -> Iterator[list[int]]:
    """Defer calls from a thread of this process, which holds one runtime all the time, while the block lasts."""
    import systemapp

    added: list[int] = []
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.005):
            deferlib.defer(systemapp.note, len(added))
            added.append(len(added))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield added
    finally:
        done.set()
        thread.join(TIMEOUT)


def test_key_file_replaced_twenty_times_under_an_engine_in_process_loses_nothing(
    installation: Installation, site: Site
) -> None:
    with site.engine("--app", "systemapp:application"), adding() as added:
        for _ in range(20):
            before = len(added)
            assert installation.keys("rotate").returncode == 0
            wait_until(lambda before=before: len(added) > before + 5, "more was added")
    with site.engine("--app", "systemapp:application"):
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert {str(number) for number in added} <= set(site.finished())
    assert installation.dead() == 0
    assert len(json.loads(installation.keys("list", "--json").stdout)["keys"]) == 11
