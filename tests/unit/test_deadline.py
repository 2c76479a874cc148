"""Dispatch deadlines: who is told, when, and that nobody else ever is."""

from __future__ import annotations

import asyncio
import gc
import importlib
import io
import logging
import queue
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from time import monotonic, perf_counter, sleep
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import deferlib
from deferlib import attempt as attempts
from deferlib import config, context, deadline, deferred, payload, testing
from deferlib.context import ENVIRON_KEY, Dispatch, TaskContext
from deferlib.contrib.asgi import wrap_asgi_app
from deferlib.core.model import SECOND, Claim, Delivery, Kind, Micros, Result
from deferlib.deadline import within
from deferlib.engine.bridge import as_wsgi
from deferlib.engine.local import LocalTransport
from deferlib.errors import DeadlineExceededError
from deferlib.keys import Keyring
from deferlib.server.wsgi import wrap_wsgi_app

KEY = "a key for the tests of deadlines"
URL = deferred.DEFAULT_URL
PATIENCE = 10  # seconds before a test that hangs fails
SOON = 0.02  # seconds
BRIEF = 0.15  # seconds of a task: it is told after half of them, when its call surely has begun
CALLS: list[Any] = []


@pytest.fixture(autouse=True)
def _nobody_elses_code() -> Iterator[None]:
    """Let the garbage collector run no callback (Hypothesis has one) and no finalizer: an exception in one is lost."""
    gc.collect()
    callbacks, gc.callbacks[:] = list(gc.callbacks), []
    gc.disable()
    yield
    gc.enable()
    gc.callbacks[:] = callbacks


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    CALLS.clear()
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key=KEY)
    yield
    config.install(former)
    assert threading.get_ident() not in deadline._watchdog.calls


def task(seconds: float = BRIEF, url: str = URL) -> TaskContext:
    """Return the task of an attempt that may take so many *seconds*: it is told when half of them are over."""
    now = context.SYSTEM_CLOCK.now()
    return TaskContext(
        id=77, user_name="", queue="mail", attempt=3, execution_count=1, eta_micros=now,
        deadline_micros=now + round(seconds * SECOND), fence=9, namespace="", url=url, clock=context.SYSTEM_CLOCK,
    )  # fmt: skip


def spin(seconds: float = PATIENCE) -> None:
    """Run Python for so long."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def sealed(fn: Any, *args: Any) -> bytes:
    binding = payload.Binding(77, "", "mail", URL, "")
    return payload.seal(payload.dump_call(fn, args, {}), Keyring([KEY.encode()]).signing, binding)


def perform(fn: Any, *args: Any, seconds: float = BRIEF) -> attempts.Answer:
    return attempts.perform(Dispatch(task(seconds), {}), sealed(fn, *args))


# --- nobody else is told ----------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


OWN = OwnError()


class Hammer:
    """Makes calls that end around their deadlines, and counts how they end."""

    def __init__(self, seed: int, count: int) -> None:
        self.rng = Random(seed)
        self.count = count
        self.ends: Counter[str] = Counter()
        self.leaks: list[str] = []
        self.last = -1  # the call that came to its end

    def __call__(self) -> None:
        where = "before"
        try:
            for number in range(self.count):
                where = f"between, before {number}"
                seconds = self.rng.expovariate(20_000)  # 0.05 ms on average, up to 0.6
                work = self.rng.choice((self.returns, self.raises, self.catches))
                spent = seconds * self.rng.uniform(0.7, 2.2)
                where = f"in {number}"
                self.ends[self.outcome(seconds, work, number, spent)] += 1
        except DeadlineExceededError:
            self.leaks.append(where)

    def outcome(self, seconds: float, work: Callable[[int, float], int], number: int, spent: float) -> str:
        try:
            value = within(seconds, work, number, spent)
        except DeadlineExceededError:
            if self.last == number:
                self.leaks.append(f"after the end of {number}")
            return "told"
        except OwnError:
            assert self.last == number
            return "own error"
        assert value == self.last == number
        return "value"

    # The last that each of these does is no call, so that nothing can come between it and the end.

    def returns(self, number: int, spent: float) -> int:
        spin(spent)
        self.last = number
        return number

    def raises(self, number: int, spent: float) -> NoReturn:
        spin(spent)
        self.last = number
        raise OWN

    def catches(self, number: int, spent: float) -> int:
        with suppress(DeadlineExceededError):
            spin(spent)
        self.last = number
        return number


def test_no_exception_reaches_anything_but_its_own_call() -> None:
    hammers = [Hammer(seed, 25_000) for seed in range(4)]
    threads = [threading.Thread(target=hammer) for hammer in hammers]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)

    ends = sum((hammer.ends for hammer in hammers), Counter[str]())
    assert [leak for hammer in hammers for leak in hammer.leaks] == []
    assert ends.total() == 100_000
    assert all(ends[end] > 500 for end in ("told", "own error", "value")), ends
    assert deadline._watchdog.calls == {}


class Late(defaultdict[int, int]):
    """A look-up in it asks for the exception, as the watchdog does, in one step of C: Python hasn't looked for it yet."""

    def __init__(self) -> None:
        interpreter = deadline._interpreter()
        super().__init__(partial(interpreter.raise_in, threading.get_ident(), interpreter.deadline))
        deadline._watchdog.calls[threading.get_ident()].raised = True


