"""Targets that tasks have beside their queue's: when those that found no room there come again.

A queue is asked for as many tasks as its own target takes, so of another target there may be more than have room. They
come again when their turn is there, by how long that target takes for one; of one that hasn't answered yet, later and
later, and not all at once.
"""

from __future__ import annotations

from deferlib.core.model import SECOND, Micros

FIRST: Micros = SECOND
LONGEST: Micros = 30 * SECOND
_MOST = 1_000  # targets: origins of absolute URLs can be any number
_APART: Micros = SECOND // 5000  # tasks that are put off while nothing is known: each costs 30 µs when it comes again
_EARLY = 0.9  # so that none of its slots waits for them


class _State:
    __slots__ = ("grown_at", "length", "next_at", "took")

    def __init__(self) -> None:
        self.took = 0.0  # moving average of how long an answer takes, in microseconds; 0: none has come
        self.next_at: Micros = 0  # when the last of those that were put off comes again
        self.length: Micros = FIRST  # for how long they are put off while nothing is known
        self.grown_at: Micros = 0


class Crowding:
    """One engine's view of them, by base URL; *full* is how many deliveries a target gets at once."""

    def __init__(self, full: int) -> None:
        self._full = full
        self._states: dict[str, _State] = {}

    def answered(self, base: str, took: Micros) -> None:
        """Take how long a delivery there took."""
        state = self._state(base)
        state.took += (took - state.took) / 8 if state.took else max(took, 1)

    def again(self, base: str, now: Micros, place: int) -> Micros:
        """Return when the task comes again that found no room at *now*, the *place*-th in this turn. Changes nothing."""
        state = self._states.get(base)
        if state is None or not state.took:
            length = FIRST if state is None else state.length
            return self._after(state, now + length, place * _APART, now)
        return self._after(state, now, place * max(state.took / self._full, 100.0) * _EARLY, now)

    def _after(self, state: _State | None, soonest: Micros, distance: float, now: Micros) -> Micros:
        """Return the time behind all that were put off before: thousands at once would keep a turn busy for long."""
        last = soonest if state is None else max(soonest, state.next_at)
        return min(last + round(distance), now + LONGEST)

    def put_off(self, base: str, now: Micros, until: Micros) -> None:
        """Take that a task was put off *until* then."""
        state = self._state(base)
        state.next_at = max(state.next_at, until)
        if now - state.grown_at >= state.length // 2:
            if state.grown_at:
                state.length = min(2 * state.length, LONGEST)
            state.grown_at = now

    def _state(self, base: str) -> _State:
        state = self._states.get(base)
        if state is None:
            while len(self._states) >= _MOST:
                del self._states[next(iter(self._states))]
            state = self._states[base] = _State()
        return state
