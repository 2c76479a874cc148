"""The log of a command: on stderr, one line a record."""

from __future__ import annotations

import logging
import sys
from typing import Any

from deferlib.cli.show import safe


def log_to_stderr(level: str, *, lines: bool = False) -> None:
    """Show our log, and the app's unless it has set up its own; with *lines*, a message's further lines below its first."""
    logging.getLogger("deferlib").setLevel(level.upper())
    if level != "debug":  # a line for each call, which App Engine's programs expect in the log of their app
        logging.getLogger("deferlib.handler.headers").setLevel(logging.WARNING)
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter((_Lines if lines else _Formatter)("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(level.upper())


class _Formatter(logging.Formatter):
    """Keeps a record's message on its line: a part of it may come from a task or an answer, so from anybody."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return safe(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(safe(line) for line in super().formatException(ei).split("\n"))


class _Lines(_Formatter):
    """Keeps the lines of a message apart, indented, so that none looks like a record of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = logging.Formatter.formatMessage(self, record)
        return "\n    ".join(safe(line) for line in text.rstrip().split("\n"))
