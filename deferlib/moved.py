"""Functions and classes that have moved: calls that wait under the old name find them at the new place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_moved: dict[str, object] = {}  # by what stood before: package.module.name


def formerly(old: str) -> Callable[[T], T]:
    """Return a decorator for a function or class that used to be *old*, `package.module.name`.

    Calls that were deferred under that name run it, whether something else is there now or nothing. What moved must be
    imported by whoever runs calls. It may stand several times, once for each former name; of a class the methods follow.
    ValueError if *old* is no dotted name, or something else was decorated with it.

    >>> @formerly("shop.mail.send")
    ... def send_mail(user_id): ...
    """
    if not isinstance(old, str) or len(parts := old.split(".")) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"formerly() takes the dotted name of a function or class, 'package.module.name', not {old!r}")

    def register(new: T) -> T:
        if not callable(new):
            raise ValueError(f"formerly({old!r}) decorates a function or a class, not {type(new).__name__}")
        known = _moved.get(old)
        if known is not None and _place(known) != _place(new):  # the same place: its module was loaded again
            raise ValueError(f"formerly({old!r}) stands at two places, {_place(known)} and {_place(new)}; leave one")
        _moved[old] = new
        return new

    return register


def anything_moved() -> bool:
    """Tell whether there is any former name to look for."""
    return bool(_moved)


def find(module: str, name: str) -> object:
    """Return what used to be *name* (`function`, `Class.method`) in *module*; None if nothing there has moved."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        found = _moved.get(f"{module}.{'.'.join(parts[:end])}")
        if found is not None:
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    return None


def _place(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
