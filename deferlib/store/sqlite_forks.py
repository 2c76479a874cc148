"""What stores do when their process forks: a connection that is carried across corrupts the file."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Protocol


class Forked(Protocol):
    """A store of a process that forks."""

    def before_fork(self) -> AbstractContextManager[None]:
        """Close what mustn't be carried across, and keep it closed until the block ends."""

    def after_fork_in_child(self) -> None:
        """Begin anew in a child."""


torn: set[str] = set()  # paths whose locks SQLite believes to have, wrongly
_stores: weakref.WeakSet[Forked] = weakref.WeakSet()
_forking = threading.local()  # the turns that the forking thread holds


def attend(store: Forked) -> None:
    """Tell *store* of every fork, for as long as it lives."""
    _stores.add(store)


def _before_fork() -> None:
    _forking.turns = []
    for store in sorted(_stores, key=id):  # in one order, should two threads fork
        _forking.turns.append(store.before_fork())


def _after_fork_in_parent() -> None:
    for turns in _forking.turns:
        turns.__exit__(None, None, None)
    _forking.turns = []


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.after_fork_in_child()
    _forking.turns = []  # of locks that this process has replaced


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
