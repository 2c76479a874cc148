"""The calls of a batch on their way: one after the other, unless one of them takes long.

What goes together has been quick lately. Where one isn't after all, those behind it don't wait for its end: after a moment
another thread goes on with them, if the server has several; else they are sent again as soon as it has ended.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextvars import copy_context

from deferlib.batch import PATIENCE, Batch, Part, Told
from deferlib.clock import Clock
from deferlib.context import Dispatch
from deferlib.core.model import SECOND, Micros

LOOK = PATIENCE / SECOND  # seconds between two looks for calls that hold up others
HELPERS = 4  # threads that go on with the calls of one batch
ALL_HELPERS = 32  # in this process


class Series:
    """The calls of *batch*, each taken once, by whichever thread; *clock* is this process's."""

    __slots__ = ("_batch", "_began", "_clock", "_left", "_offset", "answers")

    def __init__(self, batch: Batch, clock: Clock) -> None:
        self._batch = batch
        self._clock = clock
        self._left = deque(enumerate(batch.parts))
        self._began = clock.now()
        self._offset = batch.sent - self._began  # between the engine's clock and this one
        self.answers: list[Told | None] = [None] * len(batch.parts)

    @property
    def waiting(self) -> int:
        """How many calls nobody has taken."""
        return len(self._left)

    def take(self, *, late: bool = False) -> tuple[int, Part, Dispatch, Micros] | None:
        """Return the next call: its place, itself, what is vouched for of it, and the time; None if there is none.

        There is none, either, once the batch has taken long, unless *late*: they are sent again.
        """
        now = self._clock.now()
        if not late and now - self._began > PATIENCE:
            self._left.clear()
        try:
            place, part = self._left.popleft()
        except IndexError:
            return None
        return place, part, part.dispatch(self._batch.url, now + self._offset, self._clock), now

    def tell(self, place: int, began: Micros, status: int, outcome: str, text: str) -> None:
        """Take what became of a call that was taken at *began*."""
        self.answers[place] = Told(status, outcome, self._clock.now() - began, text)


class Relay:
    """Runs a series: *perform* is called for each of its calls, in a copy of the present context."""

    __slots__ = ("_context", "_perform", "error", "helpers", "series", "taken")

    def __init__(self, series: Series, perform: Callable[[Part, Dispatch], tuple[int, str, str]]) -> None:
        self.series = series
        self.helpers: list[threading.Thread] = []
        self.error: BaseException | None = None  # that ended a helper: no failure of a call ends one
        self.taken = 0
        self._perform = perform
        self._context = copy_context()

    def run(self, *, threads: bool) -> list[Told | None]:
        """Run all calls, and say what became of each. With *threads* others may take over what a long one holds up."""
        if not threads or self.series.waiting < 2:
            self.work()
            return self.series.answers
        _watcher.add(self)
        try:
            self.work()
        finally:
            _watcher.remove(self)  # from here on no helper comes
        for helper in self.helpers:
            helper.join()
        if self.error is not None:  # what it ran would count as not begun
            raise self.error
        return self.series.answers

    def work(self, *, late: bool = False) -> None:
        """Run calls until there are none."""
        while (taken := self.series.take(late=late)) is not None:
            self.taken += 1
            place, part, dispatch, began = taken
            self.series.tell(place, began, *self._context.copy().run(self._perform, part, dispatch))


class _Watcher:
    """Sees to it that no call holds up the others of its batch for long: one thread, while there are batches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._relays: dict[Relay, int] = {}  # and how many calls each had begun when it was looked at
        self._busy = threading.Event()
        self._never = threading.Event()
        self._thread: threading.Thread | None = None
        self._helpers = 0

    def add(self, relay: Relay) -> None:
        with self._lock:
            self._relays[relay] = -1
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deferlib-batches", daemon=True)
                self._thread.start()
        if not self._busy.is_set():
            self._busy.set()

    def remove(self, relay: Relay) -> None:
        with self._lock:
            self._relays.pop(relay, None)

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            self._never.wait(LOOK)
            with self._lock:
                if not self._relays:
                    self._busy.clear()
                for relay, taken in self._relays.items():
                    if relay.taken == taken and relay.series.waiting:
                        self._help(relay)
                    self._relays[relay] = relay.taken

    def _help(self, relay: Relay) -> None:
        if len(relay.helpers) < HELPERS and self._helpers < ALL_HELPERS:
            self._helpers += 1
            helper = threading.Thread(target=self._work, args=(relay,), name="deferlib-batch", daemon=True)
            helper.start()
            relay.helpers.append(helper)

    def _work(self, relay: Relay) -> None:
        try:
            relay.work(late=True)
        except BaseException as error:
            relay.error = error
        finally:
            with self._lock:
                self._helpers -= 1


def _reset() -> None:
    """Begin anew in a forked child, which has none of the threads."""
    global _watcher
    _watcher = _Watcher()


_watcher = _Watcher()
os.register_at_fork(after_in_child=_reset)
