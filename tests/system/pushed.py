"""A target for the system tests, as a process of its own: it answers as it is told, and says when what came and left.

`python pushed.py PORT LOG`. Paths: `/ok`, `/hang`, `/sleep/MS`, `/status/CODE`, `/status/CODE/RETRY_AFTER`, and `/mode`: it
answers like the path that was last put into the file LOG.mode. The log has a line for each request: "start" or "end",
monotonic nanoseconds, the queue, the task and the path.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

REASONS = {200: "OK", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}


class Answering(asyncio.Protocol):
    """One connection."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._data = b""
        self._task: asyncio.Task[None] | None = None
        self._ending = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._end()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(body) < length:
            return
        self._data = body[length:]
        path = first.split()[1]
        self._ending = f"{headers.get('x-appengine-queuename')} {headers.get('x-appengine-taskname')} {path}"
        self._write("start")
        if path == "/mode":
            path = self._log.with_suffix(".mode").read_text()
        self._task = asyncio.get_running_loop().create_task(self._answer(path.split("/")[1:]))

    async def _answer(self, parts: list[str]) -> None:
        status, extra = 200, ""
        match parts:
            case ["hang"]:
                await asyncio.sleep(3_600)
            case ["sleep", milliseconds]:
                await asyncio.sleep(int(milliseconds) / 1000)
            case ["status", code]:
                status = int(code)
            case ["status", code, seconds]:
                status, extra = int(code), f"Retry-After: {seconds}\r\n"
        self._end()
        self._transport.write(f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Length: 0\r\n{extra}\r\n".encode())

    def _end(self) -> None:
        if self._ending:
            self._write("end")
            self._ending = ""

    def _write(self, what: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{what} {time.monotonic_ns()} {self._ending}\n")


async def main(port: int, log: Path) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Answering(log), "127.0.0.1", port, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
