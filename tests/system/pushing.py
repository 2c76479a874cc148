"""Engines that push to targets whose logs say what came when."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deferlib import config
from deferlib.core.model import NewTask
from deferlib.ids import ids
from tests.system.processes import Site, free_port, listens, wait_until, whole_lines

_SCRIPT = Path(__file__).with_name("pushed.py")


class Visit(NamedTuple):
    """A request as its target saw it, in seconds of the monotonic clock."""

    start: float
    end: float | None  # None: not answered yet
    queue: str
    task: str
    path: str


class Target:
    """A target of its own process, with a log of what came."""

    def __init__(self, site: Site, name: str) -> None:
        self._site = site
        self._port = free_port()
        self._log = site.folder / f"{name}.log"
        self.url = f"http://127.0.0.1:{self._port}"
        self.mode("/ok")

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[bytes]]:
        """Serve; killed at the end of the block."""
        with self._site.process([sys.executable, str(_SCRIPT), str(self._port), str(self._log)]) as process:
            wait_until(lambda: listens(self._port), "the target listens")
            yield process

    def mode(self, path: str) -> None:
        """Answer `/mode` like that path from now on."""
        self._log.with_suffix(".mode").write_text(path)

    def visits(self, queue: str | None = None) -> list[Visit]:
        """Return the requests of a queue, in the order in which they came."""
        open_, visits = {}, []
        for line in whole_lines(self._log):
            what, at, name, task, path = line.split()
            if what == "start":
                open_[name, task] = len(visits)
                visits.append(Visit(int(at) / 1e9, None, name, task, path))
            else:
                place = open_.pop((name, task))
                visits[place] = visits[place]._replace(end=int(at) / 1e9)
        return [visit for visit in visits if queue in (None, visit.queue)]

    def forget(self) -> None:
        """Begin the log anew, at a moment when nothing is on its way."""
        self._log.write_text("")


def at_once(visits: Sequence[Visit]) -> int:
    """Return how many were on their way at the busiest moment."""
    steps = [(visit.start, 1) for visit in visits] + [(visit.end, -1) for visit in visits if visit.end is not None]
    most = now = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most


def configure(site: Site, queues: str, **environ: str) -> None:
    """Give the site these queues, in queue.yaml's words, and settings."""
    (site.folder / "queue.yaml").write_text(f"queue:\n{queues}")
    site.environ.update(environ)
    config.runtime().close()
    runtime = site.runtime()
    runtime.apply_queues()


def add(number: int, path: str, *, queue: str = "default", target: str = "") -> list[str]:
    """Add so many tasks at once; return their names."""
    runtime = config.runtime()
    now = runtime.clock.now()
    rest: Any = ("GET", path, target, "", "", "", "", 0, 0, b"", b"")
    tasks = [NewTask(id, id, queue, None, "push", now, now, *rest) for id in (ids.next(now) for _ in range(number))]
    runtime.store.run(lambda tx: tx.add(now, tasks))
    return [str(task.id) for task in tasks]


def added(queue: str, number: int, every: float, path: str = "/ok") -> dict[str, float]:
    """Add a task each so many seconds; return when, by their names, in seconds of the monotonic clock."""
    times = {}
    begun = time.monotonic()
    for count in range(number):
        time.sleep(max(0.0, begun + count * every - time.monotonic()))
        [name] = add(1, path, queue=queue)
        times[name] = time.monotonic()
    return times


def delays(times: dict[str, float], visits: Sequence[Visit]) -> list[float]:
    """Return how long after they were added tasks came to their target, the shortest first."""
    first: dict[str, float] = {}
    for visit in visits:
        first.setdefault(visit.task, visit.start)
    return sorted(max(0.0, first[name] - at) for name, at in times.items())


def said(site: Site, *command: str) -> Any:
    """Return what a command prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "deferlib.cli", *command, "--json"],
        cwd=site.folder, env=site.environ, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def told(site: Site, *command: str) -> str:
    """Return what a command prints for people, with its warnings."""
    done = subprocess.run(
        [sys.executable, "-m", "deferlib.cli", *command],
        cwd=site.folder, env=site.environ, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout + done.stderr
