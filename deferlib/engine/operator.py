"""The engine's operator port: is it alive, does it take tasks, and its metrics, over HTTP, for whoever runs it.

It is served by threads of its own, and waits for nothing of the engine's: a stuck turn shows there, and stops no answer.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from deferlib import config
from deferlib.engine.metrics import Exposition, Metrics, QueueNumbers, target_names
from deferlib.engine.observer import Observer
from deferlib.errors import ConfigError

if TYPE_CHECKING:
    from werkzeug.serving import BaseWSGIServer

    from deferlib.engine.engine import Engine

log = logging.getLogger("deferlib.engine")

STUCK = 30.0  # seconds without a turn: an idle engine makes one each second
_LOOPBACK = "127.0.0.1"
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?\Z", re.IGNORECASE)
_REQUESTS = 32  # at once
_PATIENCE = 10.0  # seconds for a connection, from its first moment to its last
_MAKING_ROOM = 1.0  # seconds, at most, for a connection that was ended to be gone
_POLL = 0.1  # seconds: how soon `close` is noticed
_PLAIN = "text/plain; charset=utf-8"


class State(NamedTuple):
    """What is said of the engine: yes or no, and why."""

    well: bool
    text: str


class Health:
    """Tells, from any thread, how an engine is; there is none yet while it starts."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.engine: Engine | None = None

    def alive(self) -> State:
        """Return whether turns go on. If not, a restart may help: nothing else does."""
        metrics = self._metrics
        if metrics.last_turn is None:
            return State(True, "starting")
        if metrics.thread is not None and not metrics.thread.is_alive():
            return State(False, "the engine's thread has ended")
        seconds = metrics.monotonic() - metrics.last_turn
        if seconds >= STUCK:
            return State(False, f"no turn has ended for {seconds:.0f} s")
        return State(True, "ok")

    def ready(self) -> State:
        """Return whether the engine takes tasks: it serves the store, and isn't about to leave."""
        if self.engine is not None and self.engine.stopping:
            return State(False, "draining")
        alive = self.alive()
        if not alive.well or self._metrics.last_turn is None:
            return State(False, alive.text)
        if self._metrics.failed:
            return State(False, "the store failed" if self._metrics.failed == "store" else "the last turn failed")
        return State(True, "ready")


class OperatorPort:
    """Answers GET and HEAD of `/healthz`, `/readyz` and `/metrics` on a port, until it is closed.

    Observe and monitor the engine with *metrics*, and tell of it with `tell`; until then it is starting.
    """

    def __init__(self, runtime: config.Runtime, observer: Observer) -> None:
        """Open the port that the runtime's setting says; `ConfigError` if that can't be."""
        host, port = address(runtime.settings["port"])
        self.metrics = Metrics(observer)
        self._health = Health(self.metrics)
        self._numbers = QueueNumbers(runtime)
        self._exposition = Exposition(self.metrics, self._numbers, target_names(runtime))
        listener = _listen(host, port, runtime.settings.all["port"].source)
        self._local = _LOCAL_HOST.match(f"[{host}]" if ":" in host else host) is not None
        with listener:
            self.address = listener.getsockname()[:2]
            self._server = _server(listener, self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL,), name="deferlib-port", daemon=True)
        self._thread.start()

    def tell(self, engine: Engine) -> None:
        """Tell of *engine* from now on."""
        self._health.engine = self._exposition.engine = engine

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._numbers.close()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, kind, body = self._answer(environ)
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        headers.append(("X-Content-Type-Options", "nosniff"))
        if status.startswith("405"):
            headers.append(("Allow", "GET, HEAD"))
        start_response(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: dict[str, Any]) -> tuple[str, str, bytes]:
        path = environ.get("PATH_INFO", "")
        # A page in a browser of this machine can let its own host's name lead here, but not change what Host is sent.
        if self._local and not _LOCAL_HOST.match(environ.get("HTTP_HOST") or "localhost"):
            return "403 Forbidden", _PLAIN, b"this port answers to localhost only\n"
        if path not in ("/healthz", "/readyz", "/metrics"):
            return "404 Not Found", _PLAIN, b"there are /healthz, /readyz and /metrics\n"
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "405 Method Not Allowed", _PLAIN, b"GET and HEAD are allowed\n"
        if path == "/metrics":
            return "200 OK", self._exposition.content_type, self._exposition.text()
        state = self._health.alive() if path == "/healthz" else self._health.ready()
        return "200 OK" if state.well else "503 Service Unavailable", _PLAIN, f"{state.text}\n".encode()