def test_value_that_was_returned_before_the_exception_came_counts() -> None:
    def fn() -> str:
        late = Late()
        late[0]
        return "value"

    for _ in range(100):
        assert within(PATIENCE, fn) == "value"
    spin(SOON)


def test_value_of_a_call_in_c_counts_too() -> None:
    call = deadline._Call(monotonic() + PATIENCE, threading.get_ident())
    call.raised = True
    interpreter = deadline._interpreter()

    # After a call into C, Python looks for exceptions before it does anything with the value.
    assert deadline._guarded(call, partial(interpreter.raise_in, call.thread, interpreter.deadline)) == 1


def test_error_that_was_raised_before_the_exception_came_counts() -> None:
    def fn() -> NoReturn:
        late = Late()
        late[0]
        raise OWN

    for _ in range(100):
        with pytest.raises(OwnError):
            within(PATIENCE, fn)
    spin(SOON)


def test_ctrl_c_at_the_end_of_a_call_waits_until_the_call_can_not_be_told_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = deadline._Call.end
    interruptions = [KeyboardInterrupt(), DeadlineExceededError()]

    def interrupted(self: Any) -> bool:
        if interruptions:
            raise interruptions.pop(0)
        return end(self)

    monkeypatch.setattr(deadline._Call, "end", interrupted)

    with pytest.raises(KeyboardInterrupt):
        within(SOON, int)

    assert not interruptions
    spin(2 * SOON)


def test_call_is_told_once() -> None:
    def fn() -> str:
        call = deadline._watchdog.calls[threading.get_ident()]
        with pytest.raises(DeadlineExceededError):
            call.tell()
        call.tell()
        spin(SOON)
        return "value"

    assert within(PATIENCE, fn) == "value"


def test_call_that_is_over_is_not_told() -> None:
    call = within(PATIENCE, lambda: deadline._watchdog.calls[threading.get_ident()])

    call.tell()

    spin(SOON)
    assert not call.raised


def test_watchdog_knows_no_call_that_is_over_and_is_not_woken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = deadline._Watchdog()
    monkeypatch.setattr(deadline, "_watchdog", watchdog)
    interval = sys.getswitchinterval()
    within(2 * PATIENCE, int)  # starts the thread
    sys.setswitchinterval(PATIENCE)  # the thread looks when this one waits, and the call is over by then
    try:
        at = monotonic() + PATIENCE
        within(PATIENCE, int)
        threading.Event().wait(SOON)
        next_at = watchdog._next
        for _ in range(1_000):
            within(PATIENCE, int)
    finally:
        sys.setswitchinterval(interval)

    assert at <= next_at < at + 1
    assert (watchdog._next, watchdog._asked) == (next_at, float("inf"))
    assert watchdog.calls == {}


# --- calls ------------------------------------------------------------------------------------------------------------


def note(value: Any = "ran") -> Any:
    CALLS.append(value)
    return value


