"""From a claim to what its target is told: the vouched headers, and the signed HTTP request around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import urlsplit

from deferlib import token
from deferlib.clock import Clock
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import SECOND, Claim, Delivery, Micros
from deferlib.engine.transport import Request
from deferlib.keys import Keyring

_OCTETS = "Content-Type: application/octet-stream"
_HOP_HEADERS = frozenset(
    {
        "host", "content-length", "connection", "keep-alive", "proxy-connection", "proxy-authorization",
        "transfer-encoding", "trailer", "expect", "upgrade", "te",
    }
)  # fmt: skip


def vouch(delivery: Delivery, now: Micros, clock: Clock) -> Dispatch:
    """Return what is true of *delivery*, begun at *now*."""
    claim = delivery.claim
    context = TaskContext(
        id=claim.id,
        user_name=claim.name or "",
        queue=claim.queue,
        attempt=claim.attempts,
        execution_count=claim.executions,
        eta_micros=claim.eta,
        deadline_micros=now + delivery.deadline,
        fence=claim.claims,
        namespace=claim.namespace,
        url=claim.url,
        clock=clock,
    )
    return Dispatch(context, _headers(claim))


def _headers(claim: Claim) -> dict[str, str]:
    """Return App Engine's headers of an attempt."""
    headers = {
        "X-AppEngine-QueueName": claim.queue,
        "X-AppEngine-TaskName": claim.name or str(claim.id),
        "X-AppEngine-TaskRetryCount": str(claim.attempts - 1),
        "X-AppEngine-TaskExecutionCount": str(claim.executions),
        "X-AppEngine-TaskETA": f"{claim.eta / SECOND:.6f}",
        "X-AppEngine-Current-Namespace": claim.namespace,
    }
    if claim.status:
        headers["X-AppEngine-TaskPreviousResponse"] = str(claim.status)
    return headers


def user_headers(claim: Claim) -> list[tuple[str, str]]:
    """Return the headers that the task's adder set, without those that belong to the connection."""
    if not claim.headers:
        return []
    # Servers fold '_' into '-', so both spellings are the same header.
    return [
        (name, value) for name, value in json.loads(claim.headers) if name.lower().replace("_", "-") not in _HOP_HEADERS
    ]


def signer(ring: Keyring, clock: Clock) -> Callable[[Delivery, Micros], Request]:
    """Return the function that builds the signed HTTP request of a delivery at the moment it is sent."""

    def build(delivery: Delivery, now: Micros) -> Request:
        claim = delivery.claim
        dispatch = vouch(delivery, now, clock)
        signature = token.sign(
            ring,
            now,
            dispatch,
            method=claim.method,
            body=claim.body,
            deadline=delivery.deadline,
            base_path=urlsplit(delivery.base).path,
        )
        lines = [f"{name}: {value}" if value else f"{name};" for name, value in user_headers(claim)]
        if claim.body and not any(line[:13].lower() == "content-type:" for line in lines):
            lines.append(_OCTETS)
        lines += [f"{name}: {value}" if value else f"{name};" for name, value in dispatch.headers.items()]
        lines += ["User-Agent: deferlib", f"{token.HEADER}: {signature}"]
        return Request(claim.method, delivery.base + claim.url, lines, claim.body)

    return build
