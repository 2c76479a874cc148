"""The store that a command looks at: opened as it is, never made."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from deferlib import config
from deferlib.cli.settings import settings_of
from deferlib.cli.show import rough
from deferlib.cli.task_text import View
from deferlib.clock import Clock
from deferlib.context import SYSTEM_CLOCK
from deferlib.core.model import MINUTE, Micros
from deferlib.errors import Error, KeyringError, StoreUnavailableError
from deferlib.keys import Keyring
from deferlib.settings import Settings
from deferlib.store import Store, Tx
from deferlib.taskqueue.unserved import oldest_due


class UsageError(Error):
    """The command needs to be told more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A store, open, and what else a command needs to know."""

    store: Store
    settings: Settings
    clock: Clock = SYSTEM_CLOCK

    def now(self) -> Micros:
        return self.clock.now()

    def view(self, tx: Tx) -> View:
        """Return what tasks are looked at with."""
        return View(self.now(), self._ring(), {row.name: row for row in tx.queues()}, self.store.served())

    def warn_if_unserved(self, view: View, tx: Tx) -> None:
        """Tell, on stderr, that tasks have been due for a minute and no engine serves the store."""
        due = None if view.served else oldest_due(tx, view.now)
        if due is not None and view.now - due > MINUTE:
            print(
                f"deferlib: warning: no engine serves this store, and tasks have been due for {rough(view.now - due)}: "
                "start `deferlib engine`, or `deferlib dev`",
                file=sys.stderr,
            )

    def _ring(self) -> Keyring | None:
        """Return the keys if they are at hand; looking must not make any."""
        runtime = config.Runtime(settings=self.settings)
        file = runtime.key_file()
        try:
            return runtime.ring if file is None or os.path.exists(file) else None
        except KeyringError:  # not ours to read: calls are shown without their arguments
            return None


@contextmanager
def opened(arguments: argparse.Namespace, settings: Settings | None = None) -> Iterator[Opened]:
    """Open the configured store for the length of the block; *settings* are the command's, unless an app has its own.

    `StoreUnavailableError` if there is no such file: making one would answer "no tasks" to whoever mistyped its name.
    """
    settings = settings_of(arguments) if settings is None else settings
    dsn, source = settings["store"], settings.all["store"].source
    path = config.sqlite_path(dsn, settings.root)
    if path is None and dsn.startswith("sqlite:"):
        raise UsageError("a store in memory is gone with its process: no command can look at it; name one with --store")
    if path is not None and not os.path.exists(path):
        raise StoreUnavailableError(
            f"{path}: there is no store yet (setting 'store' from {source}). The first defer() makes it, or "
            "`deferlib engine`; or name another one with --store"
        )
    store = config.connect(dsn, settings.root)
    try:
        yield Opened(store=store, settings=settings)
    finally:
        store.close()


def confirmed(question: str, arguments: argparse.Namespace) -> bool:
    """Ask before something is destroyed; --yes answers. `UsageError` if there is nobody to ask."""
    if arguments.yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to ask at: repeat the command with --yes")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("Nothing was changed.")
    return False


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return *names* as a list for people, cut short if it is long."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
