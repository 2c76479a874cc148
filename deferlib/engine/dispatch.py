"""From a claim to what its target is told: the vouched headers, and the signed HTTP request around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TypeVar, overload
from urllib.parse import urlsplit

from deferlib import outbound, token
from deferlib.clock import Clock
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import SECOND, Claim, Delivery, Micros
from deferlib.engine.transport import Request
from deferlib.errors import InvalidUrlError
from deferlib.keys import Keyring
from deferlib.payload import is_envelope

T = TypeVar("T")

_OCTETS = "Content-Type: application/octet-stream"
_HOP_HEADERS = frozenset(
    {
        "host", "content-length", "connection", "keep-alive", "proxy-connection", "proxy-authorization",
        "transfer-encoding", "trailer", "expect", "upgrade", "te",
    }
)  # fmt: skip
_DEFAULT_NAMESPACE = "X-AppEngine-Default-Namespace"
_NOT_THE_USERS = _HOP_HEADERS | {_DEFAULT_NAMESPACE.lower()}
_REASON_LENGTH = 200
_UNPRINTABLE = re.compile(r"[^ -~]")


def vouch(delivery: Delivery, now: Micros, clock: Clock) -> Dispatch:
    """Return what is true of *delivery*, begun at *now*, for an app in this process."""
    return Dispatch(_context(delivery, now, clock), _Vouched(delivery.claim))


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


class _Vouched(Mapping[str, str]):
    """App Engine's headers of an attempt, made when somebody asks: in process, where calls ask for none (2 µs)."""

    __slots__ = ("_claim", "_made")

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._made: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._made is None:
            self._made = _headers(self._claim)
        return self._made

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: T) -> str | T: ...
    def get(self, name: str, default: object = None) -> object:
        if name == _DEFAULT_NAMESPACE:  # the one that every call asks for
            value = _default_namespace(self._claim.headers)
            return default if value is None else value
        return self._all().get(name, default)


def _headers(claim: Claim) -> dict[str, str]:
    """Return App Engine's headers of an attempt."""
    headers = {
        "X-AppEngine-QueueName": claim.queue,
        "X-AppEngine-TaskName": claim.name or str(claim.id),
        "X-AppEngine-TaskRetryCount": str(claim.attempts - 1),
        "X-AppEngine-TaskExecutionCount": str(claim.executions),
        "X-AppEngine-TaskETA": str(claim.eta / SECOND),
        "X-AppEngine-Current-Namespace": claim.namespace,
    }
    if claim.status:
        headers["X-AppEngine-TaskPreviousResponse"] = str(claim.status)
    if claim.reason and claim.attempts > 1:
        headers["X-AppEngine-TaskRetryReason"] = _UNPRINTABLE.sub("?", claim.reason[:_REASON_LENGTH])
    if claim.fail_fast:
        headers["X-AppEngine-FailFast"] = "true"
    namespace = _default_namespace(claim.headers)
    if namespace is not None:
        headers[_DEFAULT_NAMESPACE] = namespace
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


@lru_cache(256)
def _default_namespace(text: str) -> str | None:
    """Return the default namespace of the request that added the task, kept among the headers in *text*."""
    found = [value for name, value in _given(text) if _folded(name) == _DEFAULT_NAMESPACE.lower()]
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


def signer(ring: Keyring, clock: Clock) -> Callable[[Delivery, Micros], Request]:
    """Return the function that builds the HTTP request of a delivery at the moment it is sent, signed for an app.

    One to an absolute URL isn't signed: whoever gets it could replay the token to the app. `InvalidUrlError` for a URL
    that is neither a path nor absolute.
    """

    def build(delivery: Delivery, now: Micros) -> Request:
        claim = delivery.claim
        dispatch = Dispatch(_context(delivery, now, clock), _headers(claim))
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
