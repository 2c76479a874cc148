"""The engine of `deferlib dev`: in a thread of the parent, on the settings that the app reported."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from deferlib import config
from deferlib.cli.gate import Gate
from deferlib.cli.logs import log_to_stderr
from deferlib.cli.narrate import Narrator, Paper
from deferlib.cli.reload import QueueFileWatch
from deferlib.cli.show import count
from deferlib.core.model import SECOND, QueueConfig
from deferlib.engine.build import build
from deferlib.errors import Error, StoreError
from deferlib.settings import load_settings

if TYPE_CHECKING:
    from deferlib.engine.engine import Engine


class DevEngine:
    """An engine in a thread, on the settings that the app reported."""

    def __init__(self, report: dict[str, Any], url: str, paper: Paper, events: SimpleQueue[Any]) -> None:
        log_to_stderr("warning")
        queues = report["queues"]
        self.report = report
        self.runtime = config.Runtime(
            settings=load_settings({**report["settings"], "app": url}),
            given_queues=None if queues is None else [QueueConfig.from_json(text) for text in queues],
        )
        self.notes = self._notes()
        self.narrator: Narrator = Narrator(paper, self.runtime.ring, self.runtime.clock.now())
        self._gates: list[Gate] = []

        def around(transport: Any) -> Gate:
            self._gates.append(Gate(transport, url))
            return self._gates[0]

        # take_over: the app that a killed parent had died with it.
        self._engine: Engine = build(self.runtime, observer=self.narrator, around=around, take_over=True)
        self._events = events
        self._thread = threading.Thread(target=self._run, name="deferlib-engine", daemon=True)
        self._watch = self._watched()
        self._thread.start()

    @property
    def gate(self) -> Gate:
        return self._gates[0]

    @property
    def running(self) -> int:
        """How many calls are on their way."""
        return self._engine.in_flight

    def added(self, id: int) -> None:
        """Tell of a task that the app says it has added."""
        try:
            with self.runtime.store.read() as tx:
                rows = tx.find(None, [str(id)])
        except StoreError:  # the engine tells
            return
        for row in rows:
            if row.id == id and row.due is not None:
                self.narrator.queued(row, self.runtime.clock.now())

    def stop(self, grace: float) -> None:
        """End the engine: what runs has *grace* seconds to finish."""
        if self._watch is not None:
            self._watch.stop()
        self._engine.stop(round(grace * SECOND))
        self._thread.join()
        self._engine.close()
        self.runtime.close()
        self.narrator.tick()

    def _run(self) -> None:
        try:
            self._engine.run()
        except Error as error:
            self._events.put((None, {"engine": error}))

    def _watched(self) -> QueueFileWatch | None:
        if self.runtime.given_queues is not None:
            return None
        watch = QueueFileWatch(self.runtime, self._engine.reread)
        watch.start()
        return watch

    def _notes(self) -> list[str]:
        notes = []
        now = self.runtime.clock.now()
        store = self.runtime.store
        if store.served():
            notes.append("another engine serves this store too; it may take tasks from this one")
        with store.read() as tx:
            names = [row.name for row in tx.queues()]
            stats = tx.stats(now, names)
        waiting, dead = sum(each.tasks for each in stats), sum(each.dead for each in stats)
        if waiting:
            notes.append(f"{count(waiting, 'task')} from before in the store: `deferlib tasks list`")
        if dead:
            notes.append(f"{count(dead, 'dead letter')} from before: `deferlib tasks list --state dead`")
        return notes
