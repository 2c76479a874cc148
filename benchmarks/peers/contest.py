"""The measures that every contender goes through, the same for all."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.peers import servers
from benchmarks.peers.arena import Arena, Stores, arena
from benchmarks.peers.contenders import Contender
from benchmarks.peers.environment import Peers
from benchmarks.stage import import_milliseconds, percentile

WARM = 0.2  # the share of a drain that isn't measured: workers start, pools and caches fill
_ENQUEUE_SECONDS = 1.5
_BULK = 1000
_MIXED = 20_000
_MIXED_SECONDS = 8.0
_LATENCIES = 150
_LATENCY_SECONDS = 6.0
_PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of it: the whole, or a quick look."""

    rounds: int = 3
    share: float = 1.0  # of each contender's tasks
    scheduled: int = 100_000
    patience: float = _PATIENCE


@dataclass(slots=True, kw_only=True)
class Figures:
    """What was measured of one contender; None: not measured."""

    contender: Contender
    enqueue: float | None = None  # a second
    bulk: float | None = None
    drain: float | None = None
    cpu: float | None = None  # microseconds of the workers a task
    mixed: float | None = None
    p50: float | None = None  # milliseconds
    p99: float | None = None
    scheduled: float | None = None  # the drain with tasks scheduled in the future
    first: float | None = None  # seconds until the first of them ran, from the start of the workers
    imported: float | None = None  # milliseconds
    notes: list[str] = field(default_factory=list)


def compete(contender: Contender, peers: Peers, stores: Stores, effort: Effort, say: Callable[[str], None]) -> Figures:
    """Measure one contender; what fails is noted in its figures, and the others go on."""
    figures = Figures(contender=contender)
    if contender.package and contender.package not in peers.versions:
        figures.notes.append(f"not installed: {peers.missing.get(contender.package, 'pip gave no reason')}")
        return figures
    try:
        _bulk(figures, peers, stores)
        _rounds(figures, peers, stores, effort)
        if contender.schedules:
            _scheduled(figures, peers, stores, effort)
    except servers.NoServerError as error:
        figures.notes.append(str(error))
        return figures
    except Exception as error:  # a peer that breaks breaks only its own row
        figures.notes.append(f"{type(error).__name__}: {error}")
    say(_line(figures))
    return figures


def imported(figures: Figures, peers: Peers, times: int) -> None:
    """Measure what importing the package costs."""
    contender = figures.contender
    if contender.package in ("", *peers.versions):
        python = peers.python if contender.package else sys.executable
        figures.imported = import_milliseconds(python, contender.imports, times)


def _bulk(figures: Figures, peers: Peers, stores: Stores) -> None:
    """Adds of a thousand, where there is a call for that, without workers: what they add isn't run."""
    with arena(figures.contender, peers, stores) as it:
        if it.producer.call("has", "bulk")[0]:
            figures.bulk = _BULK / statistics.median(it.producer.call("bulk", _BULK)[1] for _ in range(3))


def _rounds(figures: Figures, peers: Peers, stores: Stores, effort: Effort) -> None:
    contender = figures.contender
    count = max(200, round(contender.tasks * effort.share))
    enqueued, drained, cpu, mixed = [], [], [], []
    quick = True
    for number in range(effort.rounds):
        with arena(contender, peers, stores) as it:
            has_bulk, _ = it.producer.call("has", "bulk")
            added, took = it.producer.call("enqueue_for", _ENQUEUE_SECONDS, count)
            enqueued.append(added / took)
            figures.enqueue = statistics.median(enqueued)
            added += _fill(it, count - added, bulk=has_bulk)
            it.start()
            rate, cost = _drain(it, added, effort.patience)
            drained.append(rate)
            cpu.append(cost)
            figures.drain, figures.cpu = statistics.median(drained), statistics.median(cpu)
            if number == 0 or quick:
                together, took = _mixed(it, min(round(_MIXED * effort.share), 2 * count), effort.patience)
                mixed.append(together)
                figures.mixed, quick = statistics.median(mixed), took < _MIXED_SECONDS / 2
            if number == 0:
                delays = sorted(_latencies(it))
                figures.p50, figures.p99 = percentile(delays, 0.5) * 1000, percentile(delays, 0.99) * 1000


def _fill(it: Arena, count: int, *, bulk: bool) -> int:
    """Add the rest of *count* tasks, in bulk where that can be done; return how many."""
    if count <= 0:
        return 0
    if not bulk:
        it.producer.call("enqueue", count)
        return count
    for done in range(0, count, _BULK):
        it.producer.call("bulk", min(_BULK, count - done))
    return count


def _drain(it: Arena, count: int, patience: float) -> tuple[float, float]:
    """Return tasks a second and CPU microseconds a task of the workers, once they are warm."""
    it.wait_ran(round(count * WARM), patience)
    ran, cpu, started = it.ran, it.cpu(), time.perf_counter()
    it.wait_ran(count, patience)
    elapsed, cpu = time.perf_counter() - started, it.cpu() - cpu
    return (count - ran) / elapsed, cpu / (count - ran) * 1e6


def _mixed(it: Arena, most: int, patience: float) -> tuple[float, float]:
    """Return tasks a second, and the seconds, from the first enqueueing to the last run, with everybody at full speed.

    As many tasks as are added one by one within some seconds, at most *most*.
    """
    before, started = it.ran, time.perf_counter()
    added, _ = it.producer.call("enqueue_for", _MIXED_SECONDS, most)
    it.wait_ran(before + added, patience)
    took = time.perf_counter() - started
    return added / took, took


def _latencies(it: Arena) -> list[float]:
    """Return the seconds from the call of the enqueueing function to the start of the task, on an idle system."""
    jitter, until = random.Random(1), time.monotonic() + _LATENCY_SECONDS
    time.sleep(0.5)
    for number in range(_LATENCIES + 1):
        before = it.ran
        it.producer.call("stamp")
        it.wait_ran(before + 1, 30, pause=0.001)
        time.sleep(jitter.uniform(0.005, 0.02))
        if time.monotonic() > until and number > 10:
            break
    return [float(line) for line in it.notes()[1:]]  # the first one imports and connects


def _scheduled(figures: Figures, peers: Peers, stores: Stores, effort: Effort) -> None:
    """The drain again, with many tasks waiting for their time; the workers start with both there."""
    contender = figures.contender
    count = max(200, round(contender.tasks * effort.share))
    with arena(contender, peers, stores) as it:
        it.producer.call("later", effort.scheduled)
        added = _fill(it, count, bulk=it.producer.call("has", "bulk")[0])
        started = time.perf_counter()
        it.start()
        try:
            it.wait_ran(1, effort.patience)
            figures.first = time.perf_counter() - started
            figures.scheduled, _ = _drain(it, added, effort.patience)
        except TimeoutError:
            figures.notes.append(
                f"with {effort.scheduled:,} tasks scheduled, {it.ran:,} of {added:,} had run after "
                f"{time.perf_counter() - started:.0f} s"
            )


def _line(figures: Figures) -> str:
    def number(value: float | None, text: str) -> str:
        return "-" if value is None else format(value, text)

    parts = [
        f"{figures.contender.title:60}",
        f"enqueue {number(figures.enqueue, ',.0f')}/s",
        f"drain {number(figures.drain, ',.0f')}/s",
        f"{number(figures.cpu, ',.0f')} us",
        f"mixed {number(figures.mixed, ',.0f')}/s",
        f"p50 {number(figures.p50, '.2f')} ms",
    ]
    return ", ".join(parts) + "".join(f"; {note}" for note in figures.notes)
