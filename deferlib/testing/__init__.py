"""Test what your app defers: the real engine, in the calling thread, on a clock that you move.

>>> from deferlib import testing
>>> with testing.engine() as engine:  # doctest: +SKIP
...     sign_up("ada@example.com")  # your code, which defers a mail for tomorrow
...     engine.advance(timedelta(days=1))  # runs it, and its retries, at their virtual times
...     assert not engine.dead_letters()

With pytest, ask for the fixture `deferlib_engine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deferlib.testing.clock import VirtualClock as VirtualClock
    from deferlib.testing.harness import Attempt as Attempt
    from deferlib.testing.harness import Harness as Harness
    from deferlib.testing.harness import NeverIdleError as NeverIdleError
    from deferlib.testing.harness import TaskFailedError as TaskFailedError
    from deferlib.testing.harness import TaskView as TaskView
    from deferlib.testing.harness import engine as engine
    from deferlib.testing.inline import InlineTransport as InlineTransport

__all__ = [
    "Attempt",
    "Harness",
    "InlineTransport",
    "NeverIdleError",
    "TaskFailedError",
    "TaskView",
    "VirtualClock",
    "engine",
]


def __getattr__(name: str) -> Any:
    # Late, because pytest loads this package (for its plugin) in every project that has deferlib installed.
    if name not in __all__:
        raise AttributeError(f"module 'deferlib.testing' has no attribute {name!r}")
    from deferlib.testing import clock, harness, inline

    found = {"VirtualClock": clock, "InlineTransport": inline}.get(name, harness)
    return getattr(found, name)
