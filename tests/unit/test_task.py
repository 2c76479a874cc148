"""Tasks: what is accepted, and what each refusal says."""

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
    DEFAULT_APP_VERSION,
    InvalidDispatchDeadlineError,
    InvalidEtaError,
    InvalidTagError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidUrlError,
    Task,
    TaskTooLargeError,
)

NAMESPACE = len("X-AppEngine-Current-Namespace: \r\n")
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
    assert Task(url=url, method="GET").url == url


def test_url_beyond_ascii_is_sent_in_percents() -> None:
    assert Task(url="/café au lait?q=ü&x=%20", method="GET").url == "/caf%C3%A9%20au%20lait?q=%C3%BC&x=%20"


@pytest.mark.parametrize(
    "url",
    [
        "a", "http://h/a", "//h/a", "/a#b", "?a=b", "/a\nb", "/a\r\nX: y", "/a\x01", "/\x00", "/" + "p" * 2_083,
        "/" + "€" * 500, "http://[", "/a/../b", "/./a", "/a/..", "/%2E%2e/a", "/a/%2e", "/\ud800", "\\\\h\\a",
    ],
)  # fmt: skip
def test_other_urls_are_refused(url: Any) -> None:
    with pytest.raises(InvalidUrlError) as caught:
        Task(url=url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", [None, 7, b"/a"])
def test_url_that_is_no_string_is_a_type_error(url: Any) -> None:
    with pytest.raises(TypeError, match="url is a string"):
        Task(url=url)


def test_task_without_a_url_goes_to_its_queues() -> None:
    assert (Task().url, Task().on_queue_url) == ("", True)
    assert (Task(url="/x").on_queue_url, Task(b"", method="PULL").on_queue_url) == (False, True)
    assert row(Task(), "mail").url == "/_ah/queue/mail"
    assert row(Task(method="GET", params={"a": 1}), "mail").url == "/_ah/queue/mail?a=1"
    assert Task(method="GET", params={"a": 1}).on_queue_url


def test_query_of_any_length_is_taken_as_on_app_engine_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert Task(url="/long1?" + "q" * 10_000, method="PUT").url == "/long1?" + "q" * 10_000
    assert Task(url="/long1", method="GET", params={"q": "q" * 10_000}).url.startswith("/long1?q=qq")

    assert [record.message.count("/long1 is longer than 4000 bytes") for record in caplog.records] == [1]  # once a path


def test_limit_of_the_url_can_be_set() -> None:
    deferlib.configure(store="sqlite:///:memory:", limits="deferlib")
    with pytest.raises(InvalidUrlError, match="4001 bytes as it is sent, at most 4000"):
        Task(url="/?" + "q" * 3_999, method="GET")
    with pytest.raises(InvalidUrlError, match="put what is long into the payload"):
        Task(url="/", method="GET", params={"q": "q" * 4_000})


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

    assert task.headers == {"X-One": "1", "Content-Type": "a/b", "X-AppEngine-Current-Namespace": ""}
    assert (task.headers["x-one"], "CONTENT-TYPE" in task.headers, "a" in task.headers) == ("1", True, False)
    task.headers["X-One"] = "2"
    assert task.headers["X-One"] == "1"  # it was a copy
    assert json.loads(row(task).headers) == [["X-One", "1"], ["Content-Type", "a/b"]]


@pytest.mark.parametrize(
    "name",
    [
        "X-AppEngine-TaskName", "x-appengine-foo", "X_AppEngine_TaskName", "X-AppEngine_TaskName", "X-CloudTasks-TaskName",
        "X-Deferlib-Signature", "x_deferlib_outcome",
    ],
)  # fmt: skip
def test_engines_headers_are_dropped_however_they_are_spelled(name: str) -> None:
    assert json.loads(row(Task(headers={name: "forged", "X-Other": "1"})).headers) == [["X-Other", "1"]]


def test_header_may_be_a_number_or_bytes_and_headers_pairs() -> None:
    task = Task(headers={"A": 5, "B": True, "C": None, "D": 1.5, "E": b"\xe9", "F": ["b", 5]})

    assert dict(task.headers) == {
        "A": "5", "B": "True", "C": "None", "D": "1.5", "E": "é", "F": ["b", "5"], "X-AppEngine-Current-Namespace": "",
    }  # fmt: skip
    assert Task(headers=[("A", "b")]).headers["a"] == "b"  # type: ignore[arg-type]  # App Engine takes pairs


@pytest.mark.parametrize(
    ("url", "sent"),
    [(" /x", "/x"), ("\t\n/x", "/x"), ("/x\r\n", "/x"), ("/x?", "/x"), ("/x#", "/x"), ("/x?#", "/x"), ("///x", "/x"),
     ("/a\\b", "/a%5Cb")],
)  # fmt: skip
def test_what_means_nothing_in_a_url_is_left_out(url: str, sent: str) -> None:
    assert Task(url=url).url == sent
    assert Task(url=url, params={"a": "b"}).payload == b"a=b"
    assert Task(url=url, method="GET", params={"a": "b"}).url == f"{sent}?a=b"
    assert row(Task(url=url)).url == sent


def test_header_of_several_values_is_repeated() -> None:
    task = Task(headers={"X-Many": ["1", "2"], "X-None": [], "X-Once": ("3",)})

    assert task.headers["x-many"] == ["1", "2"]
    assert json.loads(row(task).headers) == [["X-Many", "1"], ["X-Many", "2"], ["X-Once", "3"]]
    assert task.size == Task().size + 2 * (6 + 1 + 4) + (6 + 1 + 4)


def test_namespaces_and_fail_fast_are_the_headers_that_a_task_may_choose() -> None:
    task = Task(
        headers={
            "X-AppEngine-Current-Namespace": "mine",
            "x-appengine-default-namespace": "theirs",
            "X-Appengine-FailFast": "true",
        }
    )
    kept = row(task)

    assert (kept.namespace, kept.fail_fast) == ("mine", 1)
    assert json.loads(kept.headers) == [["x-appengine-default-namespace", "theirs"]]
    assert task.headers["X-AppEngine-Current-Namespace"] == "mine"
    assert row(Task(headers={"X-AppEngine-FailFast": "false"})).fail_fast == 0
    for name in ("X-AppEngine-Current-Namespace", "X-AppEngine-Default-Namespace"):
        for wrong in ("a b", "x" * 101, "é", ["a", "b"]):
            with pytest.raises(InvalidTaskError, match=name):
                Task(headers={name: wrong})


def test_requests_default_namespace_travels_on() -> None:
    token = namespaces.default_namespace.set("example.com")
    try:
        assert json.loads(row(Task()).headers) == [["X-AppEngine-Default-Namespace", "example.com"]]
        own = Task(headers={"x-appengine-default-namespace": "other"})
        assert own.headers["X-AppEngine-Default-Namespace"] == "other"
    finally:
        namespaces.default_namespace.reset(token)
    assert row(Task()).headers == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"), ("a b", "x"), ("a:", "x"), ("a\n", "x"), ("é", "x"), (5, "x"),
        ("a", "x\r\nX: y"), ("a", "\x00"), ("a", "€"), ("a", "x\n"), ("a", b"\n"), ("a", ["x", {}]), ("a", ["\n"]),
        ("a", object()), ("a", {"b": "c"}), ("a", "\x7f"),
    ],
)  # fmt: skip
def test_header_that_would_break_a_request_is_refused(name: Any, value: Any) -> None:
    with pytest.raises(InvalidTaskError, match="header"):
        Task(headers={name: value})


