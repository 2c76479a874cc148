"""What an engine tells of the targets and queues it has slowed: in its log, and by notes in the store."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deferlib.core.health import PAUSES, Ailment, Condition
from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.core.scheduler import Slowdown

log = logging.getLogger("deferlib.engine")

NOTE = "slowed by "  # and the engine's name
RENEW: Micros = MINUTE // 2
_STALE: Micros = 2 * MINUTE
_MOST = 100  # targets, or queues


def tell(now: Micros, news: Condition | Slowdown) -> None:
    """Log that a target or a queue is slowed, was tried in vain, or is as before."""
    match news:
        case Condition(base=base, ailment=None):
            log.warning("target %s is well again", base)
        case Condition(ailment=Ailment.REFUSING):
            log.error(
                "target %s %s, so it gets one at a time, the next in %.0f s, until it accepts one: %s. Its tasks wait, and "
                "none is lost. Give both the same keys (`deferlib keys list` at either side), and see `deferlib doctor`",
                *(news.base, news.ailment, max(news.until - now, 0) / SECOND, news.reason or "it doesn't say why"),
            )
        case Condition(ailment=Ailment() as ailment) if news.until and ailment in PAUSES:
            wait = max(news.until - now, 0) / SECOND
            log.warning("target %s %s, and is tried again in %.2g s: %s", news.base, ailment, wait, news.reason)
        case Condition():
            log.warning("target %s %s: it gets %d at once now", news.base, news.ailment, news.limit)
        case Slowdown(rate=None):
            log.warning("queue %s has its own rate again", news.queue)
        case Slowdown():
            log.warning("queue %s is slowed to %.3g/s: its target is overloaded (503)", news.queue, news.rate)


def note_of(conditions: Sequence[Condition], slowdowns: Sequence[Slowdown]) -> str:
    """Return what an engine's note says of the targets and queues that it has slowed; '' for none."""
    if not conditions and not slowdowns:
        return ""
    slowed = [each._replace(rate=each.rate and float(f"{each.rate:.2g}")) for each in slowdowns]
    return json.dumps({"targets": conditions[:_MOST], "queues": slowed[:_MOST]})


def dated(text: str, now: Micros) -> str:
    """Return the note *text* with its time, for `stale` and its like."""
    return f"{now} {text}" if text else ""


def stale(notes: Mapping[str, str], now: Micros) -> list[str]:
    """Return the names of the notes that engines left when they were killed."""
    return [name for name, text in notes.items() if name.startswith(NOTE) and not _is_fresh(text, now)]


def conditions(notes: Mapping[str, str], now: Micros) -> list[Condition]:
    """Return the targets in trouble, as the engines' *notes* say; of several, as the one that knows it longest."""
    found: dict[str, Condition] = {}
    for fields in _read(notes, now):
        for base, since, ailment, *rest in fields["targets"]:
            if base not in found or since < found[base].since:
                found[base] = Condition(base, since, Ailment(ailment), *rest)
    return [found[base] for base in sorted(found)]


def slowdowns(notes: Mapping[str, str], now: Micros) -> dict[str, Slowdown]:
    """Return the slowed queues by their names, as the engines' *notes* say: the rates of several add up."""
    found: dict[str, Slowdown] = {}
    for fields in _read(notes, now):
        for each in (Slowdown(*values) for values in fields["queues"]):
            known = found.get(each.queue)
            if known is not None:
                rate = (known.rate or 0.0) + (each.rate or 0.0)
                each = Slowdown(each.queue, min(known.since, each.since), rate, max(known.until, each.until))
            found[each.queue] = each
    return found


def _read(notes: Mapping[str, str], now: Micros) -> Iterator[dict[str, Any]]:
    for name, text in sorted(notes.items()):
        if name.startswith(NOTE) and _is_fresh(text, now):
            yield json.loads(text.partition(" ")[2])


def _is_fresh(text: str, now: Micros) -> bool:
    return now - int(text.partition(" ")[0]) < _STALE
