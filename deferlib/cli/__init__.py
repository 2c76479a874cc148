"""The command line: `deferlib engine`, `tasks`, `queues`, `keys` and `config`.

Each command is a function of its parsed arguments that returns the Exit code: 0 done, 1 not found, refused or only in part,
2 for a mistake in the arguments or the configuration and for a store that fails. Everything heavy is imported by the
command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

from deferlib.cli.show import safe
from deferlib.errors import Error
from deferlib.settings import mask

REFUSED = 2

_EPILOG = """\
Settings come from flags, then DEFERLIB_… in the environment, then
[tool.deferlib] in pyproject.toml; `deferlib config` shows all of them with
their sources.

examples:
  deferlib dev main:app               serve the app in main.py and run its calls
  deferlib engine                     in production: push them to where it runs
  deferlib tasks list --state dead    see which of them were given up
  deferlib doctor                     find out why nothing runs
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and shows no password that stood among the arguments."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see `{self.prog} --help`")
        raise SystemExit(REFUSED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that *argv* (by default the process's arguments) names; return its exit code."""
    _hold_descriptors()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that can't show a character shows its number
            reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if argv is None else argv)
    for argument in given:
        if not _is_text(argument):
            fail(f"argument {argument!r} is not text in this terminal's encoding")
            return REFUSED
    try:
        arguments = _parser().parse_args(given)
        code: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except Error as error:
        fail(str(error))
        return REFUSED
    except BrokenPipeError:  # whoever read our output, like `head`, has seen enough
        _drop_output()
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def fail(text: str) -> None:
    """Print *text* as an error, in one line."""
    with suppress(OSError):
        print(f"deferlib: error: {safe(mask(text))}", file=sys.stderr)


def _hold_descriptors() -> None:
    """Open 0, 1 and 2 where whoever started us closed them: what is printed there must not end up in a database."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _is_text(argument: str) -> bool:
    """Tell whether *argument* can be written down: bytes that the terminal's encoding lacks come as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    from deferlib import __version__
    from deferlib.cli import dev, doctor, engine, keys, preflight, queues, settings, tasks

    parser = _Parser(
        prog="deferlib",
        description="Runs Python calls later, reliably: the engine, and a look at its tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"deferlib {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.set_defaults(run=partial(show_help, parser))
    dev.add_to(commands)
    engine.add_to(commands)
    tasks.add_to(commands)
    queues.add_to(commands)
    keys.add_to(commands)
    settings.add_to(commands)
    doctor.add_to(commands)
    preflight.add_to(commands)
    return parser


def show_help(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Do what a command does that was given no verb: say which there are."""
    parser.print_help(sys.stderr)
    return REFUSED


def _drop_output() -> None:
    """Send what is still buffered nowhere; the interpreter would complain about it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