def test_text_is_sent_as_text_and_bytes_as_they_are() -> None:
    assert Task("é").payload == b"\xc3\xa9"
    assert Task("é").headers["content-type"] == "text/plain; charset=utf-8"
    assert Task("é", headers={"content-type": "a/b"}).headers["Content-Type"] == "a/b"
    assert "content-type" not in Task(b"\xff").headers
    assert Task().payload is None
    assert (Task("").payload, Task("").headers.get("content-type")) == (b"", None)


def test_payload_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidTaskError, match="not int"):
        Task(5)  # type: ignore[arg-type]  # what is tested


def test_size_counts_method_url_headers_and_payload() -> None:
    assert Task(b"12345", url="/abc", headers={"X": "yz"}).size == 4 + 4 + (1 + 2 + 4) + NAMESPACE + 5
    with namespaces.namespace("tenant-1"):
        assert Task(b"12345", url="/abc").size == 4 + 4 + NAMESPACE + 8 + 5
    chosen = Task(b"12345", url="/abc", headers={"X-AppEngine-Current-Namespace": "tenant-1"})
    assert chosen.size == 4 + 4 + NAMESPACE + 8 + 5


def test_task_of_the_limit_passes_and_one_more_byte_does_not() -> None:
    rest = 100 * 1024 - len("POST/") - NAMESPACE
    assert Task(b"x" * rest, url="/").size == 100 * 1024
    with pytest.raises(TaskTooLargeError, match=r"102401 bytes.*at most 102400.*push_task_bytes"):
        Task(b"x" * (rest + 1), url="/")
    assert Task(b"x" * (rest + 1), url="/", _size_check=False)
    deferlib.configure(store="sqlite:///:memory:", limits={"push_task_bytes": 102_401})
    assert Task(b"x" * (rest + 1), url="/").size == 102_401


