"""Deploys that break what waits: nothing is lost, all is visible, and all runs after the fix."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from deferlib import config
from deferlib.core.model import Page, TaskRow, TaskState
from tests.system.processes import Site, free_port, wait_until

COUNT = 5
BEFORE = '''
"""What was deployed when the calls were deferred."""
import systemapp

def fine(number): systemapp.note(number)
def renamed(number): systemapp.note(number)
def took_more(number, more=None): systemapp.note(number)
class Order:
    def __init__(self, number): self.number = number
    def ship(self): systemapp.note(self.number)
'''
BROKEN = (
    BEFORE.replace("def renamed", "def renamed_now").replace(", more=None", "").replace("class Order", "class Purchase")
)
MENDED = (
    BROKEN.replace("import systemapp", "import deferlib, systemapp")
    .replace("def renamed_now", '@deferlib.formerly("shop.renamed")\ndef renamed_now')
    .replace("(number):", "(number, more=None):")
    .replace("class Purchase", '@deferlib.formerly("shop.Order")\nclass Purchase')
)
LATE = '"""Deferred from here, too."""\nimport systemapp\n\ndef late(number): systemapp.note(number)\n'
APP = "import deferlib, systemapp, shop\napplication = systemapp.application\n"
PATIENT = """
queue:
- name: default
  retry_parameters: {task_retry_limit: 0, min_backoff_seconds: 0.05, max_backoff_seconds: 0.2}
