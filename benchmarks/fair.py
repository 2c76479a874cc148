"""What other queues cost one: how long its tasks wait for their start, alone and beside a backlog or a hanging target."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import deferlib
from benchmarks import app
from benchmarks.elsewhere import BACKLOG, config_of
from benchmarks.row import Row
from benchmarks.slow import environment, server
from benchmarks.stage import child, cli_engine, fill, fresh_store, granian, percentile, tasks_left, wait
from deferlib import config, taskqueue
from deferlib.core.model import QueueConfig, QueueSource

RATE = 1_000.0
_PROBES = 600
_GAP = 0.02  # seconds between two, about


def fair() -> list[Row]:
    """The 99th percentile of the start delay of a quiet queue's tasks.

    Whoever works beside a backlog shares the machine's cores and disk with it: at full speed all there is. So that is
    compared with the delay where the same backlog is another application's, with a store, an engine and a server of its
    own: the difference is what it costs to be served by one engine. A target that hangs takes nothing of the machine.
    """
    with fresh_store() as runtime, ExitStack() as stack:
        port = stack.enter_context(granian(runtime))
        stuck = stack.enter_context(server(runtime.settings.root / "stuck"))
        stack.enter_context(environment(DEFERLIB_TARGETS=f"stuck=http://127.0.0.1:{stuck}"))
        _put(QueueConfig(name="quiet"), QueueConfig(name="stuck", target="stuck"))
        out = runtime.settings.root / "delays"
        with cli_engine("--app-url", f"http://127.0.0.1:{port}"):
            _probe(out, 20)
            alone = _probe(out)
            queue = taskqueue.Queue("stuck")
            queue.add([taskqueue.Task(url="/slow?seconds=600", method="GET") for _ in range(100)])
            time.sleep(1)
            rows = [_row("beside a target that hangs", _probe(out), alone)]

            apart = []
            for rate in (RATE, 0.0):
                with _elsewhere(runtime.settings.root, rate):
                    apart.append(_probe(out))

            _put(config_of(RATE))
            fill(BACKLOG)
            os.sync()  # or the kernel writes all that to the disk beside the first probes
            time.sleep(1.5)  # an engine rereads the queues each second
            rows.append(_row(f"beside {BACKLOG:,} tasks at {RATE:,.0f}/s", _probe(out), alone, apart[0]))

            _put(config_of(0))
            time.sleep(1.5)
            rows.append(_row(f"beside {BACKLOG:,} at full speed", _probe(out), alone, apart[1]))
            if not tasks_left():
                raise RuntimeError("the backlog was gone before the end")
    return rows


def _put(*queues: QueueConfig) -> None:
    config.runtime().store.run(lambda tx: tx.put_queues(queues, QueueSource.COMMAND))


def _probe(out: Path, probes: int = _PROBES) -> list[float]:
    """Return the start delays of tasks of the quiet queue, in seconds."""
    out.unlink(missing_ok=True)
    for _ in range(probes):
        deferlib.defer(app.stamp_to, str(out), time.monotonic(), _queue="quiet")
        time.sleep(_GAP * random.uniform(0.5, 1.5))
    wait(lambda: out.exists() and len(out.read_text().splitlines()) == probes)
    return sorted(float(line) for line in out.read_text().splitlines())


def _row(measure: str, delays: list[float], alone: list[float], apart: list[float] | None = None) -> Row:
    p99, idle = percentile(delays, 0.99) * 1000, percentile(alone, 0.99) * 1000
    text, other = f"alone {idle:.1f} ms", idle
    if apart is not None:
        other = percentile(apart, 0.99) * 1000
        text = f"that in another application {other:.1f} ms, {text}"
    return Row(
        f"start delay {measure}, p99",
        f"{p99:.1f} ms ({text}), p50 {percentile(delays, 0.5) * 1000:.1f} ms",
        "<= 1.2 x",
        p99 <= 1.2 * other,
        p99 / other,
    )


@contextmanager
def _elsewhere(folder: Path, rate: float) -> Iterator[None]:
    """The same backlog, but of another application."""
    ready = folder / "ready"
    with child([sys.executable, "-m", "benchmarks.elsewhere", str(folder), str(rate)]):
        wait(ready.exists)
        os.sync()
        yield
        ready.unlink()