# --- methods, payloads and params -----------------------------------------------------------------------------------

FORM = "application/x-www-form-urlencoded"
TEXT = "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("method", "given", "payload", "url", "content_type"),
    [
        ("POST", {"payload": b"p"}, b"p", "/x", None),
        ("POST", {"payload": "p"}, b"p", "/x", TEXT),
        ("POST", {"params": {"a": "1"}}, b"a=1", "/x", FORM),
        ("POST", {"params": {"a": ["1", 2], "b": "ü &"}}, b"a=1&a=2&b=%C3%BC+%26", "/x", FORM),
        ("POST", {"params": {"a": b"\xff"}, "headers": {"Content-Type": "x/y"}}, b"a=%FF", "/x", "x/y"),
        ("POST", {"params": {"a": []}}, None, "/x", None),
        ("POST", {"payload": b"", "params": {"a": "1"}}, b"a=1", "/x", FORM),
        ("PUT", {"params": {"a": "1"}}, None, "/x?a=1", None),
        ("PUT", {"payload": b"p", "params": {"a": "1"}}, b"p", "/x?a=1", None),
        ("PUT", {"payload": "p", "url": "/x?q=1"}, b"p", "/x?q=1", TEXT),
        ("GET", {"params": {"a": None}}, None, "/x?a=None", None),
        ("GET", {"payload": b"", "url": "/x?q=1"}, None, "/x?q=1", None),
        ("HEAD", {"params": {"a": "1"}, "payload": ""}, None, "/x?a=1", None),
        ("DELETE", {"params": {"a": True}}, None, "/x?a=True", None),
        ("POST", {"payload": b"p", "url": "/x?q=1"}, None, None, None),
        ("POST", {"url": "/x?q=1"}, None, None, None),
    ],
)  # fmt: skip
def test_each_method_has_its_place_for_payload_and_params(
    method: str, given: dict[str, Any], payload: bytes | None, url: str | None, content_type: str | None
) -> None:
    if url is None:
        with pytest.raises(InvalidTaskError, match="POST"):
            Task(**{"url": "/x", "method": method, **given})
        return
    task = Task(**{"url": "/x", "method": method, **given})

    assert (task.payload, task.url, task.headers.get("Content-Type")) == (payload, url, content_type)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"payload": b"p", "params": {"a": 1}}, "payload or params, not both"),
        ({"url": "/x?q=1", "params": {"a": 1}}, "query in the url or params, not both"),
        ({"url": "/x?q=1", "params": {"a": 1}, "method": "PUT"}, "query in the url or params, not both"),
        ({"url": "/x?q=1", "params": {"a": 1}, "method": "GET"}, "query in the url or params, not both"),
        ({"payload": b"p", "method": "GET"}, "no payload"),
        ({"payload": "p", "method": "HEAD"}, "no payload"),
        ({"payload": b"p", "method": "DELETE"}, "no payload"),
        ({"params": ["a"]}, "params is a mapping"),
        ({"params": {"a": "\ud800"}}, "params"),
        ({"payload": "\ud800"}, "payload"),
        ({"headers": ["a"]}, "headers is a mapping"),
        ({"headers": 5}, "headers is a mapping"),
        ({"payload": 0}, "not int"),
        ({"payload": bytearray(b"x")}, "not bytearray"),
    ],
)
def test_other_contents_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTaskError, match=message):
        Task(**given)


