"""Thousands of slow deliveries in flight on one engine, and fast ones to another target beside them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import stub
from benchmarks.row import Row
from benchmarks.stage import child, cli_engine, free_port, fresh_store, listens, percentile, resident_mb, wait
from deferlib import taskqueue

IN_FLIGHT = 2_000
_SECONDS = 2
_WAVES = 4
_FAST = 300
_PAUSE = 0.01


def slow() -> list[Row]:
    """How long fast deliveries wait for their start: alone, and beside 2,000 of two seconds each.

    Those of two seconds take 1.5 to 2.5 of them. Once more they all take the same, so that they begin and end in step, a
    thousand in one turn of the engine: that is information, without a goal.
    """
    alone, _, _ = _delays(0, spread=0)
    beside, seen, memory = _delays(IN_FLIGHT, spread=1)
    in_step, _, _ = _delays(IN_FLIGHT, spread=0)
    enough = seen.most >= IN_FLIGHT * 0.95
    rows = [
        Row(
            "slow deliveries in flight at once",
            f"{seen.most:,}, engine {memory:.0f} MB",
            f">= 95 % of {IN_FLIGHT:,}",
            enough,
        )
    ]
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        without, with_slow, worst = (percentile(sorted(delays), share) * 1000 for delays in (alone, beside, in_step))
        # A few milliseconds are what the engine's turn costs while 1,000 requests a second begin and end.
        figure = f"{with_slow:.1f} ms (alone {without:.1f} ms, in step {worst:.1f} ms)"
        rows.append(
            Row(f"fast ones beside {IN_FLIGHT:,} slow, {name}", figure, "<= alone + 10 ms", with_slow <= without + 10)
        )
    return rows


def _delays(in_flight: int, spread: float) -> tuple[list[float], stub.Seen, float]:
    """Return the delays of fast deliveries, what the slow server saw, and the engine's megabytes."""
    with fresh_store() as runtime:
        folder = runtime.settings.root
        with server(folder / "fast") as fast, server(folder / "slow") as slow_port:
            targets = f"fast=http://127.0.0.1:{fast},slow=http://127.0.0.1:{slow_port}"
            with environment(DEFERLIB_TARGETS=targets, DEFERLIB_CONCURRENCY=str(IN_FLIGHT)), cli_engine() as engine:
                queue = taskqueue.Queue()
                for _ in range(in_flight * _WAVES // 100):
                    steps = [_SECONDS + spread * (number / 100 - 0.5) for number in range(100)]
                    queue.add([_get(f"/slow?seconds={seconds}", "slow") for seconds in steps])
                time.sleep(_SECONDS * 1.5)
                for _ in range(_FAST):
                    queue.add(_get(f"/fast?at={time.monotonic()}", "fast"))
                    time.sleep(_PAUSE)
                memory = resident_mb(engine.pid)
        return stub.read(folder / "fast").delays, stub.read(folder / "slow"), memory


def _get(url: str, target: str) -> taskqueue.Task:
    return taskqueue.Task(url=url, target=target, method="GET")


@contextmanager
def server(out: Path) -> Iterator[int]:
    """A stub server on a free port, which writes what it saw to *out*."""
    port = free_port()
    with child([sys.executable, "-m", "benchmarks.stub", str(port), str(out)]):
        wait(lambda: listens(port))
        yield port


@contextmanager
def environment(**values: str) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
