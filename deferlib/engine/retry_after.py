"""`Retry-After`: how long an answer asks to wait, in seconds or until a date (RFC 9110, 10.2.3)."""

from __future__ import annotations

from deferlib.core.model import DAY, SECOND, Micros

STATUSES = frozenset({429, 503})  # the answers whose Retry-After counts


def parse(text: str, now: Micros) -> Micros:
    """Return how long *text* asks to wait at *now*, at most a day; 0 if it doesn't say."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return min(int(text[:9]) * SECOND, DAY)
    if len(text) > 40:
        return 0
    from email.utils import parsedate_to_datetime  # 8 ms: only where it is needed

    try:
        at = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0
    return max(0, min(round(at * SECOND) - now, DAY))
