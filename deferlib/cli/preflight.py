"""`deferlib preflight`: would the calls that wait run with the code that is about to be deployed?"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from deferlib import config, disassembly, payload
from deferlib.cli.runnable import Code, name_of
from deferlib.cli.show import count, print_json, safe
from deferlib.core.model import Page, TaskRow, TaskState
from deferlib.disassembly import Callee
from deferlib.errors import (
    AppError,
    KeyringError,
    PayloadKeyUnknownError,
    PayloadNewerError,
    PayloadUnverifiedError,
)
from deferlib.keys import Keyring

if TYPE_CHECKING:
    from deferlib.cli.settings import Commands
    from deferlib.cli.store import Opened

_BROKEN = 1
_PAGE = 100  # tasks read at once: of the largest ones 100 MB
_MOST_LINES = 1_000
_LIMITS = {"most_bytes": 4 << 20, "most_opcodes": 100_000}
_OTHER_PYTHON = (
    f"it was pickled by value on Python 3.{{}}, which 3.{sys.version_info.minor} can't load; let it run before you change "
    "Python, or define it in an importable module"
)
_EPILOG = """\
Imports the app as an engine would, then goes through all live tasks and looks
for what their calls need: a key that verifies them, the functions and classes
that they name (also by their former names, see deferlib.formerly), arguments
that fit. No call is run, and nothing in the store is changed; importing the
app runs its modules, so give the step a time limit in a pipeline. What the
app prints meanwhile goes to stderr.

Run it with the new code and the settings of production, before the old code
is replaced.

