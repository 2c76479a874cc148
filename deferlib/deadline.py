"""Dispatch deadlines, made real: shortly before its own, a call gets a `DeadlineExceededError`, a coroutine is cancelled.

One daemon thread watches the calls that run and raises in their threads, with `PyThreadState_SetAsyncExc`. Such an
exception comes late, some instructions after it was asked for, and only between instructions of Python: a call in C
isn't interrupted. That it never reaches anything but its own call rests on this:

- It is asked for at most once in a call, only while the call is `live`, and under the call's lock.
- At the call's end `live` is cleared under that lock, so none is asked for from then on, and then the one that may still be
  on its way is taken back. That is repeated until no exception came in between.
- A thread has one live call at most: one inside another suspends it, or has no watch of its own if the other's ends first.

A call isn't told while it is in code that would be left with a lock (`_LOCKING`): the watchdog tries again.

An exception that arrives in a callback whose errors Python ignores (`__del__`) is lost; the engine's own timeout remains.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache, partial
from math import inf
from time import monotonic
from types import FrameType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from deferlib import config
from deferlib.clock import SystemClock
from deferlib.context import SYSTEM_CLOCK, TaskContext, running
from deferlib.core.model import SECOND
from deferlib.errors import DeadlineExceededError

log = logging.getLogger("deferlib.handler")

P = ParamSpec("P")
T = TypeVar("T")


# --- what a call, or a coroutine, is run with -------------------------------------------------------------------------


def call(task: TaskContext, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call *fn*; shortly before *task*'s deadline a `DeadlineExceededError` is raised in it, unless it is over by then.

    How long before is the setting `deadline_margin`, at most half of the time that is left. Nothing is raised if the
    setting says `off`, by a clock of tests, or under gevent. What comes after its deadline isn't called at all: nobody
    waits for it, and its next attempt may run already.
    """
    seconds = _seconds(task)
    if seconds is None:
        return fn(*args, **kwargs)
    if seconds <= 0:
        raise DeadlineExceededError(f"it came too late: its dispatch deadline was {task.deadline:%Y-%m-%d %H:%M:%S} UTC")
    return within(seconds, fn, *args, **kwargs)


