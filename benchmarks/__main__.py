"""Measure, and print the figures beside their goals; `make bench` also writes them to benchmarks/RESULTS.md.

python -m benchmarks                    every measure of deferlib alone
python -m benchmarks NAME…              some of them
python -m benchmarks peers [TEXT]       every task queue, or those with TEXT in their name
python -m benchmarks kills [TEXT]       five workers of each killed while they work
python -m benchmarks scale [--small]    with twelve million rows in the store, or a tenth
python -m benchmarks all [quick] [--kills]   everything, into RESULTS.md
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from benchmarks import measures, report
from benchmarks.fair import fair
from benchmarks.machine import described, machine
from benchmarks.row import Row
from benchmarks.scale import scale
from benchmarks.slow import slow

ALL: dict[str, Callable[[], list[Row]]] = {
    "import": measures.importing,
    "enqueue": measures.enqueue,
    "threads": measures.threads,
    "bulk": measures.bulk,
    "in-process": measures.drain_in_process,
    "http": measures.drain_over_http,
    "scheduled": measures.scheduled,
    "latency": measures.latency_in_process,
    "latency-across": measures.latency_across_processes,
    "idle": measures.idle,
    "slow": slow,
    "fair": fair,
}
_SMALL, _FULL = 0.1, 1.0


def main() -> int:
    """Run what the arguments name; return 0 if every goal was reached, 2 for arguments that name nothing."""
    arguments = sys.argv[1:]
    words = [word for word in arguments if not word.startswith("--")]
    options = set(arguments) - set(words)
    print(machine(), flush=True)
    match words:
        case ["all"] | ["all", "quick"]:
            return _all(quick="quick" in words, kills="--kills" in options)
        case ["scale"]:
            return _print(scale(_SMALL if "--small" in options else _FULL, _say))
        case ["peers" | "kills" as what, *text]:
            from benchmarks.peers.run import compare, kill

            run = compare if what == "peers" else kill
            run(quick="--quick" in options, wanted=" ".join(text), say=_say)
            return 0
    if unknown := set(words) - set(ALL):
        print(
            f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(ALL)}, peers, kills, scale, all", file=sys.stderr
        )
        return 2
    return max([_print(ALL[name]()) for name in words or ALL])


def _all(*, quick: bool, kills: bool) -> int:
    from benchmarks.peers.run import compare, kill

    started = time.monotonic()
    before = machine()
    rows = []
    for measure in ALL.values():
        rows += _attempted(measure)
    big = _attempted(lambda: scale(_SMALL if quick else _FULL, _say))
    contest = compare(quick=quick, wanted="", say=_say)
    tolls = kill(quick=quick, wanted="", say=_say) if kills else []
    rows += report.compared(contest.figures)
    text = report.written(
        rows=rows,
        scale=big,
        contest=contest,
        tolls=tolls,
        machine={**described(), "before": before, "after": machine()},
        minutes=(time.monotonic() - started) / 60,
        quick=quick,
    )
    report.PATH.write_text(text, encoding="utf-8")
    missed = sum(not row.reached for row in (*rows, *big))
    print(f"{missed} goals missed; everything is in {report.PATH}")
    return 0


def _attempted(measure: Callable[[], list[Row]]) -> list[Row]:
    """Return and print the rows of *measure*; one that breaks becomes a row that says so, and the others go on."""
    try:
        rows = measure()
    except Exception as error:  # whatever it was belongs in the results
        name = getattr(measure, "__name__", "a measure")
        rows = [Row(name, f"broke: {type(error).__name__}: {error}", "to work", reached=False)]
    _print(rows)
    return rows


def _print(rows: list[Row]) -> int:
    for row in rows:
        print(row, flush=True)
    return 0 if all(row.reached for row in rows) else 1


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
