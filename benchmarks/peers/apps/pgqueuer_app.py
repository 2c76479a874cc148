"""PgQueuer, through asyncpg. https://pgqueuer.readthedocs.io/en/latest/"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import pgqueuer
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, STORE


@asynccontextmanager
async def main() -> AsyncIterator[PgQueuer]:
    """A worker's manager and its entrypoints."""
    connection = await asyncpg.connect(STORE)
    pgq = PgQueuer(AsyncpgDriver(connection))

    @pgq.entrypoint("noop")
    async def noop(job: Job) -> None:
        tasks.noop(*json.loads(job.payload or b""))

    @pgq.entrypoint("stamp")
    async def stamp(job: Job) -> None:
        tasks.stamp(*json.loads(job.payload or b""))

    @pgq.entrypoint("work")
    async def work(job: Job) -> None:
        tasks.work(*json.loads(job.payload or b""))

    try:
        yield pgq
    finally:
        await connection.close()


_runner = asyncio.Runner()
_queries: Queries
_connection: asyncpg.Connection


def setup() -> None:
    """Make the tables."""
    global _queries, _connection
    _connection = _runner.run(asyncpg.connect(STORE))
    _queries = Queries(AsyncpgDriver(_connection))
    _runner.run(_queries.install())


def enqueue(count: int) -> None:
    async def add() -> None:
        for _ in range(count):
            await _queries.enqueue("noop", json.dumps(tasks.ARGS).encode())

    _runner.run(add())


def bulk(count: int) -> None:
    payloads = [json.dumps(tasks.ARGS).encode() for _ in range(count)]
    _runner.run(_queries.enqueue(["noop"] * count, payloads, [0] * count))


def later(count: int) -> None:
    for _ in range(count // 1000):
        payloads = [json.dumps(tasks.ARGS).encode() for _ in range(1000)]
        wait = [timedelta(seconds=HOUR)] * 1000
        _runner.run(_queries.enqueue(["noop"] * 1000, payloads, [0] * 1000, wait))


def stamp() -> None:
    _runner.run(_queries.enqueue("stamp", json.dumps([time.monotonic()]).encode()))


def work(first: int, count: int) -> None:
    payloads = [json.dumps([number]).encode() for number in range(first, first + count)]
    _runner.run(_queries.enqueue(["work"] * count, payloads, [0] * count))


def left() -> int:
    return int(_runner.run(_connection.fetchval("select count(*) from pgqueuer")))


if __name__ == "__main__":
    # What `pgq run` does, on uvloop like that command, which fails with the newest Typer before it begins.
    uvloop.run(pgqueuer.run(main, batch_size=int(sys.argv[1])))
