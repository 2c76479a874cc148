"""Applying queue.yaml again when it changes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from deferlib.config import Runtime
from deferlib.errors import Error
from deferlib.queue_rows import FILE_ERROR

log = logging.getLogger("deferlib.engine")

_EVERY_SECONDS = 0.3

_Stamp = tuple[int, int, int] | None


class QueueFileWatch:
    """Applies the runtime's queue.yaml to the store whenever it has changed, and when `asked` is set; then calls *applied*.

    A file with a mistake changes nothing: the queues stay as they are until it is mended.
    """

    def __init__(self, runtime: Runtime, applied: Callable[[], None]) -> None:
        self.asked = False  # a plain flag: a signal handler sets it
        self._runtime = runtime
        self._applied = applied
        self._seen = self._stamp()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deferlib-queues", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def look(self) -> None:
        """Apply the file if it has changed since the last look."""
        stamp = self._stamp()
        if stamp == self._seen and not self.asked:
            return
        gone = stamp is None and self._seen is not None
        self._seen, self.asked = stamp, False
        if gone:  # it is being replaced, perhaps
            log.warning("queue.yaml is gone, and the queues stay as they are")
            return
        try:
            applied = self._runtime.apply_queues()
        except Error as error:
            log.error("the queues stay as they are: %s", error)
            self._note(str(error))
        else:
            self._applied()
            log.info("queue.yaml is applied%s", f"; resumed: {', '.join(applied.resumed)}" if applied.resumed else "")

    def _note(self, text: str) -> None:
        """Leave the file's error where `deferlib queues list` finds it."""
        try:
            self._runtime.store.run(lambda tx: tx.put_note(FILE_ERROR, text))
        except Error as error:  # of the store, which the engine tells of by itself
            log.debug("no note was left: %s", error)

    def _run(self) -> None:
        while not self._end.wait(_EVERY_SECONDS):
            self.look()

    def _stamp(self) -> _Stamp:
        try:
            path = self._runtime.queue_file()
            status = None if path is None else os.stat(path)
        except (Error, OSError):  # it is just being replaced, or gone
            return None
        return None if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)