def test_params_come_back_out() -> None:
    params = {"a": "1", "b": ["x", "y"], "c": "", "ü": "ß"}
    found = {"a": b"1", "b": [b"x", b"y"], "c": b"", "ü": "ß".encode()}

    assert Task(params=params).extract_params() == found
    assert Task(params=params, method="GET").extract_params() == found
    assert Task(params=params, method="PULL").extract_params() == {name.encode(): value for name, value in found.items()}
    assert Task(url="/x?a=%ff&a=2", method="GET").extract_params() == {"a": [b"\xff", b"2"]}
    assert Task().extract_params() == {}
    with pytest.raises(ValueError, match="bad query"):
        Task("no params").extract_params()


# --- pull tasks -----------------------------------------------------------------------------------------------------


def test_pull_task_has_a_payload_and_perhaps_a_tag() -> None:
    task = Task(b"", method="PULL", tag="blue")

    assert (task.tag, row(task, "shelf").tag, row(task, "shelf").headers) == ("blue", "blue", "")
    assert Task(params={"a": 1}, method="PULL").payload == b"a=1"
    assert (Task(b"", method="PULL", tag="").tag, Task(b"", method="PULL").tag) == ("", None)
    assert (row(task, "shelf").mode, row(task, "shelf").url) == ("pull", "")
    assert Task(b"x" * (1024 * 1024 - 4 - NAMESPACE), method="PULL").size == 1024 * 1024
    with pytest.raises(TaskTooLargeError, match="pull_task_bytes"):
        Task(b"x" * (1024 * 1024 - 3 - NAMESPACE), method="PULL")


@pytest.mark.parametrize(
    "wrong", [{"url": "/x"}, {"headers": {"a": "b"}}, {"target": "t"}, {"payload": None}, {"params": {"a": 1}}]
)
def test_pull_task_has_nothing_else(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidTaskError):
        Task(**{"payload": b"x", "method": "PULL", **wrong})


def test_tag_is_for_pull_tasks_and_short() -> None:
    with pytest.raises(InvalidTaskError, match="PULL"):
        Task(tag="blue")
    with pytest.raises(InvalidTaskError, match="PULL"):
        Task(tag="")
    assert Task(b"", method="PULL", tag="€" * 500).tag == "€" * 500  # characters, not bytes
    assert Task(b"", method="PULL", tag=b"blue").tag == b"blue"  # type: ignore[arg-type,comparison-overlap]  # Python 2's
    assert row(Task(b"", method="PULL", tag=b"blue"), "shelf").tag == "blue"  # type: ignore[arg-type]
    for wrong in ("x" * 501, 5, "a\x00", "\ud800", b"\xff"):
        with pytest.raises(InvalidTagError):
            Task(b"", method="PULL", tag=wrong)  # type: ignore[arg-type]  # what is tested


# --- times ----------------------------------------------------------------------------------------------------------


def test_task_is_due_when_it_is_made_unless_it_says_otherwise() -> None:
    assert row(Task()).eta == NOW
    assert row(Task(countdown=1.5)).eta == NOW + 1_500_000
    assert row(Task(countdown=-5)).eta == NOW - 5 * SECOND
    assert row(Task(countdown="5")).eta == NOW + 5 * SECOND  # type: ignore[arg-type]  # App Engine takes it
    assert Task(countdown=0).eta_posix == NOW / SECOND
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
    for far in (1e303, "1e308", 10**20):
        with pytest.raises(InvalidEtaError, match="30"):
            Task(countdown=far)
    assert Task(countdown=-1e308).eta.year == 1
    with pytest.raises(InvalidEtaError, match="30"):
        Task(countdown=30 * 86_400 + 0.001)


