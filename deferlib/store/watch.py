"""A watch: a thread that turns hints from other processes, and changes that sent none, into calls of `wake`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger("deferlib.store")

POLL_SECONDS = 0.5  # how late a missed hint is noticed; one `pragma data_version` costs 3 µs
# Hints within a millisecond of each other are a stream: from the eighth on, those of each 4 ms are one. A wake-up
# for each takes the core from whoever adds tasks: 1,900 a second beside an engine, so 2,500.
_STREAM = 8
_QUICK_SECONDS = 0.001
_GATHER_SECONDS = 0.004
_MOST = 1000  # hints taken at once


class Watch:
    """Calls *wake* when *receiver* has a datagram or *version* has changed. Belongs to the process that made it.

    *version* may be called from the thread, and must not raise.
    """

    def __init__(self, wake: Callable[[], None], receiver: socket.socket | None, version: Callable[[], object]) -> None:
        self._wake, self._receiver, self._version = wake, receiver, version
        self._seen: object = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deferlib-watch", daemon=True)
        self._process = os.getpid()
        if receiver is not None:
            receiver.settimeout(POLL_SECONDS)

    def start(self) -> None:
        self._seen = self._version()  # here: the thread may first get to it after a commit that nobody hints at
        self._thread.start()

    def wake(self) -> None:
        """Call the watcher's function. Its failure is its own: it fails neither the commit before it nor the thread."""
        try:
            self._wake()
        except Exception:
            log.exception("a watcher of the store failed")

    def stop(self) -> bool:
        """End the thread, and tell whether it was ours: a forked child has none, and must let the parent's socket be."""
        if os.getpid() != self._process:
            return False
        self._stop.set()
        if self._receiver is not None:
            # Not by shutdown: it makes a datagram socket readable with nothing to read, and Python spins on that.
            with contextlib.suppress(OSError):
                self._receiver.sendto(b"", socket.MSG_DONTWAIT, self._receiver.getsockname())
        if self._thread.ident is not None:
            self._thread.join()
        return True

    def abandon(self) -> None:
        """Give up a forked child's copy of the socket, so that it doesn't outlive the parent's."""
        if self._receiver is not None:
            self._receiver.close()

    def _run(self) -> None:
        seen = self._seen
        last, quick = 0.0, 0
        while not self._stop.is_set():
            if self._hinted():
                self.wake()
                now = time.monotonic()
                quick, last = quick + 1 if now - last < _QUICK_SECONDS else 0, now
                if quick >= _STREAM:
                    self._gather()
                    quick = 0
            elif not self._stop.is_set() and (version := self._version()) != seen:
                seen = version
                self.wake()

    def _gather(self) -> None:
        """Take hints together while they come in a stream. Each is followed by a wake-up, if not one of its own."""
        more = 2
        while more > 1 and not self._stop.wait(_GATHER_SECONDS):
            more = self._drained()
            if more:
                self.wake()

    def _drained(self) -> int:
        """Take the hints that are there; return how many."""
        assert self._receiver is not None
        taken = 0
        with contextlib.suppress(OSError):  # none is left
            while taken < _MOST and not self._stop.is_set():
                os.read(self._receiver.fileno(), 1)  # `recv` would wait for the socket's timeout
                taken += 1
        return taken

    def _hinted(self) -> bool:
        if self._receiver is None:
            self._stop.wait(POLL_SECONDS)
            return False
        try:
            self._receiver.recv(1)
        except TimeoutError:
            return False
        except OSError:  # not ours to repair: the poll must do, without spinning
            self._stop.wait(POLL_SECONDS)
            return False
        return not self._stop.is_set()
