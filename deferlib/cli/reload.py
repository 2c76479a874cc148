"""Applying queue.yaml again when it changes."""

from __future__ import annotations

import logging
import os
import threading

from deferlib.config import Runtime
from deferlib.core.model import QueueSource
from deferlib.errors import Error

log = logging.getLogger("deferlib.engine")

_EVERY_SECONDS = 1.0

_Stamp = tuple[int, int, int] | None


class QueueFileWatch:
    """Applies the runtime's queue.yaml to the store whenever it has changed, and when `asked` is set.

    A file with a mistake changes nothing: the queues stay as they are until it is mended.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.asked = False  # a plain flag: a signal handler sets it
        self._runtime = runtime
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
        self._seen, self.asked = stamp, False
        try:
            configs = self._runtime.queues()
            self._runtime.store.run(lambda tx: tx.put_queues(configs, QueueSource.FILE))
        except Error as error:
            log.error("the queues stay as they are: %s", error)
        else:
            log.info("%d queues applied from queue.yaml", len(configs))

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