def address(setting: int | str) -> tuple[str, int]:
    """Return the host and the port that the setting `port` means."""
    if isinstance(setting, int):
        return _LOOPBACK, setting
    host, _, port = setting.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listen(host: str, port: int, source: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_REQUESTS)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"setting 'port' from {source}: can't listen on {host}:{port}: {error.strerror or error}; choose another, "
            "or end what listens there"
        ) from None
    return listener


class _Places:
    """The connections that are open: so many, each for so long, and who comes last finds room.

    Slow ones can't keep the port from answering: where all places are taken, the oldest one ends, unless its answer is
    just being made. Safe to call from any thread.
    """

    def __init__(self) -> None:
        self._left = threading.Condition()
        self._since: dict[socket.socket, float] = {}  # the oldest first
        self._answering: set[socket.socket] = set()

    def take(self, connection: socket.socket) -> bool:
        """Give *connection* a place; False if there is none to be had."""
        with self._left:
            if len(self._since) >= _REQUESTS:
                oldest = next((each for each in self._since if each not in self._answering), None)
                if oldest is None:
                    return False
                _end(oldest)
                if not self._left.wait_for(lambda: len(self._since) < _REQUESTS, _MAKING_ROOM):
                    return False
            self._since[connection] = monotonic()
            return True

    def leave(self, connection: socket.socket) -> None:
        """Give its place back, if it has one."""
        with self._left:
            self._answering.discard(connection)
            if self._since.pop(connection, None) is not None:
                self._left.notify_all()

    def answer(self, app: OperatorPort, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Have *app* answer; until it has, the connection isn't the one to end for another."""
        connection = environ["werkzeug.socket"]
        with self._left:
            self._answering.add(connection)
        try:
            return app(environ, start_response)
        finally:
            with self._left:
                self._answering.discard(connection)

    def end_late(self, patience: float) -> None:
        """End those that are older than *patience*; their threads see their end, and give the places back."""
        with self._left:
            for connection, since in self._since.items():
                if monotonic() - since < patience:
                    break
                _end(connection)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # its client was quicker
        connection.shutdown(socket.SHUT_RDWR)


def _server(listener: socket.socket, app: OperatorPort) -> BaseWSGIServer:
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler  # 50 ms: only where it is needed

    places = _Places()

    class Requests(WSGIRequestHandler):
        timeout = _PATIENCE  # of a single read or write, also when nobody counts the whole any more
        protocol_version = "HTTP/1.0"  # a connection for each request: none is kept that nobody uses

        def version_string(self) -> str:
            return "deferlib"

        def log(self, type: str, message: str, *args: Any) -> None:
            log.debug("operator port: " + message.rstrip(), *args)

    class Server(ThreadedWSGIServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            if places.take(request):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def shutdown_request(self, request: Any) -> None:
            places.leave(request)
            super().shutdown_request(request)

        def service_actions(self) -> None:  # several times a second
            places.end_late(_PATIENCE)

        def server_close(self) -> None:
            super().server_close()
            places.end_late(0)

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug("operator port: a request failed", exc_info=True)

        def log(self, type: str, message: str, *args: Any) -> None:
            log.debug("operator port: " + message.rstrip(), *args)

    host, port = listener.getsockname()[:2]
    return Server(host, port, partial(places.answer, app), handler=Requests, fd=listener.fileno())
