"""The limits profile: what it may be, that each limit holds, and that each can be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import deferlib
from deferlib import config, deferred, limits
from deferlib.errors import ConfigError, Error, NotAvailableError
from deferlib.limits import PROFILES, TABLE
from deferlib.taskqueue import Queue, Task
from deferlib.taskqueue import limits as appengine

SECOND = 1_000_000


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    former = config.install(None)
    yield
    config.install(former)


def use(value: object) -> None:
    deferlib.configure(store="sqlite:///:memory:", limits=value, queues=[{"name": "default"}])
    assert config.runtime().store is not None  # opened


def lease(seconds: float = 1, count: int = 1) -> None:
    with pytest.raises(NotAvailableError):
        Queue().lease_tasks(seconds, count)


# For each limit: what is done with a value, and one that is allowed by App Engine's limits and just isn't.
USES: dict[str, tuple[Callable[[Any], object], Any, Any]] = {
    "push_task_bytes": (lambda n: Task(b"x" * (n - 37), url=""), 102_400, 102_401),
    "pull_task_bytes": (lambda n: Task(b"x" * (n - 37), method="PULL"), 1_048_576, 1_048_577),
    "call_bytes": (lambda n: deferred.defer(print, "x" * n), 33_554_000, 33_554_433),
    "tasks_per_add": (lambda n: Queue().add([Task() for _ in range(n)]), 100, 101),
    "tasks_per_lease": (lambda n: lease(count=n), 1_000, 1_001),
    "eta_seconds": (lambda n: Task(countdown=n), 2_592_000, 2_592_000.001),
    "lease_seconds": (lambda n: lease(seconds=n), 604_800, 604_801),
    "min_deadline_seconds": (lambda n: Task(dispatch_deadline_usec=round(n * SECOND)), 15, 14.999999),
    "max_deadline_seconds": (lambda n: Task(dispatch_deadline_usec=round(n * SECOND)), 86_400, 86_400.000001),
    "url_length": (lambda n: Task(url="/" + "x" * (n - 1)), 2_083, 2_084),
    "sent_url_bytes": (lambda n: Task(url="/?" + "x" * (n - 2), method="GET"), 100_000, None),
    "tag_length": (lambda n: Task(b"", method="PULL", tag="x" * n), 500, 501),
    "task_name_length": (lambda n: Task(name="x" * n), 500, 501),
    "queue_name_length": (lambda n: Queue("x" * n), 100, 101),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_limit_holds_and_can_be_moved(name: str) -> None:
    work, allowed, beyond = USES[name]
    use(None)
    work(allowed)
    if beyond is None:  # on App Engine it is none: to be set, not to be lifted
        use({name: 5_000})
        work(5_000)
        with pytest.raises(Error, match="5000"):
            work(5_001)
        return
    with pytest.raises(Error) as caught:
        work(beyond)
    assert "allowed" in str(caught.value)

    moved = 1 if name == "min_deadline_seconds" else 40_000_000 if name == "call_bytes" else int(beyond) + 1
    use({name: moved})

    work(beyond)


@pytest.mark.parametrize(("seconds", "allowed"), [(15, True), (14.999, False), (86_400, True), (86_400.001, False)])
def test_deadlines_of_queues_have_the_same_limits(seconds: float, allowed: bool) -> None:
    def read() -> list[Any]:
        return deferlib.configure(
            store="sqlite:///:memory:",
            queues=[{"name": "default", "deferlib": {"deadline": f"{seconds:.3f}s"}}],
            limits=use_limits,
        ).queues()

    use_limits = "appengine"
    if allowed:
        assert read()
    else:
        with pytest.raises(Error, match=r"deadline: .*15 s to 86400 s are allowed"):
            read()
    use_limits = "min_deadline_seconds=1,max_deadline_seconds=100000"
    assert read()


def test_app_engines_are_the_default_and_have_its_names() -> None:
    assert limits.DEFAULT is PROFILES["appengine"]
    found = limits.DEFAULT
    assert (found.push_task_bytes, found.pull_task_bytes) == (
        appengine.MAX_PUSH_TASK_SIZE_BYTES,
        appengine.MAX_PULL_TASK_SIZE_BYTES,
    )
    assert (found.tasks_per_add, found.tasks_per_lease) == (appengine.MAX_TASKS_PER_ADD, appengine.MAX_TASKS_PER_LEASE)
    assert (found.lease_seconds, found.url_length) == (appengine.MAX_LEASE_SECONDS, appengine.MAX_URL_LENGTH)
    assert (found.tag_length, found.task_name_length) == (appengine.MAX_TAG_LENGTH, appengine.MAX_TASK_NAME_LENGTH)
    assert found.queue_name_length == appengine.MAX_QUEUE_NAME_LENGTH
    assert found.min_deadline_seconds == appengine.MIN_DISPATCH_DEADLINE.total_seconds()
    assert found.max_deadline_seconds == appengine.MAX_DISPATCH_DEADLINE.total_seconds()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("appengine", "appengine"),
        ("deferlib", "deferlib"),
        ("", "appengine"),
        (" deferlib , tag_length = 100 ", "deferlib,tag_length=100"),
        ("tag_length=100", "appengine,tag_length=100"),
        ("min_deadline_seconds=0.5", "appengine,min_deadline_seconds=0.5"),
        ({"profile": "deferlib", "tag_length": 100.0}, "deferlib,tag_length=100"),
        ({"push_task_bytes": 1_234_567}, "appengine,push_task_bytes=1234567"),
        ({}, "appengine"),
    ],
)
def test_setting_is_a_profile_and_what_differs(value: object, text: str) -> None:
    found = limits.parse(value)

    assert str(found) == text
    assert limits.parse(text) == found
    assert limits.parse(found) is found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("google", "profile 'google': appengine or deferlib"),
        ("appengine,deferlib", "no limit 'deferlib'"),
        ("tasks=5", r"no limit 'tasks'; limits are push_task_bytes"),
        ("tag_length=5,tag_length=6", "given twice"),
        ("tag_length=0", "tag_length=0: a number from 1 to 10,000"),
        ("tag_length=10001", "10001: a number"),
        ("tag_length=many", "many: a number"),
        ("tag_length=1.5", "1.5: a number"),
        ("tag_length=", "tag_length=: a number"),
        ({"tag_length": True}, "True: a number"),
        ({"tag_length": 1.5}, "1.5: a number"),
        ({"tag_length": None}, "None: a number"),
        ({"eta_seconds": float("nan")}, "nan: a number"),
        ({"eta_seconds": float("inf")}, "inf: a number"),
        ({"profile": 5}, "profile 5"),
        ("min_deadline_seconds=100,max_deadline_seconds=50", "min_deadline_seconds is above"),
        (5, "5 is no profile"),
    ],
)
def test_mistake_in_the_setting_is_named(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits.parse(value)
    with pytest.raises(ConfigError, match="setting 'limits' from argument"):
        deferlib.configure(limits=value)


def test_body_that_a_handler_takes_follows_the_limits() -> None:
    from deferlib import inbound

    use("call_bytes=1024,push_task_bytes=1024")
    with pytest.raises(deferlib.errors.TokenError, match="66560 bytes"):
        inbound.content_length("66561")
    assert inbound.content_length("66560") == 66_560
    use("call_bytes=100000000")
    assert inbound.content_length("100000000") == 100_000_000
