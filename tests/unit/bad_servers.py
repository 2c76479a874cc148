"""HTTP servers on loopback that behave as badly as a test asks."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Received(NamedTuple):
    """A request as a server read it."""

    line: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    connection: int  # counted from 1

    @property
    def task(self) -> str:
        """The path, by which the tests tell their tasks apart."""
        return self.line.split()[1]


class Connection:
    """One accepted connection, for a script to read from and write to."""

    def __init__(self, server: Server, sock: socket.socket, number: int) -> None:
        self.server = server
        self.number = number
        self._sock = sock
        self._buffer = b""

    def read(self) -> Received | None:
        """Read a request and note it; None at the end of the connection."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._fill():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        length = int(headers.get("content-length", 0))
        while len(self._buffer) < length:
            if not self._fill():
                return None
        received = Received(line, headers, self._buffer[:length], self.number)
        self._buffer = self._buffer[length:]
        self.server.received.append(received)
        return received

    def write(self, data: bytes) -> None:
        self._sock.sendall(data)

    def reset(self) -> None:
        """Close with a TCP reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        self._sock.close()

    def hold(self) -> None:
        """Do nothing until the client gives up or the test ends."""
        while self._fill():
            pass

    def drip(self, data: bytes) -> None:
        """Write *data* over and over, a piece each 5 ms, until the client gives up or the test ends."""
        while not self.server.stopping.wait(0.005):
            self.write(data)

    def _fill(self) -> bytes:
        data = self._sock.recv(65_536)
        self._buffer += data
        return data


Script: TypeAlias = Callable[[Connection], None]


class Server:
    """Runs a script for each connection, in a thread of its own."""

    def __init__(self, script: Script, certificate: Path | None = None) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self.stopping = threading.Event()
        self._script = script
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        scheme = "https" if certificate else "http"
        self.base = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def stop(self) -> None:
        self.stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._sockets.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock, self.connections))
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with sock, suppress(OSError):
            if self._tls is None:
                self._script(Connection(self, sock, number))
            else:
                with self._tls.wrap_socket(sock, server_side=True) as wrapped:
                    self._sockets.append(wrapped)
                    self._script(Connection(self, wrapped, number))


@contextmanager
def serving(script: Script, certificate: Path | None = None) -> Iterator[Server]:
    """Run a server of *script* for a while."""
    server = Server(script, certificate)
    try:
        yield server
    finally:
        server.stop()


def answering(data: bytes) -> Script:
    """Return a script that answers every request with *data* and keeps the connection."""

    def script(connection: Connection) -> None:
        while connection.read():
            connection.write(data)

    return script


def answering_once(data: bytes) -> Script:
    """Return a script that answers one request with *data* and closes the connection."""

    def script(connection: Connection) -> None:
        connection.read()
        connection.write(data)

    return script


def closed_port() -> int:
    """Return a port that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# Self-signed for 127.0.0.1, 2020 to 2120; its key guards nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0mDIpWJYyWmo3pC7
z+hBAcJrEarnpjOP8KIgbMUhcnmhRANCAASEkv+7FXdtEf1liqCbyn7iUs+UtEX3
U5+yoUBMvvS+nx0ZqYhln/FZq1pM4rioJhgcD5l/mGx3glPnWQ1RT1rw
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBZDCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1kZWZlcmxp
YiB0ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1kZWZlcmxpYiB0ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEhJL/
uxV3bRH9ZYqgm8p+4lLPlLRF91OfsqFATL70vp8dGamIZZ/xWataTOK4qCYYHA+Z
f5hsd4JT51kNUU9a8KNDMEEwDwYDVR0RBAgwBocEfwAAATAPBgNVHRMBAf8EBTAD
AQH/MB0GA1UdDgQWBBTD9exkS1cAe6sB/Vhk+0bzvRPrNTAKBggqhkjOPQQDAgNI
ADBFAiB+fX/l7f4TEBci0/MEJHsCDcZ+Pn2vXroqGgDuspfYzAIhANQJZDpWj4aK
++SX/9HyJRIbwYwlVjmzUhHa2it5j01F
-----END CERTIFICATE-----
"""
