"""One function a measure: it prepares, measures, and returns its rows."""

from __future__ import annotations

import hmac
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import apsw

import deferlib
from benchmarks import app
from deferlib import config, payload, taskqueue
from deferlib.store import Tx

TASKS = 20_000
_TIMEOUT = 120.0
# Users' interpreters cache bytecode; with this set, each import compiles anew.
_CACHED = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


class Row(NamedTuple):
    """One figure with its goal."""

    measure: str
    figure: str
    goal: str
    reached: bool


def machine() -> str:
    """Say how fast this machine is right now, beside the one that the goals were set on."""
    body = bytes(300)
    digest = 1 / _rate(20_000, lambda: hmac.digest(b"key", body, "sha256")) * 1e6
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:

        def sync() -> None:
            os.write(file.fileno(), body)
            os.fdatasync(file.fileno())

        synced = 1 / _rate(300, sync) * 1e3
    return (
        f"this machine: HMAC-SHA-256 of 300 bytes {digest:.1f} us (goals were set at 1.6), "
        f"fdatasync {synced:.2f} ms (goals: 0.1 to 0.2)"
    )


def enqueue() -> list[Row]:
    """`defer()` one by one, durable, against a bare apsw autocommit insert of the same row; alternating blocks."""
    with fresh_store() as runtime:
        deferlib.defer(app.noop, *app.ARGS)
        path = str(runtime.settings.root / "bare.db")
        bare = _bare_database(path, _row_of_a_task(runtime))
        rates: list[tuple[float, float]] = []
        for _ in range(7):
            rates.append((_rate(300, bare), _rate(300, lambda: deferlib.defer(app.noop, *app.ARGS))))
    ratio = statistics.median(ours / theirs for theirs, ours in rates)
    ours, theirs = statistics.median(r[1] for r in rates), statistics.median(r[0] for r in rates)
    figure = f"{ratio:.0%} ({ours:,.0f}/s of {theirs:,.0f}/s)"
    return [Row("defer() one by one, of a bare insert", figure, ">= 60 %", ratio >= 0.6)]


def bulk() -> list[Row]:
    """Adds of 100: prebuilt tasks, and deferred calls from pickling on."""
    with fresh_store():
        queue = taskqueue.Queue()
        built = [[_task() for _ in range(100)] for _ in range(50)]
        started = time.perf_counter()
        for tasks in built:
            queue.add(tasks)
        prebuilt = 5_000 / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(50):
            queue.add([_task() for _ in range(100)])
        calls = 5_000 / (time.perf_counter() - started)
    return [
        Row("bulk add of 100, prebuilt tasks", f"{prebuilt:,.0f}/s", "", True),
        Row("bulk add of 100, deferred calls", f"{calls:,.0f}/s", "", True),
    ]


def drain_in_process() -> list[Row]:
    """Drain of no-op tasks into a pool of threads in the engine's process."""
    with fresh_store():
        fill(TASKS)
        app.ran = 0
        cpu, started = time.process_time(), time.perf_counter()
        with deferlib.running():
            _wait(lambda: app.ran == TASKS)
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        assert app.ran == TASKS, f"{app.ran} of {TASKS} ran"
    rate = TASKS / elapsed
    figure = f"{rate:,.0f}/s, {cpu / TASKS * 1e6:.0f} us CPU a task"
    return [Row("drain in process", figure, ">= 10,000/s", rate >= 10_000)]


def drain_over_http() -> list[Row]:
    """Drain of no-op tasks by `deferlib engine` over HTTP to one granian worker, from its first thousand answers on."""
    with fresh_store() as runtime, granian(runtime) as port:
        fill(TASKS)
        with cli_engine("--app-url", f"http://127.0.0.1:{port}") as engine:
            wait_until_left(TASKS - 1_000)
            left, cpu, started = tasks_left(), _cpu_seconds(engine.pid), time.perf_counter()
            wait_until_left(0)
            elapsed, cpu = time.perf_counter() - started, _cpu_seconds(engine.pid) - cpu
    rate = left / elapsed
    figure = f"{rate:,.0f}/s, engine {cpu / left * 1e6:.0f} us CPU a task"
    return [Row("drain over HTTP to one granian worker", figure, ">= 8,000/s", rate >= 8_000)]


def latency_in_process() -> list[Row]:
    """From the call of `defer` to the start of the task, on an idle system, in one process."""
    with fresh_store():
        app.delays.clear()
        with deferlib.running():
            time.sleep(0.5)
            for _ in range(300):
                deferlib.defer(app.stamp, time.monotonic())
                time.sleep(0.005)
            _wait(lambda: len(app.delays) == 300)
        return [_latency("enqueue to start, one process", app.delays, 1.5)]


def latency_across_processes() -> list[Row]:
    """The same, with the engine and the tasks in another process."""
    with fresh_store() as runtime:
        out = runtime.settings.root / "delays"
        with cli_engine("--app", "benchmarks.app:application"):
            deferlib.defer(app.stamp_to, str(out), time.monotonic())
            _wait(out.exists)
            time.sleep(0.5)
            for _ in range(300):
                deferlib.defer(app.stamp_to, str(out), time.monotonic())
                time.sleep(0.005)
            _wait(lambda: len(out.read_text().splitlines()) == 301)
        delays = [float(line) for line in out.read_text().splitlines()[1:]]
    return [_latency("enqueue to start, across processes", delays, 2.5)]


