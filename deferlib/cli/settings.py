"""The settings that a command works with: the flags for them, and `deferlib config`, which shows them all."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from deferlib import config
from deferlib.cli.show import print_fields, print_json, print_table
from deferlib.settings import DEFAULT_APP, DEFAULT_STORE, SETTINGS, Settings, load_settings

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Any]  # what add_subparsers returns has no public name

# The flag of each setting. A key has none: every user of the machine can read the arguments of a process.
FLAGS = {
    "store": "--store",
    "queues": "--queues",
    "app": "--app-url",
    "targets": "--target",
    "concurrency": "--concurrency",
    "batch": "--batch",
    "lease": "--lease",
    "grace": "--grace",
    "port": "--port",
}
_HELP = {
    "store": ("DSN", f"the store: sqlite:///PATH, relative to the project root (default: {DEFAULT_STORE})"),
    "queues": ("FILE", "the queue.yaml, relative to the project root (default: queue.yaml there, if there is one)"),
    "app": ("URL", f"where the app is served, for an engine that pushes (default: {DEFAULT_APP})"),
    "targets": ("NAME=URL", "the base URL of a named target, for an engine that pushes; may be repeated"),
    "concurrency": (
        "N",
        "calls at once: requests per target (default: 32), or threads of an engine that calls the app itself (cores + 4)",
    ),
    "batch": (
        "N",
        "quick deferred calls in one request at most, for an engine that pushes; 1: none together (default: 32)",
    ),
    "lease": ("SECONDS", "how long a task stays claimed if the engine dies (default: 30)"),
    "grace": ("SECONDS", "how long running calls may go on after SIGTERM (default: 25)"),
    "port": ("PORT", "the engine's port for health and metrics, on 127.0.0.1 or at HOST:PORT (default: off)"),
}
_PREFIX = "DEFERLIB_"
_NOT_SETTINGS = frozenset({"DEFERLIB_FAILPOINT", "DEFERLIB_TESTS_NO_SKIP"})  # for deferlib's own tests

_EPILOG = """\
Keys and passwords are masked. JSON: root, queue_file, store_path, key_file
(null where there is none), settings (by name: value, source), unknown
(variables named DEFERLIB_… that are no setting).

example:
  deferlib config --store sqlite:///other.db
"""


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str], **texts: str) -> None:
    """Give *parser* the flags of the settings *names*; *texts* are the helps of those that mean something else there."""
    group = parser.add_argument_group("settings")
    for name in names:
        metavar, text = _HELP[name]
        text = texts.get(name, text)
        action = "append" if name == "targets" else "store"
        group.add_argument(FLAGS[name], dest=f"setting_{name}", metavar=metavar, help=text, action=action)


def given(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings that were given by flags, as text."""
    found = {}
    for name in FLAGS:
        value = getattr(arguments, f"setting_{name}", None)
        if value is not None:
            found[name] = ",".join(value) if isinstance(value, list) else value
    return found


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings, flags first."""
    return load_settings(given(arguments), flags=FLAGS)


def unknown_variables() -> list[str]:
    """Return the variables of the environment that look like settings and are none: misspelled ones."""
    known = {f"DEFERLIB_{name.upper()}" for name in SETTINGS} | _NOT_SETTINGS
    return sorted(name for name in os.environ if name.startswith("DEFERLIB_") and name not in known)


def unknown_hint(name: str) -> str:
    """Return what is wrong with a variable that is no setting."""
    close = difflib.get_close_matches(name.removeprefix(_PREFIX), [known.upper() for known in SETTINGS], n=1)
    hint = f"; did you mean {_PREFIX}{close[0]}?" if close else "; `deferlib config` shows those there are"
    return f"{name} is set, but is no setting{hint}"


# --- deferlib config ------------------------------------------------------------------------------------------------


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "config",
        help="show every setting and where it comes from",
        description="Show every setting with its value and where it comes from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, FLAGS)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=show_config)


def show_config(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    runtime = config.Runtime(settings=settings)
    queue_file = runtime.queue_file()
    places = {
        "root": str(settings.root),
        "queue_file": None if queue_file is None else str(queue_file),
        "store_path": config.sqlite_path(settings["store"], settings.root),
        "key_file": runtime.key_file(),
    }
    unknown = unknown_variables()
    if arguments.json:
        shown = {setting.name: {"value": setting.value, "source": setting.source} for setting in settings.shown()}
        print_json({**places, "settings": shown, "unknown": unknown})
        return 0
    print_table(
        ("SETTING", "VALUE", "SOURCE"),
        [(setting.name, _text(setting.value), setting.source) for setting in settings.shown()],
    )
    print()
    print_fields(
        [
            ("project root", settings.root.as_posix()),
            ("queue file", places["queue_file"] or "none: one queue, default, without limits"),
            ("store", places["store_path"] or "no file"),
            ("key file", places["key_file"] or ("none: the key is a setting" if settings["key"] else "none")),
            ("no setting", ", ".join(unknown)),
        ]
    )
    return 0


def _text(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return ", ".join(f"{name}={url}" for name, url in value.items()) or "none"
    return str(value) or "none"
