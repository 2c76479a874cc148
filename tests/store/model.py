"""What a store is, as a dict of tasks and nothing else: the oracle of `test_model.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deferlib.core.model import (
    Action,
    AddResult,
    Claim,
    ClaimSpec,
    DeleteResult,
    Micros,
    NewTask,
    Outcome,
    QueueConfig,
    Signed,
    TaskRow,
    TaskState,
)


@dataclass(slots=True)
class Entry:
    """A task in one of its lives: live (due), a tombstone (expires) or a dead letter (died)."""

    task: NewTask
    eta: Micros
    due: Micros | None = None
    expires: Micros | None = None
    died: Micros | None = None
    claims: int = 0
    attempts: int = 0
    executions: int = 0
    failures: int = 0
    lost: int = 0
    first_try: Micros | None = None
    status: int = 0
    reason: str = ""


Seen = tuple[object, ...]


def claimed(task: Claim | Entry) -> Seen:
    """Return what is compared of a claim."""
    of = task.task if isinstance(task, Entry) else task
    counts = (task.claims, task.attempts, task.executions, task.failures, task.lost, task.first_try)
    return (of.id, of.queue, of.name, of.tag, of.body, task.eta, *counts, task.status, task.reason)


def seen(task: TaskRow | Entry) -> Seen:
    """Return what is compared of a task."""
    of = task.task if isinstance(task, Entry) else task
    counts = (task.claims, task.attempts, task.executions, task.failures, task.lost, task.first_try)
    return (of.id, of.queue, of.name, of.tag, of.body, task.eta, task.due, task.died, *counts, task.status, task.reason)


class Model:
    """The verbs, on two dicts by id: *tasks* (with tombstones) and *dead*."""

    def __init__(self, configs: Sequence[QueueConfig]) -> None:
        self.configs = {config.name: config for config in configs}
        self.tasks: dict[int, Entry] = {}
        self.dead: dict[int, Entry] = {}
        self.tat = dict.fromkeys(self.configs, 0)

    # --- verbs ------------------------------------------------------------------------------------------------------

    def add(self, now: Micros, tasks: Sequence[NewTask]) -> list[AddResult]:
        return [self._add(now, task) for task in tasks]

    def _add(self, now: Micros, task: NewTask) -> AddResult:
        if task.queue not in self.configs:
            return AddResult.NO_QUEUE
        if self.configs[task.queue].mode != task.mode:
            return AddResult.WRONG_MODE
        if other := self.tasks.get(task.id) or self.dead.get(task.id):
            return AddResult.EXISTS if other.task.nonce == task.nonce else AddResult.COLLIDED
        if not self._free(now, task.queue, task.name):
            holder = next(each for each in self._named(self.tasks, task.queue, task.name))
            return AddResult.TAKEN if holder.expires is None else AddResult.TOMBSTONED
        self.tasks[task.id] = Entry(task, task.eta, due=task.eta)
        return AddResult.ADDED

    def delete(self, now: Micros, queue: str, names: Sequence[str]) -> list[DeleteResult]:
        return [self._delete(now, queue, name) for name in names]

    def _delete(self, now: Micros, queue: str, name: str) -> DeleteResult:
        found = self.find(queue, name)
        result = DeleteResult.TOMBSTONED if found else DeleteResult.UNKNOWN
        for entry in found:
            if entry.died is not None:
                del self.dead[entry.task.id]
                result = DeleteResult.DELETED
            elif entry.due is not None:
                self._end(entry, now + self.configs[queue].tombstone)
                result = DeleteResult.DELETED
        return result

    def purge(self, now: Micros, queue: str, limit: int) -> int:
        gone = self.live(queue)[:limit]
        for entry in gone:
            self._end(entry, now + self.configs[queue].tombstone)
        return len(gone)

    def claim(self, now: Micros, spec: ClaimSpec) -> list[Entry]:
        live = self.fast(spec.queue) if spec.fail_fast else self.live(spec.queue)
        due = [entry for entry in live if (entry.due or 0) <= now and spec.tag in (None, entry.task.tag)]
        taken: list[Entry] = []
        spent = 0
        for entry in due[: spec.limit]:
            if spent and spent + len(entry.task.body) > spec.bytes:
                break
            spent += len(entry.task.body)
            entry.lost += (entry.due or 0) > entry.eta
            entry.due, entry.claims, entry.attempts = spec.until, max(entry.claims + 1, now), entry.attempts + 1
            entry.first_try = now if entry.first_try is None else entry.first_try
            taken.append(replace(entry))
        if taken and spec.interval:
            self.tat[spec.queue] = max(self.tat[spec.queue], now) + len(taken) * spec.interval
        return sorted(taken, key=lambda entry: (entry.eta, entry.task.id))

    def settle(self, now: Micros, outcomes: Sequence[Outcome]) -> list[bool]:
        return [self._settle(now, outcome) for outcome in outcomes]

    def _settle(self, now: Micros, outcome: Outcome) -> bool:
        if not self.holds(outcome.id, outcome.claims):
            return False
        entry = self.tasks[outcome.id]
        match outcome.action:
            case Action.DONE:
                self._end(entry, outcome.at)
            case Action.RENEW:
                entry.due = outcome.at
            case Action.RELEASE:
                entry.eta = entry.due = outcome.at
                entry.attempts, entry.reason = entry.attempts - 1, outcome.reason
            case Action.RETRY | Action.DEAD:
                entry.executions, entry.failures = entry.executions + outcome.executed, entry.failures + outcome.charged
                entry.status, entry.reason = outcome.status, outcome.reason
                if outcome.action is Action.RETRY:
                    entry.eta = entry.due = outcome.at
                else:
                    self.dead[outcome.id] = replace(entry, due=None, died=now)
                    self._end(entry, outcome.at)
        return True

    def holds(self, id: int, claims: int) -> bool:
        """Tell whether a fence holds: nobody has claimed, settled or removed the task since."""
        entry = self.tasks.get(id)
        return entry is not None and entry.due is not None and entry.due > entry.eta and entry.claims == claims

    def reschedule(self, now: Micros, queue: str, name: str, eta: Micros) -> int:
        return sum(self._reschedule(now, entry, eta) for entry in self.find(queue, name))

    def _reschedule(self, now: Micros, entry: Entry, eta: Micros) -> bool:
        id, task = entry.task.id, entry.task
        if entry.died is not None:
            if not self._free(now, task.queue, task.name, but=id):
                return False
            del self.dead[id]
            self.tasks[id] = Entry(task, eta, due=eta, claims=entry.claims, reason=entry.reason)
        elif entry.due is None or now < entry.due != entry.eta:
            return False
        else:
            entry.eta = entry.due = eta
        return True

    def sweep(self, now: Micros) -> None:
        self.tasks = {id: entry for id, entry in self.tasks.items() if entry.expires is None or entry.expires > now}

    # --- looking ----------------------------------------------------------------------------------------------------

    def live(self, queue: str) -> list[Entry]:
        found = [entry for entry in self.tasks.values() if entry.task.queue == queue and entry.due is not None]
        return sorted(found, key=lambda entry: (entry.due, entry.task.id))

    def fast(self, queue: str) -> list[Entry]:
        return [entry for entry in self.live(queue) if entry.task.fail_fast]

    def letters(self, queue: str) -> list[Entry]:
        return sorted((each for each in self.dead.values() if each.task.queue == queue), key=lambda each: each.task.id)

    def signed(self, after: int, limit: int, state: TaskState) -> Signed:
        rows = self.dead if state is TaskState.DEAD else self.tasks
        slice = [rows[id] for id in sorted(rows) if id > after][:limit]
        keys = [entry.task.key_id for entry in slice if entry.expires is None and entry.task.key_id]
        return Signed(Counter(keys), slice[-1].task.id if len(slice) == limit else None)

    def find(self, queue: str, name: str) -> list[Entry]:
        """Return what *name* stands for: a user's name first, then an id."""
        both = (self.tasks, self.dead)
        named = [entry for part in both for entry in self._named(part, queue, name)]
        if named or not name.isdigit():
            return named
        return [part[int(name)] for part in both if int(name) in part and part[int(name)].task.queue == queue]

    def shown(self, queue: str, name: str) -> list[Entry]:
        """Return what `find` shows: a dead letter, but not its tombstone."""
        found = self.find(queue, name)
        letters = {entry.task.id for entry in found if entry.died is not None}
        return [entry for entry in found if entry.expires is None or entry.task.id not in letters]

    # --- rules ------------------------------------------------------------------------------------------------------

    def _named(self, part: dict[int, Entry], queue: str, name: str | None) -> Iterator[Entry]:
        """Return the entries of that name, in order of id."""
        found = (part[id] for id in sorted(part)) if name is not None else ()
        return (entry for entry in found if (entry.task.queue, entry.task.name) == (queue, name))

    def _free(self, now: Micros, queue: str, name: str | None, but: int = -1) -> bool:
        """Tell whether the name may be used by task *but*; an expired tombstone makes way."""
        for holder in list(self._named(self.tasks, queue, name)):
            if holder.task.id == but or (holder.expires is not None and holder.expires <= now):
                del self.tasks[holder.task.id]
            else:
                return False
        return True

    def _end(self, entry: Entry, expires: Micros) -> None:
        """Let a live task end: a named one becomes its tombstone."""
        if entry.task.name is None:
            del self.tasks[entry.task.id]
        else:
            entry.due, entry.expires = None, expires
