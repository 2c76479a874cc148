"""What `tasks explain` says, and what the engine then does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import config
from deferlib.core.health import Ailment, Condition
from deferlib.core.model import SECOND, ClaimSpec
from tests.unit.test_explain import Desk, call

QUEUES: list[dict[str, Any]] = [
    {"name": "default"},
    {"name": "daily", "rate": "1/d", "bucket_size": 5},
    {"name": "other", "target": "worker"},
]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr("tests.unit.test_explain.QUEUES", QUEUES)
    monkeypatch.setenv("DEFERLIB_ALLOW_URLS", "example.com")
    former = config.install(None)
    desk = Desk(tmp_path / "tasks.db", capsys)
    with desk.runtime.store.serving(lambda: None):
        yield desk
    config.runtime().close()
    config.install(former)


def test_task_that_finds_a_full_bucket_is_expected_now(desk: Desk) -> None:
    deferlib.defer(call, _name="x", _queue="daily")

    assert desk.explain("x") == "daily/x: expected now"


def test_task_that_waits_for_the_next_token_is_expected_with_it(desk: Desk) -> None:
    deferlib.defer(call, _name="x", _queue="daily")
    store = desk.runtime.store
    store.run(lambda tx: tx.cap({"daily": 0}))
    store.run(lambda tx: tx.claim(desk.now, [ClaimSpec("default", 1, 1, desk.now + 1)]))
    day = 86_400 * SECOND
    import apsw

    connection = apsw.Connection(str(desk.dsn.removeprefix("sqlite:///")))
    connection.execute("update queues set tat = ? where name = 'daily'", (desk.now + 5 * day,))  # a day from the next token
    connection.close()

    document = desk.json("x")

    [reason] = document["reasons"]
    assert document["expected"][:13] == reason["until"][:13]


def test_task_behind_a_full_target_is_told_so(desk: Desk) -> None:
    """All 32 slots are taken by calls that take long: the next one waits, and explain says `expected now`."""
    for number in range(33):
        deferlib.defer(call, number, _name=f"t{number}")
    store, until = desk.runtime.store, desk.now + 60 * SECOND
    store.run(
        lambda tx: (tx.claim(desk.now, [ClaimSpec("default", 32, 10**6, until)]), tx.fly("e", until, {"default": 32}))
    )

    assert desk.json("t32")["reasons"], desk.explain("t32")


def test_task_of_a_shrunk_target_is_told_so(desk: Desk) -> None:
    for number in range(5):
        deferlib.defer(call, number, _name=f"t{number}")
    store, until = desk.runtime.store, desk.now + 60 * SECOND
    store.run(lambda tx: (tx.claim(desk.now, [ClaimSpec("default", 4, 10**6, until)]), tx.fly("e", until, {"default": 4})))
    desk.told([Condition(desk.runtime.settings["app"], desk.now, Ailment.FAILING, "no answer", 4, 0)], [])

    assert desk.json("t4")["reasons"], desk.explain("t4")


def test_absolute_url_is_not_explained_by_the_apps_trouble(desk: Desk) -> None:
    deferlib.taskqueue.add(url="https://example.com/x", name="x")
    base = desk.runtime.settings["app"]
    desk.told([Condition(base, desk.now, Ailment.UNREACHABLE, "connection refused", 1, desk.now + 5 * SECOND)], [])

    assert not [reason for reason in desk.json("x")["reasons"] if base in reason["reason"]]
