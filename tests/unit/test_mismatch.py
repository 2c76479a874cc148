"""Requests that something on the way has changed, and rows of which no request can be made: nobody else's trouble."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from deferlib.core.model import MINUTE, SECOND, Action, Claim, Kind, QueueConfig, QueueRow, Result
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.core.verdict import verdict

NOW = 1_700_000_000_000_000


def claim(id: int, **fields: Any) -> Claim:
    values: dict[str, Any] = {
        "claims": 1, "queue": "default", "name": None, "eta": NOW, "until": NOW + 30 * SECOND, "attempts": 1,
        "executions": 0, "failures": 0, "lost": 0, "first_try": NOW,
        "status": 0, "reason": "", "method": "POST", "url": "/a//b",
        "target": "", "headers": "", "namespace": "", "tag": "", "retry": "", "deadline": 0, "fail_fast": 0, "created": NOW,
        "history": "", "body": b"",
    }  # fmt: skip
    return Claim(id=id, **{**values, **fields})


def ended(of: Claim, kind: Kind, outcome: str = "") -> Result:
    status = 403 if kind is Kind.ANSWERED else 0
    return Result(
        of.id, of.claims, kind, NOW, NOW + 1, status, outcome, "the token is for the path '/a//b', this is '/a/b'"
    )


@pytest.mark.parametrize(("kind", "outcome"), [(Kind.ANSWERED, "mismatched"), (Kind.UNFIT, "")])
def test_it_is_no_trouble_of_its_target(kind: Kind, outcome: str) -> None:
    """Sixty tasks with an odd path must not stop the app's whole queue."""
    scheduler = Scheduler(Rules(node="me", base="http://app", target={}.get), Random(0))
    scheduler.configure([QueueRow(config=QueueConfig(name="default"))])
    for id in range(60):
        specs = scheduler.plan(NOW, lambda base: 8)
        assert specs[0].limit == 8
        scheduler.claimed(NOW, specs, [claim(id)], {"default": NOW}, {}, [])
        outcome_of = scheduler.finished(NOW + 1, ended(claim(id), kind, outcome))
        assert outcome_of is not None
        assert (outcome_of.action, outcome_of.charged, outcome_of.executed) == (Action.RETRY, 0, 0)
        scheduler.settled(NOW + 1, [outcome_of], [True])

    assert scheduler.news(NOW + 1) == []
    assert scheduler.conditions() == []


@pytest.mark.parametrize(("kind", "outcome"), [(Kind.ANSWERED, "mismatched"), (Kind.UNFIT, "")])
def test_it_is_tried_again_and_keeps_its_reason(kind: Kind, outcome: str) -> None:
    config = QueueConfig(name="default")
    old = claim(1, attempts=9, first_try=NOW - 60 * MINUTE)

    settled = verdict(NOW, old, ended(old, kind, outcome), config, quarantine_after=0, rng=Random(0))

    assert settled.action is Action.RETRY
    assert settled.at - NOW <= 30 * SECOND
    assert "this is '/a/b'" in settled.reason


def test_answers_of_absolute_urls_do_not_slow_their_queue() -> None:
    scheduler = Scheduler(
        Rules(node="me", base="http://app", target={}.get, origin=lambda url: "https://hooks.example"), Random(0)
    )
    scheduler.configure([QueueRow(config=QueueConfig(name="default"))])
    hooks = [claim(id, url="https://hooks.example/x") for id in range(20)]
    scheduler.claimed(NOW, scheduler.plan(NOW, lambda base: 20), hooks, {"default": NOW}, {}, [])

    for each in hooks:
        scheduler.finished(NOW, Result(each.id, 1, Kind.ANSWERED, NOW, NOW, 503, "", "", 60 * SECOND))

    assert scheduler.slowdowns(NOW) == []
