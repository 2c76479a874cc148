"""The store's verbs on SQLite, inside one transaction of an apsw connection.

Safe to check and then write, statement by statement: SQLite has one writer, and a write transaction begins IMMEDIATE.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress, groupby
from operator import itemgetter
from typing import Any, TypeVar

from deferlib.core.model import (
    MINUTE,
    Action,
    AddResult,
    Claim,
    ClaimSpec,
    DeleteResult,
    Limiter,
    Micros,
    NewTask,
    Outcome,
    Page,
    QueueConfig,
    QueueRow,
    QueueSource,
    QueueStats,
    Signed,
    TaskRow,
    TaskState,
)
from deferlib.errors import StoreError
from deferlib.store import names_and_ids, queries
from deferlib.store.sqlite_statements import SQL, Statements

T = TypeVar("T")

_ADD = queries.Many(SQL["add"], (*NewTask._fields, "size"))
_DONE = queries.Many(SQL["done"], ("id", "claims"))
_LEASED_FIELDS = ("until", "claims", "attempts", "lost", "first_try", "id")
_LEASE = queries.Many(SQL["lease"], _LEASED_FIELDS)
_LEASED = itemgetter(*map(Claim._fields.index, _LEASED_FIELDS))
_ORDER = itemgetter(*map(Claim._fields.index, ("eta", "id")))
_FENCE = itemgetter(*map(Outcome._fields.index, ("id", "claims")))
_KIND = itemgetter(*map(Outcome._fields.index, ("action", "named")))
_TALLIED = itemgetter(*map(Outcome._fields.index, ("queue", "action", "executed")))
_ENDS = frozenset({Action.DONE, Action.DEAD})
_FAILURES = frozenset({Action.DEAD, Action.RETRY})
_KEEP_MINUTES = 24 * 60
_FEW = 8  # queues that are asked for one by one
_TASK_COLUMNS = (
    *("id", "queue", "name", "eta", "due", "claims", "attempts", "executions", "failures", "lost", "first_try"),
    *("created", "status", "reason", "method", "url", "target", "headers", "namespace", "tag", "retry", "deadline"),
    *("expires", "died", "history", "key_id", "body"),
)  # as in task_row and dead_row
_SETTLE = {
    Action.DONE: SQL["done"],
    Action.RETRY: SQL["retry"],
    Action.RENEW: SQL["renew"],
    Action.RELEASE: SQL["release"],
}


class SqliteTx(Statements):
    """One transaction's verbs; `deferlib.store.Tx` says what each does.

    A statement that fails ends it: a verb is done whole or not at all, so nothing may follow half of one, or be committed
    with it.
    """

    __slots__ = ()

    def attempt(self, work: Callable[[SqliteTx], T]) -> T:
        """Return what *work* makes of this transaction; what it raises comes through, and nothing of it stays.

        If an error has undone the whole transaction (a full disk does), this one is over, too: see `failure`.
        """
        connection = self._connection
        connection.execute("savepoint deferlib_work")
        part = SqliteTx(connection, self._path)
        try:
            result = work(part)
            if part.failure is not None:
                raise StoreError(f"{self._path}: rolled back, because of: {part.failure}") from part.failure
            connection.execute("release deferlib_work")
        except BaseException as error:
            if not connection.in_transaction:
                self.failure = error
                self.close()
                raise
            connection.execute("rollback to deferlib_work")
            connection.execute("release deferlib_work")
            raise
        finally:
            part.close()
        return result

    # --- tasks ------------------------------------------------------------------------------------------------------

    def add(self, now: Micros, tasks: Sequence[NewTask]) -> list[AddResult]:
        modes: dict[str, str | None] = {}
        results = [AddResult.ADDED] * len(tasks)
        places, values = [], []
        for place, task in enumerate(tasks):
            queue = task.queue
            if queue not in modes:
                modes[queue] = self._value("queue_mode", {"queue": queue})
            mode = modes[queue]
            if mode == task.mode:
                places.append(place)
                values.append((*task, len(task.body)))
            else:
                results[place] = AddResult.NO_QUEUE if mode is None else AddResult.WRONG_MODE
        added = self._many(_ADD, values)
        if len(added) < len(values):
            for number in sorted(set(range(len(values))).difference(added)):
                results[places[number]] = self._add_again(now, tasks[places[number]])
        self._count(Counter(tasks[place].queue for place, result in enumerate(results) if result is AddResult.ADDED))
        return results

    def _add_again(self, now: Micros, task: NewTask) -> AddResult:
        """Add what wasn't, if what kept it out is gone or an expired name; say what else it was."""
        nonces = self._column("nonce_of", {"id": task.id})
        if nonces:
            return AddResult.EXISTS if task.nonce in nonces else AddResult.COLLIDED
        name = {"queue": task.queue, "name": task.name, "now": now}
        self._run("drop_expired_name", name)
        holders = self._column("name_state", name)
        if holders:
            return AddResult.TOMBSTONED if holders[0] else AddResult.TAKEN
        return AddResult.ADDED if self._many(_ADD, [(*task, len(task.body))]) else AddResult.COLLIDED

    def delete(self, now: Micros, queue: str, names: Sequence[str]) -> list[DeleteResult]:
        expires = now + self._tombstone(queue)
        return [self._delete(queue, name, id, expires) for name, id in names_and_ids(names)]

    def _delete(self, queue: str, name: str, id: int | None, expires: Micros) -> DeleteResult:
        rows = self._resolve(queue, name, id)
        result = DeleteResult.TOMBSTONED if rows else DeleteResult.UNKNOWN
        for row_id, is_dead, tombstone in rows:
            if is_dead:
                self._run("drop_dead", {"id": row_id})
                self._count_one(queue, dead=-1)
                result = DeleteResult.DELETED
            elif not tombstone:
                self._remove(row_id, expires)
                self._count_one(queue, tasks=-1)
                result = DeleteResult.DELETED
        return result

    def _remove(self, id: int, expires: Micros) -> None:
        if self._value("drop_task", {"id": id}) is None:
            self._run("entomb", {"id": id, "expires": expires})

    def purge(self, now: Micros, queue: str, limit: int) -> int:
        expires = now + self._tombstone(queue)
        ids = self._column("purge_page", {"queue": queue, "limit": limit})
        for id in ids:
            self._remove(id, expires)
        self._count_one(queue, tasks=-len(ids))
        return len(ids)

    def claim(self, now: Micros, specs: Sequence[ClaimSpec]) -> list[Claim]:
        claims: list[Claim] = []
        for spec in specs:
            query = "claim_fast" if spec.fail_fast else "claim" if spec.tag is None else "claim_tag"
            rows = self._rows_within(query, {**spec._asdict(), "now": now}, spec.bytes)
            if not rows:
                continue
            self._each(_LEASE.silent, list(map(_LEASED, rows)))
            if spec.interval:
                self._run("spend", {"queue": spec.queue, "now": now, "spent": len(rows) * spec.interval})
            claimed = list(map(Claim._make, rows))
            claimed.sort(key=_ORDER)  # by ETA: what lost its lease, or was put off, is due later than that
            claims += claimed
        return claims

    def settle(self, now: Micros, outcomes: Sequence[Outcome]) -> list[bool]:
        held: list[bool] = []
        for (action, named), run in groupby(outcomes, key=_KIND):
            # Runs, not groups: what is answered twice is settled in the order asked, and the second answer is late.
            each = list(run)
            places: Sequence[int]
            if action is Action.DONE and not named:  # nearly all of them
                places = self._many(_DONE, list(map(_FENCE, each)))
            else:
                places = self._settle(now, action, named, [{**one._asdict(), "place": at} for at, one in enumerate(each)])
            start = len(held)
            held += [len(places) == len(each)] * len(each)
            if len(places) < len(each):
                for place in places:
                    held[start + place] = True
        self._tally(now, outcomes if all(held) else compress(outcomes, held))
        return held

    def _settle(self, now: Micros, action: Action, named: bool, values: Sequence[dict[str, Any]]) -> list[int]:
        """Settle what has one *action*; return the places of those whose fence held."""
        if action is Action.DEAD:
            return [each["place"] for each in values if self._bury(now, named, each)]
        return self._each(SQL["done_named"] if action is Action.DONE else _SETTLE[action], values)

    def _bury(self, now: Micros, named: bool, values: dict[str, Any]) -> bool:
        """Make a dead letter; tell whether the fence held."""
        if self._value("bury", {**values, "now": now}) is None:
            return False
        self._each(SQL["done_named" if named else "done"], [values])
        return True

    def _tally(self, now: Micros, outcomes: Iterable[Outcome]) -> None:
        """Keep the counters of what was settled."""
        totals: dict[str, list[int]] = {}
        for (queue, action, executed), run in groupby(outcomes, key=_TALLIED):  # in C: 0.1 µs a task alone, 0.3 in Python
            count = len(list(run))
            total = totals.setdefault(queue, [0, 0, 0, 0])
            if action in _ENDS:
                total[0] -= count
            if action is Action.DEAD:
                total[1] += count
            if action in _FAILURES:
                total[3] += count
            total[2] += executed * count
        for queue, (tasks, dead, executed, failed) in totals.items():
            self._count_one(queue, tasks=tasks, dead=dead)
            if executed or failed:
                values = {"queue": queue, "minute": now // MINUTE, "executed": executed, "failed": failed}
                self._run("tally", values)

    def reschedule(self, now: Micros, queue: str, names: Sequence[str], eta: Micros) -> int:
        moved = 0
        for name, id in names_and_ids(names):
            for row_id, is_dead, tombstone in self._resolve(queue, name, id):
                if is_dead:
                    moved += self._revive(now, queue, row_id, eta)
                elif not tombstone:
                    moved += self._value("reschedule", {"id": row_id, "eta": eta, "now": now}) is not None
        return moved

    def _revive(self, now: Micros, queue: str, id: int, eta: Micros) -> bool:
        self._run("drop_tombstone", {"id": id})
        self._run("drop_expired_name_of_dead", {"id": id, "now": now})
        if self._value("revive", {"id": id, "eta": eta}) is None:
            return False  # its name is in use again: the dead letter stays
        self._run("drop_dead", {"id": id})
        self._count_one(queue, tasks=1, dead=-1)
        return True

    def ahead(self, queue: str, due: Micros, id: int, most: int) -> int:
        return int(self._value("ahead", {"queue": queue, "due": due, "id": id, "limit": most}))

    def next_due(self, queues: Sequence[str], *, fail_fast: bool = False) -> dict[str, Micros]:
        if len(queues) > _FEW and not fail_fast:
            wanted = set(queues)
            return {queue: due for queue, due in self._rows("next_dues", {}) if due is not None and queue in wanted}
        query = "next_due_fast" if fail_fast else "next_due"
        found = {queue: self._value(query, {"queue": queue}) for queue in queues}
        return {queue: due for queue, due in found.items() if due is not None}

    def sweep(self, now: Micros, limit: int) -> int:
        swept = len(self._column("sweep_tombstones", {"now": now, "limit": limit}))
        self._run("sweep_flights", {"now": now})
        minute = now // MINUTE - _KEEP_MINUTES
        return swept + len(self._column("sweep_minutes", {"minute": minute, "limit": limit - swept}))

    # --- looking ----------------------------------------------------------------------------------------------------

    def take_over(self, now: Micros, until: Micros) -> int:
        self._run("disown_all", {})
        self._run("land_all", {})
        return len(self._column("end_leases", {"now": now, "until": until}))

    def find(self, queue: str | None, names: Sequence[str]) -> list[TaskRow]:
        found = []
        for name, id in names_and_ids(names):
            queues = [queue] if queue is not None else self._queues_of(name, id)
            for each in queues:
                rows = self._resolve(each, name, id)
                buried = {row[0] for row in rows if row[1]}
                for row_id, is_dead, tombstone in rows:
                    if is_dead or not (tombstone and row_id in buried):
                        found.append(self._task("dead_row" if is_dead else "task_row", row_id))
        return found

    def _queues_of(self, name: str, id: int | None) -> list[str]:
        queues = self._column("queues_by_name", {"name": name})
        return queues or ([] if id is None else self._column("queues_by_id", {"id": id}))

    def tasks(self, queue: str, page: Page) -> list[TaskRow]:
        values = {"queue": queue, "limit": page.limit, "after_due": page.after[0], "after_id": page.after[1]}
        dead = page.state is TaskState.DEAD
        ids = self._column("dead_page" if dead else "live_page", values)
        return [self._task("dead_row" if dead else "task_row", id) for id in ids]

    def _task(self, query: str, id: int) -> TaskRow:
        [row] = self._rows(query, {"id": id})
        return TaskRow(**dict(zip(_TASK_COLUMNS, row, strict=True)))

    def signed(self, after: int, limit: int, state: TaskState) -> Signed:
        query = "signed_dead" if state is TaskState.DEAD else "signed_live"
        rows = self._rows(query, {"after": after, "limit": limit})
        counts = {key_id: tasks for key_id, tasks, _, _ in rows if key_id and tasks}
        full = sum(looked for _, _, looked, _ in rows) == limit
        return Signed(counts, max(last for _, _, _, last in rows) if full else None)

    def stats(self, now: Micros, queues: Sequence[str]) -> list[QueueStats]:
        return [self._stats(now, queue) for queue in queues]

    def _stats(self, now: Micros, queue: str) -> QueueStats:
        tasks, dead = next(iter(self._rows("counts", {"queue": queue})), (0, 0))
        minute = now // MINUTE
        rest = 1 - (now - minute * MINUTE) / MINUTE  # the share of the former minute within the last 60 seconds
        executed = failed = 0.0
        for at, ran, broke in self._rows("last_minutes", {"queue": queue, "minute": minute}):
            weight = 1.0 if at >= minute else rest
            executed += ran * weight
            failed += broke * weight
        return QueueStats(
            queue=queue,
            tasks=tasks,
            dead=dead,
            oldest_due=self._value("next_due", {"queue": queue}),
            executed_last_minute=round(executed),
            failed_last_minute=round(failed),
            in_flight=self._value("in_flight", {"queue": queue, "now": now}),
        )

    # --- queues -----------------------------------------------------------------------------------------------------

    def queues(self) -> list[QueueRow]:
        return [
            QueueRow(
                config=QueueConfig.from_json(config),
                source=QueueSource(source),
                paused=bool(paused),
                tat=tat,
                owner=owner,
                owned_until=owned_until,
                said=said,
                disabled=bool(disabled),
            )
            for config, source, paused, tat, owner, owned_until, said, disabled in self._rows("queues", {})
        ]

    def put_queues(
        self,
        configs: Sequence[QueueConfig],
        source: QueueSource,
        *,
        said: Mapping[str, str] = {},
        disabled: Collection[str] = (),
    ) -> None:
        query = "insert_queue" if source is QueueSource.LIBRARY else "put_queue"
        for config in configs:
            name = config.name
            values = {"name": name, "mode": str(config.mode), "config": config.to_json(), "source": str(source)}
            self._run(query, {**values, "said": said.get(name, ""), "disabled": int(name in disabled)})

    def pause(self, queues: Sequence[str], paused: bool) -> int:
        return sum(self._value("pause", {"queue": name, "paused": int(paused)}) is not None for name in queues)

    def own(self, now: Micros, node: str, ttl: Micros, queues: Sequence[str]) -> dict[str, Limiter]:
        owned = {}
        for queue in queues:
            row = self._rows("own", {"queue": queue, "node": node, "now": now, "until": now + ttl})
            if row:
                owned[queue] = Limiter._make(row[0])
        return owned

    def cap(self, tats: Mapping[str, Micros]) -> None:
        for queue, tat in tats.items():
            self._run("cap", {"queue": queue, "tat": tat})

    def refund(self, spent: Mapping[str, Micros]) -> None:
        for queue, micros in spent.items():
            self._run("refund", {"queue": queue, "spent": micros})

    def fly(self, node: str, until: Micros, tasks: Mapping[str, int]) -> None:
        for queue, count in tasks.items():
            self._run("fly" if count else "land", {"queue": queue, "node": node, "tasks": count, "until": until})

    def notes(self) -> dict[str, str]:
        return {name: value for name, value in self._rows("notes", {})}

    def put_note(self, name: str, value: str) -> None:
        self._run("put_note" if value else "drop_note", {"name": name, "value": value})

    def disown(self, node: str) -> None:
        self._run("disown", {"node": node})

    # --- what several verbs do ----------------------------------------------------------------------------------------

    def _resolve(self, queue: str, name: str, id: int | None) -> list[tuple[int, int, int]]:
        """Return (id, is a dead letter, is a tombstone) of what *name* stands for: a user's name first, then an id."""
        rows = self._rows("ids_by_name", {"queue": queue, "name": name})
        if not rows and id is not None:
            rows = self._rows("ids_by_id", {"queue": queue, "id": id})
        return rows

    def _tombstone(self, queue: str) -> Micros:
        config = self._value("queue_config", {"queue": queue})
        return (QueueConfig.from_json(config) if config else QueueConfig(name=queue)).tombstone

    def _count(self, added: Mapping[str, int]) -> None:
        for queue, tasks in added.items():
            self._count_one(queue, tasks=tasks)

    def _count_one(self, queue: str, *, tasks: int = 0, dead: int = 0) -> None:
        if tasks or dead:
            self._run("count", {"queue": queue, "tasks": tasks, "dead": dead})
