"""benchmarks/RESULTS.md, as one run found it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isnan
from pathlib import Path

import apsw
import pycurl

import deferlib
from benchmarks.peers.contest import Figures
from benchmarks.peers.kills import Toll
from benchmarks.peers.run import Contest
from benchmarks.row import Row

PATH = Path(__file__).with_name("RESULTS.md")
_AHEAD = 1.5  # times the fastest durable peer, with producer and engine at full speed

_INTRO = """# Results

Written by `make bench{how}`; edited by nobody. Figures hold within this run on this machine only: machines are noisy, and
what one says of another is worth nothing. {effort}
"""
_REPEAT = """## How to repeat it

    make bench                    # everything; wants two idle cores, 5 GB of disk, and about 25 minutes
    make bench ARGS=quick         # a look at everything in about five minutes
    make bench ARGS=--kills       # and five workers of each task queue killed, half an hour more

`benchmarks/README.md` says how each figure comes about. What each task queue is set to stands in
`benchmarks/peers/contenders.py`, with the page of its documentation that says so. A task queue that seems treated unfairly
there is a bug: please report it.
"""


def compared(figures: Sequence[Figures]) -> list[Row]:
    """Return the rows of the goals that are about the others; none where nobody else was measured."""
    ours = {each.contender.title: each for each in figures if not each.contender.package}
    peers = [each for each in figures if each.contender.package]
    rows = []
    for title, each in ours.items():
        pushed = "HTTP" in title
        # Pushed over HTTP, each task is a request to a web server: that is compared to what the others do as they come.
        rivals = [peer for peer in peers if not pushed or peer.contender.setting.startswith("defaults")]
        peer = "peer at its defaults" if pushed else "peer"
        way = "over HTTP" if pushed else each.contender.setting.removesuffix(", defaults")
        rows += _ahead(f"drain {way}, of the fastest {peer}", "drain", each, rivals, 1.0)
        durable = [peer for peer in peers if peer.contender.durable]
        rows += _ahead(f"producer and engine {way}, of the fastest durable peer", "mixed", each, durable, _AHEAD)
    return rows


def _ahead(measure: str, name: str, ours: Figures, rivals: Sequence[Figures], goal: float) -> list[Row]:
    own: float | None = getattr(ours, name)
    known = [(value, rival.contender.title) for rival in rivals if (value := getattr(rival, name)) is not None]
    if own is None or not known:
        return []
    best, title = max(known)
    ratio = own / best
    figure = f"{ratio:.2f} x ({own:,.0f}/s of {best:,.0f}/s: {title})"
    return [Row(measure, figure, f"> {goal:.1f} x" if goal == 1 else f">= {goal:.1f} x", ratio >= goal, ratio)]


def written(
    *,
    rows: Sequence[Row],
    scale: Sequence[Row],
    contest: Contest,
    tolls: Sequence[Toll],
    machine: dict[str, str],
    minutes: float,
    quick: bool,
) -> str:
    """Return the whole page."""
    effort = contest.effort
    how = (
        f"Of the comparison, medians of {effort.rounds} rounds."
        if effort.rounds > 1
        else "A quick look: one round, a fifth of the tasks, a tenth of the rows."
    )
    parts = [_INTRO.format(how=" ARGS=quick" if quick else "", effort=how), _conditions(contest, machine, minutes)]
    parts += ["## Goals\n", _goals(rows), "## A full store\n", _goals(scale)]
    parts += ["## Beside other task queues\n", _peers(contest), _EXPLAINED.format(scheduled=effort.scheduled)]
    notes = [f"- {each.contender.title}: {note}" for each in contest.figures for note in each.notes]
    if notes:
        parts.append("Not measured, or not as planned:\n\n" + "\n".join(notes) + "\n")
    if tolls:
        parts += ["## Killed workers\n", _KILLED, _killed(tolls)]
    parts.append(_REPEAT)
    return "\n".join(parts)


_EXPLAINED = """Rates are tasks a second. *One by one* and *bulk*: adding, without workers; *drain*: two worker processes,
or what the queue has for that, from a fifth of the tasks on; *CPU*: of the workers (deferlib: engine and web server), a
task; *mixed*: one producer and the workers at once; *p50, p99*: from the call that enqueues to the task's start, on an idle
system; *durable*: a task is on the disk when the call returns; *beside scheduled*: the drain with {scheduled:,} tasks
waiting for their time, and how long after the workers' start the first task ran.
"""
_KILLED = """Workers were killed with `kill -9`, five times while they worked off tasks of about a millisecond, and started
again at once. *Gone*: had not run when nothing more happened, and the queue doesn't know it any more; *stuck*: it does;
*twice*: started more than once; *waited*: from the last kill until all had run, or until nothing had run for long.
"""
_NONE = "-"


def _conditions(contest: Contest, machine: dict[str, str], minutes: float) -> str:
    parts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {minutes:.0f} minutes",
        **machine,
        "Python": f"{platform.python_version()} ({sys.implementation.name})",
        "deferlib": f"{deferlib.__version__}, SQLite {apsw.sqlite_lib_version()}, libcurl {pycurl.version_info()[1]}",
        "granian": _version("granian"),
        **contest.versions,
    }
    return _table(["", ""], [[name, value] for name, value in parts.items()])


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _goals(rows: Sequence[Row]) -> str:
    marks = {True: "reached", False: "**not reached**"}
    return _table(
        ["measure", "goal", "figure", ""],
        [[row.measure, row.goal, row.figure, marks[row.reached] if row.goal else ""] for row in rows],
    )


def _peers(contest: Contest) -> str:
    head = ["task queue", "set to", "one by one", "bulk 1,000", "drain", "CPU µs", "mixed", "p50 / p99 ms", "durable"]
    head += ["beside scheduled", "import ms"]
    return _table(head, [_peer(each) for each in contest.figures])


def _peer(each: Figures) -> list[str]:
    contender = each.contender
    latency = f"{each.p50:.2f} / {each.p99:.2f}" if each.p50 is not None and each.p99 is not None else _NONE
    beside = _NONE
    if each.scheduled is not None and each.first is not None:
        beside = f"{each.scheduled:,.0f} (first after {each.first:.1f} s)"
    elif contender.schedules and each.drain is not None:
        beside = "see below"
    return [
        contender.name,
        contender.setting,
        _number(each.enqueue),
        _number(each.bulk),
        _number(each.drain),
        _number(each.cpu),
        _number(each.mixed),
        latency,
        "yes" if contender.durable else "no",
        beside,
        _number(each.imported),
    ]


def _killed(tolls: Sequence[Toll]) -> str:
    rows = []
    for toll in tolls:
        counts = [f"{toll.gone:,}", f"{toll.stuck:,}", f"{toll.twice:,}", f"{toll.seconds:.0f} s"]
        rows.append([toll.contender.title, f"{toll.tasks:,}", *(counts if not toll.note else [toll.note, "", "", ""])])
    return _table(["task queue", "tasks", "gone", "stuck", "twice", "waited"], rows)


def _number(value: float | None) -> str:
    return _NONE if value is None or isnan(value) else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)
