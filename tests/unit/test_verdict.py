"""What the end of a delivery means for its task: DESIGN section 7, case by case."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from deferlib.core.model import (
    DAY,
    MINUTE,
    SECOND,
    Action,
    Claim,
    Kind,
    Outcome,
    QueueConfig,
    Result,
    RetryPolicy,
)
from deferlib.core.verdict import NO_SLOT, failed_fast, verdict

NOW = 1_000 * SECOND
LEASE = 30 * SECOND


def claim(id: int = 1, **fields: Any) -> Claim:
    values: dict[str, Any] = {
        "claims": NOW, "queue": "default", "name": None, "eta": NOW, "until": NOW + LEASE, "attempts": 1, "executions": 0,
        "failures": 0, "lost": 0, "first_try": NOW, "status": 0, "reason": "", "method": "POST", "url": "/", "target": "",
        "headers": "", "namespace": "", "tag": "", "retry": "", "deadline": 0, "fail_fast": 0, "created": NOW,
        "history": "", "body": b"",
    }  # fmt: skip
    return Claim(id=id, **{**values, **fields})


def result(claim: Claim, kind: Kind = Kind.ANSWERED, status: int = 200, outcome: str = "", error: str = "") -> Result:
    return Result(claim.id, claim.claims, kind, NOW, NOW + 5, status, outcome, error)


def judged(given: Claim, ended: Result, *, config: QueueConfig | None = None, now: int = NOW) -> Outcome:
    config = config or QueueConfig(name="default")
    return verdict(now, given, ended, config, quarantine_after=10 * MINUTE, rng=Random(0))


def test_success_ends_the_task_and_a_named_one_leaves_its_tombstone() -> None:
    config = QueueConfig(name="default", tombstone=DAY)

    assert judged(claim(), result(claim(), status=299))[:8] == (1, NOW, "default", Action.DONE, 0, False, 0, 1)
    named = judged(claim(name="x"), result(claim(name="x"), outcome="ok"), config=config)
    assert (named.action, named.named, named.at) == (Action.DONE, True, NOW + DAY)


def test_missing_handler_is_named_with_its_remedy_and_a_views_own_404_is_not() -> None:
    call = claim(url="/_ah/queue/deferred")

    assert "wrap_wsgi_app" in judged(call, result(call, status=404)).reason
    assert judged(claim(), result(claim(), status=404)).reason == "HTTP 404"
    assert judged(call, result(call, status=503)).reason == "HTTP 503"


def test_call_cut_off_by_a_replaced_target_runs_again_at_once_and_uncharged() -> None:
    tried = claim(attempts=9)

    outcome = judged(tried, result(tried, Kind.INTERRUPTED, 0))

    assert (outcome.action, outcome.at, outcome.charged, outcome.executed) == (Action.RETRY, NOW + SECOND // 100, 0, 0)


def test_attempt_without_a_slot_is_kept_with_the_others_and_charged_to_nothing() -> None:
    tried = claim(attempts=3, failures=5, history='[{"attempt":2}]')
    policy = RetryPolicy(min_backoff=SECOND, retry_limit=5)

    outcome = failed_fast(NOW, tried, QueueConfig(name="default", retry=policy), Random(0))

    assert (outcome.action, outcome.at, outcome.charged, outcome.executed) == (Action.RETRY, NOW + 4 * SECOND, 0, 0)
    assert outcome.reason == NO_SLOT
    assert json.loads(outcome.history) == [
        {"attempt": 2},
        {"attempt": 3, "at": NOW, "micros": 0, "status": 0, "error": NO_SLOT},
    ]


@pytest.mark.parametrize(
    ("kind", "status", "outcome", "charged", "executed"),
    [
        (Kind.ANSWERED, 500, "retry", 1, 1),
        (Kind.ANSWERED, 503, "", 1, 1),
        (Kind.ANSWERED, 408, "retry", 1, 1),
        (Kind.ANSWERED, 302, "", 1, 1),
        (Kind.ANSWERED, 500, "ok", 1, 1),  # something behind the handler failed
        (Kind.ANSWERED, 200, "retry", 1, 1),  # a view dropped the handler's status
        (Kind.TIMEOUT, 0, "", 1, 1),
        (Kind.MALFORMED, 0, "", 1, 1),
        (Kind.UNREACHABLE, 0, "", 0, 0),
        (Kind.UNKNOWN, 0, "", 0, 0),
        (Kind.ANSWERED, 403, "untrusted", 0, 0),
        (Kind.ANSWERED, 500, "undecodable", 0, 0),
        (Kind.ANSWERED, 500, "key-unknown", 0, 0),
        (Kind.ANSWERED, 500, "newer", 0, 0),
        (Kind.ANSWERED, 200, "undecodable", 0, 0),
    ],
)
def test_failure_is_tried_again_and_only_what_the_target_reported_counts(
    kind: Kind, status: int, outcome: str, charged: int, executed: int
) -> None:
    settled = judged(claim(), result(claim(), kind, status, outcome))

    assert (settled.action, settled.at) == (Action.RETRY, NOW + SECOND // 10)
    assert (settled.charged, settled.executed, settled.status) == (charged, executed, status)
    assert settled.reason


def test_wait_grows_with_the_attempts_but_not_with_those_that_got_lost() -> None:
    given = claim(attempts=5, lost=2)

    assert judged(given, result(given, Kind.UNREACHABLE)).at == NOW + 4 * SECOND // 10


@pytest.mark.parametrize(("failures", "action"), [(1, Action.RETRY), (2, Action.DEAD)])
def test_retry_limit_counts_charged_failures(failures: int, action: Action) -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(retry_limit=2))
    given = claim(attempts=50, failures=failures)

    assert judged(given, result(given, status=500), config=config).action is action


@pytest.mark.parametrize("kind", [Kind.UNREACHABLE, Kind.UNKNOWN])
def test_unreachable_target_exhausts_no_limit(kind: Kind) -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(retry_limit=0, age_limit=1))

    assert judged(claim(attempts=9), result(claim(), kind), config=config, now=NOW + DAY).action is Action.RETRY


def test_age_counts_from_the_first_attempt() -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(age_limit=60))
    given = claim(created=0, first_try=NOW - 60)

    assert judged(given, result(given, status=500), config=config).action is Action.RETRY
    assert judged(given, result(given, status=500), config=config, now=NOW + 1).action is Action.DEAD


def test_dead_task_says_why_and_keeps_its_story() -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(retry_limit=0))

    outcome = judged(claim(name="x"), result(claim(), status=500, error="ValueError: 5"), config=config)

    assert (outcome.action, outcome.reason) == (Action.DEAD, "limits: 1 failures: ValueError: 5")
    assert (outcome.charged, outcome.executed, outcome.named, outcome.at) == (1, 1, True, NOW + 9 * DAY)
    assert json.loads(outcome.history) == [
        {"attempt": 1, "at": NOW, "micros": 5, "status": 500, "error": "ValueError: 5"}
    ]  # fmt: skip


def test_permanent_failure_is_dead_at_once_and_not_charged() -> None:
    outcome = judged(claim(), result(claim(), status=200, outcome="permanent", error="no"))

    assert (outcome.action, outcome.reason) == (Action.DEAD, "permanent: no")
    assert (outcome.charged, outcome.executed) == (0, 1)


UNRUNNABLE = ["undecodable", "key-unknown", "newer"]


def fail_at(given: Claim, at: int, said: str, *, config: QueueConfig | None = None) -> Outcome:
    """End an attempt that began at *at* with the outcome *said*."""
    ended = Result(given.id, given.claims, Kind.ANSWERED, at, at + 5, 500, said, "why")
    return judged(given, ended, config=config, now=at + 5)


@pytest.mark.parametrize("said", UNRUNNABLE)
def test_call_that_cannot_start_is_quarantined_after_a_while(said: str) -> None:
    first = fail_at(claim(), NOW, said)
    again = claim(attempts=2, history=first.history)

    assert fail_at(again, NOW + 10 * MINUTE - 6, said).action is Action.RETRY
    outcome = fail_at(again, NOW + 10 * MINUTE - 5, said)
    assert (outcome.action, outcome.reason) == (Action.DEAD, f"quarantine: {said}: why")
    assert (outcome.charged, outcome.executed) == (0, 0)


def test_while_before_quarantine_begins_with_the_first_attempt_that_could_not_start() -> None:
    """A task that has failed for an hour, when a deploy breaks it for a minute."""
    old = claim(first_try=NOW - 60 * MINUTE, attempts=8, history=fail_at(claim(), NOW - MINUTE, "retry").history)

    broken = fail_at(old, NOW, "undecodable")
    mended = fail_at(old._replace(history=broken.history), NOW + MINUTE, "retry")
    broken_again = fail_at(old._replace(history=mended.history), NOW + 11 * MINUTE, "undecodable")

    assert [outcome.action for outcome in (broken, mended, broken_again)] == [Action.RETRY] * 3


def test_kind_of_trouble_may_change_within_the_while() -> None:
    first = fail_at(claim(), NOW, "key-unknown")

    assert fail_at(claim(history=first.history), NOW + 10 * MINUTE, "undecodable").action is Action.DEAD


def test_replayed_call_gets_its_while_anew() -> None:
    former = fail_at(claim(), NOW, "undecodable")
    replayed = claim(first_try=NOW + 60 * MINUTE, history=former.history)

    assert fail_at(replayed, NOW + 60 * MINUTE, "undecodable").action is Action.RETRY


@pytest.mark.parametrize("said", [*UNRUNNABLE, "untrusted"])
def test_call_that_cannot_start_is_tried_at_least_twice_a_minute(said: str) -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(min_backoff=60 * MINUTE))
    quick = QueueConfig(name="default", retry=RetryPolicy(min_backoff=SECOND))

    assert fail_at(claim(), NOW, said, config=config).at == NOW + 5 + 30 * SECOND
    assert fail_at(claim(), NOW, said, config=quick).at == NOW + 5 + SECOND


def test_call_that_cannot_start_outlives_every_limit() -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(retry_limit=0, age_limit=SECOND, first_limit_wins=True))
    old = claim(first_try=NOW - 60 * MINUTE, failures=7)

    assert fail_at(old, NOW, "undecodable", config=config).action is Action.RETRY


def test_unverified_call_is_quarantined_at_once() -> None:
    outcome = judged(claim(), result(claim(), status=500, outcome="unverified"))

    assert (outcome.action, outcome.reason, outcome.executed) == (Action.DEAD, "quarantine: unverified", 0)


def test_withdrawn_delivery_is_released() -> None:
    outcome = judged(claim(), result(claim(), Kind.UNSENT, error="the engine is stopping"))

    assert outcome == Outcome(1, NOW, "default", Action.RELEASE, NOW, reason="the engine is stopping")


def test_story_keeps_the_last_three_attempts() -> None:
    history = json.dumps([{"attempt": number} for number in (1, 2, 3)])
    given = claim(attempts=4, history=history)

    outcome = judged(given, result(given, status=500))

    assert [attempt["attempt"] for attempt in json.loads(outcome.history)] == [2, 3, 4]