def test_countdown_and_eta_together_are_refused() -> None:
    with pytest.raises(InvalidTaskError, match="not both"):
        Task(countdown=0, eta=datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("when", [{"countdown": -1e15}, {"eta": datetime(1, 1, 1, tzinfo=UTC)}])
def test_time_long_past_can_be_shown(when: dict[str, Any]) -> None:
    task = Task(**when)

    assert task.eta == datetime(1, 1, 1, tzinfo=UTC)
    assert "datetime(1, 1, 1, 0, 0" in repr(task)


def test_dispatch_deadline_is_fifteen_seconds_to_a_day() -> None:
    assert Task(dispatch_deadline_usec=15 * SECOND).dispatch_deadline_usec == 15 * SECOND
    assert Task(dispatch_deadline_usec=86_400 * SECOND).dispatch_deadline_usec == 86_400 * SECOND
    for wrong in (0, -1, 15 * SECOND - 1, 86_400 * SECOND + 1, 10**5_000, True):
        with pytest.raises(InvalidDispatchDeadlineError):
            Task(dispatch_deadline_usec=wrong)
    for odd in (15e6, "15000000"):
        with pytest.raises(TypeError):
            Task(dispatch_deadline_usec=odd)  # type: ignore[arg-type]  # what is tested


def test_task_takes_the_namespace_it_is_made_in() -> None:
    with namespaces.namespace("tenant-1"):
        task = Task()

    assert row(task).namespace == "tenant-1"


def test_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Task(colour="red")  # type: ignore[call-arg]  # what is tested
    with pytest.raises(TypeError, match="TaskRetryOptions"):
        Task(retry_options={"task_retry_limit": 3})  # type: ignore[arg-type]  # what is tested


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earlier", "later", "error"),
    [
        ({"name": "a b"}, {"url": "x"}, InvalidTaskNameError),
        ({"url": "x"}, {"url": "x", "tag": "t"}, InvalidUrlError),
        ({"url": "/x?q", "params": {"a": 1}}, {"tag": "t"}, InvalidTaskError),
        ({"tag": "t"}, {"payload": 5}, InvalidTaskError),
        ({"method": "BREW"}, {"countdown": "soon"}, InvalidTaskError),
        ({"headers": {"Host": "h"}, "target": "t"}, {"countdown": 31 * 86_400}, InvalidTaskError),
        ({"countdown": 31 * 86_400}, {"payload": b"x" * 200_000}, InvalidEtaError),
        ({"payload": b"x" * 200_000}, {"dispatch_deadline_usec": 0}, TaskTooLargeError),
        ({"method": "PULL", "payload": b"", "tag": "x" * 501}, {"dispatch_deadline_usec": 0}, InvalidTagError),
        ({"method": "PULL", "payload": b"x" * 2_000_000}, {"tag": "x" * 501}, TaskTooLargeError),
    ],
)
def test_first_mistake_in_app_engines_order_is_told(
    earlier: dict[str, Any], later: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        Task(**{**later, **earlier})
    assert type(caught.value) is error


def test_host_names_the_target() -> None:
    assert (Task(headers={"Host": "elsewhere"}).target, Task(target="a").target) == (DEFAULT_APP_VERSION, "a")
    assert (Task().target, Task(target="").target) == (None, None)
    default = Task(target=DEFAULT_APP_VERSION)
    assert (default.target, row(default).target, repr(default.target)) == (
        DEFAULT_APP_VERSION,
        "",
        "<DefaultApplicationVersion>",
    )
    with pytest.raises(InvalidTaskError, match="not both"):
        Task(target="a", headers={"host": "b"})
    with pytest.raises(InvalidTaskError, match="not both"):
        Task(target="", headers={"host": "b"})


def test_host_below_the_apps_own_names_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_VERSION_HOSTNAME", "app.example.com")

    assert row(Task(headers={"Host": "v2.worker.app.example.com"})).target == "v2.worker"
    assert Task(headers={"Host": "app.example.com"}).target is DEFAULT_APP_VERSION
    assert Task(headers={"Host": "evil.com"}).target is DEFAULT_APP_VERSION


def test_repr_shows_every_attribute_but_no_secret() -> None:
    text = repr(Task(b"hidden", name="a", url="/x", headers={"Authorization": "secret"}))

    assert text.startswith("Task<eta=datetime.datetime(2025, 11, 21, 4, 40")
    for part in (
        "method='POST'", "name='a'", "payload='<6 bytes>'", "queue_name=None", "retry_options=None", "url='/x'",
        "target=None", "was_enqueued=False", "was_deleted=False", "'Authorization'",
    ):  # fmt: skip
        assert part in text
    assert "hidden" not in text
    assert "secret" not in text
    assert "tag='t'" in repr(Task(b"", method="PULL", tag="t"))
