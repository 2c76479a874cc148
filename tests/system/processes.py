"""Real processes for the system tests: engines and web servers that are killed for real, and what their tasks wrote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import deferlib
from deferlib import config

TIMEOUT = 60.0
LEASE = 1.0  # seconds: short, so that a killed engine's tasks come back soon
APP = '''
"""The app of the system tests: its tasks append to a journal, one line a run."""
import os, time
import deferlib

def note(number, seconds=0.0):
    line = f"{number} {deferlib.current_task().attempt} {os.getpid()}\\n".encode()
    journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(journal, b"start " + line)
        time.sleep(seconds)
        os.write(journal, b"end " + line)
    finally:
        os.close(journal)

def kill_own_process():
    note("killer")
    os.kill(os.getpid(), 9)

def nothing_here(environ, start_response):
    start_response("404 Not Found", [("Content-Length", "0")])
    return []

application = deferlib.wrap_wsgi_app(nothing_here)
'''


class Site:
    """A folder with the app, its store and its journal, and the processes that work on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        (folder / "systemapp.py").write_text(APP)
        (folder / "queue.yaml").write_text(
            "queue:\n- name: default\n- name: patient\n  retry_parameters:\n    task_retry_limit: 0\n"
        )
        self.environ = {
            **os.environ,
            "DEFERLIB_STORE": f"sqlite:///{folder}/tasks.db",
            "DEFERLIB_LEASE": str(LEASE),
            "JOURNAL": str(self.journal),
            "PYTHONPATH": str(folder),
        }

    def runtime(self) -> config.Runtime:
        """Make the site's store this process's own."""
        return deferlib.configure(store=self.environ["DEFERLIB_STORE"], queues=str(self.folder / "queue.yaml"))

    @contextmanager
    def engine(self, *options: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
        """`deferlib engine`, ended (if need be, killed) at the end of the block."""
        with self.process([sys.executable, "-m", "deferlib.cli", "engine", *options], **environ) as process:
            yield process

    @contextmanager
    def server(self, port: int) -> Iterator[subprocess.Popen[bytes]]:
        """One granian worker with the app."""
        command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--workers", "1", "--port", str(port)]
        with self.process([*command, "--no-ws", "--log-level", "error", "systemapp:application"]) as process:
            wait_until(lambda: listens(port), "the server listens")
            yield process

    @contextmanager
    def process(self, command: list[str], **environ: str) -> Iterator[subprocess.Popen[bytes]]:
        log = (self.folder / "log").open("ab")
        process = subprocess.Popen(
            command, cwd=self.folder, env={**self.environ, **environ}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            kill(process)
            log.close()

    def runs(self) -> Counter[str]:
        """Return how often each task was started, by its number."""
        return self._journal("start")

    def finished(self) -> Counter[str]:
        """Return how often each task came to its end."""
        return self._journal("end")

    def _journal(self, word: str) -> Counter[str]:
        return Counter(line.split()[1] for line in whole_lines(self.journal) if line.startswith(f"{word} "))

    def waiting(self) -> int:
        """Return how many live tasks the store holds."""
        runtime = config.runtime()
        with runtime.store.read() as tx:
            return sum(stats.tasks for stats in tx.stats(runtime.clock.now(), ["default", "patient"]))

    def log(self) -> str:
        return (self.folder / "log").read_text()


def whole_lines(log: Path) -> list[str]:
    """Return the lines of a log that others write to: not the last one while it comes, and none before there is a log."""
    return log.read_text().split("\n")[:-1] if log.exists() else []


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and the children it leads, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server as its supervisor would: by SIGTERM.

    Again to all its processes if it goes on: one in 40 times granian's worker takes the signal in another thread than the
    one that waits for it, and waits on.
    """
    process.terminate()
    for _ in range(3):
        with suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT / 4)
            return
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(TIMEOUT / 4)


def wait_until(condition: Callable[[], object], what: str, timeout: float = TIMEOUT) -> None:
    """Return when *condition* holds; fail naming *what* if it doesn't in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
