"""One function a measure: it prepares, measures, and returns its rows."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

import apsw

import deferlib
from benchmarks import app, stage
from benchmarks.curl_clock import BENCH_CURL, libcurl_seconds
from benchmarks.row import Row, at_least
from benchmarks.stage import (
    call_task,
    cli_engine,
    fill,
    fresh_store,
    granian,
    percentile,
    rate,
    tasks_left,
    wait,
    wait_until_left,
)
from deferlib import config, taskqueue
from deferlib.store import Tx

TASKS = 20_000
THREADS = 16
SCHEDULED = 100_000
_WARM = 1_000  # answers before the measuring begins
_NO_LOSS = 0.95  # what two medians of three may differ by on a quiet machine


def enqueue() -> list[Row]:
    """`defer()` one by one, durable, against a bare apsw autocommit insert of the same row; alternating blocks."""
    with fresh_store() as runtime:
        deferlib.defer(app.noop, *app.ARGS)
        path = str(runtime.settings.root / "bare.db")
        bare = _bare_database(path, _row_of_a_task(runtime))
        rates: list[tuple[float, float]] = []
        for _ in range(7):
            rates.append((rate(300, bare), rate(300, lambda: deferlib.defer(app.noop, *app.ARGS))))
    ratio = statistics.median(ours / theirs for theirs, ours in rates)
    ours, theirs = statistics.median(r[1] for r in rates), statistics.median(r[0] for r in rates)
    figure = f"{ratio:.0%} ({ours:,.0f}/s of {theirs:,.0f}/s)"
    return [Row("defer() one by one, of a bare insert", figure, ">= 70 %", ratio >= 0.7, ratio)]


def threads() -> list[Row]:
    """`defer()` from 16 threads against one; alternating blocks."""
    with fresh_store():
        deferlib.defer(app.noop, *app.ARGS)
        rates = [(_from_threads(1), _from_threads(THREADS)) for _ in range(5)]
    ratio = statistics.median(many / one for one, many in rates)
    one, many = (statistics.median(pair[place] for pair in rates) for place in (0, 1))
    figure = f"{ratio:.2f} x ({many:,.0f}/s of {one:,.0f}/s)"
    return [Row(f"defer() from {THREADS} threads, of one thread", figure, ">= 1.3 x", ratio >= 1.3, ratio)]


def bulk() -> list[Row]:
    """Adds of 100: prebuilt tasks, and deferred calls from pickling on."""
    prebuilt, calls = zip(*(_bulk_rates() for _ in range(3)), strict=True)
    return [
        at_least("bulk add of 100, prebuilt tasks", statistics.median(prebuilt), 80_000),
        at_least("bulk add of 100, deferred calls", statistics.median(calls), 40_000),
    ]


def drain_in_process() -> list[Row]:
    """Drain of no-op tasks into a pool of threads in the engine's process; the median of three."""
    drained, cpu = zip(*(_drained_in_process() for _ in range(3)), strict=True)
    value = statistics.median(drained)
    figure = f"{value:,.0f}/s, {statistics.median(cpu):.0f} us CPU a task"
    return [at_least("drain in process", value, 25_000, figure)]


def drain_over_http() -> list[Row]:
    """Drain of no-op tasks by `deferlib engine` to one granian worker, and how much of its CPU time isn't libcurl's.

    The second is found in a run of its own, where the engine reads the thread's CPU clock around every call of libcurl
    and around every callback from it (`curl_clock`). Its share of libcurl is taken from the CPU time a task of the runs
    without that clock, so that reading it isn't counted.
    """
    drained, cpu = zip(*(_drained_over_http() for _ in range(3)), strict=True)
    value, cost = statistics.median(drained), statistics.median(cpu)
    outside = cost - _libcurl_microseconds()
    return [
        at_least("drain over HTTP to one granian worker", value, 12_000),
        Row("engine CPU a task pushed", f"{cost:.0f} us", "<= 75 us", cost <= 75, cost),
        Row("engine CPU a task pushed, outside libcurl", f"{outside:.0f} us", "<= 40 us", outside <= 40, outside),
    ]


def scheduled() -> list[Row]:
    """Both drains with 100,000 tasks waiting for their time, against the drains without; alternating."""
    rows = []
    drains: list[tuple[str, Callable[[int], tuple[float, float]]]] = [
        ("in process", _drained_in_process),
        ("over HTTP", _drained_over_http),
    ]
    for name, drain in drains:
        pairs = [(drain(0)[0], drain(SCHEDULED)[0]) for _ in range(3)]
        without, beside = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
        ratio = beside / without
        figure = f"{ratio:.0%} ({beside:,.0f}/s of {without:,.0f}/s)"
        measure = f"drain {name} beside {SCHEDULED:,} scheduled"
        rows.append(Row(measure, figure, f">= {_NO_LOSS:.0%}", ratio >= _NO_LOSS, ratio))
    return rows


