"""Rows that no version of deferlib has written: each ends as a dead letter with its reason, and stops nobody else's."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import cli, config
from deferlib.core.malformed import malformed
from deferlib.core.model import DAY, SECOND, Claim, Page, TaskState

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
