"""`deferlib tasks explain`: why a task isn't running, in the scheduler's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import deferlib
from deferlib import cli, config
from deferlib.core.explainer import Explainer
from deferlib.core.health import Ailment, Condition
from deferlib.core.model import SECOND, Action, ClaimSpec, Micros, Outcome, QueueRow, TaskRow
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Slowdown
from deferlib.engine import troubles

QUEUES: list[dict[str, Any]] = [
    {"name": "default"},
    {"name": "slow", "rate": "2/s", "bucket_size": 1},
    {"name": "narrow", "max_concurrent_requests": 5},
    {"name": "away", "target": "nowhere"},
]


#: A time of day as the command prints it: with its date, where that is another day than today.
AT = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\dZ"


def call(number: int = 0) -> None: ...


class Desk:
    """A store, and the command that looks at it."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.dsn = f"sqlite:///{path}"
        self.runtime = deferlib.configure(store=self.dsn, queues=QUEUES)
        self._capsys = capsys

    @property
    def now(self) -> Micros:
        return self.runtime.clock.now()

    def explain(self, name: str, *options: str) -> str:
        self._capsys.readouterr()
        assert cli.main(["tasks", "explain", name, "--store", self.dsn, *options]) == 0
        return self._capsys.readouterr().out.strip()

    def json(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.explain(name, "--json"))
        return document

    def told(self, conditions: list[Condition], slowdowns: list[Slowdown]) -> None:
        """Leave the note that an engine would."""
        text = troubles.dated(troubles.note_of(conditions, slowdowns), self.now)
        self.runtime.store.run(lambda tx: tx.put_note(troubles.NOTE + "engine", text))


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    former = config.install(None)
    desk = Desk(tmp_path / "tasks.db", capsys)
    yield desk
    config.runtime().close()
    config.install(former)


@pytest.fixture
def served(desk: Desk) -> Iterator[Desk]:
    with desk.runtime.store.serving(lambda: None):
        yield desk


def test_without_an_engine_nothing_runs(desk: Desk) -> None:
    deferlib.defer(call, _name="x")

    assert desk.explain("x") == ("default/x: no engine serves the store: start `deferlib engine`, or `deferlib dev`")
    assert desk.json("x")["expected"] is None


def test_next_task_is_held_back_by_nothing(served: Desk) -> None:
    deferlib.defer(call, _name="x")

    assert served.explain("x") == "default/x: expected now"
    assert served.json("x")["reasons"] == []


def test_rate_and_the_tasks_ahead_say_when(served: Desk) -> None:
    for number in range(13):
        deferlib.defer(call, number, _queue="slow", _name=f"t{number}")

    document = served.json("t12")

    assert document["ahead"] == 12
    assert document["ahead_is_all"] is True
    assert re.fullmatch(rf"slow/t12: 12 tasks ahead; expected {AT} \(in [56] s\)", served.explain("t12"))


def test_queue_at_its_concurrency_and_paused(served: Desk) -> None:
    store = served.runtime.store
    for number in range(6):
        deferlib.defer(call, number, _queue="narrow", _name=f"t{number}")
    until = served.now + 60 * SECOND
    store.run(lambda tx: (tx.claim(served.now, [ClaimSpec("narrow", 5, 10**6, until)]), tx.fly("e", until, {"narrow": 5})))

    assert served.explain("t5").startswith("narrow/t5: queue narrow is at 5/5 concurrent")
    assert served.explain("t0").startswith(
        "narrow/t0: running (attempt 1), or its engine has died: its lease ends then, until "
    )
    store.run(lambda tx: tx.pause(["narrow"], True))
    assert served.explain("t5") == "narrow/t5: queue narrow is paused"


def test_backing_off_tells_the_attempt_and_why(served: Desk) -> None:
    deferlib.defer(call, _name="x")
    store, now = served.runtime.store, served.now
    [claim] = store.run(lambda tx: tx.claim(now, [ClaimSpec("default", 1, 10**6, now + SECOND)]))
    again = Outcome(claim.id, claim.claims, "default", Action.RETRY, now + 90 * SECOND, reason="HTTP 500")
    store.run(lambda tx: tx.settle(now, [again]))

    assert re.match(
        rf"default/x: backing off, after attempt 1 \(HTTP 500\), until {AT} \(in (89|90) s\); expected", served.explain("x")
    )


def test_scheduled_task_tells_its_time_and_what_will_hold_it_then(served: Desk) -> None:
    deferlib.defer(call, _name="x", _queue="away", _countdown=3600)

    reasons = [each["reason"] for each in served.json("x")["reasons"]]

    assert reasons == ["scheduled", "target 'nowhere' is not configured"]
    assert served.json("x")["expected"] is None


def test_trouble_of_targets_and_queues_is_told(served: Desk) -> None:
    deferlib.defer(call, _name="x")
    now = served.now
    base = served.runtime.settings["app"]
    down = Condition(base, now, Ailment.UNREACHABLE, "connection refused", 1, now + 5 * SECOND)
    served.told([down], [Slowdown("default", now, 0.5, now + 9 * SECOND)])

    text = served.explain("x")

    assert "queue default is asked to wait by its target (503, Retry-After), until " in text
    assert f"target {base} can't be reached: connection refused, until " in text
    served.told([], [])
    assert served.explain("x") == "default/x: expected now"


@pytest.mark.parametrize("json", [False, True])
def test_what_waits_no_more_is_told(served: Desk, json: bool) -> None:
    for name in ("done", "dead"):
        deferlib.defer(call, _name=name)
    store, now = served.runtime.store, served.now
    claims = store.run(lambda tx: tx.claim(now, [ClaimSpec("default", 2, 10**6, now + SECOND)]))
    actions = {"done": Action.DONE, "dead": Action.DEAD}
    ends = [
        Outcome(c.id, c.claims, c.queue, actions[str(c.name)], now + 99 * SECOND, True, reason="limits: x") for c in claims
    ]
    store.run(lambda tx: tx.settle(now, ends))

    options = ["--json"] if json else []
    assert "finished; only its name is kept" in served.explain("done", *options)
    assert "a dead letter: limits: x; `deferlib tasks retry` brings it back" in served.explain("dead", *options)


def test_task_that_is_not_there_is_named(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.runtime.store.served() is False  # made
    assert cli.main(["tasks", "explain", "nobody", "--store", desk.dsn]) == 1
    assert "there is no task 'nobody'" in capsys.readouterr().err


def test_answer_is_the_schedulers_own(served: Desk) -> None:
    """What it says of a queue is what keeps the engine from planning it."""
    deferlib.defer(call, _queue="slow", _name="x")
    with served.runtime.store.read() as tx:
        rows: list[QueueRow] = tx.queues()
        [row] = tx.find("slow", ["x"])
    assert isinstance(row, TaskRow)
    scheduler = Explainer(Rules(node="", base="http://app", target={}.get), Random(0))
    now = served.now
    for paused in (False, True):
        scheduler.configure([each._replace(paused=paused) for each in rows])
        planned = "slow" in {spec.queue for spec in scheduler.plan(now, lambda base: 8)}
        assert planned is not paused
        assert bool(scheduler.explain(now, row)) is paused