def latency_in_process() -> list[Row]:
    """From the call of `defer` to the start of the task, on an idle system, in one process."""
    with fresh_store():
        app.delays.clear()
        with deferlib.running():
            time.sleep(0.5)
            for _ in range(300):
                deferlib.defer(app.stamp, time.monotonic())
                time.sleep(0.005)
            wait(lambda: len(app.delays) == 300)
        return [_latency("enqueue to start, one process", app.delays, 0.8, 2.5)]


def latency_across_processes() -> list[Row]:
    """The same, with the engine and the tasks in another process."""
    with fresh_store() as runtime:
        out = runtime.settings.root / "delays"
        with cli_engine("--app", "benchmarks.app:application"):
            deferlib.defer(app.stamp_to, str(out), time.monotonic())
            wait(out.exists)
            time.sleep(0.5)
            for _ in range(300):
                deferlib.defer(app.stamp_to, str(out), time.monotonic())
                time.sleep(0.005)
            wait(lambda: len(out.read_text().splitlines()) == 301)
        delays = [float(line) for line in out.read_text().splitlines()[1:]]
    return [_latency("enqueue to start, across processes", delays, 1.2, 3.0)]


def idle() -> list[Row]:
    """CPU and memory of an engine with nothing to do, over five seconds."""
    with fresh_store(), cli_engine() as process:
        time.sleep(1.5)
        before = stage.cpu_seconds(process.pid)
        time.sleep(5)
        share = (stage.cpu_seconds(process.pid) - before) / 5
        memory = stage.resident_mb(process.pid)
    return [
        Row("idle engine, CPU", f"{share:.2%} of a core", "<= 0.5 %", share <= 0.005, share),
        Row("idle engine, memory", f"{memory:.0f} MB", "<= 60 MB", memory <= 60, memory),
    ]


def importing() -> list[Row]:
    """`import deferlib` in a fresh interpreter, less an empty one's start."""
    milliseconds = stage.import_milliseconds(sys.executable, "deferlib")
    return [Row("import deferlib", f"{milliseconds:.0f} ms", "<= 60 ms", milliseconds <= 60, milliseconds)]


# --- parts ----------------------------------------------------------------------------------------------------------


def _bulk_rates() -> tuple[float, float]:
    """Return tasks a second of adding prebuilt ones, and of making and adding them."""
    with fresh_store():
        queue = taskqueue.Queue()
        queue.add([call_task() for _ in range(100)])  # makes the store's file: 20 ms
        built = iter([[call_task() for _ in range(100)] for _ in range(50)])
        prebuilt = rate(50, lambda: queue.add(next(built)))
        calls = rate(50, lambda: queue.add([call_task() for _ in range(100)]))
    return prebuilt * 100, calls * 100


def _drained_in_process(scheduled: int = 0) -> tuple[float, float]:
    """Return tasks a second, and microseconds of CPU a task."""
    with fresh_store():
        fill(scheduled, countdown=3600)
        fill(TASKS)
        app.ran = 0
        cpu, started = time.process_time(), time.perf_counter()
        with deferlib.running():
            wait(lambda: app.ran == TASKS)
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    return TASKS / elapsed, cpu / TASKS * 1e6


def _drained_over_http(scheduled: int = 0) -> tuple[float, float]:
    """Return tasks a second, and microseconds of the engine's CPU a task, from its first thousand answers on."""
    with fresh_store() as runtime, granian(runtime) as port:
        fill(scheduled, countdown=3600)
        fill(TASKS)
        with cli_engine("--app-url", f"http://127.0.0.1:{port}") as engine:
            wait_until_left(scheduled + TASKS - _WARM)
            left, cpu, started = tasks_left() - scheduled, stage.cpu_seconds(engine.pid), time.perf_counter()
            wait_until_left(scheduled)
            elapsed, cpu = time.perf_counter() - started, stage.cpu_seconds(engine.pid) - cpu
    return left / elapsed, cpu / left * 1e6


def _libcurl_microseconds() -> float:
    """Return libcurl's share of a task pushed, in microseconds of CPU."""
    with fresh_store() as runtime, granian(runtime) as port:
        out = runtime.settings.root / "curl"
        os.environ[BENCH_CURL] = str(out)
        fill(TASKS)
        try:
            with cli_engine("--app-url", f"http://127.0.0.1:{port}", module="benchmarks.curl_clock"):
                wait_until_left(0)
        finally:
            del os.environ[BENCH_CURL]
        return libcurl_seconds(out) / TASKS * 1e6


def _from_threads(count: int) -> float:
    """Return how many calls a second *count* threads defer together."""
    each = 1600 // count
    barrier = threading.Barrier(count + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(each):
            deferlib.defer(app.noop, *app.ARGS)

    workers = [threading.Thread(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    return each * count / (time.perf_counter() - started)


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


def _latency(measure: str, delays: list[float], goal: float, goal99: float) -> Row:
    ordered = sorted(delays)
    median, last = percentile(ordered, 0.5) * 1000, percentile(ordered, 0.99) * 1000
    reached = median <= goal and last <= goal99
    return Row(measure, f"p50 {median:.2f} ms, p99 {last:.2f} ms", f"p50 <= {goal}, p99 <= {goal99} ms", reached, median)