JSON: app, error (why the app can't be imported, or null), tasks (looked at),
calls (those that are deferred calls), would_break (of these), not_checked
(of these), broken and unchecked (lists of: call, why, tasks, queue and name
of one of them), more (lines left out, after 1,000), ok.

Exit code: 0 if all would run, 1 if something would not, 2 if it can't look.

examples:
  deferlib preflight main:app
  deferlib preflight shop.web:app --dead --json
"""


def add_to(commands: Commands) -> None:
    from deferlib.cli.settings import add_flags

    parser = commands.add_parser(
        "preflight",
        help="check that waiting calls would run with the code that is here",
        description="Check that the calls that wait would run with the code that is here.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("app", metavar="MODULE:APP", help="the app that runs the calls, imported from this folder first")
    parser.add_argument("--queue", metavar="QUEUE", help="only this queue's tasks")
    parser.add_argument("--dead", action="store_true", help="dead letters too: could they be brought back?")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_flags(parser, ["store"])
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from deferlib.cli.load import check_spec

    check_spec(arguments.app)
    threads = set(threading.enumerate())
    report = Report(app=arguments.app)
    with _stdout_aside():
        _look(arguments, report)
    if arguments.json:
        print_json(report.document())
    else:
        _print(report, arguments)
    code = 0 if report.ok else _BROKEN
    if any(not thread.daemon for thread in set(threading.enumerate()) - threads):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # the app has started a thread, for which the interpreter would wait
    return code


# --- what was found -------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Tasks of which the same is to be said."""

    call: str
    why: str


@dataclass(slots=True)
class Example:
    """How many there are of a kind, and one of them."""

    queue: str
    name: str
    tasks: int = 0


@dataclass(slots=True, kw_only=True)
class Report:
    """What is known so far; as large as there are kinds, not as there are tasks."""

    app: str
    error: str | None = None
    tasks: int = 0
    calls: int = 0
    would_break: int = 0
    not_checked: int = 0
    more: int = 0
    broken: dict[Kind, Example] = field(default_factory=dict)
    unchecked: dict[Kind, Example] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.error is None and not self.would_break

    def add_broken(self, row: TaskRow, call: str, why: str) -> None:
        self.would_break += 1
        self._add(self.broken, row, Kind(call, why))

    def add_unchecked(self, row: TaskRow, call: str, why: str) -> None:
        self.not_checked += 1
        self._add(self.unchecked, row, Kind(call, why))

    def _add(self, among: dict[Kind, Example], row: TaskRow, kind: Kind) -> None:
        found = among.get(kind)
        if found is None:
            if len(among) >= _MOST_LINES:
                self.more += 1
                return
            found = among[kind] = Example(row.queue, row.public_name)
        found.tasks += 1

    def document(self) -> dict[str, Any]:
        """Return it for programs: the keys that `preflight --help` documents."""

        def listed(among: dict[Kind, Example]) -> list[dict[str, Any]]:
            return [
                {"call": kind.call, "why": kind.why, "tasks": each.tasks, "queue": each.queue, "name": each.name}
                for kind, each in among.items()
            ]

        plain = {name: getattr(self, name) for name in ("app", "error", "tasks", "calls", "would_break", "not_checked")}
        return {
            **plain, "broken": listed(self.broken), "unchecked": listed(self.unchecked), "more": self.more, "ok": self.ok
        }  # fmt: skip


def _print(report: Report, arguments: argparse.Namespace) -> None:
    if report.error is not None:
        from deferlib.cli import fail

        return fail(report.error)
    for word, among in (("BROKEN", report.broken), ("not checked", report.unchecked)):
        for kind, each in among.items():
            which = f"task {each.name}" if each.tasks == 1 else f"{count(each.tasks, 'task')} like {each.name}"
            print(safe(f"{word}: {kind.call}, {which} in {each.queue}: {kind.why}"))
    if report.more:
        print(f"… and {count(report.more, 'task')} of other kinds")
    if report.broken or report.unchecked:
        print()
    if report.would_break:
        print(f"{report.would_break:,} of {count(report.calls, 'call')} would not run.")
    elif not report.tasks:
        print("Nothing waits." if not arguments.dead else "Nothing waits, and there are no dead letters.")
    elif not report.calls:
        print(f"None of {count(report.tasks, 'task')} is a deferred call.")
    elif report.not_checked:
        print(f"Nothing speaks against {count(report.calls, 'call')}; {report.not_checked:,} couldn't be checked in full.")
    else:
        print(f"{report.calls:,} of {count(report.calls, 'call')} would run.")


# --- looking --------------------------------------------------------------------------------------------------------


def _look(arguments: argparse.Namespace, report: Report) -> None:
    runtime = _imported(arguments, report)
    if runtime is None:
        return
    with _opened(arguments, runtime) as it:
        with it.store.read() as tx:
            queues = [row.name for row in tx.queues()]
        if arguments.queue is not None:
            queues = [_known(arguments.queue, queues)]
        checker = _Checker(runtime, report)
        for queue in queues:
            for state in (TaskState.LIVE, TaskState.DEAD) if arguments.dead else (TaskState.LIVE,):
                for row in _rows(it, queue, state):
                    checker.check(row)


def _imported(arguments: argparse.Namespace, report: Report) -> config.Runtime | None:
    """Import the app; return the runtime that it works with, its own if it made one, to which the flags apply too."""
    from deferlib.cli.load import load_app
    from deferlib.cli.settings import given, settings_of

    runtime = config.Runtime(settings=settings_of(arguments))
    config.install(runtime)  # before the app is imported, so that it finds the store that the flags name
    try:
        load_app(arguments.app)
    except AppError as error:
        report.error = str(error)
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what the user's code may raise beside exceptions
        report.error = f"{arguments.app} can't be imported: {payload.describe_error(error)}"
        return None
    current = config.runtime()
    if current is not runtime:
        current.prefer(runtime.settings, given(arguments).keys())
    return current


@contextmanager
def _opened(arguments: argparse.Namespace, runtime: config.Runtime) -> Iterator[Opened]:
    from deferlib.cli.store import Opened, opened

    if runtime.given_store is not None:  # it belongs to the app, which may have it in memory
        yield Opened(store=runtime.given_store, settings=runtime.settings)
        return
    with opened(arguments, runtime.settings) as it:
        yield it


def _known(name: str, queues: list[str]) -> str:
    from deferlib.cli.store import UsageError

    if name not in queues:
        raise UsageError(f"there is no queue {name!r}; known are: {', '.join(queues)}")
    return name


def _rows(it: Opened, queue: str, state: TaskState) -> Iterator[TaskRow]:
    """Yield a queue's tasks, page by page: a transaction that lasts would keep the store's log from being taken up."""
    after = Page().after
    while True:
        with it.store.read() as tx:
            rows = tx.tasks(queue, Page(_PAGE, after, state))
        yield from rows
        if len(rows) < _PAGE:
            return
        after = (rows[-1].due or 0, rows[-1].id)


class _Checker:
    """Looks at one task after another."""

    def __init__(self, runtime: config.Runtime, report: Report) -> None:
        self._runtime = runtime
        self._report = report
        self._unbound: bool = runtime.settings["accept_unbound"]
        self._code = Code()
        self._keys: Keyring | None = None
        self._callee = lru_cache(1024)(_callee)  # most calls of a function have the same first pickle

    def check(self, row: TaskRow) -> None:
        from deferlib.deferred import DEFAULT_URL

        self._report.tasks += 1
        if row.method != "POST" or not (payload.is_envelope(row.body) or row.url == DEFAULT_URL):
            return
        self._report.calls += 1
        binding = payload.Binding(row.id, row.name or "", row.queue, row.url, row.namespace)
        try:
            envelope = payload.verify(row.body, self._ring(), binding, unbound=self._unbound)
        except PayloadNewerError as error:
            return self._report.add_broken(row, "…", f"{error}; upgrade deferlib first")
        except PayloadKeyUnknownError as error:
            return self._report.add_broken(row, _suspect(row.body), f"{error}; add the key, it may stand last")
        except PayloadUnverifiedError as error:
            return self._report.add_broken(row, _suspect(row.body), str(error))
        if envelope.flags & payload.BY_VALUE and envelope.python_minor != sys.version_info.minor:
            return self._report.add_broken(row, envelope.label, _OTHER_PYTHON.format(envelope.python_minor))
        reference, pickled = payload.pickles_of(envelope)
        verdict = self._code.verdict(self._callee(reference), disassembly.arguments(pickled, **_LIMITS))
        if verdict.problem:
            self._report.add_broken(row, envelope.label, verdict.problem)
        elif verdict.unchecked:
            self._report.add_unchecked(row, envelope.label, verdict.unchecked)

    def _ring(self) -> Keyring:
        """Return the keys, once there is something to verify; looking makes none."""
        if self._keys is None:
            file = self._runtime.key_file()
            if file is not None and not os.path.exists(file):
                raise KeyringError(
                    f"{file}: there is no signing key, so that no call can be verified; copy it from where the calls "
                    "come from, or set DEFERLIB_KEY"
                )
            self._keys = self._runtime.ring
        return self._keys


def _callee(pickled: bytes) -> Callee:
    return disassembly.callee(pickled, **_LIMITS)


def _suspect(body: bytes) -> str:
    """Return what an unverified payload calls: by its pickle, because anybody may have written its label."""
    try:
        reference, _ = payload.pickles_of(payload.parse(body))
    except PayloadUnverifiedError:
        return "…"
    return payload.one_line(name_of(disassembly.callee(reference)), 200)


@contextmanager
def _stdout_aside() -> Iterator[None]:
    """Send what the app prints to stderr: stdout is for the report, which a program may read."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
