"""`deferlib queues`: list, show, put, pause, resume, purge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from deferlib import config, queue_rows
from deferlib.cli import queue_text
from deferlib.cli.show import print_fields, print_json, print_table, safe
from deferlib.core.health import Condition
from deferlib.core.model import Micros, QueueRow
from deferlib.engine.troubles import conditions, slowdowns
from deferlib.errors import ConfigError, InvalidQueueError

if TYPE_CHECKING:
    from deferlib.cli.settings import Commands
    from deferlib.cli.store import Opened
    from deferlib.store import Tx

_NOT_DONE = 1
_SLICE = 500  # tasks purged in one transaction: a few milliseconds

_LIST = """\
STATE says why nothing is dispatched. AT ONCE is what runs now, of how many may
run; RATE is that of the last minute, of the one that is enforced; RAN and ERR
are attempts in that minute. JSON: queues (each as in `queues show`), problem
(what is wrong with queue.yaml, if it was changed and isn't applied),
troubled_targets (those that can't be reached, lose deliveries or refuse the
engine's requests: url, since, trouble, reason, at_once, next_try).

example:
  deferlib queues list
"""
_SHOW = """\
JSON: name, mode, state, paused, disabled (it has left queue.yaml), source
(file: applied by an engine; library: made by its first use; command), tasks,
waiting, in_flight, dead, oldest_due, oldest_wait_seconds,
executed_last_minute, failed_last_minute, rate_now, rate and rate_enforced (a
second), bucket_size, max_concurrent, target, retry (by App Engine's names),
first_limit_wins, jitter, tombstone_seconds, deadline_seconds, lost_limit,
sources (where each value comes from: file, command, settings, default), owner
and owned_until (the engine that dispatches a limited queue), slowed_since
(when its target began to be overloaded: rate_enforced is lower since).

example:
  deferlib queues show mail
"""
_PUT = """\
KEY is as in queue.yaml, with a dot for its maps: rate, bucket_size,
max_concurrent_requests, target, retry_parameters.task_retry_limit,
deferlib.jitter. What is put stays, whatever queue.yaml says, until it is
cleared: KEY= clears one value, --clear all of them. A queue that isn't there
is made. Engines notice within about a second.

examples:
  deferlib queues put mail rate=20/s max_concurrent_requests=4
  deferlib queues put mail rate= retry_parameters.task_retry_limit=3
  deferlib queues put mail --clear
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

    queues = commands.add_parser("queues", help="list, show, change, pause, resume or purge queues", allow_abbrev=False)
    verbs = add_verbs(queues)

    add = partial(add_verb, verbs)
    listing = add("list", "list the queues with what waits in them", _LIST, list_queues)
    show = add("show", "show all there is to know of a queue", _SHOW, show_queue)
    change = add("put", "put values over those of queue.yaml", _PUT, put_queue)
    pause = add("pause", "start no more tasks of these queues", _PAUSE, pause_queues)
    resume = add("resume", "start tasks of these queues again", _RESUME, resume_queues)
    purge = add("purge", "delete all tasks of a queue", _PURGE, purge_queue)
    show.add_argument("name", metavar="NAME")
    change.add_argument("name", metavar="NAME")
    change.add_argument("changes", metavar="KEY=VALUE", nargs="*", help="a value, or nothing to take it back")
    change.add_argument("--clear", action="store_true", help="first take back all that was put")
    purge.add_argument("name", metavar="NAME")
    purge.add_argument("--yes", action="store_true", help="don't ask")
    for parser in (pause, resume):
        parser.add_argument("names", metavar="NAME", nargs="+")
    for parser in (listing, show):
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        add_flags(parser, ["store", "queues"])
    for parser in (change, pause, resume, purge):
        add_flags(parser, ["store"])


# --- list, show -----------------------------------------------------------------------------------------------------


def list_queues(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    with opened(arguments) as it:
        problem = _problem(it)
        with it.store.read() as tx:
            now = it.now()
            rows = tx.queues()
            stats = {each.queue: each for each in tx.stats(now, [row.name for row in rows])}
            notes = tx.notes()
            it.warn_if_unserved(it.view(tx), tx)
    problem = notes.get(queue_rows.FILE_ERROR) or problem
    slowed, troubled = slowdowns(notes, now), conditions(notes, now)
    _warn(troubled, now)
    if problem:
        print(f"deferlib: warning: queue.yaml isn't applied: {safe(problem)}", file=sys.stderr)
    if arguments.json:
        queues = [queue_text.document(row, stats[row.name], now, slowed.get(row.name)) for row in rows]
        print_json({"queues": queues, "problem": problem, "troubled_targets": queue_text.targets(troubled)})
    else:
        print_table(queue_text.TITLES, [queue_text.line(row, stats[row.name], now, slowed.get(row.name)) for row in rows])
    return 0


def _warn(troubled: Sequence[Condition], now: Micros) -> None:
    """Tell, on stderr, which targets are in trouble."""
    for each in troubled:
        print(f"deferlib: warning: {safe(queue_text.troubled_target(each, now))}", file=sys.stderr)


def show_queue(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    with opened(arguments) as it, it.store.read() as tx:
        now = it.now()
        rows = {row.name: row for row in tx.queues()}
        row = rows.get(arguments.name)
        if row is None:
            return _unknown(arguments.name, rows)
        stats = tx.stats(now, [row.name])[0]
        notes = tx.notes()
    slowed = slowdowns(notes, now).get(row.name)
    _warn(conditions(notes, now), now)
    if arguments.json:
        print_json(queue_text.document(row, stats, now, slowed))
    else:
        print_fields(queue_text.fields(row, stats, now, slowed))
        print()
        print_table(("KEY", "VALUE", "SOURCE"), queue_text.configuration(row))
    return 0


def _problem(it: Opened) -> str | None:
    """Return what is wrong with queue.yaml as it is now; that must not keep anybody from looking at what runs."""
    try:
        config.Runtime(settings=it.settings).queues()
    except (InvalidQueueError, ConfigError) as error:
        return str(error)
    return None


# --- put --------------------------------------------------------------------------------------------------------------


def put_queue(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    if not arguments.changes and not arguments.clear:
        raise ConfigError("say what to put: KEY=VALUE, or --clear; see `deferlib queues put --help`")
    changes = _changes(arguments.changes)
    with opened(arguments) as it:
        limits = config.Runtime(settings=it.settings).limits

        def work(tx: Tx) -> QueueRow:
            if arguments.clear:
                queue_rows.clear(tx, arguments.name)
            if changes:
                queue_rows.put(tx, arguments.name, changes, limits)
            return next(row for row in tx.queues() if row.name == arguments.name)

        with it.store.read() as tx:
            rows = {row.name: row for row in tx.queues()}
        if arguments.name not in rows and not changes:
            return _unknown(arguments.name, rows)
        row = it.store.run(work)
    put = [f"{key}={value}" for key, value, source in queue_text.configuration(row) if source == "command"]
    print(f"{safe(row.name)}: {', '.join(put) or 'nothing is put over it'}")
    return 0


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Return KEY=VALUE pairs as an entry of a queue.yaml; None takes a value back."""
    import yaml

    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        outer, _, inner = key.strip().rpartition(".")
        if not equals or not inner or "." in outer or inner == "name":
            raise ConfigError(f"{pair!r}: KEY=VALUE is needed, like rate=5/s or deferlib.jitter=0.2")
        try:
            value = yaml.safe_load(text) if text.strip() else None
        except (yaml.YAMLError, ValueError):
            value = text
        (changes.setdefault(outer, {}) if outer else changes)[inner] = value
    return changes


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
