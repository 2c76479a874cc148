"""Hints that come in a stream are taken together, and none is without a wake-up that follows it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deferlib.store.watch import Watch


class Watched:
    """A watch of one end of a pair of sockets, and when it woke."""

    def __init__(self) -> None:
        self.sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sender.settimeout(10)
        self.version = 0
        self.woken: list[float] = []
        self.news = threading.Condition()
        self.watch = Watch(self._wake, self.receiver, lambda: self.version)

    def _wake(self) -> None:
        with self.news:
            self.woken.append(time.monotonic())
            self.news.notify_all()

    def wait_for_wake_after(self, moment: float) -> bool:
        with self.news:
            return self.news.wait_for(lambda: bool(self.woken) and self.woken[-1] >= moment, timeout=10)


@contextmanager
def watched() -> Iterator[Watched]:
    it = Watched()
    it.watch.start()
    try:
        yield it
    finally:
        it.watch.stop()
        it.sender.close()
        it.receiver.close()


def test_hints_in_a_stream_are_taken_together() -> None:
    with watched() as it:
        for _ in range(2000):
            last = time.monotonic()
            it.sender.send(b"")  # waits while the receiver's buffer is full

        assert it.wait_for_wake_after(last)
        assert len(it.woken) < 1000


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10, 11, 12, 20, 50])
def test_last_hint_is_followed_by_a_wake_up(count: int) -> None:
    with watched() as it:
        for _ in range(20):
            for _ in range(count):
                sent = time.monotonic()
                it.sender.send(b"")
            assert it.wait_for_wake_after(sent)


def test_a_hint_after_a_stream_wakes_by_itself() -> None:
    with watched() as it:
        for _ in range(100):
            sent = time.monotonic()
            it.sender.send(b"")
        assert it.wait_for_wake_after(sent)
        for _ in range(5):
            time.sleep(0.01)
            sent = time.monotonic()
            it.sender.send(b"")
            assert it.wait_for_wake_after(sent)


def test_watch_ends_within_a_stream() -> None:
    with watched() as it:
        for _ in range(50):
            it.sender.send(b"")
        assert it.watch.stop()


def test_change_without_a_hint_is_noticed() -> None:
    with watched() as it:
        changed = time.monotonic()
        it.version += 1
        assert it.wait_for_wake_after(changed)
