"""What an engine counts, and how Prometheus is told of it.

The engine's thread counts into plain integers (`Metrics`): `prometheus_client`'s own histograms cost 2 to 4 µs an
observation, and there are two for each task. A scrape, in a thread of the operator port, makes families of them
(`Exposition`) and reads the queues through a connection of its own (`QueueNumbers`), so that no turn waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from deferlib import config
from deferlib.core.model import SECOND, Action, Claim, Kind, Micros, Mode, Outcome, QueueRow, QueueStats, Result
from deferlib.engine.observer import Observer
from deferlib.errors import ConfigError, Error, StoreError
from deferlib.store import Store

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.metrics_core import Metric

    from deferlib.engine.engine import Engine

log = logging.getLogger("deferlib.engine")

# In seconds, the last one open. A task that waits for an hour, or runs for ten minutes, is in trouble either way.
DELAYS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
RUNS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TURNS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

OUTCOMES = {Action.DONE: "done", Action.RETRY: "retried", Action.DEAD: "dead", Action.RELEASE: "released"}
LOST = "lost"
DEFAULT, OTHER = "default", "other"  # targets
_NEVER_THERE = (Kind.UNSENT, Kind.UNREACHABLE)  # the target never had the request: nothing has started
_FRESH = 1.0  # seconds for which the queues' numbers are kept
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_MISSING = (
    "the setting 'port' opens the engine's metrics, and they need prometheus-client, which isn't installed: "
    "`pip install 'deferlib[metrics]'`, or leave the port out"
)


class Histogram:
    """Counts of spans of time, in buckets. One thread adds; any may read."""

    __slots__ = ("_bounds", "counts", "labels", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.labels = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        self.counts = [0] * len(self.labels)
        self.total: Micros = 0
        self._bounds = [round(bound * SECOND) for bound in bounds]

    def add(self, span: Micros) -> None:
        self.counts[bisect_left(self._bounds, span)] += 1
        self.total += span

    def buckets(self) -> list[tuple[str, float]]:
        """Return each upper bound with the count of what doesn't exceed it."""
        return list(zip(self.labels, map(float, accumulate(list(self.counts))), strict=True))


class _Queue:
    """What is counted of one queue."""

    __slots__ = ("attempts", "delays", "lost", "runs")

    def __init__(self) -> None:
        self.attempts = dict.fromkeys(OUTCOMES, 0)
        self.lost = 0
        self.delays = Histogram(DELAYS)
        self.runs = Histogram(RUNS)


