"""Named targets: names to URLs, Hosts back to names, and the tasks that stay with the version that added them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deferlib
from deferlib import config
from deferlib.context import request_host
from deferlib.contrib.asgi import Middleware
from deferlib.errors import ConfigError
from deferlib.settings import load_settings
from deferlib.targets import Targets
from deferlib.taskqueue import DEFAULT_APP_VERSION, Task

WORKER = "http://worker.internal:8081"
TEMPLATE = "http://{target}.example.com"


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    former = config.install(None)
    yield
    config.install(former)


def use(targets: object, **settings: object) -> None:
    deferlib.configure(store="sqlite:///:memory:", targets=targets, **settings)


def target_of(task: Task) -> str:
    return task._row("default", config.runtime().ring).target


def test_name_has_its_url_or_the_templates() -> None:
    targets = Targets({"worker": WORKER}, TEMPLATE)

    assert targets.get("worker") == WORKER
    assert targets.get("v2.worker") == "http://v2.worker.example.com"
    assert targets.get("i1.v2.worker") == "http://i1.v2.worker.example.com"
    assert targets.get("Worker") is None
    assert targets.get("evil.com/#") is None
    assert Targets({"worker": WORKER}).get("other") is None


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("worker.internal:8081", "worker"), ("WORKER.internal:8081", "worker"), ("worker.internal", None),
        ("plain.internal", "plain"), ("plain.internal:80", "plain"), ("plain.internal:443", None),
        ("safe.internal:443", "safe"), ("safe.internal", "safe"),
        ("v2.worker.example.com", "v2.worker"), ("example.com", None), (".example.com", None),
        ("a b.example.com", None), ("x.example.com.evil.com", None), ("xexample.com", None), ("", None),
    ],
)  # fmt: skip
def test_host_chooses_among_what_is_configured(host: str, name: str | None) -> None:
    named = {"worker": WORKER, "plain": "http://plain.internal/path", "safe": "https://safe.internal:443"}

    assert Targets(named, TEMPLATE).name_of(host, by_template=True) == name
    by_name = name if name in named else None
    assert Targets(named, TEMPLATE).name_of(host) == by_name, "a template leaves the choice to whoever sends the request"


@pytest.mark.parametrize("host", ["127.0.0.9:8080", "10.1.2.3:8080", "1:8080", "0x7f000001:8080"])
def test_host_makes_no_address_a_target(host: str) -> None:
    assert Targets({}, "http://{target}:8080").name_of(host, by_template=True) is None


@given(st.text(max_size=30))
def test_no_host_names_anything_that_is_no_name(host: str) -> None:
    name = Targets({}, "http://{target}:8080").name_of(host)

    assert name is None or Targets({}, TEMPLATE).get(name) == f"http://{name}.example.com"


def test_template_in_the_path_has_no_way_back() -> None:
    assert Targets({}, "http://gateway/{target}").get("a") == "http://gateway/a"
    assert Targets({}, "http://gateway/{target}").name_of("gateway") is None


@pytest.mark.parametrize(
    ("value", "names", "template"),
    [
        ("http://{target}.example.com", {}, TEMPLATE),
        (f"worker={WORKER}, {TEMPLATE}/", {"worker": WORKER}, TEMPLATE),
        (f"*={TEMPLATE}", {}, TEMPLATE),
        ({"worker": WORKER, "*": TEMPLATE}, {"worker": WORKER}, TEMPLATE),
        ("", {}, ""),
    ],
)
def test_setting_is_a_map_or_a_template(value: object, names: dict[str, str], template: str) -> None:
    found = load_settings({"targets": value}, {})["targets"]

    assert (found.names, found.template) == (names, template)
    assert load_settings({"targets": str(found)}, {})["targets"] == found


@pytest.mark.parametrize(
    "value",
    [
        "http://example.com", "http://{target}/{target}", "{target}", "ftp://{target}", f"{TEMPLATE},{TEMPLATE}",
        {"*": 5}, {"*": "http://h"}, "*=", "a={target}", f"a=http://h,a={TEMPLATE}",
    ],
)  # fmt: skip
def test_other_templates_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"setting 'targets'.*a template like"):
        load_settings({"targets": value}, {})


# --- the version that enqueued ------------------------------------------------------------------------------------------


def test_task_stays_with_the_target_that_serves_the_request() -> None:
    use({"worker": WORKER, "*": TEMPLATE})
    token = request_host.set("v2.worker.example.com")
    assert target_of(Task()) == "", "the header of a request may be anything"
    use({"worker": WORKER, "*": TEMPLATE}, trust_host=True)
    request_host.set("worker.internal:8081")
    try:
        assert (target_of(Task()), Task().target) == ("worker", "worker")
        assert target_of(Task(target="other")) == "other"
        assert target_of(Task(target=DEFAULT_APP_VERSION)) == ""
        assert target_of(Task(headers={"Host": "v2.example.com"})) == ""
        assert Task(b"", method="PULL").target is None
        request_host.set("v2.worker.example.com")
        assert target_of(Task()) == "v2.worker"
        request_host.set("evil.com")
        assert (target_of(Task()), Task().target) == ("", None)
    finally:
        request_host.reset(token)
    assert target_of(Task()) == ""


def test_without_targets_a_host_means_nothing() -> None:
    use(None)
    token = request_host.set("worker.internal:8081")
    try:
        assert (target_of(Task()), Task().target) == ("", None)
    finally:
        request_host.reset(token)


def environ(host: str | None) -> dict[str, Any]:
    found = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "", "wsgi.input": io.BytesIO(),
    }  # fmt: skip
    return found if host is None else {**found, "HTTP_HOST": host}


def test_each_request_of_a_wsgi_app_has_its_own_host() -> None:
    use({"worker": WORKER})
    targets: list[str] = []

    def view(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        targets.append(target_of(Task()))
        return []

    app = deferlib.wrap_wsgi_app(view)
    for host in ("worker.internal:8081", None, "worker.internal:8081", "evil.com"):
        app(environ(host), lambda status, headers: None)

    assert targets == ["worker", "", "worker", ""]
    assert request_host.get() is None


def test_each_request_of_an_asgi_app_has_its_own_host() -> None:
    import asyncio

    use({"worker": WORKER})
    targets: list[str] = []

    async def view(scope: Any, receive: Any, send: Any) -> None:
        targets.append(target_of(Task()))

    async def main() -> None:
        for host in (b"worker.internal:8081", None):
            headers = [] if host is None else [(b"Host", host)]
            scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
            await asyncio.create_task(Middleware(view)(scope, _never, _nothing))

    asyncio.run(main())

    assert targets == ["worker", ""]


async def _never() -> Any:
    raise AssertionError


async def _nothing(message: Any) -> None:
    pass
