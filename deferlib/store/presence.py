"""Whether an engine serves a store: a lock on a file beside it, which the kernel drops with the process that holds it.

Engines share the lock. Whoever can have it alone knows that no engine is alive, and so that every lease was left behind by
one that was killed. No heartbeat: an idle engine writes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator


class Presence:
    """The engines' lock of the store at *path*."""

    def __init__(self, path: str) -> None:
        self._path = f"{path}.engine"
        self._held: set[int] = set()

    @contextlib.contextmanager
    def serving(self, first: Callable[[], None]) -> Iterator[None]:
        """Show that an engine serves the store while the block lasts; before it, call *first* if no other one does.

        No other engine starts while *first* works, because it is called under the exclusive lock; and none that found us
        under it takes us for dead, because it waits for its shared one until we have ours.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # a folder that can't be written: the leases must do
            yield
            return
        self._held.add(descriptor)
        try:
            if _alone(descriptor):
                first()
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            if descriptor in self._held:  # a forked child has given its copy up
                self._held.discard(descriptor)
                os.close(descriptor)

    def served(self) -> bool:
        """Tell whether an engine serves the store now (20 µs)."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # no engine has ever served it
            return False
        try:
            return not _alone(descriptor)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Close a forked child's copies: with them it would keep the parent's lock after its death."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()


def _alone(descriptor: int) -> bool:
    """Take the lock alone, if nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
