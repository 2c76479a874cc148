"""What the demo claims, and where it knows it from: the app's journals, the index and deferlib's command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.search_index import index
from examples.search_index.processes import PATIENCE

DeadLetter = dict[str, Any]  # a task as `deferlib tasks show --json` prints it


class CommandLine:
    """`deferlib tasks`, as anybody would run it."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._environ = environ

    def tasks(self, state: str) -> list[dict[str, Any]]:
        """Return the tasks in *state*, as `deferlib tasks list` prints them."""
        found: list[dict[str, Any]] = self._run("list", "--state", state, "--limit", "100000")["tasks"]
        return found

    def show(self, name: str) -> dict[str, Any]:
        """Return all there is to know of a task."""
        return self._run("show", name)

    def _run(self, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "deferlib.cli", "tasks", *arguments, "--json"]
        done = subprocess.run(
            command, cwd=self._folder, env=self._environ, capture_output=True, check=False, timeout=PATIENCE
        )
        if done.returncode:
            raise RuntimeError(f"`deferlib tasks {' '.join(arguments)}`: {done.stderr.decode(errors='replace').strip()}")
        document: dict[str, Any] = json.loads(done.stdout)
        return document


class Facts(NamedTuple):
    """What is true at the end; tasks are names, files are paths."""

    deferred: dict[str, str]  # the file of each task that the app was told is safe
    indexed: Counter[str]  # how often each file is in the index
    undecodable: set[str]  # the files that really aren't UTF-8
    starts: Counter[str]  # how often each task was started
    in_flight: set[str]  # the tasks that the engine had taken when it was killed
    dead: list[DeadLetter]

    @property
    def files(self) -> set[str]:
        return set(self.deferred.values())

    def file_of(self, letter: DeadLetter) -> str:
        """Return the file that a dead letter's call was for."""
        name = str(letter["name"])
        return self.deferred.get(name, f"the file of task {name}")

    @property
    def dead_files(self) -> set[str]:
        return {self.file_of(letter) for letter in self.dead}

    @property
    def lost(self) -> set[str]:
        """The files that deferlib took and that are nowhere: not a word of this comes from the engine."""
        return self.files - self.indexed.keys() - self.dead_files

    @property
    def stored_again(self) -> set[str]:
        """The files that are in the index more than once."""
        return {path for path, count in self.indexed.items() if count > 1}

    @property
    def started_again(self) -> set[str]:
        """The tasks that were started more than once, but not those that failed: they were to be tried again."""
        again = {task for task, count in self.starts.items() if count > 1}
        return {task for task in again if self.deferred.get(task) not in self.undecodable}

    def wrong(self) -> list[str]:
        """Return what doesn't hold of what was promised, in words."""
        promises = {
            f"files were lost: {sorted(self.lost)[:3]}": not self.lost,
            "not every good file is in the index": self.indexed.keys() == self.files - self.undecodable,
            "a file is in the index more than once": not self.stored_again,
            "no task was in flight when the engine was killed; try more --files": bool(self.in_flight),
            "a task was started again that the killed engine hadn't taken": self.started_again <= self.in_flight,
            f"the dead letters are {sorted(self.dead_files)}": self.dead_files == self.undecodable,
            "there is no dead letter": bool(self.dead),
            "a file has more than one dead letter": len(self.dead) == len(self.dead_files),
            "a dead letter doesn't say why": all("UnicodeDecodeError" in letter["reason"] for letter in self.dead),
            "a dead letter wasn't tried again": all(letter["attempts"] >= 2 for letter in self.dead),
        }
        return [text for text, holds in promises.items() if not holds]


def gather(command_line: CommandLine, in_flight: set[str]) -> Facts:
    """Read everything anew, from where it stands."""
    with index.connect() as db:
        deferred = dict(db.execute("select task, path from deferred"))
        indexed = Counter(path for (path,) in db.execute("select path from pages"))
    starts = Counter(line.split()[0] for line in index.starts().read_text().splitlines())
    undecodable = {path for path in deferred.values() if not _is_text(Path(path))}
    dead = [command_line.show(task["name"]) for task in command_line.tasks("dead")]
    return Facts(deferred, indexed, undecodable, starts, in_flight, dead)


def _is_text(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
