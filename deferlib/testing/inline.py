"""The transport of tests: calls a WSGI app in the calling thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextvars import Context

from deferlib.clock import Clock
from deferlib.core.model import SECOND, Delivery, Kind, Micros, Result
from deferlib.engine.local import Answer, WsgiApp, call


class InlineTransport:
    """Calls *app* with one delivery in each `wait`: no threads, and the same order every time.

    It takes one delivery at a time, so that a task is claimed only once the one before it has been settled.
    """

    def __init__(self, app: WsgiApp, clock: Clock) -> None:
        self._app = app
        self._clock = clock
        self._waiting: deque[Delivery] = deque()
        self._results: list[Result] = []
        self.ended: list[tuple[Delivery, Result]] = []  # what was called and how it ended, for whoever asks
        self.full = False  # take nothing more for now

    @property
    def pending(self) -> int:
        """How many deliveries wait to be called."""
        return len(self._waiting)

    def room(self, base: str) -> int:
        return 0 if self._waiting or self.full else 1

    def passes(self, base: str, queue: str) -> bool:
        return False  # one at a time

    def send(self, delivery: Delivery) -> None:
        self._waiting.append(delivery)

    def results(self) -> Sequence[Result]:
        results, self._results = self._results, []
        return results

    def cancel(self, id: int, claims: int) -> None:
        self._waiting = deque(delivery for delivery in self._waiting if delivery.claim[:2] != (id, claims))
        self._results = [result for result in self._results if result[:2] != (id, claims)]

    def withdraw(self) -> Sequence[Result]:
        now = self._clock.now()
        claims = [delivery.claim for delivery in self._waiting]
        self._waiting.clear()
        return [Result(claim.id, claim.claims, Kind.UNSENT, now, now, error="the engine is stopping") for claim in claims]

    def give_back(self) -> None:
        """Report what waits as not sent."""
        self._results += self.withdraw()

    def wait(self, until: Micros) -> None:
        """Call the app with the delivery that has waited longest, if there is one; the clock isn't waited for."""
        if self._waiting and not self._results:
            delivery = self._waiting.popleft()
            started = self._clock.now()
            kind, answer = Kind.UNKNOWN, Answer()
            try:
                # In a fresh context, as the engine's threads do it: a namespace set by the test doesn't reach the task.
                kind, answer = Kind.ANSWERED, Context().run(self._call, delivery, started)
            finally:  # Ctrl-C, or a test's own pytest.fail(), ends the test; the engine still gets its result
                self._end(delivery, kind, started, answer)

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self._waiting.clear()
        self._results.clear()

    def _call(self, delivery: Delivery, now: Micros) -> Answer:
        try:
            return call(self._app, delivery, now, self._clock)
        except (Exception, SystemExit) as error:
            return Answer.of_error(error)

    def _end(self, delivery: Delivery, kind: Kind, started: Micros, answer: Answer) -> None:
        claim, ended = delivery.claim, self._clock.now()
        if ended >= started + delivery.deadline:  # the call has moved the clock: no engine would still wait for its answer
            kind, answer = Kind.TIMEOUT, Answer()
            answer.error = f"no answer within {delivery.deadline / SECOND:g} s"
        result = Result(claim.id, claim.claims, kind, started, ended, answer.status, answer.outcome, answer.error)
        self._results.append(result)
        self.ended.append((delivery, result))
