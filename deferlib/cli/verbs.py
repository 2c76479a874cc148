"""The second word of a command: how `deferlib tasks list` and its like are declared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deferlib.cli.settings import Commands


def add_verbs(parser: argparse.ArgumentParser) -> Commands:
    """Prepare *parser* for verbs; without one, the command says which there are."""
    from deferlib.cli import show_help

    parser.set_defaults(run=partial(show_help, parser))
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def add_verb(
    verbs: Commands, name: str, text: str, epilog: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Declare the verb *name*, which *run* does; *text* is its help, *epilog* teaches with an example."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=f"{text.capitalize()}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser
