"""Huey on SQLite or Redis. https://huey.readthedocs.io/en/latest/guide.html"""

from __future__ import annotations

import time

from huey import RedisHuey, SqliteHuey

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, OPTIONS, STORE

# A SqliteHuey uses WAL, and SQLite's own `synchronous=FULL`, unless told otherwise:
# https://huey.readthedocs.io/en/latest/api.html#SqliteHuey
huey = (
    RedisHuey("bench", url=STORE, **OPTIONS)
    if STORE.startswith("redis:")
    else SqliteHuey("bench", filename=STORE, **OPTIONS)
)

noop = huey.task()(tasks.noop)
_stamp = huey.task()(tasks.stamp)
_work = huey.task()(tasks.work)


def setup() -> None:
    """Nothing: importing has made the tables."""


def enqueue(count: int) -> None:
    for _ in range(count):
        noop(*tasks.ARGS)


def later(count: int) -> None:
    for _ in range(count):
        noop.schedule(args=tasks.ARGS, delay=HOUR)


def stamp() -> None:
    _stamp(time.monotonic())


def work(first: int, count: int) -> None:
    for number in range(first, first + count):
        _work(number)


def left() -> int:
    return int(huey.pending_count() + huey.scheduled_count())
