"""Whatever tasks, retry options, queues and headers are made of: they are made, or refused by a documented error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deferlib
from deferlib import config
from deferlib.core.model import Claim
from deferlib.engine.dispatch import user_headers, vouch
from deferlib.taskqueue import Queue, QueueStatistics, Task, TaskRetryOptions, create_rpc

# What the reference says that each may raise: errors of deferlib, TypeError, and ValueError from extract_params.
DOCUMENTED = (deferlib.Error, TypeError)

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers().map(lambda number: 10 ** (abs(number) % 5_000))
    | st.floats()
    | st.decimals()
    | st.fractions()
    | st.complex_numbers()
    | st.text()
    | st.text(alphabet=st.characters())
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=st.just(timezone(timedelta(hours=14))))
    | st.timedeltas()
    | st.builds(object)
    | st.sampled_from(["POST", "GET", "PUT", "PULL", "/x", "/x?a=b", "a", "X-AppEngine-FailFast", "Host", "", b"", 0]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none() | st.binary(max_size=8), inner, max_size=4)
        | st.sets(st.text(max_size=3) | st.integers(), max_size=3)
        | st.builds(bytearray, st.binary(max_size=5))
    ),
    max_leaves=6,
)
NAMES = st.text(alphabet="abAB09_-", min_size=1, max_size=12)
LIKELY = {
    "payload": st.none() | st.text() | st.binary(),
    "countdown": st.none() | st.floats() | st.integers(-(10**9), 10**9),
    "eta": st.none() | st.datetimes() | st.datetimes(timezones=st.timezones()),
    "headers": st.none()
    | st.dictionaries(
        st.sampled_from(["X-A", "x-a", "Host", "content-type", "X-AppEngine-FailFast", "X-AppEngine-Current-Namespace"])
        | NAMES,
        st.text(alphabet=st.characters(max_codepoint=255)) | st.lists(st.text("ab"), max_size=3),
        max_size=4,
    ),
    "method": st.sampled_from(["POST", "get", "PUT", "HEAD", "DELETE", "PULL", "post"]),
    "name": st.none() | NAMES,
    "params": st.none()
    | st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.binary() | st.lists(st.text("ab")), max_size=3),
    "retry_options": st.none() | st.builds(TaskRetryOptions, task_retry_limit=st.none() | st.integers(0, 9)),
    "tag": st.none() | st.text(max_size=600),
    "target": st.none() | NAMES,
    "url": st.just("") | st.text().map("/{}".format) | st.sampled_from(["/x", "/x?a=b", "/ü?q=%20"]),
    "dispatch_deadline_usec": st.none() | st.integers(-1, 10**11),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=LIKELY) | st.fixed_dictionaries({}, optional=dict.fromkeys(LIKELY, ANY))
examples = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def _runtime() -> Iterator[None]:
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", queues=[{"name": "mail"}, {"name": "shelf", "mode": "pull"}])
    yield
    config.install(former)


def made(make: Callable[[], Any]) -> Any:
    """Return what *make* makes, None if a documented error refuses it, with a text that can be printed."""
    try:
        return make()
    except DOCUMENTED as error:
        refusal = str(error)
    assert 0 < len(refusal) < 2_000
    return None


@given(ARGUMENTS)
@examples
def test_task_is_made_shown_stored_and_sent_or_refused(arguments: dict[str, Any]) -> None:
    task = made(lambda: Task(**arguments))
    if task is None:
        return
    assert repr(task).startswith("Task<")
    assert task.size <= 1024 * 1024
    assert isinstance(task.headers.copy(), type(task.headers))
    assert task.eta is not None
    assert isinstance(task.eta_posix, float)
    with suppress(ValueError):  # as documented: the payload isn't a form
        assert isinstance(task.extract_params(), dict)

    made(lambda: Queue("shelf" if task.method == "PULL" else "mail").add(task))
    if not task.was_enqueued:
        return
    with config.runtime().store.read() as tx:
        (row,) = tx.find(task.queue_name, [task.name])
    assert (row.method, row.body) == (task.method, task.payload or b"")
    claim = Claim(
        row.id, 1, row.queue, row.name, row.eta, 0, 1, 0, 0, 0, 0, 0, "", row.method, row.url, row.target, row.headers,
        row.namespace, row.tag, row.retry, row.deadline, 0, row.created, "", row.body,
    )  # fmt: skip
    for name, value in [*user_headers(claim.headers), *vouched(claim).items()]:
        line = f"{name}: {value}".encode("latin-1")
        assert not {b"\r"[0], b"\n"[0], 0} & set(line)
    json.dumps(row.url)
    assert row.url.isascii()
    Queue(row.queue).delete_tasks(task)


def vouched(claim: Claim) -> dict[str, str]:
    from deferlib.core.model import Delivery

    return dict(vouch(Delivery(claim, "", 1), 0, config.runtime().clock).headers)


@given(
    st.dictionaries(
        st.sampled_from(
            ["min_backoff_seconds", "max_backoff_seconds", "task_age_limit", "max_doublings", "task_retry_limit"]
        ),
        ANY | st.floats(-1, 1e9) | st.integers(-1, 10**6),
    )
)
@examples
def test_retry_options_are_made_and_kept_or_refused(arguments: dict[str, Any]) -> None:
    options = made(lambda: TaskRetryOptions(**arguments))
    if options is not None:
        assert repr(options).startswith("TaskRetryOptions(")
        assert Task(retry_options=options)._row("mail", config.runtime().ring).retry == options.text()


@given(ANY | NAMES, ANY, ANY)
@examples
def test_queue_takes_what_it_is_for_or_refuses_it(name: Any, first: Any, second: Any) -> None:
    queue = made(lambda: Queue(name))
    if queue is None:
        queue = Queue("mail")
    assert repr(queue).startswith("Queue<")
    assert (queue == first) in (True, False)
    for verb in (
        lambda: queue.add(first),
        lambda: queue.add_async(first),
        lambda: queue.delete_tasks(first),
        lambda: queue.delete_tasks_by_name(first),
        lambda: queue.lease_tasks(first, second),
        lambda: queue.lease_tasks_by_tag(1, 1, first, second),
        lambda: queue.modify_task_lease(Task(), first),
        lambda: queue.fetch_statistics(first),
        lambda: QueueStatistics.fetch(first),
        lambda: create_rpc(first),
    ):
        made(verb)


def test_naive_time_is_local() -> None:  # keeps the strategies honest: what they make is made
    assert made(lambda: Task(eta=datetime(2026, 1, 1))) is not None  # noqa: DTZ001  # what is tested
