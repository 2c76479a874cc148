"""One request at a time on one libcurl easy handle: how a delivery is put on the wire, and what its end means.

What an answer says decides the task's fate, so every way in which it can be missing, broken or endless has its verdict
here; `http.py` drives the handles.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import pycurl

from deferlib.batch import ANSWER_BYTES, PATIENCE, Told, told
from deferlib.core.model import Delivery, Kind, Micros, Result
from deferlib.core.verdict import MISMATCHED, UNTRUSTED
from deferlib.engine import retry_after
from deferlib.engine.target import Target
from deferlib.engine.transport import ERROR_LENGTH, Request

_Address: TypeAlias = tuple[str | int, ...]  # both ends of a connection, as libcurl tells them
Kept: TypeAlias = "dict[_Address, select.poll]"
Covers: TypeAlias = Callable[[str, int], bool]  # whether a connection to an address and a port may be opened

CONNECTIONS = 4096  # kept open for later requests
HEADER_BYTES = 32 * 1024  # of an answer, interim ones included
HEADER_LINES = 100
KEPT = 2048  # bytes of an answer's body, for its error text

_LONGEST = 2**31 - 1  # milliseconds that libcurl takes
_ABORT: int = pycurl.PREREQFUNC_ABORT
_NO_SOCKET: int = pycurl.SOCKET_BAD
_STOP = -1  # from a libcurl callback: end this transfer

# What can't be printed, or would reorder the line it is printed in.
_CONTROL = re.compile(r"[\x00-\x20\x7f-\xa0\u200e\u200f\u2028-\u202e\u2066-\u2069]+")
_TOOK = re.compile(rb"[0-9]{1,12}\Z")
_REFUSALS = (UNTRUSTED.encode(), MISMATCHED.encode())
_OUTCOME = re.compile(rb"[a-z-]{1,40}\Z")


class _Lent:
    """A new socket for libcurl, which works on a copy: closed as soon as that is made, or the connection would not end."""

    __slots__ = ("_socket",)

    def __init__(self, socket: socket.socket) -> None:
        self._socket = socket

    def fileno(self) -> int:
        return self._socket.fileno()

    def __del__(self) -> None:
        self._socket.close()


class Ending(NamedTuple):
    """What came of a request."""

    results: list[Result]
    unsent: list[Delivery]  # didn't start, through no fault of anybody's: to be sent again
    took: Micros | None = None  # what the calls took, if the answer tells


class Exchange:
    """An easy handle, reused, and the delivery that it carries at present, or several.

    With *covers* it is for absolute URLs: every address is judged when it is connected to, since a name can resolve to
    another one each time, and of an answer only the status counts, since it is no app's of ours.
    """

    deliveries: Sequence[Delivery]
    target: Target
    started: Micros
    windowed: bool  # counts in its target's window
    stale: bool  # nothing was sent, because the connection to be reused was dead: start again

    def __init__(
        self,
        connect_ms: int,
        max_answer: int,
        authorities: Sequence[tuple[int, str]],
        kept: Kept,
        covers: Covers | None = None,
    ) -> None:
        self.covers = covers
        self._kept = kept
        self._connect_ms = connect_ms
        self._max_answer = max_answer
        self._deadline_ms = 0
        self._method = self._url = ""
        self.handle: Any = pycurl.Curl()
        for option, value in (*_OPTIONS, *authorities):
            self.handle.setopt(option, value)
        self.handle.setopt(pycurl.PREREQFUNCTION, self._on_send)
        self.handle.setopt(pycurl.HEADERFUNCTION, self._on_header)
        self.handle.setopt(pycurl.WRITEFUNCTION, self._on_body)
        if covers is not None:
            self.handle.setopt(pycurl.OPENSOCKETFUNCTION, self._on_open)

    def load(
        self, target: Target, deliveries: Sequence[Delivery], now: Micros, request: Request, absent: Micros = 0
    ) -> None:
        """Get ready to carry *deliveries* as *request*. Sets only what differs from the request before.

        *absent* is how long nobody has looked for answers so far, all in all.
        """
        setopt = self.handle.setopt
        method, url, headers, body = request
        if url != self._url:
            setopt(pycurl.URL, url)
            self._url = url
        if method != self._method:
            if self._method == "HEAD":
                setopt(pycurl.NOBODY, 0)
            setopt(pycurl.CUSTOMREQUEST, method)
            self._method = method
        if method == "HEAD":
            setopt(pycurl.NOBODY, 1)
        elif body or method in ("POST", "PUT", "PATCH"):
            setopt(pycurl.POSTFIELDS, body)
        else:
            setopt(pycurl.HTTPGET, 1)
        setopt(pycurl.HTTPHEADER, _header_lines(headers))
        batch = len(deliveries) > 1
        deadline = deliveries[0].deadline if not batch else max(each.deadline for each in deliveries) + PATIENCE
        deadline_ms = min(max(1, -(-deadline // 1000)), _LONGEST)  # 0 would be none at all
        if deadline_ms != self._deadline_ms:
            setopt(pycurl.TIMEOUT_MS, deadline_ms)
            setopt(pycurl.CONNECTTIMEOUT_MS, min(self._connect_ms, deadline_ms))
            self._deadline_ms = deadline_ms
        self.target = target
        self.deliveries = deliveries
        self.cancelled: set[tuple[int, int]] = set()
        self.started = now
        self.absent = absent
        self._sends = self._header_bytes = self._header_lines = 0
        self._outcome = self._text = b""
        self._took = b""
        self._retry_after = ""
        self._room = max(self._max_answer, len(deliveries) * ANSWER_BYTES) if batch else self._max_answer
        self._keeps = self._room if batch else KEPT
        self._refused = self._barred = ""
        self._address: _Address = ()
        self._trailers = self.stale = False

    def end(self, now: Micros, code: int, text: str) -> Ending:
        """Return what libcurl's *code* (0: an answer) means for the tasks."""
        end = self._end_of_one if len(self.deliveries) == 1 else self._end_of_batch
        ending = end(now, code, text)
        if not self.cancelled:
            return ending
        gone = self.cancelled
        return Ending(
            [result for result in ending.results if result[:2] not in gone],
            [delivery for delivery in ending.unsent if delivery.claim[:2] not in gone],
            ending.took,
        )

    def _end_of_one(self, now: Micros, code: int, text: str) -> Ending:
        claim = self.deliveries[0].claim
        if code == 0 or self._room < 0:
            status = self._answered()
            outcome = error = ""
            if self._outcome == b"ok" and 200 <= status <= 299:  # nearly always; saves 0.5 µs
                outcome = "ok"
            elif self.covers is None and _OUTCOME.match(self._outcome):
                outcome, error = self._outcome.decode(), plain(self._text.decode(errors="replace"))
            wait = retry_after.parse(self._retry_after, now) if self._retry_after and status in retry_after.STATUSES else 0
            result = Result(claim.id, claim.claims, Kind.ANSWERED, self.started, now, status, outcome, error, wait)
            took = int(self._took) if _TOOK.match(self._took) else None  # microseconds
            if took is not None:
                self.target.batching.learn(now, claim, took)
            return Ending([result], [], took)
        kind, error = self._failure(code, text)
        return Ending([Result(claim.id, claim.claims, kind, self.started, now, 0, "", error)], [])

    def _answered(self) -> int:
        if self._address:
            self._keep()
        status: int = self.handle.getinfo(pycurl.RESPONSE_CODE)
        return status

    def _end_of_batch(self, now: Micros, code: int, text: str) -> Ending:
        """Return what came of several calls: what each came to, or, if that isn't known, that it isn't.

        Then none of them is charged, and each comes again by itself: only one of them may be at fault, or none.
        """
        kind = Kind.UNKNOWN
        if code == 0 or self._room < 0:
            status = self._answered()
            if status == 200 and self._outcome == b"batch":
                with suppress(ValueError):
                    return self._told(now, told(self._text, len(self.deliveries)))
            self.target.batching.refused(now)
            if status == 413 or (status == 403 and self._outcome in _REFUSALS):  # none of it was looked at
                return Ending([], list(self.deliveries))
            error = f"{self.target.name} answered a batch of calls with HTTP {status}"
        else:
            failure, error = self._failure(code, text)
            if failure is Kind.UNREACHABLE:
                kind = failure
        # The target has failed once, not once for each of them.
        reported = [claim for claim, _, _ in self.deliveries if claim[:2] not in self.cancelled]
        results = [
            Result(claim.id, claim.claims, kind, self.started, now, error=error, echo=number > 0)
            for number, claim in enumerate(reported)
        ]
        return Ending(results, [])

    def _told(self, now: Micros, answers: Sequence[Told | None]) -> Ending:
        """Return what the answer to a batch says; each call ran when the one before it had ended."""
        batching = self.target.batching
        took = sum(answer.took for answer in answers if answer is not None)
        ending = Ending([], [], took)
        ended, echo = max(now - took, self.started), False
        for delivery, answer in zip(self.deliveries, answers, strict=True):
            if answer is None:
                ending.unsent.append(delivery)
                continue
            claim, started, ended = delivery.claim, ended, min(ended + answer.took, now)
            status, outcome, error = answer.status, answer.outcome, ""
            if outcome == "ok" and 200 <= status <= 299:
                batching.learn(now, claim, answer.took)
            elif _OUTCOME.match(outcome.encode()):
                error = plain(answer.text)
            else:
                outcome, echo = "", False
            result = Result(claim.id, claim.claims, Kind.ANSWERED, started, ended, status, outcome, error, 0, echo)
            echo = True  # the target has answered once: else a few of these would outweigh any loss
            ending.results.append(result)
        return ending

    def _keep(self) -> None:
        """Remember how to tell whether this connection, new a moment ago, has died since."""
        descriptor = self.handle.getinfo(pycurl.ACTIVESOCKET)
        if descriptor < 0:  # closed already
            return
        if len(self._kept) >= CONNECTIONS:  # most are of long ago: libcurl doesn't tell when it closes one
            self._kept.clear()  # the others come back with their next answer
        watch = self._kept[self._address] = select.poll()
        # The target's end of the connection, not data: with TLS, there is some that is no answer.
        watch.register(descriptor, getattr(select, "POLLRDHUP", 0))

    def _failure(self, code: int, text: str) -> tuple[Kind, str]:
        target = self.target.name
        if not self._sends:
            return Kind.UNREACHABLE, plain(self._unreachable(code, text))
        if self._sends > 1:
            # Only reused connections get here: closed by the target as the request came, or lost in its hands.
            return Kind.UNKNOWN, f"{target} closed the connection without an answer"
        if code == pycurl.E_OPERATION_TIMEDOUT:
            return Kind.TIMEOUT, f"no complete answer from {target} within {self._deadline_ms / 1000:g} s"
        if self._refused or code in _MALFORMED or "chunk" in text:  # a bad chunk has the code of a broken connection
            return Kind.MALFORMED, plain(
                f"malformed answer from {target}: {self._refused or text or 'a header is too long'}"
            )
        if code == pycurl.E_GOT_NOTHING:
            return Kind.UNKNOWN, f"{target} closed the connection without an answer"
        return Kind.UNKNOWN, plain(f"connection to {target} broke: {text}")

    def _unreachable(self, code: int, text: str) -> str:
        target = self.target.name
        if self._barred and code in (pycurl.E_COULDNT_CONNECT, pycurl.E_ABORTED_BY_CALLBACK):
            host = urlsplit(target).hostname
            return f"{host} resolves to {self._barred}, which allow_urls doesn't cover; add that address if it is meant"
        if code == pycurl.E_COULDNT_RESOLVE_HOST:
            return f"the name of {target} could not be resolved"
        if code == pycurl.E_OPERATION_TIMEDOUT:
            return f"no connection to {target} within {min(self._connect_ms, self._deadline_ms) / 1000:g} s"
        if code == pycurl.E_COULDNT_CONNECT:
            reason = self.handle.getinfo(pycurl.OS_ERRNO)
            if reason == errno.ECONNREFUSED:
                return f"connection refused by {target}"
            return f"no connection to {target}: {os.strerror(reason) if reason else text}"
        return f"no connection to {target}: {text}"

    # libcurl's callbacks: plain arithmetic, which can't raise.

    def _on_open(self, purpose: int, address: tuple[int, int, int, tuple[str, int]]) -> _Lent | int:
        """Return the socket for a new connection, if it may be opened."""
        family, kind, protocol, (host, port, *_) = address
        assert self.covers is not None
        if not self.covers(host, port):
            self._barred = host
            return _NO_SOCKET
        try:
            return _Lent(socket.socket(family, kind, protocol))
        except OSError:  # no descriptors left
            return _NO_SOCKET

    def _on_send(self, *address: str | int) -> int:
        # When a reused connection dies, libcurl sends the request again on a new one, and a task could run twice in one
        # attempt. It asks here first, each time. Only our queue retries.
        self._sends += 1
        if self._sends > 1:
            return _ABORT
        if self.covers is not None and not self.covers(str(address[0]), int(address[2])):
            self._sends, self._barred = 0, str(address[0])  # a connection that was opened for an app
            return _ABORT
        # libcurl looks for connections that the target has closed once a second at most (8.23). A request into such a
        # one is as good as lost, and nobody knows it wasn't; so look here, too: 0.6 µs.
        watch = self._kept.get(address)
        if watch is None:
            self._address = address
        elif watch.poll(0):
            del self._kept[address]
            self._sends, self.stale = 0, True
            return _ABORT
        return 0

    def _on_header(self, line: bytes) -> int | None:
        self._header_bytes += len(line)
        self._header_lines += 1
        if self._header_lines == 1:  # of this block: an interim answer, the answer, or trailers
            self._trailers = line[:5] != b"HTTP/"
            if not self._trailers:
                self._outcome = b""
                if line[9:12] == b"101":
                    self._refused = "an upgrade that nobody asked for"  # its body would never end
                    return _STOP
        elif line == b"\r\n" or line == b"\n":
            self._header_lines = 0
        elif self._trailers:
            pass
        elif line[0] in b"xX" and line[:19].lower() == b"x-deferlib-outcome:":
            self._outcome = line[19:].strip()
        elif line[0] in b"xX" and line[:16].lower() == b"x-deferlib-took:":
            self._took = line[16:].strip()
        elif line[0] in b"rR" and line[:12].lower() == b"retry-after:":
            self._retry_after = line[12:60].decode("latin-1")
        if self._header_bytes > HEADER_BYTES or self._header_lines > HEADER_LINES:
            self._refused = "too many headers"
            return _STOP
        return None

    def _on_body(self, data: bytes) -> int | None:
        if self._outcome and len(self._text) < self._keeps:
            self._text += data[: self._keeps]
        self._room -= len(data)
        return _STOP if self._room < 0 else None