def stay() -> None:
    spin()
    CALLS.append("never told")


def save() -> None:
    try:
        stay()
    except DeadlineExceededError:
        CALLS.append("saved")


def go_on_whatever_happens() -> None:
    try:
        stay()
    except Exception:
        CALLS.append("swallowed")


async def stay_asleep() -> None:
    CALLS.append("asleep")
    await asyncio.Event().wait()


async def save_asleep() -> None:
    try:
        await stay_asleep()
    except asyncio.CancelledError:
        CALLS.append("saved")


async def time_out_by_itself() -> None:
    raise TimeoutError("mine")


TOLD = "DeadlineExceededError: stopped shortly before its dispatch deadline, "


def test_call_that_is_told_has_failed_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    answer = perform(stay)

    assert (answer.status, answer.outcome) == (500, "retry")
    assert answer.body.startswith(TOLD)
    assert answer.body.endswith(" UTC")
    assert CALLS == []
    (record,) = caplog.records
    name = f"{__name__}.stay"
    assert record.getMessage() == f"{name} was stopped at its deadline (queue mail, task 77, attempt 3)"


def test_work_can_be_saved_and_that_is_a_success() -> None:
    answer = perform(save)

    assert (answer.status, answer.outcome) == (200, "ok")
    assert CALLS == ["saved"]


def test_broad_except_does_not_swallow_it() -> None:
    answer = perform(go_on_whatever_happens)

    assert answer.body.startswith(TOLD)
    assert CALLS == []


def test_call_in_time_sees_nothing() -> None:
    for _ in range(50):
        assert perform(note, seconds=60).status == 200
    assert perform(spin, BRIEF, seconds=60).status == 200


def test_call_is_told_a_margin_before_its_deadline_and_at_half_of_a_short_one() -> None:
    deferlib.configure(store="sqlite:///:memory:", key=KEY, deadline_margin=100)

    assert deadline._seconds(task(600)) == pytest.approx(500, abs=1)
    assert deadline._seconds(task(150)) == pytest.approx(75, abs=1)
    assert (deadline._seconds(task(-4)) or 0) == pytest.approx(-2, abs=1)


def test_call_that_comes_after_its_deadline_has_failed() -> None:
    answer = perform(stay, seconds=-1)
    assert (answer.status, answer.outcome) == (500, "retry")
    assert "it came too late" in answer.body


def test_margin_off_tells_nobody() -> None:
    deferlib.configure(store="sqlite:///:memory:", key=KEY, deadline_margin="off")

    assert perform(spin, BRIEF).status == 200


def test_clock_of_tests_tells_nobody() -> None:
    deferlib.configure(store="sqlite:///:memory:", key=KEY, clock=testing.VirtualClock())

    assert perform(spin, BRIEF).status == 200


@pytest.mark.parametrize(
    ("module", "ask", "asked"),
    [("gevent.monkey", "is_module_patched", "threading"), ("eventlet.patcher", "is_monkey_patched", "thread")],
)
def test_greenlets_are_not_told(
    module: str, ask: str, asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deadline, "_watchdog", deadline._Watchdog())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{ask: lambda name: name == asked}))

    for _ in range(2):
        assert perform(spin, BRIEF).status == 200

    assert [record.getMessage() for record in caplog.records] == [
        "calls in this process won't be told of their deadlines: greenlets stand in for threads"
    ]


def test_threads_are_told_where_gevent_is_installed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "_watchdog", deadline._Watchdog())
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda name: False))

    assert perform(stay).body.startswith(TOLD)


def test_call_in_c_is_not_interrupted_and_told_afterwards() -> None:
    gate = threading.Lock()
    gate.acquire()
    opened = threading.Event()

    def open_gate() -> None:
        opened.set()
        gate.release()

    def fn() -> bool:
        try:
            gate.acquire(timeout=PATIENCE)
            spin()
        except DeadlineExceededError:
            return opened.is_set()
        return False

    threading.Timer(5 * SOON, open_gate).start()

    assert within(SOON, fn)


