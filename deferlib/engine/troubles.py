"""What an engine tells of the targets and queues it has slowed: in its log, and by notes in the store."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from deferlib.core.health import PAUSES, Ailment, Condition
from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.core.scheduler import Slowdown
from deferlib.store import Tx

log = logging.getLogger("deferlib.engine")

_TARGET, _QUEUE = "target ", "slowed queue "  # and its base URL, or its name
_STALE: Micros = 2 * MINUTE  # a note is renewed each half minute, or is a killed engine's


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


def note(tx: Tx, now: Micros, news: Condition | Slowdown) -> None:
    """Leave or take away the note of a target or a queue."""
    if isinstance(news, Condition):
        tx.put_note(_TARGET + news.base, _text(news, now) if news.ailment is not None else "")
    else:
        tx.put_note(_QUEUE + news.queue, _text(news, now) if news.rate is not None else "")


def _text(news: Condition | Slowdown, now: Micros) -> str:
    return json.dumps({**news._asdict(), "at": now})


def conditions(notes: Mapping[str, str], now: Micros) -> list[Condition]:
    """Return the targets in trouble, as the engines' *notes* say."""
    found = (_fields(text, now) for name, text in sorted(notes.items()) if name.startswith(_TARGET))
    return [Condition(**{**fields, "ailment": Ailment(fields["ailment"])}) for fields in found if fields is not None]


def slowdowns(notes: Mapping[str, str], now: Micros) -> dict[str, Slowdown]:
    """Return the slowed queues by their names, as the engines' *notes* say."""
    found = (_fields(text, now) for name, text in notes.items() if name.startswith(_QUEUE))
    return {fields["queue"]: Slowdown(**fields) for fields in found if fields is not None}


def _fields(text: str, now: Micros) -> dict[str, Any] | None:
    fields: dict[str, Any] = json.loads(text)
    return fields if now - fields.pop("at") < _STALE else None