# Set once for each easy handle.
_OPTIONS: tuple[tuple[int, object], ...] = (
    (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1),
    (pycurl.HTTP09_ALLOWED, 0),
    (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
    (pycurl.FOLLOWLOCATION, 0),
    (pycurl.PROXY, ""),  # not even the environment's: a signed request is for the target alone
    (pycurl.NETRC, pycurl.NETRC_IGNORED),
    (pycurl.NOSIGNAL, 1),
    (pycurl.USERAGENT, "deferlib"),
    (pycurl.TCP_KEEPALIVE, 1),  # notices within minutes that a target is gone whose deadline is a day
    # Servers close idle connections, gunicorn after 2 s. One that is closed as the request arrives costs an attempt
    # whose outcome nobody knows, a new connection costs 0.1 ms.
    (pycurl.MAXAGE_CONN, 1),
    (pycurl.UPLOAD_BUFFERSIZE, 16_384),  # 2,000 in flight: 45 MB instead of 104
)

_MALFORMED = frozenset(
    {
        pycurl.E_UNSUPPORTED_PROTOCOL,  # HTTP/0.9, garbage, a version that nobody asked for
        8,  # CURLE_WEIRD_SERVER_REPLY, which pycurl doesn't name
        pycurl.E_PARTIAL_FILE,
        pycurl.E_BAD_CONTENT_ENCODING,
        pycurl.E_OUT_OF_MEMORY,  # a header line beyond 100 kB, until libcurl 8.6
        100,  # CURLE_TOO_LARGE: the same, since
    }
)


def _header_lines(headers: list[str]) -> Sequence[str | bytes]:
    """Return *headers* as libcurl wants them, without those that it would add by itself."""
    text = "".join(headers)
    if "\n" in text or "\r" in text or "\0" in text:  # 0.15 µs against a header that nobody checked
        raise ValueError("a header contains a line break")
    lines = [*headers, "Expect:", "Content-Type:"]  # a second Content-Type that is empty changes nothing
    return lines if text.isascii() else [line.encode("latin-1") for line in lines]


def plain(text: str) -> str:
    """Return *text* as one line that is safe to print, at most ERROR_LENGTH characters of it."""
    return _CONTROL.sub(" ", text).strip()[:ERROR_LENGTH]


def authorities() -> Sequence[tuple[int, str]]:
    """Return the options that name the certificate authorities to trust: those that Python would.

    pycurl's wheels look where the machine they were built on has them, which isn't where Debian does.
    """
    paths = ssl.get_default_verify_paths()
    found = ((pycurl.CAINFO, paths.cafile), (pycurl.CAPATH, paths.capath))
    return [(option, path) for option, path in found if path]
