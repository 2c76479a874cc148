"""What a full store costs: a million tasks due, a million scheduled, ten million used names, against a nearly empty one."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import deferlib
from benchmarks import app, stub
from benchmarks.filling import add_ready, make_store
from benchmarks.row import Row
from benchmarks.slow import server
from benchmarks.stage import cli_engine, fresh_store, percentile, resident_mb, scratch
from deferlib import config
from deferlib.core.model import Action, ClaimSpec, Outcome
from deferlib.engine.engine import SWEEP_SLICE
from deferlib.store import Tx

MILLION = 1_000_000
_TURN = 100  # tasks claimed, and as many settled, in one transaction
_TURNS = 40
_ADDS = 200
_BLOCKS = 5
_FEW = (_TURNS + 1) * _TURN * _BLOCKS  # tasks due in the store to compare with: as many as its turns take
_PURGED = 500  # rows that the library and the command remove in one transaction
_SLICES = 100
_MINUTE = 60_000_000
_CENTURY = 100 * 365 * 24 * 60 * _MINUTE
_ENGINE_SECONDS = 6


def scale(share: float = 1.0, say: Callable[[str], None] = print) -> list[Row]:
    """Measure with *share* of the rows."""
    million = round(MILLION * share)
    with scratch() as folder:
        few, many = folder / "few.db", folder / "many.db"
        started = time.perf_counter()
        make_store(few, ready=_FEW, scheduled=100, tombstones=100)
        make_store(many, ready=million, scheduled=million, tombstones=10 * million)
        os.sync()  # or the disk is still busy with the filling while it is asked how fast it is
        size = many.stat().st_size
        say(f"filled {12 * million:,} rows, {size / 1e9:.1f} GB, in {time.perf_counter() - started:.0f} s")
        return [
            *_compared(few, many),
            *_engine(many),
            *_slices(many, size),
        ]


def _compared(few: Path, many: Path) -> list[Row]:
    """Rows for what should cost the same on both stores; in alternating blocks, because a disk's mood changes."""
    measured: dict[str, list[tuple[float, float]]] = {}
    parts = {f"claim and settle {_TURN}, a task": _turn, "defer(), a call": _add, "`tasks list`, a call": _list}
    for _ in range(_BLOCKS):
        for name, part in parts.items():
            pair = []
            for path in (few, many):
                with fresh_store(path):
                    pair.append(part())
            measured.setdefault(name, []).append((pair[0], pair[1]))
    rows = []
    for name, pairs in measured.items():
        base, full = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
        ratio = statistics.median(full / base for base, full in pairs)
        figure = f"{full * 1e6:,.1f} us, {ratio:.2f} x an empty store's {base * 1e6:,.1f} us"
        rows.append(Row(name, figure, "<= 1.15 x", ratio <= 1.15, ratio))
    return rows


def _turn() -> float:
    """Return the seconds a task of a durable transaction that settles some tasks and claims as many."""
    runtime = config.runtime()
    times: list[float] = []
    claimed: list[Outcome] = []
    for _ in range(_TURNS):
        started = time.perf_counter()
        now = runtime.clock.now()
        with runtime.store.begin() as tx:
            tx.settle(now, claimed)
            claims = tx.claim(now, [ClaimSpec("default", _TURN, 2**30, now + _MINUTE)])
        times.append(time.perf_counter() - started)
        claimed = [Outcome(each.id, each.claims, each.queue, Action.DONE, now, executed=1) for each in claims]
        assert len(claimed) == _TURN, f"only {len(claimed)} were due"
    with runtime.store.begin() as tx:
        tx.settle(runtime.clock.now(), claimed)
    return statistics.median(times) / _TURN


def _add() -> float:
    def once() -> None:
        deferlib.defer(app.noop, *app.ARGS, _countdown=3600)

    once()
    return statistics.median(_seconds(once) for _ in range(_ADDS))


def _list() -> float:
    from deferlib import cli

    def once() -> None:
        with redirect_stdout(io.StringIO()):
            assert cli.main(["tasks", "list"]) == 0

    once()
    return statistics.median(_seconds(once) for _ in range(10))


def _engine(path: Path) -> list[Row]:
    """Rows for an engine that delivers from the full store to a server that says yes to everything."""
    with fresh_store(path) as runtime:
        out = runtime.settings.root / "stub"
        with server(out) as port:
            started = time.monotonic()
            with cli_engine("--app-url", f"http://127.0.0.1:{port}") as engine:
                memory = 0.0
                while time.monotonic() < started + _ENGINE_SECONDS:
                    time.sleep(0.2)
                    memory = max(memory, resident_mb(engine.pid))
        seen = stub.read(out)
    ready, count = seen.first - started, seen.requests
    worked = count > 1_000  # one that stands still needs little
    figure = f"{memory:.0f} MB, {count:,} deliveries"
    return [
        Row("engine memory while it delivers", figure, "< 100 MB", memory < 100 and worked),
        Row("engine from its start to its first delivery", f"{ready:.2f} s", "< 2 s", ready < 2 and worked),
    ]


def _slices(path: Path, size: int) -> list[Row]:
    """Rows for removing in slices, and for the room that it leaves."""
    with fresh_store(path) as runtime:
        now = runtime.clock.now()
        with runtime.store.watch(lambda: None):  # like an engine, which then checkpoints more often
            swept = [_transaction(lambda tx: tx.sweep(now + _CENTURY, SWEEP_SLICE)) for _ in range(_SLICES)]
        purged = []
        while (one := _transaction(lambda tx: tx.purge(now, "default", _PURGED)))[1]:
            purged.append(one)
    removed = sum(count for _, count in purged)
    with fresh_store(path):
        deferlib.defer(app.noop, *app.ARGS)  # whose body the others get
    add_ready(path, removed)
    after = path.stat().st_size
    grown = after / size
    return [
        _slice_row("one slice of a sweep", SWEEP_SLICE, [seconds for seconds, _ in swept]),
        _slice_row("one slice of a purge", _PURGED, [seconds for seconds, _ in purged]),
        Row(
            f"file after purging {removed:,} and adding as many",
            f"{after / 1e9:.2f} GB, {grown:.2f} x",
            "<= 1.02 x",
            grown <= 1.02,
            grown,
        ),
    ]


def _transaction(work: Callable[[Tx], int]) -> tuple[float, int]:
    """Return the seconds of one durable transaction, and what *work* returned."""
    started = time.perf_counter()
    with config.runtime().store.begin() as tx:
        count = work(tx)
    return time.perf_counter() - started, count


def _slice_row(measure: str, rows: int, times: list[float]) -> Row:
    ordered = sorted(times)
    median, last = percentile(ordered, 0.5) * 1000, percentile(ordered, 0.99) * 1000
    return Row(f"{measure} ({rows} rows)", f"p50 {median:.1f} ms, p99 {last:.1f} ms", "p50 <= 5 ms", median <= 5, median)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
