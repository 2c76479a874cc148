"""`deferlib tasks explain`: why a task isn't running, and when it is expected to.

The answer is the scheduler's own: it is made as the engines of the store are, by what they have told there, and asked.
"""

from __future__ import annotations

import argparse
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from deferlib.cli.show import count, iso, print_json, relative, safe
from deferlib.core.model import Decision, Micros, QueueStats, TaskRow
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.engine.troubles import conditions, slowdowns

if TYPE_CHECKING:
    from deferlib.cli.store import Opened
    from deferlib.store import Tx

MOST_AHEAD = 10_000  # counting them takes a few milliseconds
HELP = """\
Why a task isn't running, and when it is expected to: what the engine's own
scheduler says of it, and how many tasks are due before it. An expectation is
an estimate: by the queue's rate, or else by what ran in the last minute.
JSON: name, queue, state, reasons (each: reason, until), ahead, ahead_is_all
(false: there are more), expected, engine (whether one serves the store).

example:
  deferlib tasks explain welcome-4711
"""


class Explanation(NamedTuple):
    """Why a task isn't running."""

    reasons: list[Decision]
    ahead: int  # live tasks of the queue that are due before it
    expected: Micros | None  # when it should start, as far as can be said


def explain(it: Opened, tx: Tx, now: Micros, row: TaskRow) -> Explanation:
    """Return why *row*, a live task without a lease, isn't running."""
    queues = tx.queues()
    stats = {each.queue: each for each in tx.stats(now, [queue.name for queue in queues])}
    notes = tx.notes()
    slowed = slowdowns(notes, now)
    rules = Rules(
        node="", base=it.settings["app"], target=it.settings["targets"].get, concurrency=it.settings["concurrency"] or 32
    )
    scheduler = Scheduler(rules, Random(0))
    scheduler.configure(queues)
    in_flight = {name: each.in_flight for name, each in stats.items()}
    scheduler.restore(now, conditions(notes, now), slowed.values(), in_flight)
    reasons = scheduler.explain(now, row)
    if not it.store.served():
        reasons.insert(0, Decision("no engine serves the store: start `deferlib engine`, or `deferlib dev`"))
    assert row.due is not None
    ahead = tx.ahead(row.queue, row.due, row.id, MOST_AHEAD)
    rate = next((queue.config.rate for queue in queues if queue.name == row.queue), None)
    throttled = slowed[row.queue].rate if row.queue in slowed else None
    rates = [each for each in (rate, throttled) if each]
    return Explanation(
        reasons, ahead, _expected(now, row.due, reasons, ahead, stats.get(row.queue), min(rates, default=None))
    )


def _expected(
    now: Micros, due: Micros, reasons: list[Decision], ahead: int, stats: QueueStats | None, rate: float | None
) -> Micros | None:
    """Return when a task should start; None if that depends on somebody's doing, or on tasks that never end."""
    if any(reason.until is None and "concurrent" not in reason.reason for reason in reasons):
        return None
    at = max([now, due, *(reason.until for reason in reasons if reason.until is not None)])
    waits = ahead + 1 if rate else ahead
    pace = rate or (stats.executed_last_minute / 60 if stats is not None else 0.0)
    crowded = any(reason.until is None for reason in reasons)
    if (waits or crowded) and not pace:
        return None
    return at + round((waits + crowded) / pace * 1e6) if waits or crowded else at


def explain_task(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from deferlib.cli.store import opened
    from deferlib.cli.tasks import report_missing, tasks_named

    with opened(arguments) as it, it.store.read() as tx:
        rows = tasks_named(tx, arguments.name, arguments.queue)
        if not rows:
            return report_missing([arguments.name], arguments.queue)
        row, now, served = rows[0], it.now(), it.store.served()
        state = row.state(now)
        explanation = explain(it, tx, now, row) if state in ("ready", "scheduled") else _of_another(row, state)
    if arguments.json:
        print_json(
            {
                "name": row.public_name,
                "queue": row.queue,
                "state": state,
                "reasons": [{"reason": each.reason, "until": iso(each.until)} for each in explanation.reasons],
                "ahead": explanation.ahead,
                "ahead_is_all": explanation.ahead < MOST_AHEAD,
                "expected": iso(explanation.expected),
                "engine": served,
            }
        )
    else:
        print(safe(f"{row.queue}/{row.public_name}: {_text(explanation, state, now)}"))
    return 0


def _of_another(row: TaskRow, state: str) -> Explanation:
    """Return what is to be said of a task that waits for no engine."""
    match state:
        case "dead":
            text = f"a dead letter: {row.reason}; `deferlib tasks retry` brings it back"
        case "tombstone":
            text = "finished; only its name is kept, so that it isn't added again"
        case _:
            text = f"running (attempt {row.attempts}), or its engine has died: its lease ends then"
    return Explanation([Decision(text, row.due)], 0, None)


def _text(explanation: Explanation, state: str, now: Micros) -> str:
    parts = [
        each.reason if each.until is None else f"{each.reason}, until {_clock(each.until, now)}"
        for each in explanation.reasons
    ]
    if explanation.ahead and state == "ready":
        more = "more than " if explanation.ahead >= MOST_AHEAD else ""
        parts.append(f"{more}{count(explanation.ahead, 'task')} ahead")
    if explanation.expected is not None:
        parts.append(f"expected {_clock(explanation.expected, now)}")
    elif state == "ready" and not explanation.reasons:
        parts.append("nothing holds it back but them" if explanation.ahead else "nothing holds it back")
    return "; ".join(parts)


def _clock(at: Micros, now: Micros) -> str:
    """Return a time of today's clock in UTC and how far it is: "14:03:12 (in 40 s)"."""
    text = iso(at) or ""
    if at < now + 1_000_000:
        return "now" if at <= now else f"{text[11:19]}Z (in {(at - now) / 1e6:.1f} s)"
    day = "" if text[:10] == (iso(now) or "")[:10] else f"{text[:10]} "
    return f"{day}{text[11:19]}Z ({relative(at, now)})"
