"""What the demo prints: steps, a bar on one line, and the facts; never wider than 80 columns."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

from examples.search_index import index
from examples.search_index.facts import DeadLetter, Facts

WIDTH = 80
INDENT = " " * 11
BAR = 30


class Screen:
    """Prints steps with the seconds since the start; the bar is drawn again in place, or now and then in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._started = time.monotonic()
        self._drawn = -1  # the last bar's percentage, of the tens where there is no terminal
        self._open = False  # the cursor stands behind a bar

    def step(self, text: str) -> None:
        """Print what has just happened."""
        self._finish_bar()
        lines = textwrap.wrap(text, WIDTH - len(INDENT))
        print(f"{time.monotonic() - self._started:7.1f} s  {lines[0]}", flush=True)
        for line in lines[1:]:
            print(INDENT + line, flush=True)

    def bar(self, done: int, of: int) -> None:
        """Show how much is *done*."""
        percent = 100 * done // max(of, 1)
        if not self._terminal:
            if percent // 10 > self._drawn // 10:
                self._drawn = percent
                print(f"{INDENT}{percent:3} %  {done:,} of {of:,}", flush=True)
            return
        full = BAR * done // max(of, 1)
        line = f"{_glyphs('█' * full, '#' * full)}{_glyphs('░', '.') * (BAR - full)} {percent:3} %  {done:,} of {of:,}"
        print(f"\r{INDENT}{line:<{WIDTH - len(INDENT) - 1}}", end="", flush=True)
        self._open = True

    def lines(self, lines: Iterable[str]) -> None:
        """Print *lines* as they are."""
        self._finish_bar()
        for line in lines:
            print(line, flush=True)

    def _finish_bar(self) -> None:
        if self._open:
            print()
            self._open = False


def _glyphs(pretty: str, plain: str) -> str:
    """Return *pretty*, or *plain* where the terminal can't show it."""
    try:
        pretty.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return plain
    return pretty


def summary(facts: Facts, seconds: float) -> Iterable[str]:
    """Yield the table of facts."""
    rate = len(facts.indexed) / seconds
    yield ""
    yield f"  files            {len(facts.files):>7,}"
    yield f"  indexed          {len(facts.indexed):>7,}"
    yield f"  files per second {rate:>7,.0f}   the kill and the wait for leases included"
    yield f"  lost             {len(facts.lost):>7,}"
    yield f"  started twice    {len(facts.started_again):>7,}   of the {len(facts.in_flight):,} in flight at the kill"
    yield f"  stored twice     {len(facts.stored_again):>7,}"
    yield f"  dead letters     {len(facts.dead):>7,}"


def hits(query: str) -> Iterable[str]:
    """Yield the best files for *query*."""
    count, found = index.search(query, limit=3)
    yield ""
    yield f'  "{query}" is in {count:,} files; the best of them:'
    for hit in found:
        snippet = hit.snippet.replace(index.MATCH, "[").replace(index.END_MATCH, "]")
        yield f"    {_end_of(hit.path)}"
        yield f"      {_shortened(snippet, WIDTH - 6)}"


def dead_letter(letter: DeadLetter, path: str) -> Iterable[str]:
    """Yield what deferlib keeps of a call that it gave up, and the file that the call was for."""
    yield ""
    yield f"  dead letter {letter['name']}"
    fields = {"call": letter["call"], "file": Path(path).name, "reason": letter["reason"]}
    for attempt in letter["history"]:
        fields[f"attempt {attempt['attempt']}"] = f"{attempt['at']}, HTTP {attempt['status']}"
    for name, value in fields.items():
        lines = textwrap.wrap(_shortened(str(value), 300), WIDTH - 16) or [""]
        yield f"    {name:<10}  {lines[0]}"
        yield from (" " * 16 + line for line in lines[1:])


def _end_of(path: str) -> str:
    return path if len(path) <= WIDTH - 4 else "…" + path[-(WIDTH - 5) :]


def _shortened(text: str, width: int) -> str:
    """Return *text* in at most *width* characters, without any that would do something to the terminal."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= width else text[: width - 1] + "…"
