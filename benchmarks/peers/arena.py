"""What one contender runs in: its store, its workers, the process that adds its tasks, and the count of what ran."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import servers
from benchmarks.peers.contenders import FILE, POSTGRES, REDIS, REDIS_ALWAYS, Contender
from benchmarks.peers.environment import ROOT, Peers
from benchmarks.peers.tally import Tally, create
from benchmarks.stage import CACHED, TICKS, free_port, listens, wait

_ANSWER_SECONDS = 600.0
_STOP_SECONDS = 10.0
_PROC = Path("/proc")
_NEW_DATABASE = (
    "import psycopg, sys; psycopg.connect(sys.argv[1], autocommit=True).execute(f'create database {sys.argv[2]}')"
)


class Stores:
    """The servers that contenders need, started when the first one asks, and fresh stores on them."""

    def __init__(self, peers: Peers, folder: Path) -> None:
        self._peers = peers
        self._folder = folder
        self._stack = ExitStack()
        self._urls: dict[str, str] = {}
        self._number = 0

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fresh(self, contender: Contender) -> tuple[Path, str]:
        """Return a new folder and the address of an empty store; raise `servers.NoServerError` if it can't be had."""
        self._number += 1
        folder = self._folder / f"round-{self._number}"
        folder.mkdir()
        if contender.server == FILE:
            path = folder / "tasks.db"
            return folder, f"sqlite:///{path}" if not contender.package else str(path)
        url = self._server(contender.server)
        if contender.server == POSTGRES:
            name = f"bench_{self._number}"
            subprocess.run([self._peers.python, "-c", _NEW_DATABASE, url, name], check=True)
            return folder, url.replace("/postgres", f"/{name}")
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            connection.recv(100)
        return folder, url

    def _server(self, server: str) -> str:
        if server not in self._urls:
            match server:
                case "postgres":
                    context = servers.postgres(self._peers, self._folder)
                case _:
                    assert server in (REDIS, REDIS_ALWAYS), server
                    context = servers.redis(self._peers, self._folder, always=server == REDIS_ALWAYS)
            self._urls[server] = self._stack.enter_context(context)
        return self._urls[server]


class Producer:
    """The process that adds tasks, in the contender's own environment."""

    def __init__(self, python: str, module: str, environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            command = [python, "-m", "benchmarks.peers.produce", module]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                text=True,
                bufsize=1,
            )

    def call(self, name: str, *arguments: Any, seconds: float = _ANSWER_SECONDS) -> tuple[Any, float]:
        """Return what the function of the app returned, and how long it took there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not readable:
            raise TimeoutError(f"{name} of the producer took longer than {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the producer ended in {name}: {last_line(self._log)}")
        result, took = json.loads(line)
        return result, took

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Arena:
    """A contender with a fresh store; its workers run between `start` and `stop`."""

    def __init__(self, contender: Contender, peers: Peers, folder: Path, store: str) -> None:
        self.contender = contender
        counts = create(folder)
        self.environment = {
            **CACHED,
            **counts,
            "BENCH_STORE": store,
            "BENCH_OPTIONS": json.dumps(contender.options),
            "DEFERLIB_STORE": store,
            "PYTHONPATH": str(ROOT),
        }
        self._store = store
        self._port = str(free_port())
        self._log = folder / "workers.log"
        self._workers: list[subprocess.Popen[bytes]] = []
        self._tally = Tally(counts["BENCH_COUNTS"])
        self._notes = Path(counts["BENCH_NOTES"])
        python = peers.python if contender.package else sys.executable
        self.producer = Producer(python, contender.module, self.environment, folder / "producer.log")

    @property
    def ran(self) -> int:
        """Return how many tasks have run so far."""
        return self._tally.total()

    def notes(self) -> list[str]:
        """Return the lines that tasks have noted."""
        return self._notes.read_text().splitlines()

    def start(self) -> None:
        """Start all workers."""
        for place in range(len(self.contender.workers)):
            self._workers.append(self._spawn(place))

    def wait_ran(self, count: int, seconds: float, pause: float = 0.002) -> None:
        """Return when *count* tasks have run; raise TimeoutError with what the workers said if they don't."""
        try:
            wait(lambda: self.ran >= count, seconds, pause=pause)
        except TimeoutError:
            said = last_line(self._log)
            raise TimeoutError(f"{self.ran} of {count} had run after {seconds:.0f} s{said and ': ' + said}") from None

    def cpu(self) -> float:
        """Return the CPU seconds of all workers, their children included; NaN where there is no /proc."""
        if not (_PROC / "self" / "stat").exists():
            return float("nan")
        sessions = {process.pid for process in self._workers}
        return sum(fields[1] for _, fields in _processes() if fields[0] in sessions)

    def kill(self, place: int) -> None:
        """Kill one worker with all its processes, as the kernel would, and start it again."""
        _signal(self._workers[place].pid, signal.SIGKILL)
        self._workers[place].wait()
        self._workers[place] = self._spawn(place)

    def stop(self) -> None:
        """Ask the workers to end, and see to it."""
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        for process in self._workers:
            _signal(process.pid, signal.SIGKILL)  # whatever it left behind, which is in its session
            process.wait()
        self._workers.clear()

    def close(self) -> None:
        """End everything."""
        self.stop()
        self.producer.close()

    def _spawn(self, place: int) -> subprocess.Popen[bytes]:
        words = [
            word.replace("{store}", self._store).replace("{port}", self._port) for word in self.contender.workers[place]
        ]
        with self._log.open("ab") as log:
            # A session of its own: so that its descendants, and only they, can be measured and ended.
            process = subprocess.Popen(
                words,
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if "granian" in words:
            wait(lambda: listens(int(self._port)), 30)
        return process


@contextmanager
def arena(contender: Contender, peers: Peers, stores: Stores) -> Iterator[Arena]:
    """An arena on a fresh store, ended at the end of the block."""
    folder, store = stores.fresh(contender)
    it = Arena(contender, peers, folder, store)
    try:
        it.producer.call("setup")
        yield it
    finally:
        it.close()


def last_line(log: Path) -> str:
    """Return the last line of a log, for an error message; "" for none."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:200] if lines else ""


def _processes() -> Iterator[tuple[int, tuple[int, float]]]:
    """Yield (pid, (session, CPU seconds with those of ended children)) of every process."""
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                yield int(folder.name), (int(fields[3]), sum(map(int, fields[11:15])) / TICKS)


def _signal(session: int, number: signal.Signals) -> None:
    """Signal all processes of a session that we made; without /proc, its first process group."""
    pids = [pid for pid, fields in _processes() if fields[0] == session] if _PROC.exists() else []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if not pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, number)
    time.sleep(0.01)
