"""How well each target is, by what came of the deliveries to it: how many it gets at once, and whether any at all.

A target that refuses every request, or can't be reached, gets one delivery at a time, each after a longer pause, until
it answers one. One that loses deliveries or lets them time out gets half as many at once. Either grows back with its
answers, the way a TCP connection does: doubling up to half of what it had, then one more a round. So a backlog ramps up
after an outage, instead of stampeding.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from deferlib.core.model import SECOND, Decision, Micros

ENOUGH = 3.0  # troubles that count: one alone may be about its request (a proxy that rewrites an odd URL)
FORGIVEN = 0.5  # of a trouble, by each answer: a target is in trouble where more than a third of its deliveries are
_TOLD_EVERY: Micros = SECOND
_FORGOTTEN: Micros = 30 * SECOND
_LIVELY: Micros = 6 * SECOND  # longer than a connection may take to be made


class Ailment(StrEnum):
    """What is wrong with a target."""

    REFUSING = "refuses this engine's requests"
    UNREACHABLE = "can't be reached"
    FAILING = "loses deliveries, or lets them time out"


# Between two tries of a target that is closed: at first, and at most.
PAUSES: dict[Ailment, tuple[Micros, Micros]] = {
    Ailment.REFUSING: (SECOND, 30 * SECOND),  # its keys are others: somebody has to do something
    Ailment.UNREACHABLE: (SECOND // 20, 5 * SECOND),
}


class Condition(NamedTuple):
    """What is told of a target when it changes."""

    base: str
    since: Micros
    ailment: Ailment | None  # None: it is well again
    reason: str = ""
    limit: int = 0  # deliveries at once
    until: Micros = 0  # when it is tried again; 0 if it isn't closed


class _State:
    __slots__ = (
        "ailment",
        "growing_at",
        "in_flight",
        "limit",
        "pause",
        "reason",
        "score",
        "shrunk_at",
        "since",
        "threshold",
        "told_at",
        "troubled_at",
        "until",
    )

    def __init__(self) -> None:
        self.score = 0.0
        self.ailment: Ailment | None = None  # None: not in enough trouble
        self.reason = ""
        self.in_flight = 0  # of use from the moment that it is limited
        self.limit = 0.0
        self.threshold = 0.0
        self.since: Micros = 0
        self.until: Micros = 0
        self.growing_at: Micros = 0  # from when on the limit doubles each second by itself; 0: it doesn't
        self.pause: Micros = 0
        self.shrunk_at: Micros = 0
        self.troubled_at: Micros = 0
        self.told_at: Micros = 0


class Health:
    """One engine's view of its targets, by base URL; *full* is how many deliveries one gets at once that is well."""

    def __init__(self, full: int) -> None:
        self._full = full
        self.states: dict[
            str, _State
        ] = {}  # of those in any trouble; for callers that ask of each task (`bool` takes 0.1 µs)
        self._news: list[Condition] = []

    def __bool__(self) -> bool:
        return bool(self.states)

    # --- what came of deliveries --------------------------------------------------------------------------------------

    def troubled(
        self, base: str, now: Micros, started: Micros, ailment: Ailment, reason: str, in_flight: Callable[[str], int]
    ) -> None:
        """Take a delivery, *started* then, that ended in trouble; *in_flight* counts what is still on its way."""
        state = self.states.setdefault(base, _State())
        state.score += 1
        state.troubled_at = now
        # What was on its way when the target was limited says nothing new.
        if state.score < ENOUGH or now < state.until or started < state.shrunk_at:
            return
        if state.ailment is None:
            state.since, state.in_flight, state.limit = now, in_flight(base), float(self._full)
        state.ailment, state.reason = ailment, reason
        state.shrunk_at = now
        if ailment in PAUSES:
            first, longest = PAUSES[ailment]
            state.pause = min(max(2 * state.pause, first), longest)
            state.until, state.growing_at = now + state.pause, 0
            state.limit, state.threshold = 1.0, max(self._full / 2, 1.0)
        else:
            state.limit = state.threshold = max(state.limit / 2, 1.0)
            state.score, state.growing_at = 0.0, 0
        self._tell(base, state, now)

    def answered(self, base: str, now: Micros) -> None:
        """Take a delivery that was answered, whatever the answer says of its task."""
        state = self.states.get(base)
        if state is None:
            return
        state.score = max(state.score - FORGIVEN, 0.0)
        if state.ailment is None:
            if not state.score:
                del self.states[base]
            return
        if state.until:  # it was closed
            state.limit = max(state.limit, float(self._limit(state, now)))
            state.until = state.pause = 0
            state.growing_at = now + SECOND
            state.score = 0.0
            state.told_at = 0
        state.limit += 1.0 if state.limit < state.threshold else 1.0 / state.limit
        if self._limit(state, now) >= self._full:
            del self.states[base]
            self._news.append(Condition(base, state.since, None))
        elif now - state.told_at >= _TOLD_EVERY:
            self._tell(base, state, now)

    def restore(self, condition: Condition, in_flight: int) -> None:
        """Be as another engine's, as it has told."""
        state = self.states[condition.base] = _State()
        state.in_flight = in_flight
        state.ailment, state.reason, state.since = condition.ailment, condition.reason, condition.since
        state.limit, state.until = float(condition.limit), condition.until

    def forget(self, now: Micros) -> None:
        """Forget targets that nothing was sent to for a while: how they are now isn't known."""
        for base, state in list(self.states.items()):
            if not state.in_flight and now - max(state.until, state.troubled_at) > _FORGOTTEN:
                del self.states[base]

    def sent(self, base: str, now: Micros, count: int = 1) -> None:
        """Count *count* deliveries on their way to *base*."""
        state = self.states.get(base)
        if state is not None:
            state.in_flight += count
            if state.until and not state.growing_at:
                state.growing_at = now + _LIVELY

    def landed(self, base: str) -> None:
        """Count one that has ended, however it did."""
        state = self.states.get(base)
        if state is not None and state.in_flight:
            state.in_flight -= 1

    # --- what follows from it -----------------------------------------------------------------------------------------

    def room(self, base: str, now: Micros, free: int) -> int:
        """Return how many of the *free* slots of *base* may be used."""
        state = self.states.get(base)
        if state is None or state.ailment is None:
            return free
        return 0 if now < state.until else max(0, min(free, self._limit(state, now) - state.in_flight))

    def _limit(self, state: _State, now: Micros) -> int:
        """Return how many deliveries at once *state* allows.

        What has been on its way to a target that was closed for longer than `_LIVELY` has surely been taken there: from
        then on the limit doubles each second. Else tasks that take long would be back at their old pace after an hour.
        """
        limit = state.limit
        if state.growing_at and now > state.growing_at and state.in_flight:
            limit = min(limit * 2 ** min((now - state.growing_at) / SECOND, 30.0), self._full)
        return int(limit)

    def until(self, base: str) -> Micros:
        """Return when *base*, which is closed, is tried again; 0 if it isn't closed."""
        state = self.states.get(base)
        return state.until if state is not None else 0

    def hold(self, base: str, now: Micros) -> Decision | None:
        """Say why nothing may be sent to *base* at *now*, or None if something may."""
        state = self.states.get(base)
        if state is None or state.ailment is None or self.room(base, now, self._full):
            return None
        if state.ailment in PAUSES and state.until:
            return Decision(f"target {base} {state.ailment}: {state.reason}", state.until if now < state.until else None)
        return Decision(f"target {base} {state.ailment}, and is at {state.in_flight}/{int(state.limit)} deliveries")

    def trouble(self, base: str) -> str:
        """Return what is wrong with *base*; '' if it is well."""
        state = self.states.get(base)
        if state is None or state.ailment is None:
            return ""
        return f"target {base} {state.ailment}: {state.reason}"

    def conditions(self) -> list[Condition]:
        """Return the targets in trouble."""
        return [
            Condition(base, state.since, state.ailment, state.reason, int(state.limit), state.until)
            for base, state in self.states.items()
            if state.ailment is not None
        ]

    def news(self) -> list[Condition]:
        """Return and forget what has changed."""
        news, self._news = self._news, []
        return news

    def _tell(self, base: str, state: _State, now: Micros) -> None:
        if state.until or now - state.told_at >= _TOLD_EVERY:
            state.told_at = now
            self._news.append(Condition(base, state.since, state.ailment, state.reason, int(state.limit), state.until))
