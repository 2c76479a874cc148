"""A queue as a line, a list of fields and a JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deferlib import queue_fields, queue_rows
from deferlib.cli.show import iso, relative, rough, seconds, when
from deferlib.core.health import Ailment, Condition
from deferlib.core.model import Micros, Mode, QueueRow, QueueStats
from deferlib.core.scheduler import Slowdown

_LENGTHS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
TITLES = ("QUEUE", "MODE", "STATE", "WAITING", "OLDEST", "AT ONCE", "RATE", "RAN", "ERR", "DEAD")


def document(row: QueueRow, stats: QueueStats, now: Micros, slowed: Slowdown | None = None) -> dict[str, Any]:
    """Return all there is to know of a queue, for programs."""
    queue = row.config
    return {
        "name": row.name,
        "mode": str(queue.mode),
        "state": state(row),
        "paused": row.paused,
        "disabled": row.disabled,
        "source": str(row.source),
        "tasks": stats.tasks,
        "waiting": stats.tasks - stats.in_flight,
        "in_flight": stats.in_flight,
        "dead": stats.dead,
        "oldest_due": iso(stats.oldest_due),
        "oldest_wait_seconds": None if stats.oldest_due is None else max(now - stats.oldest_due, 0) / 1e6,
        "executed_last_minute": stats.executed_last_minute,
        "failed_last_minute": stats.failed_last_minute,
        "rate_now": round(stats.executed_last_minute / 60, 3),
        "rate": queue.rate,
        "rate_enforced": _enforced(row, slowed),
        "slowed_since": iso(slowed.since) if slowed is not None else None,
        "bucket_size": queue.bucket_size,
        "max_concurrent": queue.max_concurrent,
        "target": queue.target or None,
        "retry": {
            "task_retry_limit": queue.retry.retry_limit,
            "task_age_limit": seconds(queue.retry.age_limit),
            "min_backoff_seconds": seconds(queue.retry.min_backoff),
            "max_backoff_seconds": seconds(queue.retry.max_backoff),
            "max_doublings": queue.retry.max_doublings,
        },
        "first_limit_wins": queue.retry.first_limit_wins,
        "jitter": queue.retry.jitter,
        "tombstone_seconds": seconds(queue.tombstone),
        "deadline_seconds": seconds(queue.deadline),
        "lost_limit": queue.lost_limit,
        "sources": queue_rows.sources(row),
        "owner": row.owner or None,
        "owned_until": iso(row.owned_until) if row.owner else None,
    }


def line(row: QueueRow, stats: QueueStats, now: Micros, slowed: Slowdown | None = None) -> tuple[str, ...]:
    """Return what `queues list` shows of a queue."""
    limit = "" if row.config.max_concurrent is None else f"/{row.config.max_concurrent}"
    return (
        row.name,
        str(row.config.mode),
        "slowed" if slowed is not None and state(row) == "active" else state(row),
        str(stats.tasks - stats.in_flight),
        "" if stats.oldest_due is None else relative(stats.oldest_due, now),
        "" if row.config.mode is Mode.PULL else f"{stats.in_flight}{limit}",
        _rate(row, stats, slowed),
        str(stats.executed_last_minute),
        str(stats.failed_last_minute),
        str(stats.dead),
    )


def fields(row: QueueRow, stats: QueueStats, now: Micros, slowed: Slowdown | None = None) -> list[tuple[str, str]]:
    """Return what `queues show` shows of a queue before its configuration."""
    return [
        ("queue", row.name),
        ("state", state(row)),
        ("waiting", str(stats.tasks - stats.in_flight)),
        ("in flight", str(stats.in_flight)),
        ("dead letters", str(stats.dead)),
        ("next due", when(stats.oldest_due, now)),
        ("last minute", f"{stats.executed_last_minute} ran, {stats.failed_last_minute} failed"),
        ("enforced rate", _slowed(slowed, now)),
        ("dispatched by", f"{row.owner} until {when(row.owned_until, now)}" if row.owner else ""),
    ]


def troubled_target(condition: Condition, now: Micros) -> str:
    """Return what is told of a target in trouble."""
    since, reason = rough(max(now - condition.since, 0)), condition.reason or "no reason given"
    if condition.until:
        then = f"is tried again in {rough(max(condition.until - now, 0))}, and its tasks wait"
    else:
        then = f"gets {condition.limit} at once"
    remedy = "; give the app and the engine the same keys" if condition.ailment is Ailment.REFUSING else ""
    return f"target {condition.base} {condition.ailment} (for {since}), {then}: {reason}{remedy}"


def targets(troubled: Iterable[Condition]) -> list[dict[str, Any]]:
    """Return the targets in trouble, for programs."""
    return [
        {
            "url": each.base,
            "since": iso(each.since),
            "trouble": str(each.ailment),
            "reason": each.reason,
            "at_once": each.limit,
            "next_try": iso(each.until) if each.until else None,
        }
        for each in troubled
    ]


def configuration(row: QueueRow) -> list[tuple[str, str, str]]:
    """Return key, value and source of everything that is configured."""
    sources = queue_rows.sources(row)
    rows = []
    for key, value in queue_fields.values_of(row.config).items():
        text = "none" if key == "target" and value is None else _value(value)
        rows.append((key, text, "queue.yaml" if sources[key] == "file" else sources[key]))
    return rows


def state(row: QueueRow) -> str:
    """Return whether a queue's tasks are dispatched, and why not."""
    if row.config.mode is Mode.PULL:
        return "pull"
    if row.disabled:
        return "disabled: left queue.yaml"
    if row.paused:
        return "paused"
    return "paused: its rate is 0" if row.config.rate == 0 else "active"


def _enforced(row: QueueRow, slowed: Slowdown | None) -> float | None:
    """Return how many tasks a second may be dispatched now; None for any number."""
    if row.held:
        return 0.0
    rates = [rate for rate in (row.config.rate, slowed.rate if slowed is not None else None) if rate is not None]
    return min(rates, default=None)


def _slowed(slowed: Slowdown | None, now: Micros) -> str:
    if slowed is None or slowed.rate is None:
        return ""
    return f"{slowed.rate:.3g}/s for {rough(max(now - slowed.since, 0))}: its target is overloaded (503)"


def _rate(row: QueueRow, stats: QueueStats, slowed: Slowdown | None) -> str:
    """Return the rate of the last minute, of the one that is enforced; the configured one is in `queues show`."""
    ran = stats.executed_last_minute / 60
    rate = row.config.rate
    if slowed is not None and slowed.rate is not None:
        return f"{ran:.2g} of {_enforced(row, slowed):.2g}/s"
    if rate is None:
        return f"{ran:.2g}/s"
    unit, length = next(
        ((unit, length) for unit, length in _LENGTHS.items() if rate * length >= 1 or rate == 0), ("d", _LENGTHS["d"])
    )
    enforced = 0 if row.held else rate * length
    return f"{ran * length:.2g} of {enforced:.4g}/{unit}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "unlimited" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
