"""Why a task isn't running: the scheduler itself, made of rows and of what the engines have told, says what it would do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deferlib.core.health import Condition
from deferlib.core.model import Decision, Micros, TaskRow
from deferlib.core.rules import leaves
from deferlib.core.scheduler import Scheduler, Slowdown
from deferlib.errors import InvalidUrlError


class Explainer(Scheduler):
    """A scheduler that explains, and dispatches nothing."""

    def restore(
        self, now: Micros, conditions: Iterable[Condition], slowdowns: Iterable[Slowdown], in_flight: Mapping[str, int]
    ) -> None:
        """Be as the engines of the store are, as they have told: to explain what they do, not to work beside them."""
        for name, count in in_flight.items():
            self._queues[name].in_flight = count
        for condition in conditions:
            self._health.restore(condition, self._flying_to(condition.base))
        for slowdown in slowdowns:
            if slowdown.queue in self._queues and slowdown.rate is not None:
                self._queues[slowdown.queue].throttle.restore(slowdown.rate, slowdown.since, slowdown.until, now)

    def explain(self, now: Micros, task: TaskRow) -> list[Decision]:
        """Return what holds a live, unleased *task* back at *now*; nothing: it is started as soon as it is its turn."""
        queue = self._queues.get(task.queue)
        if queue is None:
            return [Decision(f"queue {task.queue} is gone")]
        decisions = []
        if task.due is not None and task.due > now:
            again = f"backing off, after attempt {task.attempts}" if task.attempts else "scheduled"
            decisions.append(Decision(f"{again} ({task.reason})" if task.reason else again, task.due))
        held = queue.hold(now)
        if held is not None:
            decisions.append(Decision(f"queue {task.queue} is {held.reason}", held.until))
        target = queue.config.target or task.target
        if leaves(task.url):
            try:
                base: str | None = self._rules.origin(task.url)
            except InvalidUrlError as error:
                return [*decisions, Decision(str(error))]
        else:
            base = self._rules.resolve(target)
        if base is None:
            decisions.append(Decision(f"target {target!r} is not configured"))
        elif (held := self._health.hold(base, now)) is not None:
            decisions.append(held)
        elif (flying := self._flying_to(base)) >= self._rules.concurrency:
            decisions.append(Decision(f"target {base} is at {flying}/{self._rules.concurrency} deliveries"))
        return decisions

    def _flying_to(self, base: str) -> int:
        return sum(queue.in_flight for queue in self._queues.values() if self._base(queue) == base)