def idle() -> list[Row]:
    """CPU and memory of an engine with nothing to do, over five seconds."""
    with fresh_store(), cli_engine() as process:
        time.sleep(1.5)
        before = _cpu_seconds(process.pid)
        time.sleep(5)
        share = (_cpu_seconds(process.pid) - before) / 5
        memory = _resident_mb(process.pid)
    return [
        Row("idle engine, CPU", f"{share:.2%} of a core", "<= 1 %", share <= 0.01),
        Row("idle engine, memory", f"{memory:.0f} MB", "<= 60 MB", memory <= 60),
    ]


def importing() -> list[Row]:
    """`import deferlib` in a fresh interpreter, less an empty one's start: the least of many, since noise only adds."""
    empty, full = zip(*((_run_python("pass"), _run_python("import deferlib")) for _ in range(15)), strict=True)
    milliseconds = (min(full) - min(empty)) * 1000
    return [Row("import deferlib", f"{milliseconds:.0f} ms", "<= 60 ms", milliseconds <= 60)]


# --- parts ----------------------------------------------------------------------------------------------------------


@contextmanager
def fresh_store() -> Iterator[config.Runtime]:
    """A new durable store in a folder of its own, as the process's runtime and in the environment of its children."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        dsn = f"sqlite:///{folder}/tasks.db"
        former = os.environ.get("DEFERLIB_STORE")
        os.environ["DEFERLIB_STORE"] = dsn
        runtime = deferlib.configure(store=dsn)
        object.__setattr__(runtime.settings, "root", Path(folder))
        try:
            yield runtime
        finally:
            config.runtime().close()
            config.install(None)
            if former is None:
                del os.environ["DEFERLIB_STORE"]
            else:
                os.environ["DEFERLIB_STORE"] = former


def fill(count: int) -> None:
    """Add *count* no-op calls."""
    queue = taskqueue.Queue()
    for _ in range(count // 100):
        queue.add([_task() for _ in range(100)])


def tasks_left() -> int:
    """Return how many live tasks the default queue has."""
    with config.runtime().store.read() as tx:
        return tx.stats(config.runtime().clock.now(), ["default"])[0].tasks


def wait_until_left(count: int) -> None:
    """Return when the default queue has *count* tasks or fewer; looks seldom, because looking costs the measured CPU."""
    _wait(lambda: tasks_left() <= count, 0.02)


@contextmanager
def granian(runtime: config.Runtime) -> Iterator[int]:
    """One granian worker with `benchmarks.app` on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--workers", "1", "--port", str(port)]
    # One thread for Python, one for the network: more of them fight for the GIL (180 us a task, not 108).
    command += ["--blocking-threads", "1", "--runtime-mode", "st"]
    command += ["--no-ws", "--log-level", "error", "benchmarks.app:application"]
    runtime.ring  # noqa: B018  # the key file must be there before two processes want it
    with _child(command):
        _wait(lambda: _listens(port))
        yield port


@contextmanager
def cli_engine(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`deferlib engine` on the store of the environment."""
    config.runtime().store.migrate()
    with _child([sys.executable, "-m", "deferlib.cli", "engine", *options]) as process:
        yield process


@contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _task() -> taskqueue.Task:
    call = payload.dump_call(app.noop, app.ARGS, {})
    return taskqueue.Task.of_call(call, url="/_ah/queue/deferred", headers={"Content-Type": "application/octet-stream"})


def _row_of_a_task(runtime: config.Runtime) -> tuple[object, ...]:
    def body(tx: Tx) -> tuple[object, ...]:
        cursor = tx._cursor  # type: ignore[attr-defined]  # the very row, to insert it bare
        return tuple(next(iter(cursor.execute("select * from tasks limit 1"))))

    with runtime.store.read() as tx:
        return body(tx)


def _bare_database(path: str, row: tuple[object, ...]) -> Callable[[], None]:
    """Return a function that inserts the row of a deferred call, one commit each, into a table of the same shape."""
    from deferlib.store import queries

    connection = apsw.Connection(path)
    connection.execute(queries.migrations("sqlite")[1])
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", 2)
    connection.wal_autocheckpoint(16_384)
    sql = f"insert into tasks values (null{', ?' * (len(row) - 1)})"  # noqa: S608  # a number of marks
    values = row[1:]

    def insert() -> None:
        connection.execute(sql, values)

    return insert


def _rate(count: int, call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return count / (time.perf_counter() - started)


def _latency(measure: str, delays: list[float], goal: float) -> Row:
    ordered = sorted(delays)
    median, last = statistics.median(ordered) * 1000, ordered[int(len(ordered) * 0.99)] * 1000
    return Row(measure, f"p50 {median:.2f} ms, p99 {last:.2f} ms", f"p50 <= {goal} ms", median <= goal)


def _wait(condition: Callable[[], object], pause: float = 0.005) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the benchmark didn't finish in time")
        time.sleep(pause)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _run_python(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=_CACHED)
    return time.perf_counter() - started