def test_later_call_with_an_earlier_deadline_is_told_in_time() -> None:
    entered, told = threading.Event(), threading.Event()

    def long() -> bool:
        entered.set()
        return told.wait(PATIENCE)

    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(within(PATIENCE, long)))
    thread.start()
    entered.wait(PATIENCE)

    with pytest.raises(DeadlineExceededError):
        within(SOON, spin)

    told.set()
    thread.join()
    assert results == [True]


def test_process_without_another_thread_to_spare_works_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(deadline, "_watchdog", deadline._Watchdog())
    monkeypatch.setattr(threading.Thread, "start", start)

    assert [within(SOON, int) for _ in range(3)] == [0, 0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "calls in this process won't be told of their deadlines: can't start new thread"
    ]


FORK = """
import os, sys, time
from deferlib.deadline import within
from deferlib.errors import DeadlineExceededError

def spin(seconds=10.0):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass

def told():
    try:
        within(0.02, spin)
    except DeadlineExceededError:
        return True
    return False

def fork():
    child = os.fork()
    if child == 0:
        try:
            spin(0.2)  # the deadline is the parent's
            os._exit(0 if told() and told() else 2)
        except BaseException:
            os._exit(3)
    try:
        spin()
    except DeadlineExceededError:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 4

assert told()
code = within(0.1, fork)
assert told()
sys.exit(code)
"""


def test_forked_process_has_a_watchdog_of_its_own_and_not_its_parents_deadline() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


# --- calls inside calls -----------------------------------------------------------------------------------------------


def test_outer_call_is_not_told_while_an_inner_one_has_a_deadline_of_its_own() -> None:
    def outer() -> str:
        call = deadline._watchdog.calls[threading.get_ident()]
        assert within(PATIENCE, inner, call) == "not told"
        with pytest.raises(DeadlineExceededError):
            call.tell()
        return "told"

    def inner(call: Any) -> str:
        call.tell()
        spin(SOON)
        return "not told"

    assert within(2 * PATIENCE, outer) == "told"


def test_inner_deadline_ends_the_inner_call_only() -> None:
    def outer() -> str:
        with pytest.raises(DeadlineExceededError):
            within(SOON, spin)
        spin(SOON)
        return "went on"

    assert within(PATIENCE, outer) == "went on"


def test_outer_deadline_comes_first_and_goes_through_the_inner_call() -> None:
    def outer() -> None:
        within(PATIENCE, spin)

    with pytest.raises(DeadlineExceededError):
        within(SOON, outer)


def test_outer_deadline_is_told_after_an_inner_call_that_ignored_its_own() -> None:
    def inner() -> str:
        with pytest.raises(DeadlineExceededError):
            spin()
        spin(12 * SOON)
        return "done"

    def outer() -> str:
        try:
            CALLS.append(within(SOON, inner))
            spin()
        except DeadlineExceededError:
            return "told"
        return "never told"

    assert within(10 * SOON, outer) == "told"
    assert CALLS in ([], ["done"])  # it comes as the inner call ends


def test_unguarded_code_is_not_told_nor_what_follows_if_the_time_came_meanwhile() -> None:
    def outer() -> str:
        deadline.unguarded(spin, 8 * SOON)
        spin(SOON)
        return "not told"

    assert deadline.unguarded(note, "plain") == "plain"
    assert within(5 * SOON, outer) == "not told"


def test_what_follows_unguarded_code_is_told() -> None:
    def outer() -> None:
        deadline.unguarded(note)
        spin()

    with pytest.raises(DeadlineExceededError):
        within(SOON, outer)
    assert CALLS == ["ran"]


def test_deferred_call_in_a_view_of_the_same_task() -> None:
    answers: list[int] = []

    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body, status, headers = deferred.Handler().post(environ)
        answers.append(status)
        start_response(f"{status.value} X", headers)
        return [body.encode()]

    app = wrap_wsgi_app(view, use_deferred=False)

    assert request(app, 60, body=sealed(note))[0] == 200
    assert CALLS == ["ran"]
    status, headers, body = request(app, body=sealed(stay))
    assert (status, headers["X-Deferlib-Outcome"], answers) == (500, "retry", [200, 500])
    assert body.startswith(TOLD)
    assert request(app, body=sealed(stay_asleep))[2].startswith(TOLD)
    assert answers == [200, 500, 500]
    assert request(app, body=sealed(save_asleep))[0] == 200
    assert CALLS == ["ran", "asleep", "asleep", "saved"]


