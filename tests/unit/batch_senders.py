"""Requests with several calls, sent to a WSGI or an ASGI app as an engine sends them, and what the app says."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import pytest

import deferlib
from deferlib import attempt, batch, config, deferred
from deferlib.batch import Told
from deferlib.contrib.asgi import wrap_asgi_app
from deferlib.core.model import MINUTE, Delivery, Micros
from deferlib.deferred import DEFAULT_URL
from tests.unit.batches import KEY, NOW, request_of, token_of

EARLY: Micros = MINUTE  # the app's clock is behind the engine's


class Clock:
    """A clock that stands until a call moves it."""

    def __init__(self) -> None:
        self.time = NOW - EARLY

    def now(self) -> Micros:
        return self.time


CLOCK = Clock()


@contextmanager
def app_runtime(**settings: Any) -> Iterator[None]:
    """Be an app whose clock stands, with the engine's key."""
    attempt._refused.clear()
    CLOCK.time = NOW - EARLY
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY, clock=CLOCK, **settings)
    try:
        yield
    finally:
        config.install(former)


class Response(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: str

    @property
    def outcome(self) -> str | None:
        return self.headers.get("x-deferlib-outcome")

    def told(self, count: int) -> list[Told | None]:
        """Return what the engine reads in it."""
        assert (self.status, self.outcome) == (200, "batch"), self
        return batch.told(self.body.encode(), count)

    def outcomes(self, count: int) -> list[str | None]:
        return [each and each.outcome for each in self.told(count)]


def wsgi(body: bytes, signature: str, app: Any = deferred.application, **changes: Any) -> Response:
    """Send a request to a WSGI app."""
    environ = {
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": DEFAULT_URL, "QUERY_STRING": "", "HTTP_HOST": "app",
        "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/octet-stream", "REMOTE_ADDR": "192.0.2.1",
        "wsgi.input": io.BytesIO(body), "HTTP_X_DEFERLIB_SIGNATURE": signature,
    }  # fmt: skip
    started: list[Any] = []
    text = b"".join(app({**environ, **changes}, lambda status, headers: started.append((status, headers)))).decode()
    ((status, headers),) = started
    return Response(int(status[:3]), {name.lower(): value for name, value in headers}, text)


async def nothing_here(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


ASGI_APP = wrap_asgi_app(nothing_here)


async def post(body: bytes, signature: str, app: Any = ASGI_APP, *, path: str = DEFAULT_URL, root: str = "") -> Response:
    """Send a request to an ASGI app, in three pieces."""
    third = len(body) // 3 + 1
    parts = [body[start : start + third] for start in range(0, 3 * third, third)]
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"%d" % len(body)), (b"host", b"app"), (b"x-deferlib-signature", signature.encode())]
    scope = {
        "type": "http", "method": "POST", "path": root + path, "root_path": root, "query_string": b"", "headers": headers,
        "client": ("192.0.2.1", 5),
    }  # fmt: skip
    await app(scope, receive, send)
    start, end = sent
    told = {name.decode(): value.decode() for name, value in start["headers"]}
    return Response(start["status"], told, end["body"].decode())


def asgi(body: bytes, signature: str, app: Any = ASGI_APP, **options: Any) -> Response:
    return asyncio.run(post(body, signature, app, **options))


Post: TypeAlias = Callable[..., Response]
BOTH = pytest.mark.parametrize("send", [wsgi, asgi])


def run(send: Post, deliveries: Sequence[Delivery], **options: Any) -> Response:
    """Send a batch as an engine does."""
    request = request_of(deliveries)
    return send(request.body, token_of(request), **options)
