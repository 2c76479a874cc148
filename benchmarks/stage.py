"""Where a measure takes place: a fresh store, the processes around it, and looks at them from outside."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import deferlib
from benchmarks import app
from deferlib import config, payload, taskqueue

TIMEOUT = 120.0
TICKS = os.sysconf("SC_CLK_TCK")
# Users' interpreters cache bytecode; with this set, each import compiles anew.
CACHED = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder on the disk of the working directory: a file system in memory would make every fsync free."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd(), ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user where we are root
        yield Path(folder)


@contextmanager
def fresh_store(path: Path | None = None) -> Iterator[config.Runtime]:
    """A durable store, new unless there is one at *path*, as the process's runtime and in its children's environment."""
    with scratch() as folder:
        dsn = f"sqlite:///{path or folder / 'tasks.db'}"
        former = os.environ.get("DEFERLIB_STORE")
        os.environ["DEFERLIB_STORE"] = dsn
        runtime = deferlib.configure(store=dsn)
        object.__setattr__(runtime.settings, "root", folder)
        try:
            yield runtime
        finally:
            config.runtime().close()
            config.install(None)
            if former is None:
                del os.environ["DEFERLIB_STORE"]
            else:
                os.environ["DEFERLIB_STORE"] = former


def call_task(**options: object) -> taskqueue.Task:
    """Return the task of a deferred no-op call."""
    call = payload.dump_call(app.noop, app.ARGS, {})
    headers = {"Content-Type": "application/octet-stream"}
    return taskqueue.Task.of_call(call, url="/_ah/queue/deferred", headers=headers, **options)


def fill(count: int, **options: object) -> None:
    """Add *count* no-op calls."""
    queue = taskqueue.Queue()
    for done in range(0, count, 100):
        queue.add([call_task(**options) for _ in range(min(100, count - done))])


def tasks_left() -> int:
    """Return how many live tasks the default queue has."""
    with config.runtime().store.read() as tx:
        return tx.stats(config.runtime().clock.now(), ["default"])[0].tasks


def wait_until_left(count: int) -> None:
    """Return when the default queue has *count* tasks or fewer; looks seldom, because looking costs the measured CPU."""
    wait(lambda: tasks_left() <= count, pause=0.02)


@contextmanager
def granian(runtime: config.Runtime) -> Iterator[int]:
    """One granian worker with `benchmarks.app` on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--workers", "1", "--port", str(port)]
    # One thread for Python, one for the network: more of them fight for the GIL (180 us a task, not 108).
    command += ["--blocking-threads", "1", "--runtime-mode", "st"]
    command += ["--no-ws", "--log-level", "error", "benchmarks.app:application"]
    runtime.ring  # noqa: B018  # the key file must be there before two processes want it
    with child(command):
        wait(lambda: listens(port))
        yield port


@contextmanager
def cli_engine(*options: str, module: str = "deferlib.cli") -> Iterator[subprocess.Popen[bytes]]:
    """`deferlib engine` on the store of the environment; *module* runs it."""
    config.runtime().store.migrate()
    with child([sys.executable, "-m", module, "engine", *options]) as process:
        yield process


@contextmanager
def child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process of *command*, ended at the end of the block."""
    env = None if environment is None else {**os.environ, **environment}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    """Tell whether somebody does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait(condition: Callable[[], object], seconds: float = TIMEOUT, *, pause: float = 0.005) -> None:
    """Return when *condition* holds; raise TimeoutError if it doesn't within *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not finished within {seconds:.0f} s")
        time.sleep(pause)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mb(pid: int) -> float:
    """Return the memory that the process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def rate(count: int, call: Callable[[], object]) -> float:
    """Return how often a second *call* could be called."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return count / (time.perf_counter() - started)


def run_python(python: str, code: str) -> float:
    """Return how many seconds a fresh interpreter took for *code*."""
    started = time.perf_counter()
    subprocess.run([python, "-c", code], check=True, env=CACHED, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def import_milliseconds(python: str, module: str, times: int = 15) -> float:
    """Return what importing *module* costs beside an empty start: the least of many, since noise only adds."""
    pairs = [(run_python(python, "pass"), run_python(python, f"import {module}")) for _ in range(times)]
    return (min(full for _, full in pairs) - min(empty for empty, _ in pairs)) * 1000


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which *share* of the *ordered* values lie."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
