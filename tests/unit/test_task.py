"""Tasks, their retry options, and queues: what is accepted, and what each refusal says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

import deferlib
from deferlib import config, namespaces
from deferlib.core.model import SECOND, Micros
from deferlib.taskqueue import (
    BadTaskStateError,
    DuplicateTaskNameError,
    InvalidDispatchDeadlineError,
    InvalidEtaError,
    InvalidQueueNameError,
    InvalidTagError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
    Queue,
    Task,
    TaskRetryOptions,
    TaskTooLargeError,
    TooManyTasksError,
    UnknownQueueError,
    add,
)

NOW: Micros = 1_763_700_000_000_000


class Clock:
    def now(self) -> Micros:
        return NOW


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    former = config.install(None)
    deferlib.configure(
        store="sqlite:///:memory:", clock=Clock(), queues=[{"name": "mail"}, {"name": "shelf", "mode": "pull"}]
    )
    yield
    config.install(former)


def row(task: Task, queue: str = "default") -> Any:
    return task._row(queue, config.runtime().ring)


# --- names, URLs, methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 500])
def test_name_is_kept(name: str) -> None:
    assert Task(name=name).name == name


@pytest.mark.parametrize("name", ["a b", "a\n", "a\r\nX-AppEngine-TaskName: b", "é", "a.b", "x" * 501, "\x00"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidTaskNameError) as caught:
        Task(name=name)
    assert "\n" not in str(caught.value)


def test_empty_name_is_no_name() -> None:
    assert Task(name="").name is None
    assert row(Task(name="")).name is None


@pytest.mark.parametrize("url", ["/", "/a/b?c=d&e", "/.well-known/a.b/...?x=/../y", "/%C3%A9", "/a;b=c", "/" + "p" * 2_082])
def test_path_and_query_are_kept(url: str) -> None:
    assert Task(url=url).url == url


def test_url_beyond_ascii_is_sent_in_percents() -> None:
    assert Task(url="/café?q=ü").url == "/caf%C3%A9?q=%C3%BC"


@pytest.mark.parametrize(
    "url",
    [
        "a", "http://h/a", "//h/a", "/a#b", "/a b", "/a\n", "/a\r\nX: y", "/\x00", "/" + "p" * 2_083, "/?" + "q" * 3_999,
        "/" + "€" * 500, "http://[", 7, "/a/../b", "/./a", "/a/..", "/%2E%2e/a", "/a/%2e",
    ],
)  # fmt: skip
def test_other_urls_are_refused(url: Any) -> None:
    with pytest.raises(InvalidUrlError) as caught:
        Task(url=url)
    assert "\n" not in str(caught.value)


def test_task_without_a_url_goes_to_its_queues() -> None:
    assert Task().url == ""
    assert row(Task(), "mail").url == "/_ah/queue/mail"


def test_method_is_upper_case_and_known() -> None:
    assert Task(method="put").method == "PUT"
    for method in ("BREW", "", "POST\n", 5):
        with pytest.raises(InvalidTaskError, match="method"):
            Task(method=method)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("target", ["worker", "v2.worker", "A_b-9", "x" * 100])
def test_target_is_kept(target: str) -> None:
    assert row(Task(target=target)).target == target


@pytest.mark.parametrize("target", ["a/b", "a@b", "a:80", "a\nb", "a b", "é", "-a", ".a", "x" * 101, 5])
def test_target_that_is_no_name_is_refused(target: Any) -> None:
    with pytest.raises(InvalidTaskError, match="target"):
        Task(target=target)


# --- headers and payload --------------------------------------------------------------------------------------------


def test_headers_are_kept_and_sent() -> None:
    task = Task(headers={"X-One": "1", "Content-Type": "a/b"})

    assert task.headers == {"X-One": "1", "Content-Type": "a/b"}
    assert json.loads(row(task).headers) == [["X-One", "1"], ["Content-Type", "a/b"]]


@pytest.mark.parametrize(
    "name",
    [
        "X-AppEngine-TaskName", "x-appengine-foo", "X_AppEngine_TaskName", "X-AppEngine_TaskName", "X-CloudTasks-TaskName",
        "X-Deferlib-Signature", "x_deferlib_outcome",
    ],
)  # fmt: skip
def test_engines_headers_are_dropped_however_they_are_spelled(name: str) -> None:
    assert Task(headers={name: "forged", "X-Other": "1"}).headers == {"X-Other": "1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"), ("a b", "x"), ("a:", "x"), ("a\n", "x"), ("é", "x"), (5, "x"),
        ("a", "x\r\nX: y"), ("a", "\x00"), ("a", "€"), ("a", 5), ("a", "x\n"),
    ],
)  # fmt: skip
def test_header_that_would_break_a_request_is_refused(name: Any, value: Any) -> None:
    with pytest.raises(InvalidTaskError, match="header"):
        Task(headers={name: value})


def test_text_is_sent_as_text_and_bytes_as_they_are() -> None:
    assert Task("é").payload == b"\xc3\xa9"
    assert Task("é").headers == {"Content-Type": "text/plain; charset=utf-8"}
    assert Task("é", headers={"content-type": "a/b"}).headers == {"content-type": "a/b"}
    assert Task(b"\xff").headers == {}
    assert Task().payload is None


def test_payload_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidTaskError, match="not int"):
        Task(5)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_methods_without_a_body_have_none(method: str) -> None:
    assert Task(b"", method=method).method == method
    with pytest.raises(InvalidTaskError, match="no payload"):
        Task(b"x", method=method)


def test_size_counts_method_url_headers_and_payload() -> None:
    assert Task(b"12345", url="/abc", headers={"X": "yz"}).size == 4 + 4 + (1 + 2 + 4) + 5


def test_task_of_the_limit_passes_and_one_more_byte_does_not() -> None:
    assert Task(b"x" * (100 * 1024 - 5), url="/").size == 100 * 1024
    with pytest.raises(TaskTooLargeError, match="102401 bytes, at most 102400"):
        Task(b"x" * (100 * 1024 - 4), url="/")


# --- pull tasks -----------------------------------------------------------------------------------------------------


def test_pull_task_has_a_payload_and_perhaps_a_tag() -> None:
    task = Task(b"", method="PULL", tag="blue")

    assert (task.tag, task.headers) == ("blue", {})
    assert (row(task, "shelf").mode, row(task, "shelf").url) == ("pull", "")
    assert Task(b"x" * (1024 * 1024 - 4), method="PULL").size == 1024 * 1024


@pytest.mark.parametrize("wrong", [{"url": "/x"}, {"headers": {"a": "b"}}, {"target": "t"}, {"payload": None}])
def test_pull_task_has_nothing_else(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidTaskError):
        Task(**{"payload": b"x", "method": "PULL", **wrong})


def test_tag_is_for_pull_tasks_and_short() -> None:
    with pytest.raises(InvalidTaskError, match="PULL"):
        Task(tag="blue")
    with pytest.raises(InvalidTagError, match="501"):
        Task(b"", method="PULL", tag="x" * 501)


# --- times ----------------------------------------------------------------------------------------------------------


def test_task_is_due_when_it_is_made_unless_it_says_otherwise() -> None:
    assert row(Task()).eta == NOW
    assert row(Task(countdown=1.5)).eta == NOW + 1_500_000
    assert row(Task(countdown=-5)).eta == NOW - 5 * SECOND
    assert row(Task(countdown="5")).eta == NOW + 5 * SECOND  # type: ignore[arg-type]  # App Engine takes it
    assert Task(countdown=0).eta == datetime(2025, 11, 21, 4, 40, tzinfo=UTC)


def test_eta_is_a_moment_in_any_zone_and_local_time_without_one() -> None:
    moment = datetime(2025, 11, 21, 4, 40, tzinfo=UTC) + timedelta(hours=1, microseconds=3)

    assert row(Task(eta=moment)).eta == NOW + 3600 * SECOND + 3
    assert row(Task(eta=moment.astimezone(timezone(timedelta(hours=5))))).eta == NOW + 3600 * SECOND + 3
    assert row(Task(eta=moment.astimezone().replace(tzinfo=None))).eta == NOW + 3600 * SECOND + 3


@pytest.mark.parametrize("countdown", [math.nan, math.inf, -math.inf, "soon", 10**400])
def test_countdown_that_is_no_number_of_seconds_is_refused(countdown: Any) -> None:
    with pytest.raises(InvalidTaskError, match="countdown"):
        Task(countdown=countdown)


@pytest.mark.parametrize("eta", [5, "2026-01-01", math.nan])
def test_eta_that_is_no_datetime_is_refused(eta: Any) -> None:
    with pytest.raises(InvalidTaskError, match="datetime"):
        Task(eta=eta)


def test_thirty_days_ahead_is_the_farthest() -> None:
    assert Task(countdown=30 * 86_400)
    with pytest.raises(InvalidEtaError, match="30"):
        Task(countdown=30 * 86_400 + 0.001)


def test_countdown_and_eta_together_are_refused() -> None:
    with pytest.raises(InvalidTaskError, match="not both"):
        Task(countdown=0, eta=datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("when", [{"countdown": -1e15}, {"eta": datetime(1, 1, 1, tzinfo=UTC)}])
def test_time_long_past_can_be_shown(when: dict[str, Any]) -> None:
    task = Task(**when)

    assert task.eta == datetime(1, 1, 1, tzinfo=UTC)
    assert "0001-01-01" in repr(task)


def test_dispatch_deadline_is_fifteen_seconds_to_a_day() -> None:
    assert Task(dispatch_deadline_usec=15 * SECOND).dispatch_deadline_usec == 15 * SECOND
    assert Task(dispatch_deadline_usec=86_400 * SECOND).dispatch_deadline_usec == 86_400 * SECOND
    for wrong in (0, -1, 15 * SECOND - 1, 86_400 * SECOND + 1):
        with pytest.raises(InvalidDispatchDeadlineError):
            Task(dispatch_deadline_usec=wrong)
    for odd in (15e6, "15000000", True):
        with pytest.raises(TypeError):
            Task(dispatch_deadline_usec=odd)  # type: ignore[arg-type]  # what is tested


def test_task_takes_the_namespace_it_is_made_in() -> None:
    with namespaces.namespace("tenant-1"):
        task = Task()

    assert row(task).namespace == "tenant-1"


def test_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Task(colour="red")  # type: ignore[call-arg]  # what is tested


# --- retry options --------------------------------------------------------------------------------------------------


def test_retry_options_are_kept_and_shown() -> None:
    options = TaskRetryOptions(min_backoff_seconds=0.5, max_backoff_seconds=9, task_age_limit=59.2, task_retry_limit=3)

    assert (options.min_backoff_seconds, options.max_backoff_seconds, options.task_age_limit) == (0.5, 9, 60)
    assert (options.task_retry_limit, options.max_doublings) == (3, None)
    assert repr(options) == (
        "TaskRetryOptions(min_backoff_seconds=0.5, max_backoff_seconds=9, task_age_limit=60, task_retry_limit=3)"
    )
    assert TaskRetryOptions(max_doublings=0).max_doublings == 0


def test_options_that_set_nothing_leave_the_queues() -> None:
    assert row(Task(retry_options=TaskRetryOptions())).retry == ""
    assert row(Task(retry_options=TaskRetryOptions(task_retry_limit=0))).retry != ""


@pytest.mark.parametrize(
    "name", ["min_backoff_seconds", "max_backoff_seconds", "task_age_limit", "max_doublings", "task_retry_limit"]
)
@pytest.mark.parametrize("value", [-1, -0.1, math.nan, math.inf, 2**31])
def test_retry_option_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidTaskRetryOptionsError, match=name):
        TaskRetryOptions(**{name: value})  # type: ignore[arg-type]  # one of five


def test_longest_wait_is_not_below_the_shortest() -> None:
    assert TaskRetryOptions(min_backoff_seconds=2, max_backoff_seconds=2)
    with pytest.raises(InvalidTaskRetryOptionsError, match="smaller than"):
        TaskRetryOptions(min_backoff_seconds=2, max_backoff_seconds=1)


def test_unknown_retry_option_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        TaskRetryOptions(tries=3)  # type: ignore[call-arg]  # what is tested
    with pytest.raises(TypeError):
        TaskRetryOptions(min_backoff_seconds="soon")  # type: ignore[arg-type]  # what is tested


# --- queues ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a_b", "a b", "a\n", "é", "x" * 101, None, 5])
def test_name_that_no_queue_has_is_refused(name: Any) -> None:
    with pytest.raises(InvalidQueueNameError):
        Queue(name)


def test_queues_are_equal_by_name_and_not_hashable() -> None:
    assert Queue("mail") == Queue("mail") != Queue()
    assert repr(Queue("mail")) == "Queue<name='mail'>"
    with pytest.raises(TypeError):
        hash(Queue())


def test_added_task_knows_its_queue_and_name() -> None:
    task = Task(url="/x")

    assert Queue("mail").add(task) is task

    assert (task.was_enqueued, task.queue_name, task.name) == (True, "mail", str(row(task).id))


def test_many_are_added_in_one_call_from_any_iterable() -> None:
    tasks = [Task(url="/x") for _ in range(100)]

    assert Queue().add(iter(tasks)) == tasks
    assert all(task.was_enqueued for task in tasks)
    assert Queue().add([]) == []
    assert Queue().add(None) == []  # type: ignore[arg-type]  # as on App Engine


def test_more_than_a_hundred_are_too_many() -> None:
    with pytest.raises(TooManyTasksError, match="101 tasks"):
        Queue().add([Task() for _ in range(101)])


def test_same_task_is_added_once() -> None:
    task = Task(url="/x")
    with pytest.raises(BadTaskStateError):
        Queue().add([task, task])

    task.add("mail")
    with pytest.raises(BadTaskStateError, match="added before"):
        Queue().add(task)


def test_call_with_one_name_twice_adds_nothing() -> None:
    tasks = [Task(name="a"), Task(name="a"), Task(name="b")]

    with pytest.raises(DuplicateTaskNameError, match="'a'"):
        Queue().add(tasks)

    assert not any(task.was_enqueued for task in tasks)


def test_call_mixes_no_push_and_pull_tasks() -> None:
    with pytest.raises(InvalidTaskError, match="not both"):
        Queue().add([Task(), Task(b"", method="PULL")])


def test_only_tasks_are_added() -> None:
    with pytest.raises(InvalidTaskError, match="not str"):
        Queue().add(["a"])  # type: ignore[list-item]  # what is tested


def test_wrong_kind_of_queue_says_so() -> None:
    with pytest.raises(deferlib.taskqueue.InvalidQueueModeError, match="'shelf' doesn't take push tasks"):
        Queue("shelf").add(Task())
    with pytest.raises(deferlib.taskqueue.InvalidQueueModeError, match="'default' doesn't take pull tasks"):
        Queue().add(Task(b"", method="PULL"))


def test_unknown_queue_is_named_with_the_known_ones_and_the_remedy() -> None:
    with pytest.raises(UnknownQueueError, match=r"no queue 'nowhere'; known are: .*mail.*queue\.yaml.*- name: nowhere"):
        Queue("nowhere").add(Task())


def test_taken_name_fails_alone() -> None:
    first, other = Task(name="a"), Task(name="b")
    Queue().add(Task(name="a"))

    with pytest.raises(deferlib.taskqueue.TaskAlreadyExistsError, match="'a'"):
        Queue().add([first, other])

    assert (first.was_enqueued, other.was_enqueued) == (False, True)


def test_transactional_add_says_that_it_is_not_there_yet() -> None:
    with pytest.raises(deferlib.NotAvailableError):
        Queue().add(Task(), transactional=True)


def test_add_builds_and_adds() -> None:
    task = add("text", url="/x", queue_name="mail", countdown=5)

    assert (task.queue_name, task.payload) == ("mail", b"text")


def test_purge_empties_the_queue() -> None:
    Queue("mail").add([Task() for _ in range(10)])

    Queue("mail").purge()

    with config.runtime().store.read() as tx:
        assert tx.stats(NOW, ["mail"])[0].tasks == 0
