"""SQL as text in files: each statement stands under a line `-- name: …`, with the same names for every database."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

_PARAMETER = re.compile(r":([a-z_]+)")
_RETURNING = "returning :place"
_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


@cache
def load(dialect: str) -> dict[str, str]:
    """Return the named statements of *dialect*, without their comments."""
    found: dict[str, str] = {}
    for file in sorted(_folder(dialect).iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            _, *parts = _NAME.split(file.read_text(encoding="utf-8"))
            for name, text in zip(parts[::2], parts[1::2], strict=True):
                if name in found:
                    raise ValueError(f"two statements are named {name!r}")
                lines = [line for line in text.splitlines() if not line.lstrip().startswith("--")]
                found[name] = "\n".join(lines).strip()
    return found


class Many:
    """A statement that is run for many rows, with its `:name`s as `?1`, `?2`, … in the order of *names*.

    So it takes tuples for mappings, 2 µs a row less. It says of each row that it has changed by returning its `:place`;
    *telling* takes that after the others, *silent* is the statement without it.
    """

    __slots__ = ("silent", "telling")

    def __init__(self, statement: str, names: Sequence[str]) -> None:
        self.silent = _numbered(statement.removesuffix(_RETURNING).rstrip(), names)
        self.telling = _numbered(statement, [*names, "place"])


def _numbered(statement: str, names: Sequence[str]) -> str:
    places = {name: place for place, name in enumerate(names, 1)}
    return _PARAMETER.sub(lambda found: f"?{places[found[1]]}", statement)


@cache
def migrations(dialect: str) -> dict[int, str]:
    """Return the migrations of *dialect* by the version that each leads to."""
    folder = _folder(dialect).joinpath("migrations")
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    return {int(entry.name.removesuffix(".sql")): entry.read_text(encoding="utf-8") for entry in files}


def _folder(dialect: str) -> resources.abc.Traversable:
    return resources.files("deferlib.store").joinpath("sql", dialect)
