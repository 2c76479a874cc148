"""The values that travel between the layers: tasks, claims, outcomes, queues.

All are named tuples: 0.4 µs each where the database driver or the engine makes one for every task (a frozen dataclass of as
many fields costs 3 µs), and `import deferlib` takes 12 ms less than with dataclasses, which bring `inspect` along.
Times are `Micros`: integer microseconds since the epoch, or a span of them.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

Micros: TypeAlias = int

SECOND: Micros = 1_000_000
MINUTE: Micros = 60 * SECOND
HOUR: Micros = 60 * MINUTE
DAY: Micros = 24 * HOUR


def repr_without(value: Any, *hidden: str) -> str:
    """Return the repr of a named tuple with the length of the *hidden* fields only: payloads stay out of logs."""
    fields = [
        f"{name}=<{len(field)} hidden>" if name in hidden else f"{name}={field!r}"
        for name, field in value._asdict().items()
    ]
    return f"{type(value).__name__}({', '.join(fields)})"


class Mode(StrEnum):
    """How a queue's tasks reach their worker: pushed by the engine, or leased by the worker."""

    PUSH = "push"
    PULL = "pull"


class NewTask(NamedTuple):
    """What an adder gives the store."""

    id: int  # 63 bits, time-ordered, made by the adder
    nonce: int  # 64 random bits (signed): tells the same add repeated from another task of the same id
    queue: str
    name: str | None
    mode: str
    eta: Micros
    created: Micros
    method: str
    url: str  # path and query
    target: str  # '' for the queue's or the default one
    headers: str  # the user's own, as a JSON list of [name, value]; '' for none
    namespace: str
    tag: str
    retry: str  # the task's own retry options as JSON; '' for the queue's
    deadline: Micros  # 0 for the queue's
    fail_fast: int
    key_id: bytes  # the key that signed the body; b'' for a hand-made body
    body: bytes

    def __repr__(self) -> str:
        return repr_without(self, "headers", "body")


class AddResult(StrEnum):
    """What became of one added task."""

    ADDED = "added"
    EXISTS = "exists"  # the same add, repeated: stored once
    COLLIDED = "collided"  # another task has this id: take a new one
    TAKEN = "taken"
    TOMBSTONED = "tombstoned"
    NO_QUEUE = "no_queue"
    WRONG_MODE = "wrong_mode"


class DeleteResult(StrEnum):
    """What became of one deletion."""

    DELETED = "deleted"
    TOMBSTONED = "tombstoned"
    UNKNOWN = "unknown"


class ClaimSpec(NamedTuple):
    """How much of which queue a claim may take."""

    queue: str
    limit: int
    bytes: int  # budget for the sum of bodies; the first task is taken whatever its size
    until: Micros  # end of the lease
    interval: Micros = 0  # the rate limit's microseconds per task; 0 without a rate
    tag: str | None = None
    fail_fast: bool = False  # only the tasks that ask to fail fast


class Claim(NamedTuple):
    """A task taken under a lease: everything a delivery needs."""

    id: int
    claims: int  # the fence
    queue: str
    name: str | None
    eta: Micros
    until: Micros  # end of the lease
    attempts: int  # this one included
    executions: int
    failures: int
    lost: int  # attempts that ended with a lost lease
    first_try: Micros
    status: int  # of the last answer; 0 for none
    reason: str  # why the last attempt failed
    method: str
    url: str
    target: str
    headers: str
    namespace: str
    tag: str
    retry: str
    deadline: Micros
    fail_fast: int
    created: Micros
    history: str  # the last three attempts, as JSON
    body: bytes

    def __repr__(self) -> str:
        return repr_without(self, "headers", "body")

    @property
    def public_name(self) -> str:
        """The name to show: the user's, or one derived from the id."""
        return self.name or str(self.id)


class Action(StrEnum):
    """What a settle does with a claimed task."""

    DONE = "done"
    RETRY = "retry"
    DEAD = "dead"
    RENEW = "renew"
    RELEASE = "release"


class Outcome(NamedTuple):
    """One claimed task's fate, for `Tx.settle`."""

    id: int
    claims: int
    queue: str
    action: Action
    at: Micros  # RETRY, RELEASE: the new ETA; RENEW: the lease's new end; DONE, DEAD: when the tombstone expires
    named: bool = False
    charged: int = 0  # 1: counts against the limits
    executed: int = 0  # 1: the target ran it
    status: int = 0
    reason: str = ""
    history: str = ""


class Limiter(NamedTuple):
    """A limited queue's shared state, held by its owner."""

    tat: Micros  # GCRA's theoretical arrival time
    until: Micros  # end of the ownership


class RetryPolicy(NamedTuple):
    """When a failed task is tried again, and when it is given up. None means without limit.

    Defaults are App Engine's: 0.1 s, doubling 16 times, at most an hour, for ever.
    """

    min_backoff: Micros = SECOND // 10
    max_backoff: Micros = HOUR
    max_doublings: int = 16
    retry_limit: int | None = None
    age_limit: Micros | None = None
    jitter: float = 0.0  # the share of a wait that chance may take off
    first_limit_wins: bool = False  # a task is given up at the first of both limits, not at the second


