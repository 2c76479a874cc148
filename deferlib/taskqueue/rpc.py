"""A request to the store that runs in the background: what the `…_async` functions return.

App Engine's `UserRPC`. Argument errors come at once, the store's at `get_result()`; task objects change only there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from deferlib import deadline as deadlines
from deferlib.errors import InvalidDeadlineError, RPCDeadlineExceededError, TaskQueueError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_THREADS = 8  # requests of one process at once; writers of a store take turns anyway
_MOST_SECONDS = 10 * 365 * 86_400.0

IDLE, RUNNING, FINISHING = 0, 1, 2

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


class UserRPC:
    """One request, made once. `create_rpc` makes one with a deadline or a callback; the `…_async` functions make the rest.

    *deadline* is in seconds from the call, None for as long as the store takes; *callback* takes no arguments and is called
    once, by whichever of `wait`, `check_success` and `get_result` finds the request done first, in its thread.
    """

    def __init__(
        self, service: str = "taskqueue", deadline: float | None = None, callback: Callable[[], object] | None = None
    ) -> None:
        if deadline is not None:
            check_deadline(deadline)
        self.callback = callback
        self._service = service
        self._deadline = deadline
        self._method: str | None = None
        self._request: object = None
        self._hook: Callable[[UserRPC], Any] | None = None
        self._user_data: object = None
        self._future: Future[Any] | None = None
        self._until: float | None = None
        self._expired: RPCDeadlineExceededError | None = None
        self._called_back = False
        self._process = 0  # that made the call

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def service(self) -> str:
        """The service, `taskqueue`."""
        return self._service

    @property
    def method(self) -> str | None:
        """What is asked, like `BulkAdd`; None before the call."""
        return self._method

    @property
    def deadline(self) -> float | None:
        """Seconds that it may take; None for as long as the store takes."""
        return self._deadline

    @property
    def request(self) -> object:
        """What the call is about: the tasks, or the names."""
        return self._request

    @property
    def response(self) -> object:
        """What the store answered; None before it has, and if it failed."""
        future = self._future
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()

    @property
    def state(self) -> int:
        """0 before the call, 1 while it runs, 2 when it is done."""
        if self._future is None:
            return IDLE
        return FINISHING if self._future.done() or self._expired is not None else RUNNING

    @property
    def get_result_hook(self) -> Callable[[UserRPC], Any] | None:
        """The function that turns the answer into the result."""
        return self._hook

    @property
    def user_data(self) -> object:
        """What `make_call` was given for the hook's use."""
        return self._user_data

    @property
    def future(self) -> Future[Any]:
        """A `concurrent.futures.Future` of the answer, for `asyncio.wrap_future` and its like. It is not the result.

        To cancel it cancels the waiting, not the request.
        """
        from concurrent.futures import Future

        copy: Future[Any] = Future()

        def pass_on(done: Future[Any]) -> None:
            if done.cancelled():  # at its deadline
                copy.cancel()
            if copy.set_running_or_notify_cancel():
                error = done.exception()
                copy.set_exception(error) if error is not None else copy.set_result(done.result())

        self._started().add_done_callback(pass_on)
        return copy

    # --- what it does -----------------------------------------------------------------------------------------------

    def make_call(
        self,
        method: str,
        request: object,
        work: Callable[[], Any],
        get_result_hook: Callable[[UserRPC], Any] | None = None,
        user_data: object = None,
    ) -> None:
        """Start *work* in the background. `ValueError` if this object was used before."""
        if self._future is not None:
            raise ValueError("this RPC object was used before; create_rpc() makes a new one")
        self._method, self._request, self._hook, self._user_data = method, request, get_result_hook, user_data
        if self._deadline is not None:
            self._until = time.monotonic() + self._deadline
        self._process = os.getpid()
        self._future = deadlines.shielded(_submit, work)

    def wait(self) -> None:
        """Wait until the request is done, or its deadline has passed; then call the callback, once."""
        from concurrent.futures import wait

        future = self._started()
        if not future.done() and self._process != os.getpid():
            raise TaskQueueError("this request was begun before the process was forked: only the parent hears of its end")
        if self._expired is None and not future.done():
            wait([future], None if self._until is None else max(self._until - time.monotonic(), 0))
            if not future.done():
                self._expire(future)
        if not self._called_back:
            self._called_back = True
            if self.callback is not None:
                self.callback()

    def check_success(self) -> None:
        """Wait, then raise what the store raised, or `RPCDeadlineExceededError`."""
        self.wait()
        if self._expired is not None:
            raise self._expired
        error = self._started().exception()
        if error is not None:
            raise error

    def get_result(self) -> Any:
        """Wait, then return the result or raise what went wrong; it may be called again, and says the same."""
        if self._hook is not None:
            return self._hook(self)
        self.check_success()
        return self.response

    @classmethod
    def wait_any(cls, rpcs: Iterable[UserRPC]) -> UserRPC | None:
        """Wait until one of *rpcs* is done and return it; None if there are none."""
        from concurrent.futures import FIRST_COMPLETED, wait

        waiting = list(rpcs)
        while waiting:
            for rpc in waiting:
                if rpc._done():
                    rpc.wait()
                    return rpc
            ends = [rpc._until for rpc in waiting if rpc._until is not None]
            timeout = max(min(ends) - time.monotonic(), 0) if ends else None
            wait([rpc._started() for rpc in waiting], timeout, return_when=FIRST_COMPLETED)
        return None

    @classmethod
    def wait_all(cls, rpcs: Iterable[UserRPC]) -> None:
        """Wait until all of *rpcs* are done."""
        for rpc in list(rpcs):
            rpc.wait()

    def _done(self) -> bool:
        """Tell whether waiting ends at once."""
        over = self._until is not None and time.monotonic() >= self._until
        lost = self._process != os.getpid()  # with the parent's threads: waiting says so
        return self._started().done() or self._expired is not None or over or lost

    def _started(self) -> Future[Any]:
        if self._future is None:
            raise ValueError("this RPC object has made no call yet; pass it as rpc= to an …_async function")
        return self._future

    def _expire(self, future: Future[Any]) -> None:
        never = future.cancel()
        self._expired = RPCDeadlineExceededError(
            f"{self._method} took longer than its deadline of {self._deadline:g} s; "
            + ("it was never begun" if never else "it may still be done: adding the same Task objects again is safe")
        )

    def __repr__(self) -> str:
        return f"<UserRPC {self._method or 'not called'}, {('idle', 'running', 'done')[self.state]}>"


