"""What the tasks do, whoever runs them. Their process has the files of `tally` in its environment."""

from __future__ import annotations

import os
import time

from benchmarks.peers.tally import Tally

ARGS = ("Hello, world!", 42, True)
WORK_SECONDS = 0.001

_tally = Tally(os.environ["BENCH_COUNTS"])
_notes = os.open(os.environ["BENCH_NOTES"], os.O_WRONLY | os.O_APPEND)
os.register_at_fork(after_in_child=_tally.forget)


def noop(text: str, number: int, flag: bool) -> None:
    """Be counted, and do nothing else."""
    _tally.count()


def stamp(called_at: float) -> None:
    """Note how long after the enqueueing call this started, in seconds; the monotonic clock is the machine's."""
    os.write(_notes, f"{time.monotonic() - called_at}\n".encode())
    _tally.count()


def work(number: int) -> None:
    """Note the start and the end of about a millisecond of work."""
    os.write(_notes, f"start {number}\n".encode())
    time.sleep(WORK_SECONDS)
    os.write(_notes, f"end {number}\n".encode())
    _tally.count()
