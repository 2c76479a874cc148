"""RQ. https://python-rq.org/docs/"""

from __future__ import annotations

import time
from datetime import timedelta

from redis import Redis
from rq import Queue
from rq.intermediate_queue import IntermediateQueue
from rq.registry import FailedJobRegistry, ScheduledJobRegistry, StartedJobRegistry

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, STORE

connection = Redis.from_url(STORE)
queue = Queue(connection=connection)


def setup() -> None:
    """Nothing is needed."""


def enqueue(count: int) -> None:
    for _ in range(count):
        queue.enqueue(tasks.noop, *tasks.ARGS)


def bulk(count: int) -> None:
    # https://python-rq.org/docs/#bulk-job-enqueueing
    queue.enqueue_many([Queue.prepare_data(tasks.noop, tasks.ARGS) for _ in range(count)])


def later(count: int) -> None:
    for _ in range(count):
        queue.enqueue_in(timedelta(seconds=HOUR), tasks.noop, *tasks.ARGS)


def stamp() -> None:
    queue.enqueue(tasks.stamp, time.monotonic())


def work(first: int, count: int) -> None:
    for number in range(first, first + count):
        queue.enqueue(tasks.work, number)


def left() -> int:
    # A job that a killed worker had taken is in two of these at times.
    known = set(queue.get_job_ids()) | set(IntermediateQueue(queue.key, connection=connection).get_job_ids())
    for registry in (StartedJobRegistry, FailedJobRegistry, ScheduledJobRegistry):
        known |= set(registry(queue=queue).get_job_ids(cleanup=False))
    return len(known)
