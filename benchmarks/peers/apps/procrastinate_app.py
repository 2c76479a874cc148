"""Procrastinate. https://procrastinate.readthedocs.io/en/stable/quickstart.html"""

from __future__ import annotations

import time
from typing import Any

import procrastinate

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, OPTIONS, STORE

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=STORE), worker_defaults=OPTIONS.get("worker", {}))


# Coroutines run in the worker's loop, plain functions in a thread: the former cost less.
@app.task(name="noop")
async def noop(text: str, number: int, flag: bool) -> None:
    tasks.noop(text, number, flag)


@app.task(name="stamp")
async def _stamp(called_at: float) -> None:
    tasks.stamp(called_at)


@app.task(name="work")
async def _work(number: int) -> None:
    tasks.work(number)


if "retry_stalled" in OPTIONS:
    # https://procrastinate.readthedocs.io/en/stable/howto/production/retry_stalled_jobs.html, but every ten seconds
    @app.periodic(cron="* * * * * */10")
    @app.task(queueing_lock="retry_stalled_jobs", pass_context=True)
    async def retry_stalled_jobs(context: Any, timestamp: int) -> None:
        for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=OPTIONS["retry_stalled"]):
            await app.job_manager.retry_job(job)


ARGUMENTS = dict(zip(("text", "number", "flag"), tasks.ARGS, strict=True))
_producer: procrastinate.App


def setup() -> None:
    """Make the tables."""
    global _producer
    _producer = app.open()  # used without asyncio, it connects without
    _producer.schema_manager.apply_schema()


def enqueue(count: int) -> None:
    for _ in range(count):
        noop.defer(**ARGUMENTS)


def bulk(count: int) -> None:
    noop.batch_defer(*[ARGUMENTS] * count)


def later(count: int) -> None:
    for _ in range(count // 1000):
        noop.configure(schedule_in={"seconds": HOUR}).batch_defer(*[ARGUMENTS] * 1000)


def stamp() -> None:
    _stamp.defer(called_at=time.monotonic())


def work(first: int, count: int) -> None:
    _work.batch_defer(*[{"number": number} for number in range(first, first + count)])


def left() -> int:
    import psycopg

    with psycopg.connect(STORE) as connection:
        sql = "select count(*) from procrastinate_jobs where status in ('todo', 'doing', 'failed') and task_name = 'work'"
        return int(connection.execute(sql).fetchall()[0][0])
