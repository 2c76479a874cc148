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
    """Run the calls of a batch, one after the other, each as if it had come alone; say what became of each."""
    series = _Series(calls, clock)
    while (begun := await asyncio.to_thread(series.run)) is not None:  # a hop for all plain functions, not for each
        await asyncio.create_task(series.finish(begun), context=begun.context)
    return series.answers


class _Begun(NamedTuple):
    """A call of a coroutine function, of which nothing has run."""

    attempt: attempts.Attempt
    value: Awaitable[Any]
    context: Context
    stack: ExitStack  # ends the attempt


class _Series:
    """The calls of a batch, on their way: plain functions run in a thread, coroutines on the loop."""

    def __init__(self, calls: batch.Batch, clock: Clock) -> None:
        self.answers: list[batch.Told | None] = []
        self._url, sent, parts = calls
        self._clock = clock
        self._parts = iter(parts)
        self._began = self._now = clock.now()
        self._offset = sent - self._began  # between the engine's clock and this one

    def run(self) -> _Begun | None:
        """Run calls until one is a coroutine's; None once all have been run. Off the loop."""
        for part in self._parts:
            if self._now - self._began > batch.PATIENCE:  # the others have waited long enough for those before them
                self.answers.append(None)
                continue
            context = copy_context()
            begun = context.run(self._begin, part, context)
            if begun is not None:
                return begun
        return None

    def _begin(self, part: batch.Part, context: Context) -> _Begun | None:
        headers = {name.lower(): value for name, value in part.headers}
        tracing.receive(headers.get(tracing.PARENT), headers.get(tracing.STATE, ""))
        attempt = attempts.Attempt(part.dispatch(self._url, self._now + self._offset, self._clock))
        with ExitStack() as stack:
            stack.enter_context(attempt)
            value = attempt.run(lambda: attempt.load(part.body)())
            if inspect.isawaitable(value):
                return _Begun(attempt, value, context, stack.pop_all())
        self._tell(attempt.answer)
        return None

    async def finish(self, begun: _Begun) -> None:
        """Run a coroutine to its end, in the context of its call."""
        with begun.stack:
            await attempts.uncancelled(begun.value)
        self._tell(begun.attempt.answer)

    def _tell(self, answer: attempts.Answer) -> None:
        ended = self._clock.now()
        self.answers.append(batch.Told(answer.status, answer.outcome, ended - self._now, answer.body))
        self._now = ended
