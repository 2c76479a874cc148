"""`deferlib queues`: list, show, pause, resume, purge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from deferlib import config
from deferlib.cli.show import iso, print_fields, print_json, print_table, relative, safe, seconds, span, when
from deferlib.core.model import Micros, QueueConfig, QueueRow, QueueSource, QueueStats
from deferlib.errors import ConfigError, InvalidQueueError

if TYPE_CHECKING:
    from deferlib.cli.settings import Commands
    from deferlib.cli.store import Opened

_TITLES = ("QUEUE", "MODE", "STATE", "TASKS", "DEAD", "NEXT", "RATE", "AT ONCE", "RAN/MIN", "FAILED/MIN")
_SOURCES = {
    QueueSource.FILE: "an engine, from queue.yaml or its settings",
    QueueSource.LIBRARY: "its first use, from queue.yaml or the settings",
    QueueSource.COMMAND: "a command",
}
_NOT_DONE = 1
_SLICE = 500  # tasks purged in one transaction: a few milliseconds

_LIST = """\
JSON: queues (each as in `queues show`).

example:
  deferlib queues list
"""
_SHOW = """\
JSON: name, mode, paused, source (file: applied by an engine; library: made
by its first use; command), managed (whether it is still configured; null if
queue.yaml can't be read), tasks, dead, oldest_due, executed_last_minute,
failed_last_minute, rate (a second), bucket_size, max_concurrent, target, retry
(by App Engine's names), jitter, tombstone_seconds, deadline_seconds,
lost_limit, owner and owned_until (the engine that dispatches a limited queue).

example:
  deferlib queues show mail
"""
_PAUSE = """\
Engines notice within about a second; what runs is finished. Tasks can still be
added.

example:
  deferlib queues pause mail
"""
_RESUME = """\
example:
  deferlib queues resume mail
"""
_PURGE = """\
Dead letters stay. What runs is finished, and counts no more. The names of
named tasks stay used until their tombstones expire.

example:
  deferlib queues purge mail --yes
"""


def add_to(commands: Commands) -> None:
    from deferlib.cli.settings import add_flags
    from deferlib.cli.verbs import add_verb, add_verbs

    queues = commands.add_parser("queues", help="list, show, pause, resume or purge queues", allow_abbrev=False)
    verbs = add_verbs(queues)

    add = partial(add_verb, verbs)
    listing = add("list", "list the queues with what waits in them", _LIST, list_queues)
    show = add("show", "show all there is to know of a queue", _SHOW, show_queue)
    pause = add("pause", "start no more tasks of these queues", _PAUSE, pause_queues)
    resume = add("resume", "start tasks of these queues again", _RESUME, resume_queues)
    purge = add("purge", "delete all tasks of a queue", _PURGE, purge_queue)
    show.add_argument("name", metavar="NAME")
    purge.add_argument("name", metavar="NAME")
    purge.add_argument("--yes", action="store_true", help="don't ask")
    for parser in (pause, resume):
        parser.add_argument("names", metavar="NAME", nargs="+")
    for parser in (listing, show):
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        add_flags(parser, ["store", "queues"])
    for parser in (pause, resume, purge):
        add_flags(parser, ["store"])


# --- list, show -----------------------------------------------------------------------------------------------------


def list_queues(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    with opened(arguments) as it:
        configured = _configured(it)
        with it.store.read() as tx:
            now = it.now()
            rows = tx.queues()
            stats = {each.queue: each for each in tx.stats(now, [row.name for row in rows])}
            it.warn_if_unserved(it.view(tx), tx)
    if arguments.json:
        print_json({"queues": [_document(row, stats[row.name], configured) for row in rows]})
    else:
        print_table(_TITLES, [_line(row, stats[row.name], configured, now) for row in rows])
    return 0


def show_queue(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    with opened(arguments) as it:
        configured = _configured(it)
        with it.store.read() as tx:
            now = it.now()
            rows = {row.name: row for row in tx.queues()}
            row = rows.get(arguments.name)
            if row is None:
                return _unknown(arguments.name, rows)
            stats = tx.stats(now, [row.name])[0]
    if arguments.json:
        print_json(_document(row, stats, configured))
    else:
        print_fields(_fields(row, stats, configured, now))
    return 0


def _configured(it: Opened) -> set[str] | None:
    """Return the names of the configured queues; None, with a warning, if queue.yaml can't be read.

    A mistake in it must not keep anybody from looking at what runs.
    """
    try:
        return {queue.name for queue in config.Runtime(settings=it.settings).queues()}
    except (InvalidQueueError, ConfigError) as error:
        print(f"deferlib: warning: {safe(str(error))}", file=sys.stderr)
        return None


def _document(row: QueueRow, stats: QueueStats, configured: set[str] | None) -> dict[str, Any]:
    queue = row.config
    return {
        "name": row.name,
        "mode": str(queue.mode),
        "paused": row.paused,
        "source": str(row.source),
        "managed": None if configured is None else _managed(row, configured),
        "tasks": stats.tasks,
        "dead": stats.dead,
        "oldest_due": iso(stats.oldest_due),
        "executed_last_minute": stats.executed_last_minute,
        "failed_last_minute": stats.failed_last_minute,
        "rate": queue.rate,
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
        "jitter": queue.retry.jitter,
        "tombstone_seconds": seconds(queue.tombstone),
        "deadline_seconds": seconds(queue.deadline),
        "lost_limit": queue.lost_limit,
        "owner": row.owner or None,
        "owned_until": iso(row.owned_until) if row.owner else None,
    }


def _line(row: QueueRow, stats: QueueStats, configured: set[str] | None, now: Micros) -> tuple[str, ...]:
    return (
        row.name,
        str(row.config.mode),
        _state(row, configured),
        str(stats.tasks),
        str(stats.dead),
        "" if stats.oldest_due is None else relative(stats.oldest_due, now),
        _rate(row.config),
        "" if row.config.max_concurrent is None else str(row.config.max_concurrent),
        str(stats.executed_last_minute),
        str(stats.failed_last_minute),
    )


def _fields(row: QueueRow, stats: QueueStats, configured: set[str] | None, now: Micros) -> list[tuple[str, str]]:
    queue, retry = row.config, row.config.retry
    limits = [
        f"{retry.retry_limit} retries" if retry.retry_limit is not None else "",
        f"for {span(retry.age_limit)}" if retry.age_limit is not None else "",
    ]
    backoff = f"{span(retry.min_backoff)} doubling {retry.max_doublings} times, at most {span(retry.max_backoff)}"
    return [
        ("queue", row.name),
        ("mode", str(queue.mode)),
        ("state", _state(row, configured)),
        ("configured by", _SOURCES[row.source]),
        ("tasks", str(stats.tasks)),
        ("dead letters", str(stats.dead)),
        ("next due", when(stats.oldest_due, now)),
        ("last minute", f"{stats.executed_last_minute} ran, {stats.failed_last_minute} failed"),
        ("rate", f"{_rate(queue)}, bucket of {queue.bucket_size}" if queue.rate else _rate(queue) or "unlimited"),
        ("at once", "unlimited" if queue.max_concurrent is None else str(queue.max_concurrent)),
        ("target", queue.target),
        ("retry limit", " and ".join(filter(None, limits)) or "none: until it succeeds"),
        ("backoff", f"{backoff}, jitter {retry.jitter:g}" if retry.jitter else backoff),
        ("deadline", span(queue.deadline)),
        ("tombstone", span(queue.tombstone)),
        ("lost limit", str(queue.lost_limit)),
        ("dispatched by", f"{row.owner} until {when(row.owned_until, now)}" if row.owner else ""),
    ]


def _state(row: QueueRow, configured: set[str] | None) -> str:
    if row.paused or row.config.rate == 0:
        return "paused"
    return "active" if configured is None or _managed(row, configured) else "unmanaged"


def _managed(row: QueueRow, configured: set[str]) -> bool:
    """Tell whether somebody still answers for the queue: one that left queue.yaml keeps its tasks and goes on."""
    return row.source is QueueSource.COMMAND or row.name in configured


def _rate(queue: QueueConfig) -> str:
    if queue.rate is None:
        return ""
    for unit, length in (("s", 1), ("m", 60), ("h", 3_600)):
        if queue.rate * length >= 1 or queue.rate == 0:
            return f"{queue.rate * length:.4g}/{unit}"
    return f"{queue.rate * 86_400:.4g}/d"


# --- pause, resume, purge -------------------------------------------------------------------------------------------


def pause_queues(arguments: argparse.Namespace) -> int:
    return _pause(arguments, True, "paused")


def resume_queues(arguments: argparse.Namespace) -> int:
    return _pause(arguments, False, "resumed")


def _pause(arguments: argparse.Namespace, paused: bool, word: str) -> int:
    from deferlib.cli.store import opened

    code = 0
    with opened(arguments) as it:
        with it.store.read() as tx:
            rows = {row.name: row for row in tx.queues()}
        for name in arguments.names:
            if name not in rows:
                code = _unknown(name, rows)
            else:
                it.store.run(lambda tx, name=name: tx.pause([name], paused))  # type: ignore[misc]  # mypy can't infer it
                zero = not paused and rows[name].config.rate == 0
                print(f"{safe(name)}: {word}" + ("; but its rate is 0, which pauses it as well" if zero else ""))
    return code


def purge_queue(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import confirmed, opened

    name: str = arguments.name
    with opened(arguments) as it:
        with it.store.read() as tx:
            rows = {row.name: row for row in tx.queues()}
            if name not in rows:
                return _unknown(name, rows)
            tasks = tx.stats(it.now(), [name])[0].tasks
        if not confirmed(f"Delete all tasks of queue {safe(name)} (now {tasks}) for good?", arguments):
            return _NOT_DONE
        total = 0
        while True:
            purged = it.store.run(lambda tx: tx.purge(it.now(), name, _SLICE))
            total += purged
            if purged < _SLICE:  # the last of them; what is added from now on is meant to stay
                break
    print(f"{safe(name)}: {total} tasks deleted")
    return 0


def _unknown(name: str, known: Mapping[str, QueueRow]) -> int:
    from deferlib.cli import fail

    fail(f"there is no queue {name!r}; known are: {', '.join(known)}")
    return _NOT_DONE