def create_rpc(deadline: float | None = None, callback: Callable[[], object] | None = None) -> UserRPC:
    """Return an RPC object for one `…_async` call, which returns it.

    *deadline* is in seconds; `InvalidDeadlineError` unless it is above 0, TypeError if it is no number.
    """
    return UserRPC("taskqueue", deadline, callback)


def check_deadline(deadline: object) -> None:
    """Raise TypeError if *deadline* is no number, `InvalidDeadlineError` if it is no time to wait."""
    if not isinstance(deadline, int | float):
        raise TypeError(f"a deadline is a number of seconds, not {type(deadline).__name__}")
    if not 0 < deadline <= _MOST_SECONDS:
        raise InvalidDeadlineError("a deadline is a number of seconds above 0")


def check_rpc(rpc: object) -> None:
    """Raise unless *rpc* is None or one that `create_rpc` made and nobody has used: TypeError, ValueError."""
    if rpc is None:
        return
    if not isinstance(rpc, UserRPC):
        raise TypeError(f"rpc is what create_rpc() returns, not {type(rpc).__name__}")
    if rpc.service != "taskqueue":
        raise ValueError(f"rpc is for the service 'taskqueue', not {rpc.service!r}")
    if rpc.state != IDLE:
        raise ValueError("this RPC object was used before; create_rpc() makes a new one")


def _submit(work: Callable[[], Any]) -> Future[Any]:
    global _pool
    with _pool_lock:
        try:
            if _pool is None:
                from concurrent.futures import ThreadPoolExecutor  # 5 ms: only where it is needed

                _pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="deferlib.rpc")
            return _pool.submit(work)
        except RuntimeError:  # the interpreter is ending, and starts no threads: do it here
            pass
    return _done_here(work)


def _done_here(work: Callable[[], Any]) -> Future[Any]:
    from concurrent.futures import Future

    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def _after_fork() -> None:
    """Forget the pool: its threads stayed in the parent."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
