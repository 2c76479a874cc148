"""`deferlib doctor`: is everything there that a task needs to run?"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING

from deferlib import config
from deferlib.cli.settings import add_flags, settings_of
from deferlib.cli.show import print_json, safe

if TYPE_CHECKING:
    from deferlib.cli.settings import Commands

_PROBLEM = 1
_MARKS = {"ok": "ok      ", "note": "note    ", "warning": "warning ", "problem": "PROBLEM "}
_INDENT = " " * 20
_EPILOG = """\
Looks at the settings, the store and its key, asks whether an engine serves
the store, and asks the app itself, over HTTP: is it reachable, is the handler
mounted, has it the same key and the same store, can its server run the calls?
Nothing is changed.

Run it where the engine runs, with the engine's settings.
JSON: findings (level: ok, note, warning or problem; subject; text), problems.
Exit code: 0 if there is no problem, 1 if there is one, 2 if it can't look.

example:
  deferlib doctor --app-url http://web:8000
"""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="find out why tasks don't run",
        description="Find out why tasks don't run, or would not.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_flags(parser, ["store", "queues", "app", "targets", "concurrency"])
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from deferlib.cli.checks import Finding, check

    findings: list[Finding] = []
    for finding in check(config.Runtime(settings=settings_of(arguments))):
        findings.append(finding)
        if not arguments.json:
            _print(finding)
    problems = sum(finding.level == "problem" for finding in findings)
    if arguments.json:
        print_json({"findings": [finding._asdict() for finding in findings], "problems": problems})
    elif problems:
        print(f"\n{problems} problem{'s' if problems > 1 else ''} to mend.")
    else:
        warnings = any(finding.level == "warning" for finding in findings)
        print("\nNothing stands in the way of a task" + (", but read the warnings." if warnings else "."))
    return _PROBLEM if problems else 0


def _print(finding: object) -> None:
    from deferlib.cli.checks import Finding

    assert isinstance(finding, Finding)
    width = max(shutil.get_terminal_size((80, 24)).columns, 60)
    head = f"{_MARKS[finding.level]}{safe(finding.subject):<11} "
    print(textwrap.fill(safe(finding.text), width, initial_indent=head, subsequent_indent=_INDENT, break_on_hyphens=False))
