"""Fail on purpose at a step of the engine: `DEFERLIB_FAILPOINT=commit:3:kill` kills it at its third commit.

For tests of whole processes. Off unless the variable is set.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping

from deferlib.errors import ConfigError, Error

VARIABLE = "DEFERLIB_FAILPOINT"
STALL_VARIABLE = "DEFERLIB_FAILPOINT_STALL"
STEPS = ("answer", "settle", "claim", "commit", "committed", "send")
ACTIONS = ("kill", "raise", "stall")
_DEFAULT_STALL = "60"


class FailpointError(Error):
    """A failpoint was reached."""


def from_environ(environ: Mapping[str, str] = os.environ) -> Callable[[str], None] | None:
    """Return the `step` of an `Engine` that fails as the environment says; None if it says nothing.

    `DEFERLIB_FAILPOINT=name:n:action`: when step *name* is reached for the *n*-th time (from 1), kill this process with
    SIGKILL, raise `FailpointError`, or stall for `DEFERLIB_FAILPOINT_STALL` seconds (60 by default).
    """
    text = environ.get(VARIABLE)
    if not text:
        return None
    name, count, action = _parsed(text)
    seconds = _stall(environ.get(STALL_VARIABLE) or _DEFAULT_STALL)
    reached = 0

    def step(at: str) -> None:
        nonlocal reached
        if at != name:
            return
        reached += 1
        if reached == count:
            _fail(action, f"failpoint {text}", seconds)

    return step


def _parsed(text: str) -> tuple[str, int, str]:
    name, _, rest = text.partition(":")
    count, _, action = rest.partition(":")
    if name not in STEPS or not count.isascii() or not count.isdigit() or int(count) < 1 or action not in ACTIONS:
        raise ConfigError(
            f"{VARIABLE}={text!r}: STEP:N:ACTION is needed, like commit:3:kill; steps are {', '.join(STEPS)}, N counts "
            f"from 1, actions are {', '.join(ACTIONS)}"
        )
    return name, int(count), action


def _stall(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise ConfigError(f"{STALL_VARIABLE}={text!r}: a number of seconds from 0 to 86400 is needed")
    return seconds


def _fail(action: str, what: str, seconds: float) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise FailpointError(what)
        case _:
            time.sleep(seconds)
