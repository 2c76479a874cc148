"""deferlib, with its defaults."""

from __future__ import annotations

import os
import time

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, STORE

os.environ["DEFERLIB_STORE"] = STORE

import deferlib
from deferlib import config, payload, taskqueue


def _not_found(environ: object, start_response: object) -> list[bytes]:
    start_response("404 Not Found", [("Content-Length", "0")])  # type: ignore[operator]  # WSGI
    return []


application = deferlib.wrap_wsgi_app(_not_found)


def setup() -> None:
    """Make the file and its key."""
    config.runtime().store.migrate()
    config.runtime().ring  # noqa: B018  # made on first use


def enqueue(count: int) -> None:
    for _ in range(count):
        deferlib.defer(tasks.noop, *tasks.ARGS)


def bulk(count: int) -> None:
    queue = taskqueue.Queue()
    for done in range(0, count, 100):  # App Engine's limit of one call
        queue.add([_task() for _ in range(min(100, count - done))])


def later(count: int) -> None:
    queue = taskqueue.Queue()
    for _ in range(count // 100):
        queue.add([_task(HOUR) for _ in range(100)])


def stamp() -> None:
    deferlib.defer(tasks.stamp, time.monotonic())


def work(first: int, count: int) -> None:
    for number in range(first, first + count):
        deferlib.defer(tasks.work, number)


def left() -> int:
    runtime = config.runtime()
    with runtime.store.read() as tx:
        stats = tx.stats(runtime.clock.now(), ["default"])[0]
    return stats.tasks + stats.dead


def _task(countdown: float = 0) -> taskqueue.Task:
    call = payload.dump_call(tasks.noop, tasks.ARGS, {})
    headers = {"Content-Type": "application/octet-stream"}
    return taskqueue.Task.of_call(call, url="/_ah/queue/deferred", headers=headers, countdown=countdown)
