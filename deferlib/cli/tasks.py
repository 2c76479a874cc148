"""`deferlib tasks`: list, show, explain, run, retry, delete."""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from deferlib.cli import task_text
from deferlib.cli.explain import HELP as EXPLAIN
from deferlib.cli.explain import explain_task
from deferlib.cli.show import print_json, print_table, safe
from deferlib.core.model import DeleteResult, Micros, Page, TaskRow, TaskState

if TYPE_CHECKING:
    from deferlib.cli.settings import Commands
    from deferlib.cli.store import Opened
    from deferlib.store import Tx

_PAGE = 200
_MOST = 100_000
_STATES = ("live", "dead", "ready", "scheduled", "leased")
_NOT_DONE = 1

_LIST = """\
Live tasks come in the order in which they are due, dead letters in the order
in which they were added. JSON: tasks (each as in `tasks show`), more (whether
there are others beyond --limit).

example:
  deferlib tasks list mail --state dead --limit 20
"""
_SHOW = """\
NAME is the name that the task was given or, if it has none, its id. JSON:
name, id, queue, state, reason, call (what a deferred call runs), verified
(whether one of the keys here signed it for this task; null: not a deferred
call), method, url, target, namespace, tag, headers (their names),
payload_bytes, created, eta, due, next_run, lease_until, first_try, died,
expires (times in ISO 8601, UTC), attempts, executions (what the target
answered), failures (what is charged against the limits), lost (with their
engine), fence, key (that signed it), deadline_seconds, retry (the task's own
options), queue_paused, engine (whether one serves the store), history (the
last attempts: attempt, at, seconds, status, error).

A call is shown with its arguments; nothing of it is run, and objects of your
own classes are shown by their class only. Values whose names say that they
are secrets are masked. A call that none of the keys here signed for this task
is marked "# not verified", with the reason.

example:
  deferlib tasks show welcome-4711
"""
_RUN = """\
A dead letter starts again with its attempts at 0. A task that runs already is
left alone.

example:
  deferlib tasks run welcome-4711
"""
_RETRY = """\
Its attempts begin at 0 again. Other tasks are left alone.

example:
  deferlib tasks retry welcome-4711 welcome-4712 --queue mail
"""
_DELETE = """\
The name of a named task stays used until its tombstone expires. A call that
runs is not stopped.

example:
  deferlib tasks delete welcome-4711 --yes
"""


def add_to(commands: Commands) -> None:
    from deferlib.cli.settings import add_flags
    from deferlib.cli.verbs import add_verb, add_verbs

    tasks = commands.add_parser("tasks", help="list, show, explain, run, retry or delete tasks", allow_abbrev=False)
    verbs = add_verbs(tasks)

    add = partial(add_verb, verbs)
    listing = add("list", "list tasks or dead letters", _LIST, list_tasks)
    listing.add_argument("queue", metavar="QUEUE", nargs="?", help="only this queue's")
    listing.add_argument("--state", choices=_STATES, default="live", help="which ones (default: live, all but the dead)")
    listing.add_argument("--limit", type=_limit, default=100, metavar="N", help="at most so many (default: 100)")
    listing.add_argument("--json", action="store_true", help="print one JSON document")
    show = add("show", "show all there is to know of a task", _SHOW, show_task)
    show.add_argument("name", metavar="NAME")
    show.add_argument("--json", action="store_true", help="print one JSON document")
    explain = add("explain", "say why a task isn't running", EXPLAIN, explain_task)
    explain.add_argument("name", metavar="NAME")
    explain.add_argument("--json", action="store_true", help="print one JSON document")
    run = add("run", "run tasks now, whatever their ETA", _RUN, run_tasks)
    retry = add("retry", "bring dead letters back", _RETRY, retry_tasks)
    delete = add("delete", "delete tasks or dead letters", _DELETE, delete_tasks)
    delete.add_argument("--yes", action="store_true", help="don't ask")
    for parser in (run, retry, delete):
        parser.add_argument("names", metavar="NAME", nargs="+")
    for parser in (show, explain, run, retry, delete):
        parser.add_argument("--queue", metavar="QUEUE", help="the task's queue, where several have one of this name")
    for parser in (listing, show, run, retry, delete):
        add_flags(parser, ["store"])
    add_flags(explain, ["store", "app", "targets", "concurrency"])


def _limit(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_MOST}")
    return number


# --- list -----------------------------------------------------------------------------------------------------------