class Metrics:
    """Counts what an engine does: its `Observer`, which hands everything on to *then*, and its `Monitor`.

    Times between turns are by *monotonic*, in seconds.
    """

    def __init__(self, then: Observer, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.queues: dict[str, _Queue] = {}
        self.turns = Histogram(TURNS)
        self.failures = {"store": 0, "other": 0}  # turns, by what failed them
        self.last_turn: float | None = None  # when the last one ended
        self.failed = ""  # what failed the last one: a key of `failures`
        self.thread: threading.Thread | None = None  # that makes them
        self.monotonic = monotonic
        self._then = then
        self._began = 0.0

    # --- the observer -----------------------------------------------------------------------------------------------

    def ended(self, now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        queue = self.queues.get(claim.queue) or self.known(claim.queue)
        if outcome.action in queue.attempts:
            queue.attempts[outcome.action] += 1
        if result is not None and result.kind not in _NEVER_THERE:
            started = result.started
            queue.delays.add(max(started - claim.eta, 0))
            queue.runs.add(max(result.ended - started, 0))  # a clock may go back
        self._then.ended(now, claim, result, outcome)

    def known(self, name: str) -> _Queue:
        """Return what is counted of a queue, from 0: a counter that began with 1 would hide that. From any thread."""
        return self.queues.setdefault(name, _Queue())

    # --- the monitor ------------------------------------------------------------------------------------------------

    def __enter__(self) -> None:
        self.thread = threading.current_thread()
        self._began = self.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        now = self.monotonic()
        self.turns.add(round((now - self._began) * SECOND))
        self.failed = ""
        if error is not None:
            self.failed = "store" if isinstance(error, StoreError) else "other"
            self.failures[self.failed] += 1
        self.last_turn = now

    def lost(self, claim: Claim) -> None:
        queue = self.queues.get(claim.queue) or self.known(claim.queue)
        queue.lost += 1


class Numbers(NamedTuple):
    """What the store says of its queues."""

    at: Micros
    queues: list[tuple[QueueRow, QueueStats]]


class QueueNumbers:
    """The numbers of a runtime's queues, read at most once a second, through a connection that no turn uses.

    A store in memory has but one connection, and one that `configure` was given may have no file: then it is that store's.
    """

    def __init__(self, runtime: config.Runtime, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._runtime = runtime
        self._monotonic = monotonic
        path = runtime.store_path
        self._own: Store | None = None if path is None else config.connect(f"sqlite:///{path}")
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._known: Numbers | None = None
        self._closed = False

    def read(self) -> Numbers | None:
        """Return the numbers; None if the store can't be read."""
        with self._lock:
            if not self._closed and self._monotonic() - self._read_at >= _FRESH:
                try:
                    self._known = self._fetch()
                except Error:  # the engine tells of it
                    self._known = None
                self._read_at = self._monotonic()
            return self._known

    def _fetch(self) -> Numbers:
        now = self._runtime.clock.now()
        with (self._own or self._runtime.store).read() as tx:
            rows = tx.queues()
            stats = tx.stats(now, [row.name for row in rows])
        return Numbers(now, list(zip(rows, stats, strict=True)))

    def close(self) -> None:
        """Close its connection, and read no more."""
        with self._lock:
            self._closed = True
            if self._own is not None:
                self._own.close()


class Exposition:
    """Metrics as Prometheus reads them: those of an engine, of its store's queues, and of this process.

    Those of the process are `prometheus_client`'s default registry: with an app in the process, the app's own too.
    `ConfigError` if `prometheus_client` isn't installed.
    """

    content_type = _TEXT

    def __init__(self, metrics: Metrics, numbers: QueueNumbers, names: Mapping[str, str]) -> None:
        try:
            from prometheus_client import CollectorRegistry
            from prometheus_client import core as families
        except ImportError:
            raise ConfigError(_MISSING) from None
        self._metrics = metrics
        self._numbers = numbers
        self._names = names
        self._families = families
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._told = False
        self.engine: Engine | None = None

    def text(self) -> bytes:
        """Return all of it as text."""
        from prometheus_client import REGISTRY, generate_latest

        own = generate_latest(self._registry)
        try:
            return own + generate_latest(REGISTRY)
        except Exception as error:  # a collector of the app's
            if not self._told:
                self._told = True
                log.error("the metrics of the process are left out: one of its collectors failed: %r", error)
            return own

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's families: what `prometheus_client` asks of a collector."""
        numbers = self._numbers.read()
        for row, _ in numbers.queues if numbers is not None else ():
            if row.config.mode is Mode.PUSH:
                self._metrics.known(row.name)
        yield from self._of_attempts()
        yield from self._of_engine()
        yield from self._of_queues(numbers)

    def _of_attempts(self) -> Iterator[Metric]:
        attempts = self._counter("deferlib_attempts", "Attempts, by what became of them.", "queue", "outcome")
        delays = self._histogram("deferlib_start_delay_seconds", "From when a task was due to its start.", "queue")
        runs = self._histogram("deferlib_run_seconds", "How long attempts ran.", "queue")
        for name, queue in sorted(list(self._metrics.queues.items())):  # the list in one step: the engine adds queues
            for action, outcome in OUTCOMES.items():
                attempts.add_metric([name, outcome], queue.attempts[action])
            attempts.add_metric([name, LOST], queue.lost)
            delays.add_metric([name], queue.delays.buckets(), queue.delays.total / SECOND)
            runs.add_metric([name], queue.runs.buckets(), queue.runs.total / SECOND)
        yield from (attempts, delays, runs)

    def _of_engine(self) -> Iterator[Metric]:
        turns = self._histogram("deferlib_turn_seconds", "How long the engine's turns took.")
        turns.add_metric([], self._metrics.turns.buckets(), self._metrics.turns.total / SECOND)
        failures = self._counter("deferlib_turn_failures", "Turns that failed: their transaction, or else.", "kind")
        for kind, count in self._metrics.failures.items():
            failures.add_metric([kind], count)
        yield from (turns, failures)
        if self.engine is None:
            return
        fenced = self._counter("deferlib_fenced_settles", "Settles that came too late: the lease was lost.")
        fenced.add_metric([], self.engine.fenced)
        flying = self._gauge("deferlib_in_flight", "Attempts of this engine that run now.", "target")
        targets = dict.fromkeys(self._names.values(), 0)
        for base, count in self.engine.in_flight_by_base.items():
            name = self._names.get(base, OTHER)
            targets[name] = targets.get(name, 0) + count
        for name, count in targets.items():
            flying.add_metric([name], count)
        yield from (fenced, flying)

    def _of_queues(self, numbers: Numbers | None) -> Iterator[Metric]:
        up = self._gauge("deferlib_store_up", "1 if the queues could be read, else 0.")
        up.add_metric([], numbers is not None)
        yield up
        if numbers is None:
            return
        tasks = self._gauge("deferlib_queue_tasks", "Tasks that wait or run, scheduled ones included.", "queue")
        dead = self._gauge("deferlib_queue_dead_letters", "Dead letters that are kept.", "queue")
        age = self._gauge("deferlib_queue_oldest_due_seconds", "How long ago the oldest waiting task was due.", "queue")
        flying = self._gauge("deferlib_queue_in_flight", "Attempts that run now, of all engines.", "queue")
        paused = self._gauge("deferlib_queue_paused", "1 if the queue is paused, or its rate is 0.", "queue")
        disabled = self._gauge("deferlib_queue_disabled", "1 if the queue has left queue.yaml.", "queue")
        for row, stats in numbers.queues:
            label = [row.name]
            tasks.add_metric(label, stats.tasks)
            dead.add_metric(label, stats.dead)
            overdue = 0 if stats.oldest_due is None else max(numbers.at - stats.oldest_due, 0)
            age.add_metric(label, overdue / SECOND)
            flying.add_metric(label, stats.in_flight)
            paused.add_metric(label, row.paused or row.config.rate == 0)
            disabled.add_metric(label, row.disabled)
        yield from (tasks, dead, age, flying, paused, disabled)

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return self._families.CounterMetricFamily(name, text, labels=labels)

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return self._families.GaugeMetricFamily(name, text, labels=labels)

    def _histogram(self, name: str, text: str, *labels: str) -> HistogramMetricFamily:
        return self._families.HistogramMetricFamily(name, text, labels=labels)


def target_names(runtime: config.Runtime) -> Mapping[str, str]:
    """Return the labels of base URLs: a configured target's name, or `default`. Any other URL's is `OTHER`.

    Because a template of targets, and absolute URLs, can name any number of hosts, and each would stay in Prometheus.
    """
    names = {base: name for name, base in runtime.targets.names.items()}
    return {**names, runtime.settings["app"]: DEFAULT, "": DEFAULT}
