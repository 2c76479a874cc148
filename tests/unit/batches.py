"""Deliveries of deferred calls, and the one request that carries several of them, as an engine makes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from deferlib import payload
from deferlib.core.model import MINUTE, SECOND, Claim, Delivery, Micros
from deferlib.deferred import DEFAULT_URL
from deferlib.engine.dispatch import batch_signer
from deferlib.engine.transport import Request
from deferlib.keys import Keyring

KEY = "a key for the tests of batches"
RING = Keyring([KEY.encode()])
NOW: Micros = 1_763_700_000_000_000
DEADLINE: Micros = 10 * MINUTE
BASE = "http://127.0.0.1:8080"
LABEL = b"textwrap.dedent"


def call_of(claim: Claim, fn: Callable[..., Any], *args: Any, ring: Keyring = RING, **kwargs: Any) -> bytes:
    """Return the envelope of a call that is bound to the task of *claim*."""
    binding = payload.Binding(claim.id, claim.name or "", claim.queue, claim.url, claim.namespace)
    return payload.seal(payload.dump_call(fn, args, kwargs), ring.signing, binding)


def claim_of(id: int = 1, **changes: Any) -> Claim:
    """Return a claim of a task's first attempt."""
    claim = Claim(
        id=id, claims=id + 1000, queue="mail", name=None, eta=NOW - SECOND, until=NOW + MINUTE, attempts=1, executions=0,
        failures=0, lost=0, first_try=NOW, status=0, reason="", method="POST", url=DEFAULT_URL, target="", headers="",
        namespace="", tag="", retry="", deadline=0, fail_fast=0, created=NOW, history="", body=b"",
    )  # fmt: skip
    return claim._replace(**changes)


def delivery(
    id: int, fn: Callable[..., Any], *args: Any, base: str = BASE, deadline: Micros = DEADLINE, **changes: Any
) -> Delivery:
    """Return the delivery of a call's first attempt."""
    claim = claim_of(id, **changes)
    return Delivery(claim._replace(body=call_of(claim, fn, *args)), base, deadline)


def headers_text(*headers: tuple[str, str]) -> str:
    """Return a task's own headers as a claim has them."""
    return json.dumps(headers)


def request_of(deliveries: Sequence[Delivery], *, ring: Keyring = RING, now: Micros = NOW) -> Request:
    """Return the request that an engine makes of *deliveries*."""
    return batch_signer(ring)(deliveries, now)


def token_of(request: Request) -> str:
    """Return the token of a request."""
    name, _, value = request.headers[-1].partition(": ")
    assert name == "X-Deferlib-Signature"
    return value
