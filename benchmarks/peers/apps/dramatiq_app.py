"""Dramatiq on Redis. https://dramatiq.io/guide.html"""

from __future__ import annotations

import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.peers import tasks
from benchmarks.peers.apps import HOUR, OPTIONS, STORE

broker = RedisBroker(url=STORE, **OPTIONS)
dramatiq.set_broker(broker)

noop = dramatiq.actor(tasks.noop)
_stamp = dramatiq.actor(tasks.stamp)
_work = dramatiq.actor(tasks.work)


def setup() -> None:
    """Nothing is needed."""


def enqueue(count: int) -> None:
    for _ in range(count):
        noop.send(*tasks.ARGS)


def later(count: int) -> None:
    for _ in range(count):
        noop.send_with_options(args=tasks.ARGS, delay=HOUR * 1000)


def stamp() -> None:
    _stamp.send(time.monotonic())


def work(first: int, count: int) -> None:
    for number in range(first, first + count):
        _work.send(number)


def left() -> int:
    # Every message that isn't acknowledged is in one of the hashes *.msgs, whichever worker has taken it.
    return sum(broker.client.hlen(key) for key in broker.client.keys("dramatiq:*.msgs"))
