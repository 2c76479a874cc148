"""Carry deliveries to their targets over HTTP: libcurl's multi interface on the engine's own thread.

libcurl tells which sockets it waits for (`_watch`) and when it wants to be called (`_alarm`); `wait` polls those
sockets and hands each event back. 28 µs of CPU a POST; a thread of its own for this would cost 30 to 45 % more.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import pycurl

from deferlib.core.model import SECOND, Delivery, Kind, Micros, Result
from deferlib.engine.transport import ERROR_LENGTH, Request
from deferlib.engine.wake import IN, OUT, Waker, new_poller

if TYPE_CHECKING:
    from deferlib.clock import Clock

Prepare: TypeAlias = Callable[[Delivery, Micros], Request]

FAST: Micros = 5_000  # a target that answers within this is given look-ahead
LONGEST_POLL = 60.0  # seconds; also how soon a step of the clock is noticed
FILES = 65_536  # descriptors are plenty up to here
HEADER_BYTES = 32 * 1024  # of an answer, interim ones included
HEADER_LINES = 100
KEPT = 2048  # bytes of an answer's body, for its error text

_NEVER = float("inf")
_LONGEST = 2**31 - 1  # milliseconds that libcurl takes
_WATCH = (0, IN, OUT, IN | OUT)  # by CURL_POLL_NONE, IN, OUT, INOUT
_REMOVE: int = pycurl.POLL_REMOVE
_STOP = -1  # from a libcurl callback: end this transfer

# What can't be printed, or would reorder the line it is printed in.
_CONTROL = re.compile(r"[\x00-\x20\x7f-\xa0\u200e\u200f\u2028-\u202e\u2066-\u2069]+")
_OUTCOME = re.compile(rb"[a-z-]{1,40}\Z")


class HttpTransport:
    """The `Transport` over HTTP.

    Each target has *concurrency* slots. What is sent beyond them waits here and starts the moment a slot frees, with no
    turn of the engine in between. *prepare* makes the request when it is sent, so that its signature is fresh; if it
    raises, the delivery ends as unreachable. *connect_timeout* is in seconds, *max_answer* the bytes of a body after
    which its status alone decides.
    """

    def __init__(
        self,
        prepare: Prepare,
        clock: Clock,
        *,
        concurrency: int = 32,
        connect_timeout: float = 5.0,
        max_answer: int = 65_536,
    ) -> None:
        self._prepare = prepare
        self._clock = clock
        self._concurrency = concurrency
        self._limits = (max(1, round(connect_timeout * 1000)), max_answer)
        self._authorities = _authorities()
        self._targets: dict[str, _Target] = {}
        self._running: dict[Any, _Exchange] = {}  # by easy handle
        self._idle: list[_Exchange] = []
        self._results: list[Result] = []
        self._closed = False
        self._waker = Waker()
        self._poller = new_poller()
        self._poller.register(self._waker.fileno(), IN)
        self._watched: set[int] = set()
        self._due = _NEVER  # when libcurl wants to be called, in monotonic seconds
        self._multi: Any = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._alarm)
        # libcurl's own bound is four connections for each transfer that runs *now*: between two bursts it would close
        # nearly all. Half of the descriptors: the rest of the process needs some.
        self._multi.setopt(pycurl.M_MAXCONNECTS, min(4096, _raise_file_limit() // 2))

    # --- the protocol ------------------------------------------------------------------------------------------------

    def room(self, base: str) -> int:
        """Return the free slots of *base* less what waits for one; more where answers come within milliseconds.

        The look-ahead keeps slots busy while the engine commits: what waits starts when the answers before it are read,
        not a commit later.
        """
        target = self._targets.get(base)
        if target is None:
            return self._concurrency
        ahead = self._concurrency if target.pace < FAST else 0
        return max(0, target.free - len(target.waiting) + ahead)

    def send(self, delivery: Delivery) -> None:
        """Start *delivery*, or let it wait for a slot of its target."""
        target = self._targets.get(delivery.base) or self._new_target(delivery.base)
        if target.free > 0:
            self._start(target, delivery)
        else:
            target.waiting.append(delivery)

    def results(self) -> Sequence[Result]:
        """Return and forget the results so far."""
        results, self._results = self._results, []
        return results

    def cancel(self, id: int) -> None:
        """Stop the delivery of task *id* and forget it; its connection is closed if it runs.

        A look through all deliveries, because it is rare: a lease was lost.
        """
        for target in self._targets.values():
            if any(delivery.claim.id == id for delivery in target.waiting):
                target.waiting = deque(delivery for delivery in target.waiting if delivery.claim.id != id)
        self._results = [result for result in self._results if result.id != id]
        for exchange in [exchange for exchange in self._running.values() if exchange.delivery.claim.id == id]:
            self._end(exchange)
            self._refill(exchange.target)

    def withdraw(self) -> Sequence[Result]:
        """Take back what waits for a slot."""
        now = self._clock.now()
        results = []
        for target in self._targets.values():
            for delivery in target.waiting:
                results.append(Result(delivery.claim.id, delivery.claim.claims, Kind.UNSENT, now, now))
            target.waiting.clear()
        return results

    def wait(self, until: Micros) -> None:
        """Work until there is a result, a wake, or the clock reaches *until*; take all that is ready by then."""
        self._call_if_due()
        while not self._results:
            patience = (until - self._clock.now()) / SECOND
            woken = self._poll(min(max(patience, 0.0), LONGEST_POLL))
            if woken or patience <= 0:
                return
        self._poll(0.0)  # a turn's transaction costs much more than a poll: let it settle all that is there

    def wake(self) -> None:
        """End the present or next `wait`. From any thread or signal handler."""
        self._waker.wake()

    def close(self) -> None:
        """Drop what is on its way. May be called again."""
        if self._closed:
            return
        self._closed = True
        for target in self._targets.values():
            target.waiting.clear()
        for exchange in list(self._running.values()):
            self._end(exchange)
        for exchange in self._idle:
            exchange.handle.close()  # also breaks the cycle of handle and callbacks
        self._idle.clear()
        self._results.clear()
        self._multi.close()
        self._poller.close()
        self._waker.close()

    # --- one delivery ------------------------------------------------------------------------------------------------

    def _new_target(self, base: str) -> _Target:
        if len(self._targets) >= 1024:  # a template of targets can name any number
            self._targets = {key: kept for key, kept in self._targets.items() if kept.free < self._concurrency}
        target = self._targets[base] = _Target(base, self._concurrency)
        return target

    def _start(self, target: _Target, delivery: Delivery) -> None:
        now = self._clock.now()
        exchange = self._idle.pop() if self._idle else _Exchange(*self._limits, self._authorities)
        try:
            exchange.load(target, delivery, now, self._prepare(delivery, now))
        except Exception as error:
            self._idle.append(exchange)
            text = _plain(f"the request could not be made: {type(error).__name__}: {error}")
            claim = delivery.claim
            self._results.append(Result(claim.id, claim.claims, Kind.UNREACHABLE, now, now, 0, "", text))
            return
        target.free -= 1
        self._running[exchange.handle] = exchange
        self._multi.add_handle(exchange.handle)  # sets the alarm to now

    def _refill(self, target: _Target) -> None:
        while target.waiting and target.free > 0:
            self._start(target, target.waiting.popleft())

    def _end(self, exchange: _Exchange) -> None:
        del self._running[exchange.handle]
        self._multi.remove_handle(exchange.handle)
        self._idle.append(exchange)
        exchange.target.free += 1

    # --- driving libcurl ---------------------------------------------------------------------------------------------

    def _poll(self, patience: float) -> bool:
        """Wait for events at most *patience* seconds, handle them, and say whether there was a wake."""
        if self._due < _NEVER:
            patience = min(patience, max(0.0, self._due - time.monotonic()))
        woken = False
        running = len(self._running)
        action, waker = self._multi.socket_action, self._waker.fileno()
        for descriptor, mask in self._poller.poll(patience, 1024):
            if descriptor == waker:
                self._waker.clear()
                woken = True
            else:
                # An error or a hang-up counts as readable: reading finds out which.
                _, running = action(descriptor, (mask != OUT) | (mask & OUT) >> 1)
        if running < len(self._running):
            self._collect()
        self._call_if_due()
        return woken

    def _call_if_due(self) -> None:
        """Let libcurl do what its alarm was for: start requests, enforce deadlines."""
        while self._due <= time.monotonic():
            self._due = _NEVER  # libcurl sets it again if there is more, even if it was called too early
            _, running = self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
            if running < len(self._running):
                self._collect()

    def _collect(self) -> None:
        """Take the results of finished transfers, and start what waited for their slots."""
        more = True
        while more:
            more, done, failed = self._multi.info_read()
            now = self._clock.now()
            for handle in done:
                self._finish(self._running[handle], now, 0, "")
            for handle, code, text in failed:
                self._finish(self._running[handle], now, code, text)

    def _finish(self, exchange: _Exchange, now: Micros, code: int, text: str) -> None:
        result = exchange.result(now, code, text)
        target = exchange.target
        if result.kind is Kind.ANSWERED:
            target.pace += (now - exchange.started - target.pace) // 8
        else:
            target.pace = FAST  # no look-ahead for a target in trouble
        self._results.append(result)
        self._end(exchange)
        if target.waiting:
            self._refill(target)

    # libcurl's callbacks must not raise: pycurl would print the error and go on without the event.

    def _watch(self, what: int, descriptor: int, multi: object, data: object) -> None:
        try:
            if what == _REMOVE:
                self._watched.discard(descriptor)
                self._poller.unregister(descriptor)
            elif descriptor in self._watched:
                self._poller.modify(descriptor, _WATCH[what])
            else:
                self._poller.register(descriptor, _WATCH[what])
                self._watched.add(descriptor)
        except (OSError, ValueError, KeyError):
            return  # the kernel's limit of watches: the delivery's deadline ends it

    def _alarm(self, milliseconds: int) -> None:
        self._due = _NEVER if milliseconds < 0 else time.monotonic() + milliseconds / 1000


class _Target:
    """A base URL: its slots and what waits for them."""

    __slots__ = ("free", "name", "pace", "waiting")

    def __init__(self, base: str, concurrency: int) -> None:
        scheme, _, rest = base.partition("://")
        self.name = f"{scheme}://{rest.rpartition('@')[2]}"  # for people: without a password
        self.free = concurrency
        self.waiting: deque[Delivery] = deque()
        self.pace: Micros = FAST  # moving average of how long an answer takes


class _Exchange:
    """An easy handle, reused, and the delivery it carries at present."""

    delivery: Delivery
    target: _Target
    started: Micros

    def __init__(self, connect_ms: int, max_answer: int, authorities: Sequence[tuple[int, str]]) -> None:
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

    def load(self, target: _Target, delivery: Delivery, now: Micros, request: Request) -> None:
        """Get ready to carry *delivery* as *request*. Sets only what differs from the delivery before."""
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
        deadline_ms = min(max(1, -(-delivery.deadline // 1000)), _LONGEST)  # 0 would be none at all
        if deadline_ms != self._deadline_ms:
            setopt(pycurl.TIMEOUT_MS, deadline_ms)
            setopt(pycurl.CONNECTTIMEOUT_MS, min(self._connect_ms, deadline_ms))
            self._deadline_ms = deadline_ms
        self.target = target
        self.delivery = delivery
        self.started = now
        self._sends = self._header_bytes = self._header_lines = 0
        self._outcome = self._text = self._length = b""
        self._refused = ""
        self._trailers = False
        self._room = self._max_answer

    def result(self, now: Micros, code: int, text: str) -> Result:
        """Return what libcurl's *code* (0: an answer) means for the task."""
        claim = self.delivery.claim
        if code == 0 or self._room < 0:
            status = self.handle.getinfo(pycurl.RESPONSE_CODE)
            outcome = error = ""
            if self._outcome == b"ok" and 200 <= status <= 299:  # nearly always; saves 0.5 µs
                outcome = "ok"
            elif _OUTCOME.match(self._outcome):
                outcome, error = self._outcome.decode(), _plain(self._text.decode(errors="replace"))
            return Result(claim.id, claim.claims, Kind.ANSWERED, self.started, now, status, outcome, error)
        kind, error = self._failure(code, text)
        return Result(claim.id, claim.claims, kind, self.started, now, 0, "", error)

    def _failure(self, code: int, text: str) -> tuple[Kind, str]:
        target = self.target.name
        if not self._sends:
            return Kind.UNREACHABLE, _plain(self._unreachable(code, text))
        if self._sends > 1:
            # Only reused connections get here: closed by the target as the request came, or lost in its hands.
            return Kind.UNKNOWN, f"{target} closed the connection without an answer"
        if code == pycurl.E_OPERATION_TIMEDOUT:
            return Kind.TIMEOUT, f"no complete answer from {target} within {self._deadline_ms / 1000:g} s"
        if self._refused or code in _MALFORMED or "chunk" in text:
            return Kind.MALFORMED, _plain(f"malformed answer from {target}: {self._refused or text}")
        if code == pycurl.E_GOT_NOTHING:
            return Kind.UNKNOWN, f"{target} closed the connection without an answer"
        return Kind.UNKNOWN, _plain(f"connection to {target} broke: {text}")

    def _unreachable(self, code: int, text: str) -> str:
        target = self.target.name
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

    def _on_send(self, *address: object) -> int:
        # When a reused connection dies, libcurl sends the request again on a new one, and a task could run twice in one
        # attempt. It asks here first, each time. Only our queue retries.
        self._sends += 1
        return int(pycurl.PREREQFUNC_OK if self._sends == 1 else pycurl.PREREQFUNC_ABORT)

    def _on_header(self, line: bytes) -> int | None:
        self._header_bytes += len(line)
        self._header_lines += 1
        if self._header_lines == 1:  # of this block: an interim answer, the answer, or trailers
            self._trailers = line[:5] != b"HTTP/"
            self._outcome = self._outcome if self._trailers else b""
            self._length = b""
        elif line == b"\r\n" or line == b"\n":
            self._header_lines = 0
        elif self._trailers:
            pass
        elif line[0] in b"xX" and line[:19].lower() == b"x-deferlib-outcome:":
            self._outcome = line[19:].strip()
        elif line[0] in b"cC" and line[:15].lower() == b"content-length:":
            length = line[15:].strip()
            if self._length and self._length != length:
                self._refused = "two lengths"  # libcurl takes the last: whoever sits between may take the first
                return _STOP
            self._length = length
        if self._header_bytes > HEADER_BYTES or self._header_lines > HEADER_LINES:
            self._refused = "too many headers"
            return _STOP
        return None

    def _on_body(self, data: bytes) -> int | None:
        if self._outcome and len(self._text) < KEPT:
            self._text += data[:KEPT]
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


def _plain(text: str) -> str:
    """Return *text* as one line that is safe to print, at most ERROR_LENGTH characters of it."""
    return _CONTROL.sub(" ", text).strip()[:ERROR_LENGTH]


def _authorities() -> Sequence[tuple[int, str]]:
    """Return the options that name the certificate authorities to trust: those that Python would.

    pycurl's wheels look where the machine they were built on has them, which isn't where Debian does.
    """
    paths = ssl.get_default_verify_paths()
    found = ((pycurl.CAINFO, paths.cafile), (pycurl.CAPATH, paths.capath))
    return [(option, path) for option, path in found if path]


def _raise_file_limit() -> int:
    """Raise the soft limit of open files toward the hard one; return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit that it doesn't tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES if soft == resource.RLIM_INFINITY else soft
