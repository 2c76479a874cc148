"""The targets that are slowed: they refuse what this engine sends, whichever task it is, so that it is no task's fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deferlib.core.model import SECOND, Decision, Micros

REFUSALS = 3  # by how many answers in a row: one alone may be about its request (a proxy that rewrites an odd URL)
FIRST_PAUSE: Micros = SECOND
LONGEST_PAUSE: Micros = 30 * SECOND


class Slowed(NamedTuple):
    """What is told of a target when it changes: slowed, tried again in vain, or as before (`decision` is None)."""

    base: str
    since: Micros
    decision: Decision | None


class _State:
    __slots__ = ("in_flight", "pause", "refusals", "since", "until")

    def __init__(self) -> None:
        self.refusals = 0
        self.in_flight = 0  # from the moment it is slowed
        self.since: Micros = 0
        self.until: Micros = 0
        self.pause: Micros = 0

    @property
    def slowed(self) -> bool:
        return self.refusals >= REFUSALS


class SlowedTargets:
    """One engine's view of them, by base URL. A slowed target gets one delivery at a time, each after a longer pause."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}  # of those that refused the last answer
        self._news: list[Slowed] = []

    def __bool__(self) -> bool:
        return bool(self._states)

    def refused(self, base: str, now: Micros, reason: str, in_flight: Callable[[str], int]) -> None:
        """Take an answer by which *base* refuses a request; *in_flight* counts what is still on its way there."""
        state = self._states.setdefault(base, _State())
        state.refusals += 1
        if not state.slowed or now < state.until:  # the answers of those that were on their way are no news
            return
        if not state.pause:
            state.since, state.in_flight = now, in_flight(base)
        state.pause = min(max(2 * state.pause, FIRST_PAUSE), LONGEST_PAUSE)
        state.until = now + state.pause
        self._news.append(Slowed(base, state.since, Decision(reason, state.until)))

    def accepted(self, base: str) -> None:
        """Take any other answer of *base*: it is as before."""
        state = self._states.pop(base, None)
        if state is not None and state.slowed:
            self._news.append(Slowed(base, state.since, None))

    def sent(self, base: str) -> None:
        """Count a delivery on its way to *base*."""
        state = self._states.get(base)
        if state is not None:
            state.in_flight += 1

    def landed(self, base: str) -> None:
        """Count one that has ended, however it did."""
        state = self._states.get(base)
        if state is not None and state.in_flight:
            state.in_flight -= 1

    def room(self, base: str, now: Micros, free: int) -> int:
        """Return how many of the *free* slots of *base* may be used."""
        state = self._states.get(base)
        if state is None or not state.slowed:
            return free
        return 0 if now < state.until or state.in_flight else min(free, 1)

    def until(self, base: str) -> Micros:
        """Return when *base* is tried again; 0 if it isn't slowed."""
        state = self._states.get(base)
        return state.until if state is not None and state.slowed else 0

    def news(self) -> list[Slowed]:
        """Return and forget what has changed."""
        news, self._news = self._news, []
        return news
