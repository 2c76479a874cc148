"""A watch: a thread that turns hints from other processes, and changes that sent none, into calls of `wake`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable

log = logging.getLogger("deferlib.store")

POLL_SECONDS = 0.5  # how late a missed hint is noticed; one `pragma data_version` costs 3 µs


class Watch:
    """Calls *wake* when *receiver* has a datagram or *version* has changed. Belongs to the process that made it.

    *version* may be called from the thread, and must not raise.
    """

    def __init__(self, wake: Callable[[], None], receiver: socket.socket | None, version: Callable[[], object]) -> None:
        self._wake, self._receiver, self._version = wake, receiver, version
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deferlib-watch", daemon=True)
        self._process = os.getpid()
        if receiver is not None:
            receiver.settimeout(POLL_SECONDS)

    def start(self) -> None:
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
        seen = self._version()
        while not self._stop.is_set():
            if self._hinted():
                self.wake()
            elif not self._stop.is_set() and (now := self._version()) != seen:
                seen = now
                self.wake()

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
