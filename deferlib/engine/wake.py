"""Waiting for descriptors, and a wake-up that can be waited for like one."""

from __future__ import annotations

import os
import select
import selectors
import sys
import threading
from contextlib import suppress
from typing import Protocol

IN, OUT = 1, 4  # a poller's events: EPOLLIN and EPOLLOUT, POLLIN and POLLOUT

_ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd takes; a pipe takes anything


class Waker:
    """A flag with a file descriptor that is readable while the flag is set.

    Any thread and any signal handler may `wake`; one thread waits for `fileno` and calls `clear`. Wakes are coalesced:
    a thousand of them before one `clear` cost one system call. After `close` a late wake does nothing.
    """

    __slots__ = ("_lock", "_reader", "_set", "_writer")

    def __init__(self) -> None:
        if sys.platform == "linux":
            self._reader = self._writer = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._reader, False)
            os.set_blocking(self._writer, False)
        self._set = False
        # Orders a wake against `clear`, and keeps it from writing into a descriptor that `close` has just given back
        # and somebody else reuses, perhaps for a database. Reentrant, because a signal handler may interrupt a wake of
        # its own thread; nobody blocks while holding it.
        self._lock = threading.RLock()

    def wake(self) -> None:
        """Make `fileno` readable until the next `clear`."""
        if self._set:  # 0.05 µs, against 0.6 for the rest
            return
        with self._lock:
            if self._writer >= 0:
                os.write(self._writer, _ONE)
                self._set = True  # last: interrupted between the two, the next wake just writes once more

    @property
    def is_set(self) -> bool:
        """Whether a wake has come since the last `clear`."""
        return self._set

    def clear(self) -> None:
        """Take the wakes so far; what they announced is to be looked at after this, not before.

        No wake is lost: one that finds the flag still set came before this returns, so the look that follows sees what
        it announced, and one that finds it unset writes.
        """
        with self._lock:
            if self._reader >= 0:
                with suppress(BlockingIOError):
                    os.read(self._reader, 4096)
            self._set = False  # last: unset first, a signal's wake would set it again and have its byte eaten

    def fileno(self) -> int:
        """Return the descriptor to watch for reading; -1 once closed."""
        return self._reader

    def close(self) -> None:
        """Give the descriptor back. May be called again."""
        with self._lock:
            descriptors = {self._reader, self._writer} - {-1}
            self._reader = self._writer = -1
            for descriptor in descriptors:
                os.close(descriptor)


def new_poller() -> Poller:
    """Return the leanest poller there is: `select.epoll` costs a third of a selector."""
    return select.epoll() if hasattr(select, "epoll") else SelectorPoller()


class Poller(Protocol):
    """What is used of `select.epoll`."""

    def register(self, fd: int, eventmask: int, /) -> None: ...
    def modify(self, fd: int, eventmask: int, /) -> None: ...
    def unregister(self, fd: int, /) -> None: ...
    def poll(self, timeout: float, maxevents: int, /) -> list[tuple[int, int]]: ...
    def close(self) -> None: ...


class SelectorPoller:
    """The best of the platform's selectors (kqueue, on macOS) behind the methods of `select.epoll`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, eventmask: int, /) -> None:
        self._selector.register(fd, eventmask & IN | (eventmask & OUT) >> 1)

    def modify(self, fd: int, eventmask: int, /) -> None:
        self._selector.modify(fd, eventmask & IN | (eventmask & OUT) >> 1)

    def unregister(self, fd: int, /) -> None:
        self._selector.unregister(fd)

    def poll(self, timeout: float, maxevents: int, /) -> list[tuple[int, int]]:
        ready = self._selector.select(timeout)
        return [(key.fd, events & IN | (events & selectors.EVENT_WRITE) << 1) for key, events in ready]

    def close(self) -> None:
        self._selector.close()
