"""How long an answer asks to wait, and what comes of it for its task."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from deferlib.clock import SystemClock
from deferlib.core.model import DAY, HOUR, SECOND, Claim, Delivery, Kind, QueueConfig, Result, RetryPolicy
from deferlib.core.verdict import verdict
from deferlib.engine.local import LocalTransport
from deferlib.engine.retry_after import parse

NOW = 1_763_700_000 * SECOND  # Fri, 21 Nov 2025 04:40:00 GMT


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("0", 0),
        (" 120 ", 120 * SECOND),
        ("86401", DAY),
        ("9" * 5_000, DAY),
        ("Fri, 21 Nov 2025 04:40:30 GMT", 30 * SECOND),
        ("Friday, 21-Nov-25 04:40:30 GMT", 30 * SECOND),
        ("Fri Nov 21 04:40:30 2025", 30 * SECOND),
        ("Fri, 21 Nov 2025 04:39:00 GMT", 0),
        ("Sun, 21 Nov 2100 04:40:30 GMT", DAY),
        *((text, 0) for text in ("", "soon", "-5", "1.5", "\u0663", "x" * 9_999, "Fri, 99 Nov 2025 04:40:30 GMT")),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, wait: int) -> None:
    assert parse(text, NOW) == pytest.approx(wait, abs=0)


def claim(**fields: Any) -> Claim:
    values: dict[str, Any] = {
        "id": 1, "claims": 1, "queue": "default", "name": None, "eta": 0, "until": 1, "attempts": 1, "executions": 0,
        "failures": 0, "lost": 0, "first_try": 0, "status": 0, "reason": "", "method": "POST", "url": "/", "target": "",
        "headers": "", "namespace": "", "tag": "", "retry": "", "deadline": 0, "fail_fast": 0, "created": 0,
        "history": "", "body": b"",
    }  # fmt: skip
    return Claim(**{**values, **fields})


@pytest.mark.parametrize(
    ("status", "asked", "waited"),
    [
        (429, 20 * SECOND, 20 * SECOND),
        (503, 20 * SECOND, 20 * SECOND),
        (503, 2 * SECOND, 5 * SECOND),
        (503, DAY, HOUR),
        (500, 20 * SECOND, 5 * SECOND),
    ],
)
def test_task_waits_as_long_as_it_is_asked_to_within_limits(status: int, asked: int, waited: int) -> None:
    config = QueueConfig(name="default", retry=RetryPolicy(min_backoff=5 * SECOND))
    result = Result(1, 1, Kind.ANSWERED, NOW, NOW, status, retry_after=asked)

    outcome = verdict(NOW, claim(), result, config, quarantine_after=0, rng=Random(0))

    assert outcome.at - NOW == waited


def test_view_in_the_same_process_may_ask_to_wait_too() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("503 Service Unavailable", [("Retry-After", "9")])
        return []

    transport = LocalTransport(app, SystemClock(), threads=1)
    transport.send(Delivery(claim(), "", 60 * SECOND))
    results = list(transport.results())
    while not results:
        transport.wait(SystemClock().now() + SECOND)
        results += transport.results()
    transport.close()

    assert (results[0].status, results[0].retry_after) == (503, 9 * SECOND)