def list_tasks(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    with opened(arguments) as it, it.store.read() as tx:
        now = it.now()
        view = it.view(tx)
        queues = view.queues
        if arguments.queue is not None and arguments.queue not in queues:
            return _unknown_queue(arguments.queue, queues)
        names = list(queues) if arguments.queue is None else [arguments.queue]
        pages = [_rows(tx, name, arguments.state, now) for name in names]
        merged = heapq.merge(*pages, key=_order)
        rows = [row for row, _ in zip(merged, range(arguments.limit + 1), strict=False)]
        more, rows = len(rows) > arguments.limit, rows[: arguments.limit]
        it.warn_if_unserved(view, tx)
    if arguments.json:
        print_json({"tasks": [task_text.document(row, view) for row in rows], "more": more})
        return 0
    if not rows:
        print(f"No {arguments.state} tasks.")
        return 0
    print_table(task_text.TITLES, [task_text.line(row, view) for row in rows])
    if more:
        print(f"… and more: --limit shows more than {arguments.limit}.")
    return 0


def _rows(tx: Tx, queue: str, state: str, now: Micros) -> Iterator[TaskRow]:
    """Yield a queue's tasks of *state* in order, read page by page."""
    kind = TaskState.DEAD if state == "dead" else TaskState.LIVE
    # A leased or scheduled task is due later than now, so whatever is ready can be skipped.
    after: tuple[Micros, int] = (now, 2**63 - 1) if state in ("scheduled", "leased") else Page().after
    while True:
        rows = tx.tasks(queue, Page(_PAGE, after, kind))
        for row in rows:
            if state in ("live", "dead") or row.state(now) == state:
                yield row
            elif state == "ready":
                return
        if len(rows) < _PAGE:
            return
        last = rows[-1]
        after = (last.due or 0, last.id)


def _order(row: TaskRow) -> tuple[Micros, int]:
    return (row.due or 0, row.id)


# --- show -----------------------------------------------------------------------------------------------------------


def show_task(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import opened

    with opened(arguments) as it, it.store.read() as tx:
        view = it.view(tx)
        rows = tasks_named(tx, arguments.name, arguments.queue)
    if not rows:
        return report_missing([arguments.name], arguments.queue)
    if arguments.json:
        print_json(task_text.document(rows[0], view))
        return 0
    for number, row in enumerate(rows):
        if number:
            print()
        task_text.print_task(row, view)
    return 0


def tasks_named(tx: Tx, name: str, queue: str | None) -> list[TaskRow]:
    """Return what *name* stands for in one queue, the living first; `UsageError` if several queues have one."""
    from deferlib.cli.store import UsageError, listed

    rows = tx.find(queue, [name])
    queues = sorted({row.queue for row in rows})
    if len(queues) > 1:
        raise UsageError(f"task {name!r} is in {len(queues)} queues ({listed(queues)}): say which one with --queue")
    return sorted(rows, key=lambda row: (row.due is None, row.died is None))


# --- run, retry, delete ---------------------------------------------------------------------------------------------


def run_tasks(arguments: argparse.Namespace) -> int:
    return _each(arguments, _run)


def retry_tasks(arguments: argparse.Namespace) -> int:
    return _each(arguments, _retry)


def delete_tasks(arguments: argparse.Namespace) -> int:
    from deferlib.cli.store import confirmed, listed

    names: list[str] = arguments.names
    subject = f"task {names[0]}" if len(names) == 1 else f"{len(names)} tasks ({listed(names)})"

    def agreed() -> bool:
        return confirmed(f"Delete {safe(subject)} for good?", arguments)

    return _each(arguments, _delete, agreed)


# What was done to a task, in words, and whether it was what was asked for.
_Verb = Callable[["Tx", TaskRow, Micros], tuple[bool, str]]


def _each(arguments: argparse.Namespace, verb: _Verb, agreed: Callable[[], bool] = lambda: True) -> int:
    """Apply *verb* to every task that was named, each in a transaction of its own, and say what came of it."""
    from deferlib.cli.store import opened

    code = 0
    with opened(arguments) as it:
        with it.store.read() as tx:  # all names first: an ambiguous one must not stop the command half-way
            found = {name: tasks_named(tx, name, arguments.queue) for name in arguments.names}
        missing = [name for name, rows in found.items() if not rows]
        if missing:
            code = report_missing(missing, arguments.queue)
        rows = [
            row for rows in found.values() for row in rows if row.due is not None or row.died is not None or len(rows) == 1
        ]
        if rows and not agreed():
            return _NOT_DONE
        for row in rows:
            done, text = _applied(it, verb, row)
            print(f"{safe(row.queue)}/{safe(row.public_name)}: {safe(text)}")
            code = code if done else _NOT_DONE
    return code


def _applied(it: Opened, verb: _Verb, row: TaskRow) -> tuple[bool, str]:
    def work(tx: Tx) -> tuple[bool, str]:
        # Looked up anew, by its id: it may have run meanwhile, or have been replaced by another of its name.
        same = [each for each in tx.find(row.queue, [str(row.id)]) if each.id == row.id]
        return verb(tx, same[0], it.now()) if same else (False, "is gone: it has just been finished or deleted")

    return it.store.run(work)


def _run(tx: Tx, row: TaskRow, now: Micros) -> tuple[bool, str]:
    state = row.state(now)
    if state == "dead":
        return _retry(tx, row, now)
    if state == "tombstone":
        return False, "is finished; only its name is kept, so that it isn't added again"
    if state == "leased":
        return False, f"runs already (attempt {row.attempts})"
    if not tx.reschedule(now, row.queue, [str(row.id)], now):
        return False, "could not be moved"
    held = next((queue.held for queue in tx.queues() if queue.name == row.queue), "")
    return True, f"is due now; its queue {held}" if held else "is due now"


def _retry(tx: Tx, row: TaskRow, now: Micros) -> tuple[bool, str]:
    if row.died is None:
        return False, f"is no dead letter, but {row.state(now)}"
    if not tx.reschedule(now, row.queue, [str(row.id)], now):
        return False, "stays a dead letter: another task of its name is in the queue"
    return True, "was a dead letter and is due now"


def _delete(tx: Tx, row: TaskRow, now: Micros) -> tuple[bool, str]:
    if row.state(now) == "tombstone":
        return False, "is finished; only its name is kept, until its tombstone expires"
    if tx.delete(now, row.queue, [str(row.id)]) != [DeleteResult.DELETED]:
        return False, "could not be deleted"
    return True, "deleted"


def report_missing(names: Sequence[str], queue: str | None) -> int:
    from deferlib.cli import fail

    where = f" in queue {queue!r}" if queue is not None else ""
    for name in names:
        fail(f"there is no task {name!r}{where}; `deferlib tasks list` shows what there is")
    return _NOT_DONE


def _unknown_queue(name: str, known: Iterable[str]) -> int:
    from deferlib.cli import fail

    fail(f"there is no queue {name!r}; known are: {', '.join(known)}")
    return _NOT_DONE
