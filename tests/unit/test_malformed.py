"""Rows that no version of deferlib has written: each ends as a dead letter with its reason, and stops nobody else's."""

from __future__ import annotations

import bisect
import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import cli, config
from deferlib.core import malformed as malformed_module
from deferlib.core.malformed import malformed
from deferlib.core.model import DAY, SECOND, Claim, Page, TaskState
from deferlib.errors import TaskTooLargeError
from deferlib.keys import Keyring
from deferlib.taskqueue import Task, TaskRetryOptions

RAN: list[int] = []

MALFORMED = {
    "retry": [
        *("{", "[]", '"x"', "7", "null", '{"min_backoff":"soon"}', '{"retry_limit":-1}', '{"max_doublings":1.5}'),
        "[" * 9_999,
    ],
    "headers": [
        *("[[", "{}", "7", '[["a"]]', '[["a",1]]', '[["a b","c"]]', '["ab"]', "[" * 99_999),
        '[["a","b\\r\\nX-AppEngine-QueueName: c"]]',
    ],
    "history": ["nope", "{}", "7", "[7]", "[" * 99_999],
    "method": ["", "post", "BAD METHOD", "GET\r\nX: y", "P" * 99],
    "namespace": ["a\r\nX-AppEngine-QueueName: b"],
    "target": ["a\nb"],
    "url": ["/é", "/a b", "/a\r\nX: y"],
    "name": ["a\r\nX-AppEngine-QueueName: b", "\x00"],
    "deadline": [-5, 31 * DAY],
}
CASES = [(column, value) for column, values in MALFORMED.items() for value in values]


def claim(**fields: Any) -> Claim:
    values: dict[str, Any] = {
        "id": 1, "claims": 1, "queue": "default", "name": None, "eta": 0, "until": 1, "attempts": 1, "executions": 0,
        "failures": 0, "lost": 0, "first_try": 0, "status": 0, "reason": "", "method": "POST", "url": "/", "target": "",
        "headers": "", "namespace": "", "tag": "", "retry": "", "deadline": 0, "fail_fast": 0, "created": 0,
        "history": "", "body": b"",
    }  # fmt: skip
    return Claim(**{**values, **fields})


@pytest.mark.parametrize(("column", "value"), CASES)
def test_malformed_row_is_named(column: str, value: Any) -> None:
    assert malformed(claim(**{column: value}))


def test_what_is_too_long_is_named_and_not_kept() -> None:
    before = malformed_module._common.cache_info().currsize
    headers = json.dumps([["X-A", "b" * 70_000]])

    assert "too long" in malformed(claim(headers=headers))
    assert "too long" in malformed(claim(retry=" " * 70_000))
    assert malformed_module._common.cache_info().currsize == before


@pytest.mark.parametrize("value", ["b", "\xe9"])
def test_headers_that_an_add_takes_are_never_too_long(value: str) -> None:
    options = TaskRetryOptions(
        task_retry_limit=2**31 - 1,
        task_age_limit=1e9,
        min_backoff_seconds=1e8,
        max_backoff_seconds=1e8,
        max_doublings=10**6,
    )

    def task(length: int) -> Task:
        return Task(url="/", headers={"X-A": value * length}, retry_options=options, _size_check=False)

    def fits(length: int) -> bool:
        with suppress(TaskTooLargeError):
            return task(length) is not None
        return False

    longest = bisect.bisect_left(range(100_000), True, key=lambda length: not fits(length)) - 1
    with pytest.raises(TaskTooLargeError, match="put what is long into the payload"):
        task(longest + 1)
    row = task(longest)._row("default", Keyring([b"k" * 32]).signing)

    assert longest > 10_000
    assert malformed(claim(headers=row.headers, retry=row.retry)) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "welcome-1", "namespace": "tenant", "target": "v2.worker", "deadline": 600 * SECOND},
        {"retry": '{"retry_limit":0,"min_backoff":5,"of_a_newer_version":"x"}'},
        {"headers": '[["X-A","b\\tc"],["X-A",""],["Accept","\xe9"]]'},
        {"history": '[{"attempt":1,"error":"x"}]'},
        {"method": "DELETE", "url": "/%C3%A9?x=%20"},
    ],
)
def test_sound_row_is_sound(fields: dict[str, Any]) -> None:
    assert malformed(claim(**fields)) == ""


def note(number: int) -> None:
    RAN.append(number)


def nothing_here(environ: Any, start_response: Any) -> list[bytes]:
    start_response("404 Not Found", [])
    return []


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    RAN.clear()
    former = config.install(None)
    path = tmp_path / "tasks.db"
    deferlib.configure(store=f"sqlite:///{path}")
    yield path
    config.runtime().close()
    config.install(former)


def test_engine_goes_on_with_everybody_elses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(len(CASES) + 1):
        deferlib.defer(note, number)
    store = config.runtime().store
    store.close()
    with sqlite3.connect(path) as connection:
        ids = [id for (id,) in connection.execute("select id from tasks order by id")]
        for id, (column, value) in zip(ids[1:], CASES, strict=True):
            connection.execute(f"update tasks set {column} = ? where id = ?", (value, id))  # noqa: S608  # of this file
    connection.close()

    with deferlib.running(deferlib.wrap_wsgi_app(nothing_here)):
        pass

    assert RAN == [0]
    with store.read() as tx:
        dead = tx.tasks("default", Page(state=TaskState.DEAD))
    assert len(dead) == len(CASES)
    assert all(row.reason.startswith("quarantine: the row is malformed: its ") for row in dead)
    store.close()
    for command in ("list", "list --json"):
        assert cli.main(["tasks", *command.split(), "--state", "dead", "--store", f"sqlite:///{path}"]) == 0
    shown = capsys.readouterr().out
    assert "\r" not in shown
    assert "\x00" not in shown
    assert len(json.loads(shown[shown.index("{") :])["tasks"]) == len(CASES)
    for row in dead:
        for options in ([], ["--json"]):
            assert cli.main(["tasks", "show", str(row.id), *options, "--store", f"sqlite:///{path}"]) == 0