# --- coroutines -------------------------------------------------------------------------------------------------------


def test_coroutine_is_cancelled() -> None:
    answer = perform(stay_asleep)

    assert (answer.status, answer.outcome) == (500, "retry")
    assert answer.body.startswith(TOLD)
    assert CALLS == ["asleep"]


def test_coroutine_can_save_its_work() -> None:
    assert perform(save_asleep).outcome == "ok"
    assert CALLS == ["asleep", "saved"]


def test_coroutine_that_times_out_by_itself_has_failed_by_itself() -> None:
    assert perform(time_out_by_itself, seconds=60).body == "TimeoutError: mine"


def test_coroutine_is_cancelled_also_where_a_loop_runs_already() -> None:
    async def serve() -> attempts.Answer:
        return perform(stay_asleep)

    assert asyncio.run(serve()).body.startswith(TOLD)


@pytest.mark.parametrize("fn", [stay, stay_asleep])
def test_calls_on_the_loop_of_an_asgi_app(fn: Any) -> None:
    scope, sent = scope_of(task(), URL), Sent()

    asyncio.run(wrap_asgi_app(refuse)(scope, receiver(sealed(fn)), sent))

    assert sent.status == 500
    assert sent.body.startswith(TOLD)


@pytest.mark.parametrize("fn", [stay, stay_asleep])
def test_calls_beside_an_asgi_app_in_the_engines_process(fn: Any) -> None:
    bridge = as_wsgi(refuse)
    try:
        status, headers, body = request(bridge, body=sealed(fn))
    finally:
        bridge.close()

    assert (status, headers["X-Deferlib-Outcome"]) == (500, "retry")
    assert body.startswith(TOLD)


# --- views ------------------------------------------------------------------------------------------------------------


def request(app: Any, seconds: float = BRIEF, body: bytes = b"", url: str = "/view") -> tuple[int, dict[str, str], str]:
    """Make a task's request as the in-process engine does; the answer may only start once."""
    started: list[tuple[str, list[tuple[str, str]]]] = []
    path = URL if body else url
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": path, "QUERY_STRING": "", "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body), ENVIRON_KEY: Dispatch(task(seconds, path), {}),
    }  # fmt: skip
    parts = app(environ, lambda status, headers: started.append((status, headers)))
    text = b"".join(parts).decode()
    ((status, headers),) = started
    return int(status[:3]), dict(headers), text


def test_view_that_is_told_is_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        stay()
        return [b"never"]

    status, headers, body = request(wrap_wsgi_app(view))

    assert (status, headers["X-Deferlib-Outcome"]) == (500, "retry")
    assert body.startswith(TOLD)
    (record,) = caplog.records
    assert record.getMessage() == "/view was stopped at its deadline (queue mail, task 77, attempt 3)"
    assert record.exc_info is not None


def test_view_that_is_a_generator_is_told_and_closed() -> None:
    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        try:
            start_response("200 OK", [])
            yield b"some"
            stay()
        finally:
            CALLS.append("closed")

    assert request(wrap_wsgi_app(view))[0] == 500
    assert CALLS == ["closed"]


def test_body_that_is_told_while_it_is_read_is_closed() -> None:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield b"some"
            stay()

        def close(self) -> None:
            CALLS.append("closed")

    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        return Body()

    assert request(wrap_wsgi_app(view))[0] == 500
    assert CALLS == ["closed"]


def test_view_that_saves_its_work_answers_for_itself() -> None:
    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        save()
        write = start_response("202 Saved", [("X-Mine", "1")])
        write(b"one, ")
        return iter([b"two"])

    assert request(wrap_wsgi_app(view)) == (202, {"X-Mine": "1"}, "one, two")
    assert CALLS == ["saved"]