"""

# How each broken call is told, by the function that it names.
REASONS = {
    "shop.renamed": "Can't get attribute 'renamed'",
    "shop.took_more": "doesn't take the arguments that were deferred",
    "shop.Order.ship": "Can't get attribute 'Order'",
    "late.late": "SyntaxError: '(' was never closed",
}


@pytest.fixture(params=["pushed", "in process"])
def shop(site: Site, request: pytest.FixtureRequest) -> Shop:
    return Shop(site, pushed=request.param == "pushed")


class Shop:
    """An app that is deployed anew, and the calls that wait for it."""

    def __init__(self, site: Site, *, pushed: bool) -> None:
        self.site = site
        self.pushed = pushed
        self.port = free_port()
        (site.folder / "queue.yaml").write_text(PATIENT)
        (site.folder / "served.py").write_text(APP)
        self.deploy(BEFORE, LATE)

    def deploy(self, shop: str, late: str) -> None:
        (self.site.folder / "shop.py").write_text(shop)
        (self.site.folder / "late.py").write_text(late)

    def defer(self) -> None:
        """Defer COUNT calls of each kind, by the code as it is deployed now."""
        code = (
            "import deferlib, shop, late\n"
            f"for n in range({COUNT}):\n"
            "    deferlib.defer(shop.fine, f'fine-{n}'); deferlib.defer(shop.renamed, f'renamed-{n}')\n"
            "    deferlib.defer(shop.took_more, f'more-{n}', more=1); deferlib.defer(shop.Order(f'ship-{n}').ship)\n"
            "    deferlib.defer(late.late, f'late-{n}')\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=self.site.folder, env=self.site.environ, check=True, timeout=60)

    @contextmanager
    def running(self, quarantine_after: float) -> Iterator[None]:
        """Run app and engine with the code as it is deployed now."""
        environ = {"DEFERLIB_QUARANTINE_AFTER": str(quarantine_after), "PYTHONDONTWRITEBYTECODE": "1"}
        with ExitStack() as stack:
            if self.pushed:
                command = [sys.executable, "-m", "waitress", f"--listen=127.0.0.1:{self.port}", "served:application"]
                stack.enter_context(self.site.process(command, **environ))
                stack.enter_context(self.site.engine("--app-url", f"http://127.0.0.1:{self.port}", **environ))
            else:
                stack.enter_context(self.site.engine("--app", "served:application", **environ))
            yield

    def finished(self) -> Counter[str]:
        return self.site.finished()

    def rows(self, state: TaskState) -> list[TaskRow]:
        with config.runtime().store.read() as tx:
            return tx.tasks("default", Page(state=state))

    def command(self, *words: str) -> str:
        command = [sys.executable, "-m", "deferlib.cli", *words]
        return subprocess.run(
            command, cwd=self.site.folder, env=self.site.environ, capture_output=True, text=True, timeout=60, check=True
        ).stdout


KINDS = ("fine", "renamed", "more", "ship", "late")
ALL = {f"{kind}-{number}": 1 for kind in KINDS for number in range(COUNT)}


def test_calls_that_a_deploy_broke_are_kept_shown_and_run_after_the_fix(shop: Shop) -> None:
    shop.defer()
    shop.deploy(BROKEN, "def late(number:\n")

    with shop.running(quarantine_after=0.5):
        wait_until(lambda: not shop.rows(TaskState.LIVE), "each call ran or is kept")

    assert shop.finished() == {f"fine-{number}": 1 for number in range(COUNT)}
    dead = shop.rows(TaskState.DEAD)
    assert len(dead) == 4 * COUNT
    assert {row.failures for row in dead} == {0}, "none is charged"
    told = json.loads(shop.command("tasks", "list", "--state", "dead", "--json"))["tasks"]
    for name, why in REASONS.items():
        reasons = [task["reason"] for task in told if name.rpartition(".")[2] in task["call"]]
        assert len(reasons) == COUNT, (name, told)
        assert all(reason.startswith("quarantine: undecodable: ") and why in reason for reason in reasons), reasons

    shop.deploy(MENDED, LATE)
    shop.command("tasks", "retry", *(row.public_name for row in dead))
    with shop.running(quarantine_after=0.5):
        wait_until(lambda: not shop.rows(TaskState.LIVE), "all ran")

    assert shop.rows(TaskState.DEAD) == []
    assert shop.finished() == ALL


def test_deploy_that_is_mended_in_time_costs_no_call_an_attempt(shop: Shop) -> None:
    """Their queue gives a task up at its first failure."""
    shop.defer()
    shop.deploy(BROKEN, "raise ImportError('no such library')\n")

    with shop.running(quarantine_after=600):
        wait_until(lambda: all(row.attempts > 2 for row in shop.rows(TaskState.LIVE)), "all have been tried")
        assert len(shop.rows(TaskState.LIVE)) == 4 * COUNT
    shop.deploy(MENDED, LATE)
    with shop.running(quarantine_after=600):
        wait_until(lambda: not shop.rows(TaskState.LIVE), "all ran")

    assert shop.rows(TaskState.DEAD) == []
    assert shop.finished() == ALL


def test_app_without_the_engines_key_parks_no_task(site: Site) -> None:
    """It refuses the dispatch token: the app's fault, or the engine's, but none of a task's."""
    shop = Shop(site, pushed=True)
    shop.defer()
    served = [sys.executable, "-m", "waitress", f"--listen=127.0.0.1:{shop.port}", "served:application"]
    engine = ("--app-url", f"http://127.0.0.1:{shop.port}")

    other = site.process(served, DEFERLIB_KEY="quite another key than the engine's")
    with other, site.engine(*engine, DEFERLIB_QUARANTINE_AFTER="0"):
        wait_until(lambda: "refuses this engine's requests" in site.log(), "the target is named")
        wait_until(lambda: json.loads(shop.command("queues", "list", "--json"))["troubled_targets"], "it is shown")
        tried = [row for row in shop.rows(TaskState.LIVE) if row.attempts]
        assert len(shop.rows(TaskState.LIVE)) == 5 * COUNT
        assert {row.failures for row in tried} == {0}
        assert "isn't in the ring" in tried[0].reason
    with site.process(served), site.engine(*engine):
        wait_until(lambda: not shop.rows(TaskState.LIVE), "all ran")

    assert shop.rows(TaskState.DEAD) == []
    assert shop.finished() == ALL
