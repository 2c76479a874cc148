"""`deferlib tasks explain`: why a task isn't running, and when it is expected to.

The answer is the scheduler's own: it is made as the engines of the store are, by what they have told there, and asked.
"""

from __future__ import annotations

import argparse
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from deferlib.cli.show import count, iso, print_json, relative, safe
from deferlib.core import bucket
from deferlib.core.explainer import Explainer
from deferlib.core.model import Decision, Micros, QueueRow, QueueStats, TaskRow
from deferlib.core.rules import Rules
from deferlib.engine.troubles import conditions, slowdowns
from deferlib.outbound import NOWHERE

if TYPE_CHECKING:
    from deferlib.cli.store import Opened
    from deferlib.store import Tx

CONCURRENCY = 32  # deliveries at once to one target
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
        node="",
        base=it.settings["app"],
        target=it.settings["targets"].get,
        concurrency=it.settings["concurrency"] or CONCURRENCY,
        origin=(it.settings["allow_urls"] or NOWHERE).origin,
    )
    scheduler = Explainer(rules, Random(0))
    scheduler.configure(queues)
    in_flight = {name: each.in_flight for name, each in stats.items()}
    scheduler.restore(now, conditions(notes, now), slowed.values(), in_flight)
    reasons = scheduler.explain(now, row)
    if not it.store.served():
        reasons.insert(0, Decision("no engine serves the store: start `deferlib engine`, or `deferlib dev`"))
    assert row.due is not None
    ahead = tx.ahead(row.queue, row.due, row.id, MOST_AHEAD)
    queue = next(each for each in queues if each.name == row.queue)
    throttled = slowed[row.queue].rate if row.queue in slowed else None
    return Explanation(reasons, ahead, _expected(now, row.due, reasons, ahead, queue, stats[row.queue], throttled))


def _expected(
    now: Micros,
    due: Micros,
    reasons: list[Decision],
    ahead: int,
    queue: QueueRow,
    stats: QueueStats,
    throttled: float | None,
) -> Micros | None:
    """Return when a task should start; None if that depends on somebody's doing, or on tasks that never end."""
    busy = [reason for reason in reasons if reason.until is None]
    if any(" concurrent" not in reason.reason and " deliveries" not in reason.reason for reason in busy):
        return None
    at = max([now, due, *(reason.until for reason in reasons if reason.until is not None)])
    rate = queue.config.rate
    if rate:  # its own tokens say when
        interval, size = bucket.interval_of(rate), queue.config.bucket_size
        at = max(at, max(queue.tat, now) + (ahead + 1 - size) * interval)
    pace = throttled if throttled else stats.executed_last_minute / 60
    waits = (0 if rate and not throttled else ahead) + len(busy)
    if waits and not pace:
        return None
    return at + round(waits / pace * 1e6) if waits else at


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
