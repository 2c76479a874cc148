"""A task's headers: a mapping whose names have no letter case, and whose values may be repeated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from deferlib.errors import InvalidTaskError
from deferlib.secret_names import is_secret


class Headers(MutableMapping[str, "str | list[str]"]):
    """Headers as App Engine's tasks have them: looked up in any letter case, shown as they were spelled.

    A value is a string, or a list of strings for a header that is sent several times.
    """

    __slots__ = ("_items", "_size")

    def __init__(self, given: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        self._items: dict[str, tuple[str, str | list[str]]] = {}
        self._size: int | None = None
        self.update(given)

    def __getitem__(self, name: str) -> str | list[str]:
        return self._items[name.lower()][1]

    def __setitem__(self, name: str, value: str | list[str]) -> None:
        self._items[name.lower()] = (name, value)
        self._size = None

    def __delitem__(self, name: str) -> None:
        del self._items[name.lower()]
        self._size = None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._items

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        try:
            there = {name.lower(): value for name, value in other.items()}
        except AttributeError:  # names that are no strings
            return False
        return {key: value for key, (_, value) in self._items.items()} == there

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def copy(self) -> Headers:
        """Return a copy that shares nothing with this one."""
        return Headers((name, list(value) if isinstance(value, list) else value) for name, value in self.items())

    @property
    def size(self) -> int:
        """How many bytes they take in a request, counted once: most tasks share one of these."""
        if self._size is None:
            self._size = sum(len(name) + len(value) + 4 for name, value in self.lines())
        return self._size

    def lines(self) -> list[tuple[str, str]]:
        """Return one (name, value) for each line that is sent."""
        return [(name, each) for name, value in self.items() for each in ([value] if isinstance(value, str) else value)]

    def __repr__(self) -> str:
        return f"Headers({ {name: '***' if is_secret(name) else value for name, value in self.items()} })"


def checked_value(name: str, value: object) -> str | list[str]:
    """Return a header's value, of several a list; `InvalidTaskError` if it can't be sent."""
    if isinstance(value, Mapping):
        raise InvalidTaskError(f"header {name}: its value is text or a list of texts, not a mapping")
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return _line(name, value)
    return [_line(name, each) for each in value]


def _line(name: str, value: object) -> str:
    """Return one value as text: App Engine takes numbers, too."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    elif isinstance(value, int | float | None):
        value = str(value)
    if not isinstance(value, str):
        raise InvalidTaskError(f"header {name}: its value is text or a list of texts, not {type(value).__name__}")
    if not all(char == "\t" or "\x20" <= char <= "\x7e" or "\x80" <= char <= "\xff" for char in value):
        raise InvalidTaskError(f"header {name}: its value is a line of text in Latin-1")
    return value
