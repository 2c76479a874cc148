"""A server that answers every request of an engine with success: `python -m benchmarks.stub PORT FILE`.

`/slow?seconds=2` is answered after that time; at `/fast?at=…` it notes how long after that moment of the monotonic clock
the request came. At SIGTERM it writes to FILE what it saw. Nothing is verified: it stands for an app, not for the handler.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Deferlib-Outcome: ok\r\n\r\n"


class Seen(NamedTuple):
    """What the server saw."""

    requests: int
    most: int  # slow requests at the same time
    first: float  # on the monotonic clock; 0 without any
    delays: list[float]  # of /fast, in seconds


def read(path: Path) -> Seen:
    """Return what a server that has ended wrote."""
    return Seen(*json.loads(path.read_text()))


class _State:
    def __init__(self) -> None:
        self.requests = self.running = self.most = 0
        self.first = 0.0
        self.delays: list[float] = []


class _Connection(asyncio.Protocol):
    def __init__(self, state: _State) -> None:
        self._state = state
        self._bytes = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        while True:
            head, found, rest = self._bytes.partition(b"\r\n\r\n")
            if not found:
                return
            length = _length(head)
            if len(rest) < length:
                return
            self._bytes = rest[length:]
            self._request(head.split(b" ", 2)[1].decode())

    def _request(self, url: str) -> None:
        state, now = self._state, time.monotonic()
        state.requests += 1
        state.first = state.first or now
        path, _, query = url.partition("?")
        value = float(query.partition("=")[2] or 0)
        if path == "/slow":
            state.running += 1
            state.most = max(state.most, state.running)
            asyncio.get_running_loop().call_later(value, self._slow_end)
            return
        if path == "/fast":
            state.delays.append(now - value)
        self._transport.write(_ANSWER)

    def _slow_end(self) -> None:
        self._state.running -= 1
        if not self._transport.is_closing():
            self._transport.write(_ANSWER)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line[:15].lower() == b"content-length:":
            return int(line[15:])
    return 0


async def _serve(port: int, out: Path) -> None:
    state, stop = _State(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_server(lambda: _Connection(state), "127.0.0.1", port, backlog=4096)
    await stop.wait()
    server.close()
    out.write_text(json.dumps(Seen(state.requests, state.most, state.first, state.delays)))


def main() -> None:
    """Serve until SIGTERM."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))


if __name__ == "__main__":
    main()
