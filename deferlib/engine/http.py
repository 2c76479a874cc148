"""Carry deliveries to their targets over HTTP: libcurl's multi interface on the engine's own thread.

libcurl tells which sockets it waits for (`_watch`) and when it wants to be called (`_alarm`); `wait` polls those
sockets and hands each event back. About 30 µs of CPU a POST; a thread of its own for this would cost 30 to 45 % more.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import pycurl

from deferlib.core.model import SECOND, Delivery, Kind, Micros, Result
from deferlib.deferred import DEFAULT_URL
from deferlib.engine.batching import MOST, Batching
from deferlib.engine.exchange import CONNECTIONS, Covers, Exchange, Kept, authorities, plain
from deferlib.engine.target import Target
from deferlib.engine.transport import Request
from deferlib.engine.wake import IN, OUT, Waker, new_poller
from deferlib.engine.window import STALL, Window
from deferlib.outbound import NOWHERE

if TYPE_CHECKING:
    from deferlib.clock import Clock

Prepare: TypeAlias = Callable[[Delivery, Micros], Request]
PrepareBatch: TypeAlias = Callable[[Sequence[Delivery], Micros], Request]

LOOK_AHEAD: Micros = 40_000  # how long a delivery may wait here for a slot
MOST_AHEAD = 256
EVENTS = 256  # taken at once: more would keep the turn waiting
GATHER = 0.008  # seconds to gather results, while there is a look-ahead to work off: fewer and larger transactions
BATCH = 160  # results that are enough for one
NO_PACE: Micros = 10 * SECOND
LONGEST_POLL = 60.0  # seconds; also how soon a step of the clock is noticed
FILES = 65_536  # descriptors: nobody needs more
STOPPING = "the engine is stopping"

_NEVER = float("inf")
_WATCH = (0, IN, OUT, IN | OUT)  # by CURL_POLL_NONE, IN, OUT, INOUT
_REMOVE: int = pycurl.POLL_REMOVE


class HttpTransport:
    """The `Transport` over HTTP.

    Each target has *concurrency* slots. What is sent beyond them waits here and starts the moment a slot frees, with no
    turn of the engine in between. *prepare* makes the request when it is sent, so that its signature is fresh; if it
    raises, the delivery ends as unreachable. *connect_timeout* is in seconds, *max_answer* the bytes of a body after
    which its status alone decides. *covers* tells which addresses the deliveries to absolute URLs may connect to; a
    target's own are never asked for, since it was configured to be connected to.
    """

    def __init__(
        self,
        prepare: Prepare,
        clock: Clock,
        *,
        concurrency: int = 32,
        connect_timeout: float = 5.0,
        max_answer: int = 65_536,
        covers: Covers = NOWHERE.covers,
        prepare_batch: PrepareBatch | None = None,
        batch: int = MOST,
    ) -> None:
        self._prepare = prepare
        self._prepare_batch = prepare_batch
        self._batch = batch if prepare_batch is not None else 1
        self._withdrawn = False
        self._absent: Micros = 0  # how long nobody has looked for answers, all in all
        self._left = clock.now()  # when `wait` was over
        self._clock = clock
        self._concurrency = concurrency
        self._limits = (max(1, round(connect_timeout * 1000)), max_answer)
        self._authorities = authorities()
        self._kept: Kept = {}
        self._targets: dict[str, Target] = {}
        self._fresh: set[Target] = set()  # that have got something to start
        self._held: set[Target] = set()  # where something waits though slots are free
        self._running: dict[Any, Exchange] = {}  # by easy handle
        self._covers = covers
        self._idle: list[Exchange] = []
        self._idle_abroad: list[Exchange] = []  # those for absolute URLs
        self._results: list[Result] = []
        self._hurried = False  # the last `wait` was over at once, for a wake
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
        self._multi.setopt(pycurl.M_MAXCONNECTS, min(CONNECTIONS, _raise_file_limit() // 2))

    # --- the protocol ------------------------------------------------------------------------------------------------

    def room(self, base: str) -> int:
        """Return the free slots of *base* less what waits for one, and as many more as start within `LOOK_AHEAD`.

        The look-ahead keeps slots busy while the engine commits: what waits starts when the answers before it are read,
        not a commit later. And it makes the transactions larger: 20 tasks a turn became 60, at half the cost for each.
        """
        target = self._targets.get(base)
        if target is None:
            return self._concurrency
        parallel = self._concurrency if target.window is None else min(self._concurrency, int(target.window.size))
        ahead = min(parallel * LOOK_AHEAD // max(target.pace, 1), MOST_AHEAD)
        return max(0, target.open - target.waiting + ahead)

    def passes(self, base: str, queue: str) -> bool:
        """Tell whether one of *queue* would start at once, past what waits for *base*."""
        target = self._targets.get(base)
        return target is None or target.lets_by(queue)

    def send(self, delivery: Delivery) -> None:
        """Start *delivery*, or let it wait for a slot of its target."""
        target = self._targets.get(delivery.base) or self._new_target(delivery.base)
        if target.lets_by(delivery.claim.queue):
            target.sees(delivery.claim.queue, self._left)
            self._start(target, [delivery])
            return
        target.put(delivery, self._left)
        self._fresh.add(target)

    def results(self) -> Sequence[Result]:
        """Return and forget the results so far."""
        results, self._results = self._results, []
        return results

    def cancel(self, id: int, claims: int) -> None:
        """Stop the delivery of this claim and forget it; its connection is closed if it runs.

        Looks through all deliveries, because it is rare: a lease was lost.
        """
        fence = (id, claims)
        for target in self._targets.values():
            target.drop(fence)
        self._results = [result for result in self._results if result[:2] != fence]
        for exchange in list(self._running.values()):
            if any(delivery.claim[:2] == fence for delivery in exchange.deliveries):
                exchange.cancelled.add(fence)
                if len(exchange.cancelled) == len(exchange.deliveries):  # nobody else waits for it
                    self._end(exchange)
                    self._refill(exchange.target)

    def withdraw(self) -> Sequence[Result]:
        """Take back what waits for a slot."""
        self._withdrawn = True
        now = self._clock.now()
        results = []
        for target in self._targets.values():
            while target.waiting:
                results.append(_unsent(target.take(), now))
        return results

    def wait(self, until: Micros) -> None:
        """Work until there is a result, a wake, or the clock reaches *until*; take all that is ready by then."""
        if self._waker.is_set and not self._hurried and any(self._left < target.shared_until for target in self._fresh):
            self._waker.clear()  # to start what was sent takes a millisecond: first what has just come, perhaps of another
            self._hurried = True
            return
        self._hurried = False
        self._absent += self._clock.now() - self._left
        for target in self._fresh:
            self._refill(target)
        self._fresh.clear()
        self._call_if_due()
        self._work(until)
        self._left = self._clock.now()

    def _work(self, until: Micros) -> None:
        while not self._results:
            now = self._clock.now()
            patience = (until - now) / SECOND
            if self._held:
                self._probe(now)
            woken = self._poll(min(max(patience, 0.0), STALL / SECOND if self._held else LONGEST_POLL))
            if woken or patience <= 0:
                return
        if self._poll(0.0):  # a turn's transaction costs much more than a poll: let it settle all that is there
            return
        # What waits for slots keeps them busy without a turn, so the next one can wait for more to settle.
        end = time.monotonic() + GATHER
        while len(self._results) < BATCH and any(target.waiting for target in self._targets.values()):
            patience = end - time.monotonic()
            if patience <= 0 or self._poll(patience):
                return

    def wake(self) -> None:
        """End the present or next `wait`. From any thread or signal handler."""
        self._waker.wake()

    def close(self) -> None:
        """Drop what is on its way. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._targets.clear()
        self._held.clear()
        for exchange in list(self._running.values()):
            self._end(exchange)
        for exchange in (*self._idle, *self._idle_abroad):
            exchange.handle.close()  # also breaks the cycle of handle and callbacks
        self._idle.clear()
        self._idle_abroad.clear()
        self._results.clear()
        # libcurl waits here for name look-ups that hang, 10 s and more, though nobody wants to know any longer.
        closing = threading.Thread(target=self._multi.close, daemon=True)
        closing.start()
        closing.join(0.5)
        self._poller.close()
        self._waker.close()

    # --- one delivery ------------------------------------------------------------------------------------------------

    def _new_target(self, base: str) -> Target:
        if len(self._targets) >= 1024:  # a template of targets can name any number
            self._targets = {
                key: kept for key, kept in self._targets.items() if kept.waiting or kept.free < self._concurrency
            }
        target = self._targets[base] = Target(base, self._concurrency, Batching(self._batch))
        return target

    def _start(self, target: Target, deliveries: list[Delivery]) -> None:
        now = self._clock.now()
        abroad = not deliveries[0].claim.url.startswith("/")
        idle = self._idle_abroad if abroad else self._idle
        if idle:
            exchange = idle.pop()
        else:
            exchange = Exchange(*self._limits, self._authorities, self._kept, self._covers if abroad else None)
        try:
            exchange.load(target, deliveries, now, self._request(deliveries, now), self._absent)
        except Exception as error:
            idle.append(exchange)
            text = plain(f"the request could not be made: {type(error).__name__}: {error}")
            self._results += [
                Result(claim.id, claim.claims, Kind.UNFIT, now, now, 0, "", text) for claim, _, _ in deliveries
            ]
            return
        exchange.windowed = deliveries[0].claim.url == DEFAULT_URL  # others don't tell what they take
        target.begin(deliveries[0].claim.queue, exchange.windowed)
        if len(deliveries) > 1:
            target.batches[exchange] = now
        self._running[exchange.handle] = exchange
        self._multi.add_handle(exchange.handle)  # sets the alarm to now

    def _request(self, deliveries: list[Delivery], now: Micros) -> Request:
        if len(deliveries) == 1 or self._prepare_batch is None:
            return self._prepare(deliveries[0], now)
        return self._prepare_batch(deliveries, now)

    def _refill(self, target: Target) -> None:
        while target.waiting and target.open > 0:
            self._start(target, target.take_together(self._clock.now()))
        if target.waiting and target.free > 0:
            self._held.add(target)
        else:
            self._held.discard(target)

    def _probe(self, now: Micros) -> None:
        """Let one more go to targets that are full, and have answered nothing for a while."""
        for target in list(self._held):
            if not target.waiting or (target.window is not None and target.window.stalled(now)):
                self._refill(target)  # and where nothing waits any more, because it was taken back, it isn't held

    def _end(self, exchange: Exchange) -> None:
        del self._running[exchange.handle]
        self._multi.remove_handle(exchange.handle)
        (self._idle if exchange.covers is None else self._idle_abroad).append(exchange)
        exchange.target.end(exchange.deliveries[0].claim.queue, exchange.windowed)
        exchange.target.batches.pop(exchange, None)

    # --- driving libcurl ---------------------------------------------------------------------------------------------

    def _poll(self, patience: float) -> bool:
        """Wait for events at most *patience* seconds, handle them, and say whether there was a wake."""
        if self._due < _NEVER:
            patience = min(patience, max(0.0, self._due - time.monotonic()))
        woken = False
        running = len(self._running)
        action, waker = self._multi.socket_action, self._waker.fileno()
        for descriptor, mask in self._poller.poll(patience, EVENTS):
            if descriptor == waker:
                self._waker.clear()
                woken = True
                continue
            # An error or a hang-up counts as readable: reading finds out which.
            _, running = action(descriptor, (mask != OUT) | (mask & OUT) >> 1)
            if self._waker.is_set:  # the others are told again: each brings many answers, and takes as many new calls along
                break
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

    def _finish(self, exchange: Exchange, now: Micros, code: int, text: str) -> None:
        if exchange.stale:
            exchange.stale = False
            self._multi.remove_handle(exchange.handle)  # closes the connection
            self._multi.add_handle(exchange.handle)
            return
        results, unsent, took = exchange.end(now, code, text)
        target = exchange.target
        if took is not None:
            if target.window is None:
                target.window = Window(self._concurrency)
            waited = now - exchange.started - took - (self._absent - exchange.absent)
            target.window.answered(now, waited, took, full=target.waiting > 0, shared=now < target.shared_until)
        answered = sum(result.kind is Kind.ANSWERED for result in results)
        if answered:
            target.pace += ((now - exchange.started) // answered - target.pace) // 32
        elif not unsent:
            target.pace = max(target.pace, NO_PACE)  # no look-ahead for a target in trouble
        self._results += results
        for delivery in reversed(unsent):
            if self._withdrawn:
                self._results.append(_unsent(delivery, now))
            else:
                target.put_back(delivery)
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


def _unsent(delivery: Delivery, now: Micros) -> Result:
    return Result(delivery.claim.id, delivery.claim.claims, Kind.UNSENT, now, now, error=STOPPING)


def _raise_file_limit() -> int:
    """Raise the soft limit of open files toward the hard one; return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit that it doesn't tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES if soft == resource.RLIM_INFINITY else soft
