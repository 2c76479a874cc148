"""What an engine tells of the targets it has slowed: loudly in its log, and by a note in the store."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.core.slowed import Slowed
from deferlib.store import Tx

log = logging.getLogger("deferlib.engine")

_NOTE = "target "  # and its base URL
_STALE: Micros = 2 * MINUTE  # said again at every try, which comes each half minute: an older note is a killed engine's


class Trouble(NamedTuple):
    """A slowed target, as a note tells of it."""

    base: str
    since: Micros
    again: Micros  # when it is tried again
    reason: str


def tell(now: Micros, slowed: Slowed) -> None:
    """Log that a target was slowed, was tried in vain, or is as before."""
    if slowed.decision is None:
        log.warning("target %s accepts this engine's requests again", slowed.base)
        return
    log.error(
        "target %s refuses this engine's requests, so it gets one at a time, the next in %.0f s, until it accepts one: %s. "
        "Its tasks wait and none is lost. Give both the same keys (`deferlib keys list` at either side), and see "
        "`deferlib doctor`",
        slowed.base,
        max((slowed.decision.until or now) - now, 0) / SECOND,
        slowed.decision.reason or "it doesn't say why",
    )


def note(tx: Tx, now: Micros, slowed: Slowed) -> None:
    """Leave or take away the note of a target."""
    if slowed.decision is None:
        return tx.put_note(_NOTE + slowed.base, "")
    fields = {"since": slowed.since, "again": slowed.decision.until, "reason": slowed.decision.reason, "at": now}
    tx.put_note(_NOTE + slowed.base, json.dumps(fields))


def troubles(notes: Mapping[str, str], now: Micros) -> Iterable[Trouble]:
    """Yield the targets that engines have slowed, as their *notes* say."""
    for name, text in sorted(notes.items()):
        if not name.startswith(_NOTE):
            continue
        fields = json.loads(text)
        if now - fields["at"] < _STALE:
            yield Trouble(name.removeprefix(_NOTE), fields["since"], fields["again"] or now, fields["reason"])