def test_last_start_of_an_answer_counts() -> None:
    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        try:
            raise OWN
        except OwnError:
            start_response("500 Oh", [("X-Mine", "1")], sys.exc_info())
        return [b"no"]

    assert request(wrap_wsgi_app(view), 60) == (500, {"X-Mine": "1"}, "no")


def test_error_of_a_view_is_the_servers_and_view_without_a_start_starts_nothing() -> None:
    def fails(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise OWN

    with pytest.raises(OwnError):
        request(wrap_wsgi_app(fails), 60)
    with pytest.raises(ValueError, match="not enough values"):
        request(wrap_wsgi_app(lambda environ, start_response: []), 60)


def test_request_of_anybody_else_is_not_told_and_streamed() -> None:
    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        assert not deadline._watchdog.calls
        yield b"first"
        CALLS.append("second")
        yield b"second"

    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/view"}
    body = iter(wrap_wsgi_app(view)(environ, lambda *args: None))

    assert next(body) == b"first"
    assert CALLS == []


class Sent:
    """What an ASGI app has sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        (start,) = [message for message in self.messages if message["type"] == "http.response.start"]
        return int(start["status"])

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


def scope_of(of: TaskContext, path: str) -> dict[str, Any]:
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "root_path": "", "headers": []}
    return {**scope, "client": None, ENVIRON_KEY: Dispatch(of, {})}


def receiver(body: bytes = b"") -> Callable[[], Any]:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("there is no such view, and no lifespan")


def serve(app: Any, seconds: float = BRIEF) -> Sent:
    sent = Sent()
    asyncio.run(wrap_asgi_app(app)(scope_of(task(seconds, "/view"), "/view"), receiver(), sent))
    return sent


def test_asgi_view_is_cancelled_and_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    async def view(scope: Any, receive: Any, send: Any) -> None:
        await stay_asleep()

    sent = serve(view)

    assert sent.status == 500
    assert sent.body.startswith(TOLD)
    assert (b"x-deferlib-outcome", b"retry") in sent.messages[0]["headers"]
    assert [record.getMessage() for record in caplog.records if record.name == "deferlib.handler"] == [
        "/view was stopped at its deadline (queue mail, task 77, attempt 3)"
    ]


def test_asgi_view_that_has_begun_to_answer_is_broken_off() -> None:
    sent = Sent()

    async def view(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await stay_asleep()

    with pytest.raises(TimeoutError, match="dispatch deadline"):
        asyncio.run(wrap_asgi_app(view)(scope_of(task(), "/view"), receiver(), sent))

    assert len(sent.messages) == 1


def test_asgi_view_that_saves_its_work_answers_for_itself() -> None:
    async def view(scope: Any, receive: Any, send: Any) -> None:
        await save_asleep()
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b"saved"})

    sent = serve(view)

    assert (sent.status, sent.body) == (202, "saved")


# --- the engine in the app's process ----------------------------------------------------------------------------------


class Gate:
    """An app whose calls wait, in C, until they are let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        self.entered.release()
        assert self.open.acquire(timeout=PATIENCE)
        start_response("200 OK", [])
        return [b"late"]


def delivery(id: int = 1, seconds: float = SOON) -> Delivery:
    fields: dict[str, Any] = dict.fromkeys(Claim._fields, 0)
    for name in ("reason", "target", "headers", "namespace", "tag", "retry", "history"):
        fields[name] = ""
    fields |= {
        "id": id,
        "claims": 7,
        "queue": "mail",
        "name": None,
        "attempts": 1,
        "method": "POST",
        "url": "/",
        "body": b"",
    }
    return Delivery(Claim(**fields), "", round(seconds * SECOND))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def transport(gate: Gate) -> Iterator[LocalTransport]:
    transport = LocalTransport(gate, context.SYSTEM_CLOCK, threads=2)
    yield transport
    gate.open.release(10)
    transport.close()


def collect(transport: LocalTransport, count: int = 1) -> list[Result]:
    """Wait for *count* results, and sleep only in `wait`."""
    found: list[Result] = []
    end: Micros = context.SYSTEM_CLOCK.now() + PATIENCE * SECOND
    while len(found) < count:
        assert context.SYSTEM_CLOCK.now() < end
        transport.wait(end)
        found += transport.results()
    return found


def test_call_past_its_deadline_is_reported_while_it_runs_and_its_end_is_dropped(
    transport: LocalTransport, gate: Gate
) -> None:
    for id in (1, 2, 3):
        sent = context.SYSTEM_CLOCK.now()
        transport.send(delivery(id))

        (result,) = collect(transport)

        assert (result.id, result.claims, result.kind, result.status) == (id, 7, Kind.TIMEOUT, 0)
        assert result.error == "no answer within 0.02 s; the call still runs in its thread"
        assert sent + SOON * SECOND <= result.started + SOON * SECOND <= result.ended < sent + 5 * SECOND
        assert transport.room("") == 1  # the other thread

        gate.open.release()
        while transport.room("") < 2:
            transport.wait(context.SYSTEM_CLOCK.now() + SECOND)
            assert transport.results() == []


def test_thread_that_came_back_is_used_again(transport: LocalTransport, gate: Gate) -> None:
    for id in (1, 2):
        transport.send(delivery(id))
        collect(transport)
        gate.entered.acquire(timeout=PATIENCE)
        gate.open.release()
        while transport.room("") < 2:
            transport.wait(context.SYSTEM_CLOCK.now() + SECOND)
            transport.results()

    for id in (3, 4, 5):
        transport.send(delivery(id, 60))
    for _ in range(2):
        assert gate.entered.acquire(timeout=PATIENCE)

    assert transport.results() == []  # the fifth waits for one of the two that run


def test_call_that_starts_while_the_engine_waits_has_its_deadline_too(transport: LocalTransport, gate: Gate) -> None:
    transport.send(delivery(1, 60))
    gate.entered.acquire(timeout=PATIENCE)
    threading.Timer(SOON, transport.send, [delivery(2)]).start()

    (result,) = collect(transport)

    assert (result.id, result.kind) == (2, Kind.TIMEOUT)


def test_deadline_counts_from_the_start_not_from_the_line(transport: LocalTransport, gate: Gate) -> None:
    for id in (1, 2):
        transport.send(delivery(id, 60))
        gate.entered.acquire(timeout=PATIENCE)
    transport.send(delivery(3))
    threading.Timer(3 * SOON, gate.open.release).start()

    first, second = collect(transport, 2)

    assert (first.id in (1, 2), first.kind) == (True, Kind.ANSWERED)
    assert (second.id, second.kind) == (3, Kind.TIMEOUT)
    assert second.started >= first.ended


def test_what_waits_for_threads_that_are_all_held_is_given_back(transport: LocalTransport, gate: Gate) -> None:
    for id in (1, 2, 3):
        transport.send(delivery(id))

    results = {result.id: result for result in collect(transport, 3)}

    assert [results[id].kind for id in (1, 2, 3)] == [Kind.TIMEOUT, Kind.TIMEOUT, Kind.UNSENT]
    assert results[3].error == "every thread is held by a call that is past its deadline"
    assert transport.room("") == 0


def test_cancelled_call_past_its_deadline_is_not_reported(transport: LocalTransport, gate: Gate) -> None:
    transport.send(delivery(1))
    gate.entered.acquire(timeout=PATIENCE)
    transport.cancel(1, 7)
    transport.send(delivery(2, 3 * SOON))

    assert [(result.id, result.kind) for result in collect(transport)] == [(2, Kind.TIMEOUT)]
    assert transport.room("") == 0
    assert not transport._cancelled


HELD = threading.Event()
AGAIN = threading.Event()


def hold() -> None:
    if deferlib.current_task().attempt == 1:  # type: ignore[union-attr]  # there is one
        assert HELD.wait(PATIENCE)
        CALLS.append("first ends")
    else:
        CALLS.append("second runs")
        AGAIN.set()


def test_engine_retries_a_call_that_holds_its_thread() -> None:
    deferlib.configure(
        store="sqlite:///:memory:", key=KEY, deadline_margin="off", limits={"min_deadline_seconds": 0.01},
        queues=[{"name": "short", "deferlib": {"deadline": "0.05s"}}],
    )  # fmt: skip
    try:
        with deferlib.running():
            deferlib.defer(hold, _queue="short")
            assert AGAIN.wait(PATIENCE)
            assert CALLS == ["second runs"]
    finally:
        HELD.set()


def move_clock(seconds: float) -> None:
    if deferlib.current_task().attempt > 1:  # type: ignore[union-attr]  # there is one
        return
    config.runtime().clock.advance(seconds)  # type: ignore[attr-defined]  # it is a virtual one


def test_call_that_moves_the_clock_of_tests_past_its_deadline_has_failed() -> None:
    with testing.engine() as engine:
        deferlib.defer(move_clock, 599)
        deferlib.defer(move_clock, 600)
        first, second, third = engine.advance(3_600)

    assert (first.ok, third.ok) == (True, True)
    assert (second.ok, second.status, second.error) == (False, 0, "no answer within 600 s")


# --- deferlib's own locks ---------------------------------------------------------------------------------------------


def test_call_that_is_told_while_it_defers_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    """A lock of the store that an interrupted call had just taken would be held for ever."""
    former = config.install(None)
    deferlib.configure(store=f"sqlite:///{tmp_path / 'tasks.db'}")
    queue = deferlib.taskqueue.Queue()
    added: list[int] = []
    told: list[int] = []

    def add_for_ever() -> None:
        while True:
            queue.add(deferlib.taskqueue.Task(url="/x"))
            added.append(1)

    def work(seed: int) -> None:
        for number in range(150):
            try:
                deadline.within(0.0005 + (number * 37 + seed) % 100 * 2e-5, add_for_ever)
            except deferlib.DeadlineExceededError:
                told.append(1)

    try:
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        queue.add(deferlib.taskqueue.Task(url="/x"))
        waiting = queue.fetch_statistics().tasks
        assert len(told) == 300
        # What was interrupted between the commit and the note of it is the difference.
        assert len(added) + 1 <= waiting <= len(added) + 1 + len(told)
    finally:
        config.runtime().close()
        config.install(former)


class Slow(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        sleep(0.00002)  # others wait for its lock meanwhile


def log_it() -> None:
    LOGGER.warning("x")


def queue_it() -> None:
    QUEUE.put(1)
    QUEUE.get()


def submit() -> None:
    POOL.submit(int).result()


def import_it() -> None:
    module = f"none_{threading.get_ident()}"
    with suppress(ImportError):
        importlib.import_module(module)


LOGGER = logging.getLogger("test_deadline")
LOGGER.propagate = False
LOGGER.addHandler(Slow())
QUEUE: queue.Queue[int] = queue.Queue(4)
POOL = ThreadPoolExecutor(2)


@pytest.mark.parametrize("use", [log_it, queue_it, submit, import_it])
def test_call_that_is_told_leaves_no_lock_behind_that_others_need(use: Callable[[], None]) -> None:
    """Logging takes its handler's lock by a function of Python: an exception at its end would hold it for ever."""
    told: list[int] = []

    def use_for_ever() -> None:
        while True:
            use()
            sleep(0.0002)  # where it can be told

    def work(seed: int) -> None:
        for number in range(60):
            try:
                within(0.0005 + (number * 37 + seed) % 100 * 1e-5, use_for_ever)
            except DeadlineExceededError:
                told.append(1)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 180
    done = threading.Event()
    threading.Thread(target=lambda: (use(), done.set()), daemon=True).start()
    assert done.wait(30)


def test_interruption_that_goes_out_is_not_replaced() -> None:
    def interrupt() -> None:
        sleep(0.01)
        raise KeyboardInterrupt

    for wrap in (deadline.shielded, partial(within, 0.001)):
        with pytest.raises((KeyboardInterrupt, DeadlineExceededError)) as caught:
            within(0.005, wrap, interrupt)
        if wrap is deadline.shielded:
            assert caught.type is KeyboardInterrupt


def test_call_that_comes_after_its_deadline_is_not_called() -> None:
    late = task(-0.001)
    called: list[int] = []

    with pytest.raises(DeadlineExceededError, match="it came too late"):
        deadline.call(late, called.append, 1)

    assert called == []
