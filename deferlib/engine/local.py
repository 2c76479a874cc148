"""The in-process transport: calls a WSGI app in a pool of threads.

A `SimpleQueue` in and a `deque` out cost about 1 µs a hand-off; `ThreadPoolExecutor` costs 8 to 10. What the engine
vouches for travels as an object in the environ, which no HTTP server can put there, so no token is needed.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from functools import lru_cache
from math import inf
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import unquote_to_bytes

from deferlib.clock import Clock
from deferlib.context import ENVIRON_KEY
from deferlib.core.model import SECOND, Delivery, Kind, Micros, Result
from deferlib.engine import retry_after
from deferlib.engine.dispatch import joined_headers, vouch
from deferlib.engine.lines import Lines
from deferlib.engine.transport import ERROR_LENGTH
from deferlib.engine.wake import Waker
from deferlib.inbound import BODY_KEY
from deferlib.payload import describe_error

log = logging.getLogger("deferlib.engine")

_LOOKAHEAD: Micros = SECOND // 50  # deliveries may wait in the pool for about this long before they start
_MAX_LOOKAHEAD = 256
_MAX_WAIT_SECONDS = 60.0
_GATHER = 2  # milliseconds to gather results in, and that
_GATHERS = 5  # times at most
_SHORTEN = 0.02  # seconds: a wake shortens that once in so long, because where tasks add tasks each of them wakes
_BATCH = 96  # results that are enough for a transaction

_ANSWERED = Kind.ANSWERED  # looked up once: each time takes 0.08 µs

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class LocalTransport:
    """Runs deliveries in *threads* threads of this process, by calling *app*.

    A thread can't be stopped: at its deadline a delivery is reported as failed, its thread goes on and stays taken until
    the call returns, and what it returns then is dropped.
    """

    def __init__(self, app: WsgiApp, clock: Clock, *, threads: int | None = None) -> None:
        self._app = app
        self._clock = clock
        self._threads = threads or min(32, (os.cpu_count() or 1) + 4)
        self._lines = Lines()
        self._inbox: SimpleQueue[bool] = SimpleQueue()  # True for each delivery in the lines, False ends a thread
        self._done: deque[Result | None] = deque()  # None: of a call that was reported at its deadline
        # By id(delivery). Whoever takes a run out reports it: its thread at its end, or the engine's at its deadline.
        self._running: dict[int, tuple[Micros, Micros, Delivery]] = {}  # deadline, start
        self._taken = 0  # deliveries sent whose threads, or places in the line for one, aren't free again
        self._stuck = 0  # of these, reported at their deadline
        self._cancelled: set[tuple[int, int]] = set()
        self._mean: float = SECOND  # of an answer, in microseconds: slow until the pool has shown otherwise
        self._waker = Waker()
        self._wakes: float = 0  # when `wait` wakes by itself; infinite while it finds that out, 0 outside it
        self._poll = select.poll()
        self._poll.register(self._waker.fileno(), select.POLLIN)
        self._woken = False  # by somebody else than the pool's threads
        self._shortened_at = 0.0  # when a wake has last ended the gathering of results
        self._closed = False
        for number in range(self._threads):
            threading.Thread(target=self._work, name=f"deferlib-{number}", daemon=True).start()

    def room(self, base: str) -> int:
        """Free threads, and as many more as quick calls will have worked off while the engine commits."""
        usable = self._threads - self._stuck
        ahead = min(_MAX_LOOKAHEAD, int(usable * _LOOKAHEAD / max(self._mean, 1.0)))
        return max(0, self._threads + ahead - self._taken)

    def passes(self, base: str, queue: str) -> bool:
        return self._stuck < self._threads and self._lines.peek(queue) is None  # the next thread takes it: lines take turns

    def send(self, delivery: Delivery) -> None:
        self._taken += 1
        self._lines.put(delivery)
        self._inbox.put(True)

    def results(self) -> Sequence[Result]:
        done = self._done
        found = self._expired() if self._running else []
        for _ in range(len(done)):
            result = done.popleft()
            self._taken -= 1
            if result is None:
                self._stuck -= 1
            elif self._cancelled and (key := (result.id, result.claims)) in self._cancelled:
                self._cancelled.discard(key)
            else:
                found.append(result)
        if found:
            spent = sum([result.ended - result.started for result in found])
            self._mean += (spent / len(found) - self._mean) * 0.2
        if self._stuck == self._threads:  # nobody is left to call what waits in line
            found += self._take_back("every thread is held by a call that is past its deadline")
        return found

    def _expired(self) -> list[Result]:
        """Report the calls that are past their deadline. Looking at 32 threads costs 3 µs, once a turn."""
        now = self._clock.now()
        expired = []
        for until, started, delivery in list(self._running.values()):
            if until > now or self._running.pop(id(delivery), None) is None:
                continue
            self._stuck += 1
            claim = delivery.claim
            if claim[:2] in self._cancelled:
                self._cancelled.discard(claim[:2])
                continue
            text = f"no answer within {delivery.deadline / SECOND:g} s; the call still runs in its thread"
            expired.append(Result(claim.id, claim.claims, Kind.TIMEOUT, started, now, error=text))
        return expired

    def cancel(self, id: int, claims: int) -> None:
        self._cancelled.add((id, claims))  # a thread can't be stopped: its result is dropped

    def withdraw(self) -> Sequence[Result]:
        return self._take_back("the engine is stopping")

    def _take_back(self, reason: str) -> list[Result]:
        withdrawn = []
        while not self._inbox.empty():
            try:
                waits = self._inbox.get_nowait()
            except Empty:  # a thread of the pool was quicker
                break
            if waits:
                self._taken -= 1
                withdrawn.append(self._unsent(self._lines.take(), reason))
        return withdrawn

    def wait(self, until: Micros) -> None:
        # _wakes is set before _done and _running are looked at, and a worker changes them before it looks at _wakes: no end
        # of a call is missed, and no deadline.
        self._wakes = inf
        try:
            if not self._done:
                self._wakes = until = min([until, *[run[0] for run in list(self._running.values())]])
                seconds = (until - self._clock.now()) / SECOND
                if seconds > 0:
                    self._poll.poll(min(seconds, _MAX_WAIT_SECONDS) * 1000)
        finally:
            self._wakes = 0
            self._waker.clear()
        # While the threads have work, a turn can wait for more results: fewer transactions, and fewer fights for the GIL.
        for _ in range(_GATHERS):
            if not 0 < len(self._done) < _BATCH or self._inbox.qsize() <= self._threads:
                break
            if self._woken and time.monotonic() - self._shortened_at >= _SHORTEN:
                self._shortened_at = time.monotonic()
                break
            self._poll.poll(_GATHER)
            self._waker.clear()
        self._woken = False

    def wake(self) -> None:
        self._woken = True
        self._waker.wake()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for _ in range(self._threads):
            self._inbox.put(False)
        self._waker.close()

    def _work(self) -> None:
        get, take, done = self._inbox.get, self._lines.take, self._done
        while get():
            delivery = take()
            if self._cancelled and delivery.claim[:2] in self._cancelled:  # somebody else runs it by now
                done.append(self._unsent(delivery, "its lease is lost"))
            else:
                done.append(Context().run(self._call, delivery))
            if self._wakes and not self._closed:
                self._waker.wake()

    def _unsent(self, delivery: Delivery, reason: str) -> Result:
        now = self._clock.now()
        return Result(delivery.claim.id, delivery.claim.claims, Kind.UNSENT, now, now, error=reason)

    def _call(self, delivery: Delivery) -> Result | None:
        claim, key = delivery.claim, id(delivery)
        started = self._clock.now()
        until = started + delivery.deadline
        self._running[key] = until, started, delivery
        if until < self._wakes:
            self._waker.wake()
        try:
            answer = call(self._app, delivery, started, self._clock)
        except BaseException as problem:  # the app is the user's: even sys.exit() in it is one failed attempt
            log.error("the app failed on task %s of queue %s", claim.public_name, claim.queue, exc_info=problem)
            answer = Answer.of_error(problem)
        ended = self._clock.now()
        if self._running.pop(key, None) is None:  # reported at its deadline
            return None
        wait = retry_after.parse(answer.retry_after, ended) if answer.retry_after else 0
        status, outcome, error = answer.status, answer.outcome, answer.error
        return Result(claim.id, claim.claims, _ANSWERED, started, ended, status, outcome, error, wait)


_OUTCOME_LENGTH, _WAIT_LENGTH = len("x-deferlib-outcome"), len("retry-after")


def _write(data: bytes) -> None:
    """Take what an app writes by PEP 3333's old way: nobody reads it."""


