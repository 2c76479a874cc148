"""What a claim's request says: App Engine's headers, the adder's own, and the signed lines of the two over HTTP."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from deferlib import token
from deferlib.core.model import SECOND, Claim, Delivery
from deferlib.engine.dispatch import joined_headers, signer, user_headers, vouch
from deferlib.keys import Keyring
from deferlib.testing import VirtualClock

CLOCK = VirtualClock(datetime(2025, 11, 21, tzinfo=UTC))
NOW = CLOCK.now()
RING = Keyring([bytes(32)])


def claim(**fields: Any) -> Claim:
    values: dict[str, Any] = {
        "id": 7, "claims": NOW, "queue": "mail", "name": None, "eta": NOW, "until": NOW + SECOND, "attempts": 1,
        "executions": 0, "failures": 0, "lost": 0, "first_try": NOW, "status": 0, "reason": "", "method": "POST",
        "url": "/work", "target": "", "headers": "", "namespace": "", "tag": "", "retry": "", "deadline": 0, "fail_fast": 0,
        "created": NOW, "history": "", "body": b"",
    }  # fmt: skip
    return Claim(**{**values, **fields})


def vouched(given: Claim) -> dict[str, str]:
    return dict(vouch(Delivery(given, "http://app", SECOND), NOW, CLOCK).headers)


def lines(given: Claim) -> list[str]:
    """Return the lines of the request over HTTP, without the signature."""
    request = signer(RING, CLOCK)(Delivery(given, "http://app", SECOND), NOW)
    return [line for line in request.headers if not line.startswith(token.HEADER)]


def kept(*headers: tuple[str, str]) -> str:
    return json.dumps(headers)


def test_first_attempt_has_these_headers_and_no_others() -> None:
    assert vouched(claim(namespace="tenant")) == {
        "X-AppEngine-QueueName": "mail",
        "X-AppEngine-TaskName": "7",
        "X-AppEngine-TaskRetryCount": "0",
        "X-AppEngine-TaskExecutionCount": "0",
        "X-AppEngine-TaskETA": str(NOW / SECOND),
        "X-AppEngine-Current-Namespace": "tenant",
    }


@pytest.mark.parametrize(
    ("eta", "text"),
    [
        (1_000_000_000_100_000, "1000000000.1"),
        (1_763_737_200_000_000, "1763737200.0"),
        (1_763_737_200_123_456, "1763737200.123456"),
        (0, "0.0"),
    ],
)
def test_eta_is_written_as_app_engine_writes_it(eta: int, text: str) -> None:
    assert vouched(claim(eta=eta))["X-AppEngine-TaskETA"] == text


def test_retry_tells_the_last_answer_and_why_it_is_one() -> None:
    headers = vouched(claim(name="x", attempts=3, executions=1, status=503, reason="HTTP 503"))

    assert {name.removeprefix("X-AppEngine-Task"): value for name, value in headers.items() if "Task" in name} == {
        "Name": "x",
        "RetryCount": "2",
        "ExecutionCount": "1",
        "ETA": str(NOW / SECOND),
        "PreviousResponse": "503",
        "RetryReason": "HTTP 503",
    }


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("ValueError: a\r\nX-Evil: 1", "ValueError: a??X-Evil: 1"),
        ("caf\xe9 \u2713 \x00\x7f\t~", "caf? ? ???~"),
        ("x" * 500, "x" * 200),
    ],
)
def test_reason_is_one_short_line_of_plain_characters(reason: str, text: str) -> None:
    assert vouched(claim(attempts=2, reason=reason))["X-AppEngine-TaskRetryReason"] == text


def test_released_task_whose_first_attempt_is_still_to_come_has_no_reason_for_a_retry() -> None:
    assert "X-AppEngine-TaskRetryReason" not in vouched(claim(attempts=1, reason="the engine is stopping"))


def test_task_that_asks_to_fail_fast_says_so() -> None:
    assert vouched(claim(fail_fast=1))["X-AppEngine-FailFast"] == "true"


@pytest.mark.parametrize("name", ["X-AppEngine-Default-Namespace", "x_appengine_default-namespace"])
def test_default_namespace_is_vouched_for_and_is_no_header_of_the_users(name: str) -> None:
    given = claim(headers=kept(("X-One", "1"), (name, "example.com")))

    assert vouched(given)["X-AppEngine-Default-Namespace"] == "example.com"
    assert user_headers(given.headers) == joined_headers(given.headers) == (("X-One", "1"),)
    assert [line for line in lines(given) if "default" in line.lower()] == ["X-AppEngine-Default-Namespace: example.com"]


def test_repeated_headers_keep_their_order() -> None:
    text = kept(("X-A", "2"), ("X-B", ""), ("x-a", "1"), ("X_A", "3"), ("X-B", "4"))

    assert [
        line for line in lines(claim(headers=text)) if line[:3].upper() in ("X-A", "X_A", "X-B") and line[3] in ":;"
    ] == [
        *("X-A: 2", "X-B;", "x-a: 1", "X_A: 3", "X-B: 4"),
    ]
    assert joined_headers(text) == (("X-A", "2, 1, 3"), ("X-B", ", 4"))


def test_headers_of_the_connection_are_left_out() -> None:
    text = kept(("Host", "elsewhere"), ("Content_Length", "1"), ("X-One", "1"))

    assert user_headers(text) == joined_headers(text) == (("X-One", "1"),)
    assert user_headers("") == joined_headers("") == ()
