"""Celery on Redis. https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/redis.html"""

from __future__ import annotations

import time

from celery import Celery

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, OPTIONS, STORE

app = Celery("bench", broker=STORE)
app.conf.update(OPTIONS)

noop = app.task(name="noop")(tasks.noop)
_stamp = app.task(name="stamp")(tasks.stamp)
_work = app.task(name="work")(tasks.work)


def setup() -> None:
    """Nothing is needed."""


def enqueue(count: int) -> None:
    for _ in range(count):
        noop.delay(*tasks.ARGS)


def later(count: int) -> None:
    for _ in range(count):
        noop.apply_async(tasks.ARGS, countdown=HOUR)


def stamp() -> None:
    _stamp.delay(time.monotonic())


def work(first: int, count: int) -> None:
    for number in range(first, first + count):
        _work.delay(number)


def left() -> int:
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        return int(client.llen("celery") + client.hlen("unacked"))
