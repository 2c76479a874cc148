"""Deferred calls on the loop of an ASGI app: coroutines on the loop itself, plain functions in a thread."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from contextlib import ExitStack
from contextvars import Context, copy_context
from time import perf_counter_ns
from typing import Any, NamedTuple

from deferlib import attempt as attempts
from deferlib import batch, tracing
from deferlib.clock import Clock
from deferlib.context import Dispatch
from deferlib.core.model import Micros
from deferlib.series import HELPERS, LOOK, Series


async def perform(dispatch: Dispatch, data: bytes) -> tuple[attempts.Answer, Micros]:
    """Load and run the call of *dispatch*; say how it went, and how long it ran once it had a thread.

    `deferlib.attempt.perform` for the loop this runs on.
    """
    began = 0

    def start() -> tuple[Any, BaseException | None]:
        """Unpickle (which imports) and call, off the loop; of a coroutine function nothing runs yet.

        The error is returned: a StopIteration can't pass through a future, whoever waits would wait for ever.
        """
        nonlocal began
        began = perf_counter_ns()
        try:
            return attempt.run(lambda: attempt.load(data)()), None
        except BaseException as error:
            return None, error

    with attempts.Attempt(dispatch) as attempt:
        value, error = await asyncio.to_thread(start)  # in a copy of this context
        if error is not None:
            raise error
        if inspect.isawaitable(value):
            await attempts.uncancelled(value)
    return attempt.answer, (perf_counter_ns() - began) // 1000


async def perform_all(calls: batch.Batch, clock: Clock) -> list[batch.Told | None]:
    """Run the calls of a batch, each as if it had come alone; say what became of each.

    One after the other; where one takes long, another runner goes on with those behind it.
    """
    runner = _Runner(Series(calls, clock))
    runners = [asyncio.create_task(runner.run(late=False))]
    taken, waiting = -1, set(runners)
    while waiting:
        timeout = LOOK if runner.series.waiting and len(runners) <= HELPERS else None
        done, waiting = await asyncio.wait(waiting, timeout=timeout)
        if not done and runner.taken == taken and runner.series.waiting:
            helper = asyncio.create_task(runner.run(late=True))
            runners.append(helper)
            waiting.add(helper)
        taken = runner.taken
    for each in runners:
        each.result()
    return runner.series.answers


class _Begun(NamedTuple):
    """A call of a coroutine function, of which nothing has run."""

    place: int
    began: Micros
    attempt: attempts.Attempt
    value: Awaitable[Any]
    context: Context
    stack: ExitStack  # ends the attempt


class _Runner:
    """Runs a series: plain functions in a thread, coroutines on the loop."""

    def __init__(self, series: Series) -> None:
        self.series = series
        self.taken = 0

    async def run(self, *, late: bool) -> None:
        """Run calls until there are none; as `Relay.work`."""
        while (begun := await asyncio.to_thread(self._begin, late)) is not None:  # a hop for all plain functions
            await asyncio.create_task(self._finish(begun), context=begun.context)

    def _begin(self, late: bool) -> _Begun | None:
        """Run calls until one is a coroutine's; None once there are none. Off the loop."""
        while (taken := self.series.take(late=late)) is not None:
            self.taken += 1
            context = copy_context()
            begun = context.run(self._begin_one, *taken, context)
            if begun is not None:
                return begun
        return None

    def _begin_one(
        self, place: int, part: batch.Part, dispatch: Dispatch, began: Micros, context: Context
    ) -> _Begun | None:  # fmt: skip
        headers = {name.lower(): value for name, value in part.headers}
        tracing.receive(headers.get(tracing.PARENT), headers.get(tracing.STATE, ""))
        attempt = attempts.Attempt(dispatch)
        with ExitStack() as stack:
            stack.enter_context(attempt)
            value = attempt.run(lambda: attempt.load(part.body)())
            if inspect.isawaitable(value):
                return _Begun(place, began, attempt, value, context, stack.pop_all())
        self._tell(place, began, attempt.answer)
        return None

    async def _finish(self, begun: _Begun) -> None:
        """Run a coroutine to its end, in the context of its call."""
        with begun.stack:
            await attempts.uncancelled(begun.value)
        self._tell(begun.place, begun.began, begun.attempt.answer)

    def _tell(self, place: int, began: Micros, answer: attempts.Answer) -> None:
        self.series.tell(place, began, answer.status, answer.outcome, answer.body)
