"""A task's request leaves nothing of itself to the next request of its connection."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from deferlib import token
from deferlib.clock import SystemClock
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE
from deferlib.keys import parse
from tests.system import wire


def ask(connection: socket.socket, request: bytes) -> Any:
    """Return what the app's view saw of *request*."""
    connection.sendall(request)
    got = b""
    while b">>>" not in got:
        part = connection.recv(65_536)
        assert part, got
        got += part
    return wire.reports(got)[0]


@pytest.mark.parametrize("server", ["uvicorn-h11", "uvicorn-httptools", "granian-asgi"])
def test_next_request_of_a_connection_is_no_task(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn goes on reading inside of what the app calls, and what it reads next begins in that context."""
    views = wire.VIEWS.replace('"body": len(body),', '"body": len(body), "namespace": deferlib.namespaces.get_namespace(),')
    assert views != wire.VIEWS
    monkeypatch.setattr(wire, "VIEWS", views)
    clock = SystemClock()
    with wire.serving(server, tmp_path) as served:
        for size in (10, 2_000_000):
            with socket.create_connection(("127.0.0.1", served.port), 5) as connection:
                now, body = clock.now(), bytes(size)
                task = TaskContext(7, "", "default", 1, 0, now, now + MINUTE, 1, "tenant-1", "/work/big", clock)
                sign = token.sign(parse(wire.KEY), now, Dispatch(task, {}), method="POST", body=body, deadline=MINUTE)
                lines = [f"X-Deferlib-Signature: {sign}".encode()]

                first = ask(connection, wire.request(lines, method="POST", target="/work/big", body=body, last=False))
                others = [ask(connection, wire.request([], last=False)) for _ in range(3)]

                assert first["task"]
                assert first["namespace"] == "tenant-1"
                assert [(each["task"], each["namespace"]) for each in others] == [(None, "")] * 3, f"after {size} bytes"
