"""The process that adds tasks: `python -m benchmarks.peers.produce APP`, with commands as JSON lines on its standard input.

Each command is answered with a line: what it returned, and how many seconds it took.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Answer commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    app = importlib.import_module(f"benchmarks.peers.apps.{sys.argv[1]}")
    result: object
    for line in sys.stdin:
        name, arguments = json.loads(line)
        if name == "has":
            result, seconds = hasattr(app, arguments[0]), 0.0
        elif name == "enqueue_for":
            started = time.perf_counter()
            result = _enqueue_for(app.enqueue, *arguments)
            seconds = time.perf_counter() - started
        else:
            call = getattr(app, name)
            started = time.perf_counter()
            result = call(*arguments)
            seconds = time.perf_counter() - started
        answers.write(json.dumps([result, seconds]) + "\n")


def _enqueue_for(enqueue: object, seconds: float, most: int) -> int:
    """Add tasks one by one for *seconds*, or until there are *most*; return how many."""
    done, until = 0, time.perf_counter() + seconds
    while done < most and time.perf_counter() < until:
        block = min(100, most - done)
        enqueue(block)  # type: ignore[operator]  # a module's function
        done += block
    return done


if __name__ == "__main__":
    main()