class QueueConfig(NamedTuple):
    """A queue's configuration; what isn't given is unlimited."""

    name: str
    mode: Mode = Mode.PUSH
    rate: float | None = None  # dispatches per second
    bucket_size: int = 5
    max_concurrent: int | None = None
    target: str = ""
    retry: RetryPolicy = RetryPolicy()
    tombstone: Micros = 9 * DAY
    deadline: Micros = 10 * MINUTE
    lost_limit: int = 3  # lost leases of in-process attempts before the task is given up

    @property
    def limited(self) -> bool:
        """Whether the queue has a rate or a concurrency limit, and so an owner."""
        return self.rate is not None or self.max_concurrent is not None

    def to_json(self) -> str:
        """Return the configuration as the text that the store keeps."""
        fields = {**self._asdict(), "retry": self.retry._asdict()}
        return json.dumps(fields, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> QueueConfig:
        """Return the configuration kept as *text*; unknown keys (of a newer version) are ignored."""
        raw: dict[str, Any] = json.loads(text)
        retry = RetryPolicy(**_known(RetryPolicy._fields, raw.pop("retry", {})))
        known = _known(cls._fields, raw)
        known["mode"] = Mode(known.get("mode", Mode.PUSH))
        return cls(retry=retry, **known)


def _known(fields: tuple[str, ...], raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key in fields}


class QueueSource(StrEnum):
    """Who made a queue's row what it is."""

    LIBRARY = "library"  # inserted because it was missing
    FILE = "file"  # applied by the engine from queue.yaml
    COMMAND = "command"  # made by hand


class QueueRow(NamedTuple):
    """A queue as the store has it."""

    config: QueueConfig
    source: QueueSource = QueueSource.LIBRARY
    paused: bool = False
    tat: Micros = 0
    owner: str = ""
    owned_until: Micros = 0
    said: str = ""  # what the file and the commands say of it, as JSON; `deferlib.queue_rows` reads it
    disabled: bool = False  # it has left its file: it keeps its tasks, and none is dispatched

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def held(self) -> str:
        """Why nothing of the queue is dispatched, whatever is due; '' if something may be."""
        if self.disabled:
            return "has left queue.yaml"
        if self.paused:
            return "is paused"
        return "is paused by its rate of 0" if self.config.rate == 0 else ""


class TaskRow(NamedTuple):
    """A task, tombstone or dead letter as the store has it, for people to look at."""

    id: int
    queue: str
    name: str | None
    eta: Micros
    due: Micros | None  # None: a tombstone or a dead letter
    claims: int
    attempts: int
    executions: int
    failures: int
    lost: int
    first_try: Micros | None
    created: Micros
    status: int
    reason: str
    method: str
    url: str
    target: str
    headers: str
    namespace: str
    tag: str
    retry: str
    deadline: Micros
    expires: Micros | None  # a tombstone's end
    died: Micros | None  # when the task became a dead letter
    history: str
    key_id: bytes
    body: bytes

    def __repr__(self) -> str:
        return repr_without(self, "headers", "body")

    @property
    def public_name(self) -> str:
        return self.name or str(self.id)

    def state(self, now: Micros) -> str:
        """Return the task's state at *now*: ready, scheduled, leased, tombstone or dead."""
        if self.died is not None:
            return "dead"
        if self.due is None:
            return "tombstone"
        if self.due > self.eta and self.due > now:
            return "leased"
        return "ready" if self.due <= now else "scheduled"


class TaskState(StrEnum):
    """Which part of a queue a page shows."""

    LIVE = "live"
    DEAD = "dead"


class Page(NamedTuple):
    """A slice of a queue's tasks: live ones in order of (due, id), dead letters in order of id; those after *after*."""

    limit: int = 100
    after: tuple[Micros, int] = (-(2**62), -1)
    state: TaskState = TaskState.LIVE


class Signed(NamedTuple):
    """How many tasks of a slice were signed, by the id of the key; those that nobody signed aren't counted."""

    counts: dict[bytes, int]
    last: int | None  # the id that the next slice starts after; None: there is none


class QueueStats(NamedTuple):
    """Counts of one queue, from counters that the verbs keep; only what is in flight is counted when asked."""

    queue: str
    tasks: int  # waiting and running
    dead: int
    oldest_due: Micros | None
    executed_last_minute: int
    failed_last_minute: int
    in_flight: int  # being pushed, as the engines have last said


class Kind(StrEnum):
    """How one delivery ended, as its transport saw it."""

    ANSWERED = "answered"
    TIMEOUT = "timeout"  # the target had the request and didn't answer by the deadline
    MALFORMED = "malformed"  # the answer broke the protocol
    UNREACHABLE = "unreachable"  # the target never had the request
    UNKNOWN = "unknown"  # the connection broke; the target may have run the task
    INTERRUPTED = "interrupted"  # the target was replaced by whoever runs this engine, and answers again soon
    UNFIT = "unfit"  # no request could be made of it
    UNSENT = "unsent"  # withdrawn before it started


class Result(NamedTuple):
    """What a transport reports of one delivery."""

    id: int
    claims: int
    kind: Kind
    started: Micros
    ended: Micros
    status: int = 0
    outcome: str = ""  # the answer's X-Deferlib-Outcome
    error: str = ""  # for people: at most 500 characters
    retry_after: Micros = 0  # how long the answer asks to wait
    echo: bool = False  # says nothing of its target that another result of the same request hasn't said


class Delivery(NamedTuple):
    """A claim on its way to a target."""

    claim: Claim
    base: str  # the target's base URL; '' in process
    deadline: Micros  # how long the attempt may take


class Decision(NamedTuple):
    """Why a queue or a task isn't dispatched, and until when as far as is known."""

    reason: str
    until: Micros | None = None
