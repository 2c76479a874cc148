"""Who is told what becomes of each delivery: a log for production, lines on a terminal for development."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import NamedTuple, Protocol

from deferlib.core.model import SECOND, Action, Claim, Kind, Micros, Outcome, Result

log = logging.getLogger("deferlib.engine")


class Observer(Protocol):
    """Is told of deliveries, on the engine's thread: it must neither block nor raise."""

    def ended(self, now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        """*outcome* was decided of *claim*: because of *result*, or, where there is none, before it was delivered."""


class Monitor(Protocol):
    """Is told how the engine's turns go, on the engine's thread, and is around each: it must neither block nor raise."""

    def __enter__(self) -> object:
        """A turn begins."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The turn has ended, with *error* if it failed."""

    def lost(self, claim: Claim) -> None:
        """The lease of *claim* was lost while it ran: its answer won't count."""


class Unmonitored:
    """The `Monitor` of an engine that nobody asks."""

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return

    def lost(self, claim: Claim) -> None:
        return


UNMONITORED = Unmonitored()


class Ending(NamedTuple):
    """What became of a delivery, for people."""

    level: int  # of `logging`
    text: str  # follows the name of the call: "ran in 12 ms"


def describe(now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> Ending:
    """Return what became of *claim* in a few words."""
    match outcome.action:
        case Action.DONE:
            took = "" if result is None else f" in {length(result.ended - result.started)}"
            attempt = f" (attempt {claim.attempts})" if claim.attempts > 1 else ""
            return Ending(logging.DEBUG, f"ran{took}{attempt}")
        case Action.DEAD:
            return Ending(logging.ERROR, f"is a dead letter now: {outcome.reason}")
        case Action.RELEASE:
            return Ending(logging.INFO, f"is given back: {outcome.reason}")
        case Action.RETRY:
            return _again(now, result, outcome)
    return Ending(logging.INFO, f"{outcome.action} at {outcome.at}")


def _again(now: Micros, result: Result | None, outcome: Outcome) -> Ending:
    wait = f"retry in {length(max(outcome.at - now, 0))}"
    if result is None:
        return Ending(logging.WARNING, f"was not started: {outcome.reason}; {wait}")
    match result.kind:
        case Kind.INTERRUPTED:
            return Ending(logging.INFO, "was cut off by the reload: runs again at once")
        case Kind.UNREACHABLE:
            return Ending(logging.WARNING, f"could not be delivered: {outcome.reason}; {wait}")
        case Kind.TIMEOUT:
            return Ending(logging.WARNING, f"took longer than its deadline: {wait}")
    return Ending(logging.WARNING, f"failed: {outcome.reason}; {wait}")


def length(micros: Micros) -> str:
    """Return a span of time with two or three digits: "0.34 ms", "12 ms", "1.25 s", "3 m 20 s", "2 h 5 m"."""
    if micros < SECOND // 10 - 500:  # what would be rounded to 100 ms is 0.1 s
        return f"{micros / 1000:.2g} ms"
    if micros < 60 * SECOND:
        return f"{micros / SECOND:.3g} s"
    minutes, seconds = divmod(micros // SECOND, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours else f"{minutes} m {seconds} s"


class LogObserver:
    """Logs what becomes of deliveries: dead letters as errors, failures as warnings, the rest at debug level.

    No arguments of a call are logged, only the task's name and queue.
    """

    def ended(self, now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        if outcome.action is Action.DONE and not log.isEnabledFor(logging.DEBUG):  # nearly all of them
            return
        ending = describe(now, claim, result, outcome)
        extra = {"task": claim.public_name, "queue": claim.queue, "attempt": claim.attempts}
        log.log(ending.level, "task %s of queue %s %s", claim.public_name, claim.queue, ending.text, extra=extra)
