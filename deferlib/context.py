"""The task that is running: what the engine vouches for, and what `current_task` shows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar, overload

from deferlib.clock import Clock, SystemClock
from deferlib.core.model import SECOND, Micros

T = TypeVar("T")

DEFAULT_NAMESPACE = "X-AppEngine-Default-Namespace"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TaskContext(NamedTuple):
    """One attempt of one task, as the engine vouches for it."""

    id: int  # the task's, 63 bits
    user_name: str  # '' if the task has none
    queue: str  # its queue's name
    attempt: int  # from 1
    execution_count: int  # earlier attempts that the target answered
    eta_micros: Micros  # as `eta`, in microseconds since the epoch
    deadline_micros: Micros  # as `deadline`
    fence: int  # greater with every attempt of the task, so that a side effect can refuse an older one
    namespace: str  # that the call runs in
    url: str  # path and query of the request
    clock: Clock  # that `remaining` reads

    @property
    def name(self) -> str:
        """The task's name: the user's, or one derived from its id."""
        return self.user_name or str(self.id)

    @property
    def retry_count(self) -> int:
        """How many attempts came before this one."""
        return self.attempt - 1

    @property
    def eta(self) -> datetime:
        """When this attempt was to run (aware, UTC)."""
        return moment(self.eta_micros)

    @property
    def deadline(self) -> datetime:
        """When the engine gives this attempt up (aware, UTC)."""
        return moment(self.deadline_micros)

    def remaining(self) -> timedelta:
        """Return the time left until the deadline; negative once it has passed."""
        return timedelta(microseconds=self.deadline_micros - self.clock.now())


class Dispatch(NamedTuple):
    """What a request that the engine made carries: the attempt, and the headers that are true of it.

    In the environ (or the ASGI scope) under `deferlib.claim`, where no HTTP server can put an object.
    """

    context: TaskContext
    headers: Mapping[str, str]  # X-AppEngine-… and their values

    @property
    def default_namespace(self) -> str | None:
        """What `namespaces.google_apps_namespace` returns in the request."""
        return self.headers.get(DEFAULT_NAMESPACE)


class LazyHeaders(Mapping[str, str]):
    """The headers that *make* returns, made when somebody asks: most calls ask for none (2 µs).

    *default_namespace*, which every call asks for, is given: None if they have none.
    """

    __slots__ = ("_default_namespace", "_made", "_make")

    def __init__(self, make: Callable[[], dict[str, str]], default_namespace: str | None) -> None:
        self._make = make
        self._default_namespace = default_namespace
        self._made: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: T) -> str | T: ...
    def get(self, name: str, default: object = None) -> object:
        if name == DEFAULT_NAMESPACE:
            return default if self._default_namespace is None else self._default_namespace
        return self._all().get(name, default)


def platform_headers(task: TaskContext) -> dict[str, str]:
    """Return App Engine's headers that every attempt has."""
    return {
        "X-AppEngine-QueueName": task.queue,
        "X-AppEngine-TaskName": task.name,
        "X-AppEngine-TaskRetryCount": str(task.attempt - 1),
        "X-AppEngine-TaskExecutionCount": str(task.execution_count),
        "X-AppEngine-TaskETA": str(task.eta_micros / SECOND),
        "X-AppEngine-Current-Namespace": task.namespace,
    }


ENVIRON_KEY = "deferlib.claim"
SYSTEM_CLOCK = SystemClock()

running: ContextVar[TaskContext | None] = ContextVar("deferlib_task", default=None)


# The Host of the request being served: which of the configured targets a task made in it belongs to.
request_host: ContextVar[str | None] = ContextVar("deferlib_host", default=None)


# Of a request that may be a deferred call, though it isn't at the handler's URL: not empty once somebody runs the call.
call_taken: ContextVar[list[bool] | None] = ContextVar("deferlib_call_taken", default=None)


def current_task() -> TaskContext | None:
    """Return the task this code runs in, or None outside one."""
    return running.get()


def moment(micros: Micros) -> datetime:
    """Return *micros* since the epoch as an aware datetime in UTC, in the years 1 to 9999."""
    return _EPOCH + timedelta(microseconds=min(max(micros, -62_135_596_800_000_000), 253_402_300_799_000_000))