class Answer:
    """Collects a WSGI answer: its status, outcome, and the beginning of its body if it tells of a failure."""

    __slots__ = ("error", "outcome", "retry_after", "status")

    def __init__(self) -> None:
        self.status = 0
        self.retry_after = ""
        self.outcome = ""
        self.error = ""

    @classmethod
    def of_error(cls, error: BaseException) -> Answer:
        """Return the answer that an app which raised *error* amounts to."""
        answer = cls()
        answer.status, answer.error = 500, describe_error(error)
        return answer

    def start(self, status: str, headers: Sequence[tuple[str, str]], exc_info: object = None) -> Callable[[bytes], None]:
        self.status = int(status[:3])
        for name, value in headers:
            length = len(name)  # looked at first: 0.5 µs less for the three headers of a call's answer
            if length == _OUTCOME_LENGTH and name.lower() == "x-deferlib-outcome":
                self.outcome = value
            elif length == _WAIT_LENGTH and name.lower() == "retry-after" and self.status in retry_after.STATUSES:
                self.retry_after = value
        return _write

    def take(self, body: Iterable[bytes]) -> None:
        first = b""
        for part in body:
            if len(first) < ERROR_LENGTH:
                first += part
        if self.outcome and self.outcome != "ok":
            self.error = first.decode("utf-8", "replace")[:ERROR_LENGTH]


