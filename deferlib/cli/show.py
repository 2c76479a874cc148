"""What commands print: tables that fit the terminal, times that people read, JSON that programs read.

Whatever comes from a store may have been written by anybody, so every text goes through `safe` on its way out.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta

from deferlib.core.model import DAY, HOUR, MINUTE, SECOND, Micros

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = -62_135_596_800 * SECOND, 253_402_300_799 * SECOND  # the years 1 and 9999: what a datetime can be
_NARROWEST = 40
_GAP = "  "


def safe(text: str) -> str:
    """Return *text* as one line that can do nothing to a terminal or a log: unprintable characters become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --- documents ------------------------------------------------------------------------------------------------------


def print_json(document: object) -> None:
    """Print *document* as JSON, in ASCII."""
    print(json.dumps(document, indent=2))


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values below each other; an empty value is left out."""
    shown = [(name, safe(value)) for name, value in fields if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}{_GAP}{value}")


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, keep_end: Collection[str] = ()) -> None:
    """Print *rows* under *titles*, within the terminal's width (80 columns if there is none).

    The widest columns give way first; those in *keep_end* lose their beginning, the others their end.
    """
    cells = [list(titles), *([safe(cell) for cell in row] for row in rows)]
    natural = [max(_width(row[column]) for row in cells) for column in range(len(titles))]
    room = max(shutil.get_terminal_size((80, 24)).columns, _NARROWEST) - len(_GAP) * (len(titles) - 1)
    widths = _fitted(natural, [len(title) for title in titles], room)
    for row in cells:
        shown = [
            padded(cut(cell, width, title in keep_end), width)
            for cell, width, title in zip(row, widths, titles, strict=True)
        ]
        print(_GAP.join(shown).rstrip())


def _fitted(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Return the widths of columns within *room*: the widest is made narrower, again and again, down to its title."""
    widths = list(natural)
    while sum(widths) > room:
        spare = [(width, -column) for column, width in enumerate(widths) if width > least[column]]
        if not spare:
            break
        widths[-max(spare)[1]] -= 1
    return widths


def _width(text: str) -> int:
    """Return how many cells of a terminal *text* takes."""
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int, keep_end: bool = False) -> str:
    """Return *text* in at most *width* cells of a terminal; it loses its end, or with *keep_end* its beginning."""
    if _width(text) <= width:
        return text
    kept, used = [], 1  # the ellipsis
    for character in reversed(text) if keep_end else text:
        used += _cells(character)
        if used > width:
            break
        kept.append(character)
    return "…" + "".join(reversed(kept)) if keep_end else "".join(kept) + "…"


def padded(text: str, width: int) -> str:
    """Return *text* with spaces up to *width* cells of a terminal."""
    return text + " " * (width - _width(text))


# --- times ----------------------------------------------------------------------------------------------------------


def iso(at: Micros | None) -> str | None:
    """Return a time as ISO 8601 in UTC, to the millisecond; None for None."""
    if at is None:
        return None
    moment = _EPOCH + timedelta(microseconds=min(max(at, _FIRST), _LAST))
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def relative(at: Micros, now: Micros) -> str:
    """Return how far *at* is from *now*: "in 3 m", "2 s ago"."""
    distance = abs(at - now)
    if distance < SECOND:
        return "now"
    return f"in {rough(distance)}" if at > now else f"{rough(distance)} ago"


def when(at: Micros | None, now: Micros) -> str:
    """Return a time for people, both ways; '' for None."""
    return "" if at is None else f"{iso(at)} ({relative(at, now)})"


def span(length: Micros) -> str:
    """Return a span of time: "30 s", "1.5 s", "10 m"."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (MINUTE, "m")):
        if length >= unit and length % unit == 0:
            return f"{length // unit} {name}"
    return f"{length / SECOND:.10g} s"


def rough(length: Micros) -> str:
    """Return a span of time in one whole number: "90 s", "3 m", "5 h", "3 d"."""
    for unit, name in ((2 * DAY, "d"), (2 * HOUR, "h"), (2 * MINUTE, "m")):
        if length >= unit:
            return f"{length // (unit // 2)} {name}"
    return f"{length // SECOND} s"


def count(number: int, what: str) -> str:
    """Return "1 task", "2 tasks"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def seconds(length: Micros | None) -> float | None:
    """Return a span of time in seconds, for programs; None for None."""
    return None if length is None else length / SECOND
