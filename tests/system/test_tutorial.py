"""The tutorial, followed word by word: its code, its requests, its kill -9, and what it says the terminal shows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.desk import Desk
from tests.system.processes import listens, wait_until

PAGE = Path(__file__).parent.parent.parent / "docs" / "tutorial" / "index.md"
ROOT = "/home/you/hello"


class Tutorial:
    """The tutorial's code and outputs, in order."""

    def __init__(self) -> None:
        text = PAGE.read_text(encoding="utf-8")
        self.code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        self.outputs = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


class Reader(Desk):
    """Somebody who follows the tutorial, with the waits cut short."""

    def __init__(self, folder: Path, app: str) -> None:
        super().__init__(folder, app, "app")

    def shows(self, expected: str) -> None:
        """Wait until the terminal has shown every line of *expected*; two processes write, so the order may differ."""
        lines = [self.normal(line) for line in expected.splitlines()]
        try:
            wait_until(lambda: all(line in self.normal(self.out) for line in lines), expected, timeout=30)
        except AssertionError:
            raise AssertionError(f"the tutorial shows\n{expected}\nbut there was\n{self.out}") from None

    def normal(self, text: str) -> str:
        """Return *text* without what differs from one machine and moment to another."""
        text = text.replace(str(self.folder), ROOT).replace(f":{self.port}", ":8080")
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "WHEN", text)
        text = re.sub(r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d", "TIME", text)
        text = re.sub(r"\(attempt \d+\)", "(attempt N)", text)
        text = re.sub(r"(ran in|reloaded in) [\d.]+ m?s", r"\1 AWHILE", text)
        text = re.sub(r"\b(in \d+ s|\d+ s ago|now)\b", "NEAR", text)
        text = re.sub(r"\b\d{15,19}\b", "ID", text)
        text = re.sub(r"\b[0-9a-f]{16}\b", "KEY", text)
        text = re.sub(r"^(payload +)\d+", r"\1SIZE", text, flags=re.MULTILINE)
        return re.sub(r"(?m)^(ID +default +scheduled +NEAR +)\d+", r"\1TRIES", re.sub(r" +", " ", text))

    def run(self, *command: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        done = subprocess.run(
            [sys.executable, "-m", "deferlib.cli", *command],
            cwd=self.folder, env={**clean, "COLUMNS": "100"}, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return done.stdout


@pytest.fixture
def tutorial() -> Tutorial:
    return Tutorial()


def test_tutorial_is_true_from_the_first_line_to_the_last(tmp_path: Path, tutorial: Tutorial) -> None:
    app, broken, mended, reminder = tutorial.code
    banner, answer, greeted, failing, listed, after, restarted, shown = tutorial.outputs
    reader = Reader(tmp_path, app)

    with reader.dev() as first:
        reader.shows(banner)
        assert reader.get("/greet/Ada") == answer
        reader.shows(greeted)

        reader.save(mended, broken)
        reader.sees("reloaded in")
        reader.get("/greet/Grace")
        reader.shows(failing)
        assert reader.normal(reader.run("tasks", "list")) == reader.normal(listed)

        reader.save(broken, mended)
        reader.shows(after)

        reader.write(reader.module.read_text() + "\n\n" + reminder.replace("_countdown=30", "_countdown=4"))
        reader.sees("reloaded in", 3)
        reader.get("/remind/Alan")
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: not listens(reader.port), "the app dies with its parent")
    with reader.dev():
        reader.shows(restarted)

        reader.save("_countdown=4", "_countdown=30")
        reader.sees("reloaded in", 4)
        reader.get("/remind/Edsger")
        (name,) = re.findall(r"^\d{15,}", reader.run("tasks", "list"), re.MULTILINE)
        assert reader.normal(reader.run("tasks", "show", name)) == reader.normal(shown)
        assert reader.run("tasks", "run", name) == f"default/{name}: is due now\n"
        reader.sees("Hello, Edsger!")