def call(app: WsgiApp, delivery: Delivery, now: Micros, clock: Clock) -> Answer:
    """Call *app* with *delivery* as its request, begun at *now*; what it raises comes through."""
    answer = Answer()
    body = app(_environ(delivery, now, clock), answer.start)
    try:
        answer.take(body)
        if not answer.status:
            raise RuntimeError("the app didn't call start_response")
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()
    return answer


_SAME: dict[str, Any] = {
    "SCRIPT_NAME": "",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "HTTP_HOST": "localhost",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.multithread": True,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
}  # in every environ


@lru_cache(256)  # most tasks have the same: 0.1 µs instead of 0.9
def _split(url: str) -> tuple[str, str]:
    """Return the path as WSGI has it, and the query."""
    path, _, query = url.partition("?")
    return unquote_to_bytes(path).decode("latin-1"), query


def _environ(delivery: Delivery, now: Micros, clock: Clock) -> dict[str, Any]:
    claim = delivery.claim
    path, query = _split(claim.url)
    environ: dict[str, Any] = {
        **_SAME,
        "REQUEST_METHOD": claim.method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "CONTENT_LENGTH": str(len(claim.body)),
        "wsgi.input": io.BytesIO(claim.body),
        "wsgi.errors": sys.stderr,
        ENVIRON_KEY: vouch(delivery, now, clock),
        BODY_KEY: claim.body,  # saves the handler reading it: 1.5 µs
    }
    environ.update(_header_keys(claim.headers))
    if claim.body and "CONTENT_TYPE" not in environ:
        environ["CONTENT_TYPE"] = "application/octet-stream"
    return environ


@lru_cache(256)
def _header_keys(text: str) -> dict[str, str]:
    """Return the headers kept as *text* as they stand in an environ. Not to be changed: it is every such task's."""
    keys = ((name.upper().replace("-", "_"), value) for name, value in joined_headers(text))
    return {key if key == "CONTENT_TYPE" else f"HTTP_{key}": value for key, value in keys}
