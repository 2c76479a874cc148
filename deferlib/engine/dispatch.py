"""From a claim to what its target is told: the vouched headers, and the signed HTTP request around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from deferlib import batch, outbound, token
from deferlib.clock import Clock
from deferlib.context import DEFAULT_NAMESPACE, Dispatch, LazyHeaders, TaskContext, platform_headers
from deferlib.core.model import Claim, Delivery, Micros
from deferlib.engine.transport import Request
from deferlib.errors import InvalidUrlError
from deferlib.keys import Keyring
from deferlib.payload import is_envelope

_OCTETS = "Content-Type: application/octet-stream"
_HOP_HEADERS = frozenset(
    {
        "host", "content-length", "connection", "keep-alive", "proxy-connection", "proxy-authorization",
        "transfer-encoding", "trailer", "expect", "upgrade", "te",
    }
)  # fmt: skip
_NOT_THE_USERS = _HOP_HEADERS | {DEFAULT_NAMESPACE.lower()}
_REASON_LENGTH = 200
_UNPRINTABLE = re.compile(r"[^ -~]")


def vouch(delivery: Delivery, now: Micros, clock: Clock) -> Dispatch:
    """Return what is true of *delivery*, begun at *now*, for an app in this process."""
    claim = delivery.claim
    context = _context(delivery, now, clock)
    return Dispatch(context, LazyHeaders(lambda: _headers(context, claim), _default_namespace(claim.headers)))


def _context(delivery: Delivery, now: Micros, clock: Clock) -> TaskContext:
    claim = delivery.claim
    return TaskContext(
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


def _headers(task: TaskContext, claim: Claim) -> dict[str, str]:
    """Return App Engine's headers of an attempt."""
    headers = platform_headers(task)
    if claim.status:
        headers["X-AppEngine-TaskPreviousResponse"] = str(claim.status)
    if claim.reason and claim.attempts > 1:
        headers["X-AppEngine-TaskRetryReason"] = _UNPRINTABLE.sub("?", claim.reason[:_REASON_LENGTH])
    if claim.fail_fast:
        headers["X-AppEngine-FailFast"] = "true"
    namespace = _default_namespace(claim.headers)
    if namespace is not None:
        headers[DEFAULT_NAMESPACE] = namespace
    return headers


@lru_cache(256)  # most tasks have the same: 0.1 µs instead of 2
def user_headers(text: str) -> tuple[tuple[str, str], ...]:
    """Return the headers that a task's adder set, kept as *text*, in their order; a name may come several times.

    Without those that belong to the connection, and the one that the engine vouches for.
    """
    return tuple((name, value) for name, value in _given(text) if _folded(name) not in _NOT_THE_USERS)


@lru_cache(256)
def joined_headers(text: str) -> tuple[tuple[str, str], ...]:
    """Return `user_headers` with each name once, its values joined with ", ": what a server makes of repeated lines."""
    joined: dict[str, tuple[str, str]] = {}
    for name, value in user_headers(text):
        first, values = joined.get(_folded(name), (name, None))
        joined[_folded(name)] = first, value if values is None else f"{values}, {value}"
    return tuple(joined.values())


def has_default_namespace(text: str) -> bool:
    """Tell whether the headers in *text* hold the default namespace of a request."""
    return bool(text) and _default_namespace(text) is not None


@lru_cache(256)
def _default_namespace(text: str) -> str | None:
    """Return the default namespace of the request that added the task, kept among the headers in *text*."""
    found = [value for name, value in _given(text) if _folded(name) == DEFAULT_NAMESPACE.lower()]
    return found[-1] if found else None


def _given(text: str) -> list[tuple[str, str]]:
    return json.loads(text) if text else []


def _folded(name: str) -> str:
    """Return *name* as servers compare it: they fold '_' into '-', so both spellings are the same header."""
    return name.lower().replace("_", "-")


@lru_cache(256)
def _user_lines(text: str, has_body: bool) -> tuple[str, ...]:
    lines = [_line(name, value) for name, value in user_headers(text)]
    if has_body and not any(line[:13].lower() in ("content-type:", "content-type;") for line in lines):
        lines.append(_OCTETS)
    return (*lines, "User-Agent: deferlib")


def _line(name: str, value: str) -> str:
    return f"{name}: {value}" if value else f"{name};"  # libcurl drops "Name:", and sends an empty header for "Name;"


@lru_cache(256)
def _joined_text(text: str) -> str:
    return json.dumps(joined_headers(text), separators=(",", ":"))


def batch_signer(ring: Keyring) -> Callable[[Sequence[Delivery], Micros], Request]:
    """Return the function that builds the one request of several deferred calls to the same target and URL."""

    def build(deliveries: Sequence[Delivery], now: Micros) -> Request:
        first = deliveries[0]
        url = first.claim.url
        body = batch.pack((delivery, _joined_text(delivery.claim.headers)) for delivery in deliveries)
        longest = max(delivery.deadline for delivery in deliveries)
        path = urlsplit(first.base).path
        signature = token.sign_batch(ring, now, url=url, body=body, deadline=longest, base_path=path)
        return Request("POST", first.base + url, [_OCTETS, "User-Agent: deferlib", f"{token.HEADER}: {signature}"], body)

    return build


def signer(ring: Keyring, clock: Clock) -> Callable[[Delivery, Micros], Request]:
    """Return the function that builds the HTTP request of a delivery at the moment it is sent, signed for an app.

    One to an absolute URL isn't signed: whoever gets it could replay the token to the app. `InvalidUrlError` for a URL
    that is neither a path nor absolute.
    """

    def build(delivery: Delivery, now: Micros) -> Request:
        claim = delivery.claim
        context = _context(delivery, now, clock)
        dispatch = Dispatch(context, _headers(context, claim))
        lines = [_line(name, value) for name, value in dispatch.headers.items()]
        lines += _user_lines(claim.headers, bool(claim.body))
        if not claim.url.startswith("/"):
            if is_envelope(claim.body):
                raise InvalidUrlError("a deferred call goes to an app that has its handler, not to an absolute url")
            return Request(claim.method, outbound.parse(claim.url).url, lines, claim.body)
        signature = token.sign(
            ring,
            now,
            dispatch,
            method=claim.method,
            body=claim.body,
            deadline=delivery.deadline,
            base_path=urlsplit(delivery.base).path,
        )
        lines.append(f"{token.HEADER}: {signature}")
        return Request(claim.method, delivery.base + claim.url, lines, claim.body)

    return build
