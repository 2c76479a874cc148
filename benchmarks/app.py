"""The tasks that the benchmarks defer, and the WSGI app that runs them."""

from __future__ import annotations

import time

import deferlib

ran = 0
delays: list[float] = []
ARGS = ("Hello, world!", 42, True)


def noop(text: str, number: int, flag: bool) -> None:
    """Do what most benchmarks of task queues do."""
    global ran
    ran += 1


def stamp(deferred_at: float) -> None:
    """Note how long after the call of `defer` this started, in seconds (the monotonic clock is the machine's)."""
    delays.append(time.monotonic() - deferred_at)


def stamp_to(path: str, deferred_at: float) -> None:
    """Do the same for another process to read."""
    delay = time.monotonic() - deferred_at
    with open(path, "a", encoding="ascii") as file:
        file.write(f"{delay}\n")


def _not_found(environ: object, start_response: object) -> list[bytes]:
    start_response("404 Not Found", [("Content-Length", "0")])  # type: ignore[operator]  # WSGI
    return []


application = deferlib.wrap_wsgi_app(_not_found)