def within(seconds: float, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call *fn*; after so many *seconds* a `DeadlineExceededError` is raised in it, unless it is over by then.

    What it returned or raised first counts. No exception comes before this begins or after it ends.
    """
    at, thread = monotonic() + seconds, threading.get_ident()
    outer = _watchdog.calls.get(thread)
    if outer is None:
        return _guarded(_Call(at, thread), partial(fn, *args, **kwargs))
    if outer.at <= at:  # its exception comes first, and this is a part of it
        return fn(*args, **kwargs)
    return _suspending(outer, partial(_guarded, _Call(at, thread), partial(fn, *args, **kwargs)))


def shielded(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call *fn*; a call that it is a part of is told of its deadline only afterwards: *fn* holds locks that others need."""
    outer = _watchdog.calls.get(threading.get_ident())
    if outer is None:
        return fn(*args, **kwargs)
    return _suspending(outer, partial(fn, *args, **kwargs))


def _suspending(outer: _Call, fn: Callable[[], T]) -> T:
    """Call *fn*; *outer*, which it is a part of, is told afterwards if its time came meanwhile."""
    outer.suspend()
    try:
        result = fn()
    except BaseException:
        outer.resume()  # what goes out (Ctrl-C, the store's error) isn't replaced by an exception of ours
        raise
    outer.resume()
    if outer.at <= monotonic():  # now: a call that is suspended most of the time is rarely met by the watchdog
        outer.tell()
    return result


def unguarded(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call *fn*, which is told of the deadline in its own way: it is an event loop, say.

    A call that it is a part of isn't told meanwhile, nor afterwards if its time came meanwhile.
    """
    outer = _watchdog.calls.get(threading.get_ident())
    if outer is None:
        return fn(*args, **kwargs)
    outer.suspend()
    try:
        return fn(*args, **kwargs)
    finally:
        outer.raised = outer.raised or outer.at <= monotonic()
        outer.resume()


async def limited(awaitable: Awaitable[T]) -> T:
    """Wait for *awaitable*; shortly before the running task's deadline cancel it, and raise `DeadlineExceededError`.

    If it returns all the same, or raises something else, that counts. Without a task, or where `call` raises nothing, it
    isn't cancelled.
    """
    task = running.get()
    seconds = None if task is None else _seconds(task)
    if task is None or seconds is None:
        return await awaitable
    import asyncio

    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError as error:
        if not limit.expired():  # it is the call's own
            raise
        raise DeadlineExceededError(describe(task)) from error


def describe(task: TaskContext) -> str:
    """Return what a `DeadlineExceededError` means, for people."""
    return f"stopped shortly before its dispatch deadline, {task.deadline:%Y-%m-%d %H:%M:%S} UTC"


def _seconds(task: TaskContext) -> float | None:
    """Return how long to wait before *task* is told of its deadline; None if it isn't to be told."""
    runtime = config.runtime()
    margin, clock = runtime.deadline_margin, runtime.clock
    if margin is None or (clock is not SYSTEM_CLOCK and not isinstance(clock, SystemClock)):  # one of tests stands still
        return None
    left = (task.deadline_micros - clock.now()) / SECOND
    return max(left - margin, left / 2)


# --- one call ---------------------------------------------------------------------------------------------------------


def _guarded(call: _Call, fn: Callable[[], T]) -> T:
    """Call *fn* under watch: 1.1 µs with all of `within`, and 1.7 with all of `call`."""
    # fn is called for the value that the dict lacks, by C, which stores what it returns before any exception can come in
    # between: a call that has returned is known to have done so.
    kept: defaultdict[None, T] = defaultdict(fn)
    interruption: BaseException | None = None
    try:
        try:
            _watchdog.add(call)
            kept[None]
        finally:
            # An exception comes where Python looks for one: when a function begins, after a call into C, at a jump back.
            # From here all of these are in the inner `try`, but the jump of the loop, and that follows an exception.
            over = False
            while not over:
                try:
                    over = call.end()
                except DeadlineExceededError:  # the late one: the call's own end stands
                    pass
                except BaseException as error:  # Ctrl-C, or gunicorn's end of a worker: afterwards
                    interruption = error
            if interruption is not None:
                raise interruption
    except DeadlineExceededError:
        if None not in kept:  # it came into fn, or fn never began
            raise
    finally:
        interruption = None  # or it would keep this frame alive, and the frame it
    return kept[None]


class _Call:
    """A call that runs in *thread* and is to be told at *at*, by the monotonic clock."""

    __slots__ = ("at", "live", "lock", "patience", "raised", "thread")

    def __init__(self, at: float, thread: int) -> None:
        self.at = at
        self.thread = thread
        self.lock = threading.Lock()
        self.live = True
        self.raised = False
        self.patience = _FIRST_PATIENCE

    def tell(self) -> bool:
        """Raise in the call, once; False if it is in code where that would do harm, and is to be tried again."""
        with self.lock:
            if self.live and not self.raised:
                if self.thread != threading.get_ident() and _delicate(self.thread):
                    return False
                self.raised = True
                _interpreter().raise_in(self.thread, _interpreter().deadline)
        return True

    def put_off(self, now: float) -> None:
        """Try again soon, and later and later: a call may wait in such code for hours."""
        self.at = now + self.patience
        self.patience = min(self.patience * 1.1, _LONGEST_PATIENCE)

    def end(self) -> bool:
        """Let no exception come from now on. It may come while this runs; to be repeated then, until it returns True."""
        with self.lock:
            self.live = False
        if self.raised:
            _interpreter().raise_in(self.thread, _interpreter().nothing)
        _watchdog.calls.pop(self.thread, None)
        return True

    def suspend(self) -> None:
        """Let no exception come until `resume`: one that is on its way comes here, as the lock is given back."""
        with self.lock:
            self.live = False
        _watchdog.calls.pop(self.thread, None)

    def resume(self) -> None:
        with self.lock:
            self.live = True
        _watchdog.add(self)


# --- the watchdog -----------------------------------------------------------------------------------------------------


class _Watchdog:
    """The thread that tells calls, started with the first of them. It knows those that run, and none that are over."""

    def __init__(self) -> None:
        self.calls: dict[int, _Call] = {}  # by thread
        self._next = inf  # when it wakes by itself
        self._asked = inf  # when it was last asked to wake
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        # Held unless it rings. A bare lock: ringing it is one call into C, with no state that an exception could spoil.
        self._bell = threading.Lock()
        self._bell.acquire()

    def add(self, call: _Call) -> None:
        # No call is overlooked: it is added before _next is read, and _next is infinite while the thread lists the calls.
        self.calls[call.thread] = call
        if call.at < self._next:  # rarely, most deadlines being later than that of a call which came before
            self._asked = call.at
            self._wake()

    def _wake(self) -> None:
        if self._thread is None and not self._start():
            return
        with suppress(RuntimeError):  # it rings already
            self._bell.release()

    def _start(self) -> bool:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="deadlines of deferlib", daemon=True)
                try:
                    if _green():
                        raise RuntimeError("greenlets stand in for threads")
                    thread.start()
                except RuntimeError as error:  # or at the process's limit of threads, or at its end
                    log.warning("calls in this process won't be told of their deadlines: %s", error)
                    self._next = -inf  # don't try that again with every call
                    return False
                self._thread = thread
        return True

    def _watch(self) -> None:
        while True:
            self._next = inf
            now = monotonic()
            # The call that asked may be over by now. To keep its time saves the next ones asking: they take microseconds.
            earliest, self._asked = self._asked, inf
            if earliest <= now:
                earliest = inf
            for call in list(self.calls.values()):  # in one step: no call is added or removed meanwhile
                if call.at <= now and not call.tell():
                    call.put_off(now)
                if now < call.at < earliest:
                    earliest = call.at
            # A call that is added from here on sees when this wakes; one that was added before has rung, or waits longer.
            self._next = earliest
            self._bell.acquire(timeout=min(earliest - now, threading.TIMEOUT_MAX))


# Code that takes and gives back locks by functions of Python. At the beginning of such a function an exception finds no
# `try` around it: the lock would be held for ever, and with it everybody who logs, waits, or imports.
_LOCKING = frozenset(
    {
        "_frozen_importlib", "_frozen_importlib_external", "concurrent", "importlib", "logging", "multiprocessing", "queue",
        "threading",
    }
)  # fmt: skip
_INNERMOST = _LOCKING | {"_weakrefset", "contextlib", "deferlib", "weakref"}  # these stand around whole calls, too
_FIRST_PATIENCE = 0.0005  # seconds
_LONGEST_PATIENCE = 0.02


def _delicate(thread: int) -> bool:
    """Tell whether *thread* is in such code. It doesn't go on before it is told: nobody else gets the GIL in between."""
    frame = sys._current_frames().get(thread)
    if frame is None or _module(frame) in _INNERMOST:
        return True
    while frame is not None and frame.f_code is not _guarded.__code__:
        if _module(frame) in _LOCKING:
            return True
        frame = frame.f_back
    return False


def _module(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else ""


# Where greenlets stand in for threads, all of them are one thread, and an exception would come to whichever runs.
_GREEN = (("gevent.monkey", "is_module_patched", "threading"), ("eventlet.patcher", "is_monkey_patched", "thread"))


def _green() -> bool:
    for module, ask, name in _GREEN:
        found = sys.modules.get(module)
        if found is not None and getattr(found, ask)(name):
            return True
    return False


class _Interpreter(NamedTuple):
    raise_in: Callable[[int, Any], int]  # asks for an exception in a thread; takes back what was asked for: `nothing`
    deadline: Any
    nothing: Any


@cache
def _interpreter() -> _Interpreter:
    import ctypes  # 1.6 ms: only where something is raised

    # A prototype of our own: `ctypes.pythonapi.PyThreadState_SetAsyncExc` and its argument types are everybody's.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)
    function = prototype(("PyThreadState_SetAsyncExc", ctypes.pythonapi))
    return _Interpreter(function, ctypes.py_object(DeadlineExceededError), ctypes.py_object())


_watchdog = _Watchdog()


def _forget() -> None:
    """Begin anew in a forked process: the thread isn't there, and a call that forked is the parent's."""
    global _watchdog
    call = _watchdog.calls.get(threading.get_ident())
    if call is not None:
        call.lock, call.live = threading.Lock(), False  # the watchdog may have held it
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
