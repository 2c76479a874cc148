"""Forged deliveries, from the request to the call: whatever one bit of what is signed says otherwise, nothing runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import deferlib
from deferlib import config, context, payload, token
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE, SECOND
from deferlib.deferred import DEFAULT_URL
from deferlib.keys import Keyring
from tests.unit.test_gadgets import Response, asgi, wsgi

KEY = b"the key of the tests of forgery"
RING = Keyring([KEY])
NOW = 1_763_700_000_000_000
RAN: list[str] = []
HEADERS = {"X-AppEngine-QueueName": "mail", "X-AppEngine-TaskName": "welcome-7", "X-AppEngine-TaskRetryCount": "0"}
BOTH = pytest.mark.parametrize("post", [wsgi, asgi])
Post = Callable[..., Response]


class Clock:
    """A clock that stands."""

    def now(self) -> int:
        return NOW


def canary() -> None:
    """Run when a delivery is genuine."""
    RAN.append("canary")


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    RAN.clear()
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY.decode(), clock=Clock())
    yield
    config.install(former)


def task(**changes: Any) -> TaskContext:
    made = TaskContext(
        7397463212345678901, "welcome-7", "mail", 1, 0, NOW, NOW + MINUTE, 9, "tenant-1", DEFAULT_URL, context.SYSTEM_CLOCK
    )
    return made._replace(**changes)


def binding(of: TaskContext) -> payload.Binding:
    return payload.Binding(of.id, of.user_name, of.queue, of.url, of.namespace)


def call(of: TaskContext | None = None) -> bytes:
    return payload.seal(payload.dump_call(canary, (), {}), RING.signing, binding(of or task()))


def signed(body: bytes, of: TaskContext | None = None, *, at: int = NOW, method: str = "POST") -> str:
    """Return a true engine's token for *body*, whatever that is."""
    return token.sign(RING, at, Dispatch(of or task(), HEADERS), method=method, body=body, deadline=MINUTE)


@BOTH
def test_genuine_delivery_runs(post: Post) -> None:
    """Or the tests below would say nothing."""
    response = post(call(), signed(call()))

    assert (response.status, response.outcome) == (200, "ok")
    assert RAN == ["canary"]


@BOTH
def test_no_flipped_bit_of_a_payload_runs(post: Post) -> None:
    """Every field of the head, the signature and both pickles; the engine vouches for what the store holds."""
    genuine = call()
    bits = range(8 * len(genuine)) if post is wsgi else range(0, 8 * len(genuine), 7)
    for bit in bits:
        altered = bytearray(genuine)
        altered[bit // 8] ^= 1 << bit % 8

        response = post(bytes(altered), signed(bytes(altered)))

        assert response.status == 500, bit
        assert response.outcome in ("unverified", "key-unknown", "newer"), bit

    assert not RAN


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {"id": 7397463212345678902},
        {"user_name": "welcome-8"},
        {"user_name": ""},
        {"queue": "default"},
        {"url": DEFAULT_URL + "/x"},
        {"url": DEFAULT_URL + "?x=1"},
        {"namespace": ""},
        {"namespace": "tenant-2"},
    ],
    ids=str,
)
def test_call_of_another_task_does_not_run(post: Post, change: dict[str, Any]) -> None:
    """A row copied onto another task, which the engine then delivers and vouches for."""
    other = call(task(**change))

    response = post(other, signed(other))

    assert (response.status, response.outcome) == (500, "unverified")
    assert "another task" in response.body
    assert not RAN


@BOTH
@pytest.mark.parametrize("end", range(0, 200, 7))
def test_call_cut_short_or_longer_does_not_run(post: Post, end: int) -> None:
    for body in (call()[:end], call() + bytes(end + 1)):
        assert post(body, signed(body)).outcome == "unverified"

    assert not RAN


def claims_of(text: str) -> dict[str, Any]:
    part = text.split(".")[2]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def with_claims(text: str, claims: dict[str, Any]) -> str:
    version, key, _, signature = text.split(".")
    part = base64.urlsafe_b64encode(json.dumps(claims, separators=(",", ":")).encode()).rstrip(b"=").decode()
    return ".".join((version, key, part, signature))


@BOTH
def test_no_altered_claim_of_a_token_runs(post: Post) -> None:
    """Method, path, query, body, the task, its attempt, the times and each header's value."""
    text = signed(call())
    claims = claims_of(text)
    assert set(claims) == set("mouqrbindsaxefthl")
    altered = []
    for name, value in claims.items():
        match value:
            case dict():
                altered += [{**claims, name: {**value, header: f"{old}1"}} for header, old in value.items()]
                altered += [{**claims, name: {}}, {**claims, name: {**value, "X-AppEngine-FailFast": "true"}}]
            case int():
                altered += [{**claims, name: other} for other in (value + 1, value - 1, 0, -value) if other != value]
            case _:
                altered += [{**claims, name: other} for other in (f"{value}1", "", f" {value}") if other != value]
        altered.append({key: other for key, other in claims.items() if key != name})

    for other in altered:
        assert post(call(), with_claims(text, other)).outcome == "untrusted", other

    assert with_claims(text, claims) == text
    assert not RAN


@BOTH
def test_no_flipped_bit_of_a_token_runs(post: Post) -> None:
    text = signed(call())
    for index, char in enumerate(text):
        for bit in (0, 3, 5):
            response = post(call(), text[:index] + chr(ord(char) ^ 1 << bit) + text[index + 1 :])

            assert (response.status, response.outcome) == (403, "untrusted"), index

    assert not RAN


@BOTH
@pytest.mark.parametrize(
    ("changes", "url"),
    [
        ({"method": "GET"}, DEFAULT_URL),
        ({"method": "PUT"}, DEFAULT_URL),
        ({"at": NOW - 12 * MINUTE}, DEFAULT_URL),
        ({"at": NOW + 11 * MINUTE}, DEFAULT_URL),
        ({"at": NOW - 11 * MINUTE - SECOND}, DEFAULT_URL),
        ({}, DEFAULT_URL + "/x"),
        ({}, "/"),
        ({}, DEFAULT_URL + "?x=1"),
        ({}, DEFAULT_URL + "?" + "x" * 300),
    ],
    ids=str,
)
def test_token_of_another_request_does_not_run(post: Post, changes: dict[str, Any], url: str) -> None:
    of = task(url=url)

    response = post(call(of), signed(call(of), of, **changes))

    assert (response.status, response.outcome) == (403, "untrusted" if "at" in changes else "mismatched")
    assert not RAN


@BOTH
def test_token_of_another_body_does_not_run(post: Post) -> None:
    other = payload.seal(payload.dump_call(canary, (), {}), RING.signing, None)
    for body in (b"", call()[:-1], call() + b"\0", other):
        assert post(body, signed(call())).outcome == "mismatched"

    assert not RAN


@BOTH
def test_signature_of_one_kind_is_none_of_the_other(post: Post) -> None:
    """The keys are derived by purpose: nothing that signs payloads signs tokens, and the other way around."""
    crossed = Keyring([KEY])
    crossed.signing.payload, crossed.signing.dispatch = crossed.signing.dispatch, crossed.signing.payload
    body = payload.seal(payload.dump_call(canary, (), {}), crossed.signing, binding(task()))
    text = token.sign(crossed, NOW, Dispatch(task(), HEADERS), method="POST", body=call(), deadline=MINUTE)

    assert post(body, signed(body)).outcome == "unverified"
    assert post(call(), text).outcome == "untrusted"
    assert not RAN
