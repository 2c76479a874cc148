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
from benchmarks.row import Row
from benchmarks.slow import environment, server
from benchmarks.stage import child, cli_engine, fill, fresh_store, granian, percentile, tasks_left, wait
from deferlib import config, taskqueue
from deferlib.core.model import QueueConfig, QueueSource

BACKLOG = 400_000
RATE = 1_000.0
BUCKET = 50
_PROBES = 300
_GAP = 0.02  # seconds between two, about
_BURN = "import hashlib\nwhile True: hashlib.sha256(bytes(4000)).digest()"
_CORES = 2


def fair() -> list[Row]:
    """The 99th percentile of the start delay of a quiet queue's tasks.

    A backlog at full speed takes both cores whole, and whoever has none of its own waits for one. So that is compared with
    the delay on a machine that two other programs keep just as busy; the rest with the delay on an idle one.
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
            with _burners():
                busy = _probe(out)

            queue = taskqueue.Queue("stuck")
            queue.add([taskqueue.Task(url="/slow?seconds=600", method="GET") for _ in range(100)])
            time.sleep(1)
            rows = [_row("beside a target that hangs", _probe(out), alone, "alone")]

            _put(QueueConfig(name="default", rate=RATE, bucket_size=BUCKET))
            fill(BACKLOG)
            os.sync()  # or the kernel writes all that to the disk beside the first probes
            time.sleep(1.5)  # an engine rereads the queues each second
            rows.append(_row(f"beside {BACKLOG:,} tasks at {RATE:,.0f}/s", _probe(out), alone, "alone"))

            _put(QueueConfig(name="default"))
            time.sleep(1.5)
            rows.append(_row(f"beside {BACKLOG:,} at full speed", _probe(out), busy, "beside two busy programs"))
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


def _row(measure: str, delays: list[float], other: list[float], than: str) -> Row:
    p99, without = (percentile(values, 0.99) * 1000 for values in (delays, other))
    middle = percentile(delays, 0.5) * 1000
    return Row(
        f"start delay {measure}, p99",
        f"{p99:.1f} ms ({than} {without:.1f} ms), p50 {middle:.1f} ms",
        "<= 1.2 x",
        p99 <= 1.2 * without,
        p99 / without,
    )


@contextmanager
def _burners() -> Iterator[None]:
    """Programs that keep every core busy, with nothing to do with tasks."""
    with ExitStack() as stack:
        for _ in range(_CORES):
            stack.enter_context(child([sys.executable, "-c", _BURN]))
        time.sleep(0.5)
        yield
