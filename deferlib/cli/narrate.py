"""One readable line for each thing that happens, for `deferlib dev`.

12:04:31  app.greet('Ada')            queued
12:04:31  app.greet('Ada')            ran in 12 ms
12:04:35  app.send_mail(7)            failed: ValueError: no such user; retry in 0.2 s
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from deferlib.call_text import call_text
from deferlib.cli.show import cut, padded, safe
from deferlib.cli.task_text import shown_url
from deferlib.core.model import SECOND, Action, Claim, Kind, Micros, Outcome, Result, TaskRow
from deferlib.engine.observer import describe, length
from deferlib.keys import Keyring
from deferlib.payload import Binding

_SUBJECT = 34  # columns of what a line is about, at least
_KNOWN = 100_000  # tasks whose adding was told
_BURST = 40  # lines a second about what goes well; more would be a blur

_printing = threading.Lock()

_DIM, _GREEN, _YELLOW, _RED, _BOLD = 2, 32, 33, 31, 1


class Paper:
    """Where lines are written: a terminal with its width and colours, or a file without."""

    def __init__(self) -> None:
        tty = sys.stdout is not None and sys.stdout.isatty()
        self._width = shutil.get_terminal_size((100, 24)).columns if tty else None
        self._coloured = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def line(self, subject: str, text: str, colour: int = 0) -> None:
        """Write what happened to *subject*, with the time of day before it."""
        width = _SUBJECT
        if self._width is not None:
            width = max(_SUBJECT, self._width - 10 - 2 - 24)
            subject = cut(safe(subject), width)
            width = min(width, _SUBJECT)
        self.write(f"{time.strftime('%H:%M:%S')}  {padded(safe(subject), width)}  {self.coloured(safe(text), colour)}")

    def coloured(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour and self._coloured else text

    def bold(self, text: str) -> str:
        return self.coloured(text, _BOLD)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError), _printing:  # whoever read it has gone
            sys.stdout.write(f"{text}\n")  # in one piece: other threads, and the app's process, write there too
            sys.stdout.flush()


class _Event(NamedTuple):
    text: str
    colour: int
    counted: str = ""  # as what it may be counted instead of shown; '' for never


class Narrator:
    """Tells what becomes of tasks. From any thread; also an engine's observer."""

    def __init__(self, paper: Paper, ring: Keyring, now: Micros) -> None:
        self._paper = paper
        self._ring = ring
        self._began = now
        self._lock = threading.Lock()
        self._known: dict[int, None] = {}  # tasks that were told to be queued, in order
        self._second = 0
        self._lines = 0
        self._counted: dict[str, int] = {}

    def queued(self, row: TaskRow, now: Micros) -> None:
        """Tell that a task was added."""
        with self._lock:
            if self._first(row.id):
                wait = row.eta - now
                text = f"queued: runs in {length(round(wait / SECOND) * SECOND)}" if wait >= SECOND else "queued"
                self._tell(self._subject(row), _Event(text, _DIM, "queued"))

    def ended(self, now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        with self._lock:
            subject = self._subject(claim)
            if self._first(claim.id) and claim.created > self._began:  # its adder's word of it comes later than its end
                self._tell(subject, _Event("queued", _DIM, "queued"))
            self._tell(subject, _ending(now, claim, result, outcome))

    def tick(self) -> None:
        """Tell how much was only counted."""
        with self._lock:
            self._sum_up()

    def _first(self, id: int) -> bool:
        if id in self._known:
            return False
        self._known[id] = None
        if len(self._known) > _KNOWN:
            del self._known[next(iter(self._known))]
        return True

    def _subject(self, task: TaskRow | Claim) -> str:
        binding = Binding(task.id, task.name or "", task.queue, task.url, task.namespace)
        text = call_text(task.body, self._ring, binding) or f"{task.method} {shown_url(task.url)}".rstrip()
        return text if task.queue == "default" else f"{task.queue}: {text}"

    def _tell(self, subject: str, event: _Event) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._sum_up()
            self._second, self._lines = second, 0
        self._lines += 1
        if event.counted and self._lines > _BURST:
            self._counted[event.counted] = self._counted.get(event.counted, 0) + 1
            return
        self._paper.line(subject, event.text, event.colour)

    def _sum_up(self) -> None:
        if self._counted:
            counts = ", ".join(f"{count:,} {word}" for word, count in self._counted.items())
            self._paper.line("… and more", counts, _DIM)
            self._counted = {}


def _ending(now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> _Event:
    ending = describe(now, claim, result, outcome)
    match outcome.action:
        case Action.DONE:
            return _Event(ending.text, _GREEN, "ran")
        case Action.DEAD:
            return _Event(f"{ending.text} · deferlib tasks show {claim.public_name}", _RED)
    counted = "given back" if result is not None and result.kind is Kind.UNSENT else ""
    return _Event(ending.text, _YELLOW if ending.level >= logging.WARNING else _DIM, counted)
