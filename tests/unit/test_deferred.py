"""`defer` from end to end: calls, options and refusals, on a real store in a file."""

from __future__ import annotations

import asyncio
import functools
import math
import operator
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import pytest

import deferlib
from deferlib import config, deferred, ids, namespaces, payload, taskqueue
from deferlib.core.model import AddResult, Micros, NewTask, Page, TaskRow
from deferlib.errors import (
    EnqueueUnknownError,
    PayloadUnverifiedError,
    StoreBusyError,
    TaskTooLargeError,
    UnpicklableCallError,
)
from deferlib.store import Store, Tx

PATIENCE = 10
RAN: SimpleQueue[Any] = SimpleQueue()
T = TypeVar("T")


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path) -> Iterator[config.Runtime]:
    while not RAN.empty():
        RAN.get()
    former = config.install(None)
    made = deferlib.configure(store=f"sqlite:///{tmp_path / 'tasks.db'}", queues=[{"name": "mail"}])
    yield made
    made.close()
    config.install(former)


def ran() -> Any:
    return RAN.get(timeout=PATIENCE)


def stored(queue: str = "default") -> list[TaskRow]:
    with config.runtime().store.read() as tx:
        return tx.tasks(queue, Page())


def note(*args: Any, **kwargs: Any) -> None:
    RAN.put((args, kwargs) if kwargs else args)


async def note_later(value: Any) -> None:
    await asyncio.sleep(0)
    RAN.put(value)


def note_task() -> None:
    task = deferlib.current_task()
    assert task is not None
    RAN.put((task, namespaces.get_namespace()))


def flaky() -> None:
    task = deferlib.current_task()
    assert task is not None
    RAN.put(task.attempt)
    if task.attempt < 3:
        raise ValueError("not yet")


class Greeter:
    def __init__(self, word: str = "made") -> None:
        self.word = word
        if word == "made":
            RAN.put(self.word)

    def greet(self, whom: str) -> None:
        RAN.put(f"{self.word} {whom}")

    @classmethod
    def made(cls, whom: str) -> None:
        RAN.put(f"{cls.__name__} {whom}")

    @staticmethod
    def plain(whom: str) -> None:
        RAN.put(whom)

    def __call__(self, whom: str) -> None:
        RAN.put(f"{self.word}! {whom}")


def taking_underscores(_countdow: int = 0) -> None: ...


def taking_any(**kwargs: Any) -> None: ...


def put(value: Any) -> None:
    RAN.put(value)


# --- every kind of call, from end to end ----------------------------------------------------------------------------


def test_every_kind_of_callable_runs() -> None:
    step = "closed over"

    def closure() -> None:
        put(step)

    calls: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (note, ("a", 1), ("a", 1)),
        (note_later, ("later",), "later"),
        (Greeter("hello").greet, ("bound",), "hello bound"),
        (Greeter.made, ("class method",), "Greeter class method"),
        (Greeter.plain, ("static",), "static"),
        (Greeter("hey"), ("object",), "hey! object"),
        (Greeter, (), "made"),
        (functools.partial(note, "partial"), ("rest",), ("partial", "rest")),
        (lambda: put("lambda"), (), "lambda"),
        (closure, (), "closed over"),
        (operator.methodcaller("greet", "caller"), (Greeter("hi"),), "hi caller"),
    ]

    with deferlib.running():
        for fn, args, expected in calls:
            deferlib.defer(fn, *args)
            assert ran() == expected
        deferlib.defer(print, "a builtin", flush=True)
        deferlib.defer(note, 1, key="word")
        assert ran() == ((1,), {"key": "word"})


def test_call_knows_its_task_and_runs_in_its_namespace() -> None:
    with namespaces.namespace("tenant-1"):
        added = deferlib.defer(note_task, _queue="mail", _name="welcome")

    with deferlib.running():
        task, namespace = ran()

    assert (task.name, task.queue, task.attempt, task.namespace, namespace) == (
        "welcome",
        "mail",
        1,
        "tenant-1",
        "tenant-1",
    )
    assert task.eta == added.eta
    assert 0 < task.remaining().total_seconds() <= 600


def test_failing_call_is_tried_again() -> None:
    deferlib.defer(flaky, _retry_options=taskqueue.TaskRetryOptions(min_backoff_seconds=0))
    with deferlib.running():
        assert [ran(), ran(), ran()] == [1, 2, 3]


def test_task_made_by_hand_of_a_serialized_call_runs() -> None:
    body = deferred.serialize(note, "by hand")
    task = taskqueue.Task(body, url=deferred.DEFAULT_URL, headers={"Content-Type": "application/octet-stream"})
    taskqueue.Queue("mail").add(task)

    with deferlib.running():
        assert ran() == ("by hand",)


def test_payload_of_another_row_is_not_run() -> None:
    """Who can write to the store, but has no key, can't make a call of one task run as another."""
    deferlib.defer(note, "victim", _countdown=3600)
    (row,) = stored()
    thief = taskqueue.Task(row.body, url=deferred.DEFAULT_URL, name="thief")
    taskqueue.Queue().add(thief)

    with deferlib.running():
        deferlib.defer(note, "marker")
        assert ran() == ("marker",)

    with config.runtime().store.read() as tx:
        (dead,) = tx.find("default", ["thief"])
    assert dead.reason.startswith("quarantine: unverified")


# --- options --------------------------------------------------------------------------------------------------------


def test_options_reach_the_task() -> None:
    task = deferlib.defer(
        note,
        1,
        _countdown=60,
        _headers={"X-Mine": "1"},
        _name="n",
        _queue="mail",
        _retry_options=taskqueue.TaskRetryOptions(task_retry_limit=3),
        _target="worker",
        _url="/other",
    )

    (row,) = stored("mail")
    assert (row.name, row.url, row.target, row.headers) == (
        "n", "/other", "worker", '[["X-Mine", "1"], ["Content-Type", "application/octet-stream"]]'
    )  # fmt: skip
    assert row.eta - row.created == 60_000_000
    assert row.retry
    assert (task.name, task.queue_name, task.was_enqueued) == ("n", "mail", True)


def test_eta_and_defaults_reach_the_task() -> None:
    eta = datetime.now(UTC) + timedelta(days=1)

    task = deferlib.defer(note, _eta=eta)

    (row,) = stored()
    assert (task.eta, row.name, row.url, row.target) == (eta, None, deferred.DEFAULT_URL, "")
    assert task.name == str(row.id)


@pytest.mark.parametrize("url", [None, ""])
def test_url_of_none_is_the_queues_default(url: str | None) -> None:
    assert deferlib.defer(note).url == deferred.DEFAULT_URL
    assert deferlib.defer(note, _url=url, _queue="mail").on_queue_url
    assert stored("mail")[-1].url == "/_ah/queue/mail"


def test_content_type_of_the_caller_counts() -> None:
    assert deferlib.defer(note, _headers={"content-type": "a/b"}).headers["Content-Type"] == "a/b"
    assert deferlib.defer(note, _headers={"X": "y"}).headers["Content-Type"] == "application/octet-stream"
    assert deferlib.defer(note, _headers=None).headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize("deadline", [math.nan, math.inf, 0, -1, 1e300])
def test_deadline_that_is_none_is_refused(deadline: float) -> None:
    with pytest.raises(deferlib.taskqueue.InvalidDispatchDeadlineError):
        deferlib.using(deadline=deadline).defer(note)


def test_using_can_be_kept_and_used_again() -> None:
    mail = deferlib.using(queue="mail", countdown=5, deadline=30)

    tasks = [mail.defer(note, 1), mail.defer(note, 2), asyncio.run(mail.adefer(note, 3))]

    assert len(stored("mail")) == 3
    assert {task.dispatch_deadline_usec for task in tasks} == {30_000_000}


def test_call_may_be_large_but_not_boundless() -> None:
    deferlib.defer(note, b"x" * 1_000_000)
    assert len(stored()[0].body) > 1_000_000

    with pytest.raises(TaskTooLargeError, match=r"test_deferred\.note has 3355\d+ bytes, at most 33554432"):
        deferlib.defer(note, b"x" * (32 * 1024 * 1024))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("_countdow", "did you mean _countdown?"),
        ("_que", "did you mean _queue?"),
        ("_retry_option", "did you mean _retry_options?"),
        ("_zzz", "options are _countdown, _eta, "),
    ],
)
def test_misspelled_option_is_refused_with_a_suggestion(key: str, hint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(hint)):
        deferlib.defer(Greeter.plain, "x", **{key: 5})
    assert not stored()


@pytest.mark.parametrize("fn", [taking_underscores, taking_any])
def test_argument_that_the_callable_takes_is_its_own(fn: Callable[..., None]) -> None:
    deferlib.defer(fn, **{"_countdow": 5})

    assert len(stored()) == 1


def test_defers_options_after_using_are_refused_with_its_own_way() -> None:
    with pytest.raises(TypeError, match=r"say using\(countdown=…\)"):
        deferlib.using(queue="mail").defer(Greeter.plain, "x", **{"_countdown": 5})
    with pytest.raises(TypeError, match="did you mean _countdown"):
        asyncio.run(deferlib.adefer(Greeter.plain, "x", **{"_countdow": 5}))


@pytest.mark.parametrize("fn", [None, 5, "print"])
def test_what_cannot_be_called_is_a_value_error(fn: Any) -> None:
    for refuse in (deferlib.defer, deferred.serialize, deferlib.using().defer):
        with pytest.raises(ValueError, match="callable"):
            refuse(fn)
    with pytest.raises(ValueError, match="callable"):
        asyncio.run(deferlib.adefer(fn))


def test_argument_that_cannot_be_pickled_leaves_nothing_behind() -> None:
    with pytest.raises(UnpicklableCallError, match="argument 'lock' of"):
        deferlib.defer(note, lock=threading.Lock())

    assert not stored()


def test_unknown_queue_says_what_to_do() -> None:
    with pytest.raises(taskqueue.UnknownQueueError, match=r"no queue 'nowhere'.*mail.*queue\.yaml"):
        deferlib.defer(note, _queue="nowhere")


def test_name_is_taken_once() -> None:
    deferlib.defer(note, 1, _name="once")
    with pytest.raises(taskqueue.TaskAlreadyExistsError):
        deferlib.defer(note, 2, _name="once")

    with deferlib.running():
        assert ran() == (1,)
    with pytest.raises(taskqueue.TombstonedTaskError):
        deferlib.defer(note, 3, _name="once")


@pytest.mark.parametrize("call", [lambda: deferlib.defer(note, _transactional=True), lambda: deferlib.using(connection=1)])
def test_what_is_not_there_yet_says_so(call: Callable[[], Any]) -> None:
    with pytest.raises(deferlib.NotAvailableError):
        call()


# --- asyncio --------------------------------------------------------------------------------------------------------


class SlowStore:
    """A store whose writes wait until they are let through."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.writing = threading.Event()
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def run(self, work: Callable[[Tx], T]) -> T:
        self.writing.set()
        assert self.go.wait(PATIENCE)
        return self._store.run(work)


def test_adefer_lets_the_loop_run_while_the_disk_writes(runtime: config.Runtime) -> None:
    slow = SlowStore(runtime.store)
    config.install(config.Runtime(settings=runtime.settings, given_store=slow))  # type: ignore[arg-type]  # it delegates

    async def work() -> taskqueue.Task:
        deferring = asyncio.ensure_future(deferlib.adefer(note, "from a loop"))
        while not slow.writing.is_set():
            await asyncio.sleep(0)
        assert not deferring.done()
        slow.go.set()
        return await deferring

    assert asyncio.run(work()).was_enqueued


class Pickled:
    """Remembers which thread pickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        RAN.put(threading.current_thread())
        return Pickled, ()


def test_adefer_pickles_where_nobody_else_changes_the_arguments_meanwhile() -> None:
    asyncio.run(deferlib.adefer(note, Pickled()))

    assert ran() is threading.current_thread()


def test_adefer_carries_the_namespace() -> None:
    async def work() -> None:
        with namespaces.namespace("tenant-1"):
            await deferlib.adefer(note_task)

    asyncio.run(work())

    assert stored()[0].namespace == "tenant-1"


# --- ids and unknown outcomes ---------------------------------------------------------------------------------------


def test_two_calls_of_one_id_are_both_stored_and_both_run(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = ids.ids
    first = maker.next(1_763_700_000_000_000)
    made = iter([first, first])
    real = maker.next
    monkeypatch.setattr(maker, "next", lambda now: next(made, None) or real(now))

    one, two = deferlib.defer(note, "one"), deferlib.defer(note, "two")

    assert one.name == str(first) != two.name
    assert len(stored()) == 2
    with deferlib.running():
        assert {ran(), ran()} == {("one",), ("two",)}  # each signed for the id it has


def test_ids_that_always_collide_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids.ids, "next", lambda now: 77)
    deferlib.defer(note, "one")

    with pytest.raises(deferlib.Error, match="random source"):
        deferlib.defer(note, "two")


class LosingStore:
    """A store that fails after, or instead of, its next commit without saying which."""

    def __init__(self, store: Store, *, committed: bool) -> None:
        self._store = store
        self._committed = committed
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def run(self, work: Callable[[Tx], T]) -> T:
        if self.lost:
            return self._store.run(work)
        self.lost = True
        if self._committed:
            self._store.run(work)
        raise EnqueueUnknownError


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("name", [None, "named"])
def test_add_of_unknown_outcome_can_be_repeated(committed: bool, name: str | None, runtime: config.Runtime) -> None:
    store = LosingStore(runtime.store, committed=committed)
    config.install(config.Runtime(settings=runtime.settings, given_store=store))  # type: ignore[arg-type]  # it delegates
    config.runtime()._ring = runtime.ring

    with pytest.raises(EnqueueUnknownError) as caught:
        deferlib.defer(note, "once", _name=name)
    (task,) = caught.value.tasks
    assert isinstance(task, taskqueue.Task)
    assert not task.was_enqueued
    task.add()

    assert task.was_enqueued
    assert len(stored()) == 1


class BusyTx:
    """A transaction in which every add is seen."""

    def __init__(self, tx: Tx, seen: list[NewTask]) -> None:
        self._tx = tx
        self._seen = seen

    def add(self, now: Micros, tasks: Any) -> list[AddResult]:
        self._seen.extend(tasks)
        return self._tx.add(now, tasks)


def test_work_that_the_store_repeats_adds_one_task(runtime: config.Runtime) -> None:
    seen: list[NewTask] = []

    class RepeatingStore(SlowStore):
        def run(self, work: Callable[[Tx], T]) -> T:
            def twice(tx: Tx) -> T:
                work(BusyTx(tx, seen))  # type: ignore[arg-type]  # all that is used of it
                return work(BusyTx(tx, seen))  # type: ignore[arg-type]  # all that is used of it

            return self._store.run(twice)

    store = RepeatingStore(runtime.store)
    config.install(config.Runtime(settings=runtime.settings, given_store=store))  # type: ignore[arg-type]  # it delegates

    assert deferlib.defer(note).was_enqueued

    assert len(seen) == 2
    assert len(stored()) == 1


def test_definite_failure_leaves_the_task_to_be_added_again(runtime: config.Runtime) -> None:
    class FullStore(SlowStore):
        def run(self, work: Callable[[Tx], T]) -> T:
            raise StoreBusyError

    store = FullStore(runtime.store)
    config.install(config.Runtime(settings=runtime.settings, given_store=store))  # type: ignore[arg-type]  # it delegates

    with pytest.raises(StoreBusyError):
        deferlib.defer(note)

    assert not stored()


# --- processes ------------------------------------------------------------------------------------------------------


def test_forked_child_defers_for_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "forking.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, deferlib
            deferlib.configure(store=sys.argv[1], key=sys.argv[2])
            deferlib.defer(print, "parent")
            children = []
            for number in range(4):
                pid = os.fork()
                if not pid:
                    for _ in range(5):
                        deferlib.defer(print, "child", number)
                    os._exit(0)
                children.append(pid)
            codes = [os.waitpid(pid, 0)[1] for pid in children]
            deferlib.defer(print, "parent again")
            sys.exit(any(codes))
            """
        )
    )
    path = f"sqlite:///{tmp_path / 'forked.db'}"
    key = "a key for the forked children of a test"
    subprocess.run([sys.executable, script, path, key], check=True, timeout=60)

    deferlib.configure(store=path, key=key)
    rows = stored()

    assert len({row.id for row in rows}) == 22
    for row in rows:
        binding = payload.Binding(row.id, "", "default", deferred.DEFAULT_URL, "")
        assert payload.verify(row.body, config.runtime().ring, binding).label == "builtins.print"


def test_importing_deferlib_brings_nothing_heavy() -> None:
    heavy = ("asyncio", "apsw", "yaml", "pycurl", "requests", "cloudpickle", "ssl", "http.client", "difflib", "werkzeug")
    program = f"import sys, deferlib; print([name for name in {heavy} if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert found.strip() == "[]"


def test_run_takes_nothing_that_is_not_signed() -> None:
    for data in (b"", b"\x80\x05N.", deferred.serialize(note)[:-1] + b"!"):
        with pytest.raises(PayloadUnverifiedError):
            deferred.run(data)
    assert RAN.empty()


@pytest.mark.parametrize("option", ["countdown", "eta", "name", "queue", "retry_options"])
def test_option_without_its_underscore_is_refused_with_the_right_one(option: str) -> None:
    def takes_one(value: object) -> None:
        pass

    with pytest.raises(TypeError, match=rf"takes no argument '{option}'; did you mean _{option}\?"):
        deferlib.defer(takes_one, 1, **{option: 5})


def test_argument_of_a_callable_may_be_named_like_an_option() -> None:
    deferlib.defer(named_like_options, name="x", countdown=3)


def named_like_options(name: str, **others: object) -> None:
    pass


def test_value_instead_of_a_callable_is_refused_with_the_right_form() -> None:
    with pytest.raises(ValueError, match=r"not None; say defer\(fn, argument\), not defer\(fn\(argument\)\)"):
        deferlib.defer(None)  # type: ignore[arg-type]  # the mistake that is tested


def test_payload_of_a_task_can_be_run() -> None:
    task = deferlib.defer(len, "abc")

    assert task.payload is not None
    assert deferred.run(task.payload) == 3
    assert deferred.run(bytearray(deferred.serialize(len, "abc"))) == 3  # type: ignore[arg-type]  # bytes of any kind
    for wrong in (None, 5, "text", b"", b"garbage"):
        with pytest.raises(deferlib.PermanentTaskFailure):
            deferred.run(wrong)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("headers", [[("A", "b")], {"A": 5}, {"Content-Type": None}])
def test_headers_of_a_call_are_those_of_any_task(headers: Any) -> None:
    assert deferlib.defer(note, _headers=headers).was_enqueued
    with pytest.raises(deferlib.taskqueue.InvalidTaskError):
        deferlib.defer(note, _headers=5)  # type: ignore[arg-type]  # what is tested


def test_mistakes_are_found_in_app_engines_order() -> None:
    with pytest.raises(deferlib.taskqueue.InvalidTaskNameError):
        deferlib.defer(note, _queue="a_b", _name="a b")
    with pytest.raises(deferlib.errors.UnpicklableCallError):
        deferlib.defer(note, (x for x in ()), _name="a b")


def test_failures_of_calls_are_no_errors_of_queues() -> None:
    for error in (deferlib.PermanentTaskFailure, deferlib.SingularTaskFailure, deferred.Error, namespaces.BadValueError):
        assert issubclass(error, deferlib.Error)
        assert not issubclass(error, deferlib.taskqueue.Error)
    for error in (deferlib.taskqueue.TransientError, deferlib.errors.StoreBusyError, deferlib.errors.StoreFullError):
        assert issubclass(error, deferlib.taskqueue.Error)


def test_headers_that_are_secret_are_not_shown() -> None:
    headers = {"Authorization": "Bearer canary", "X-Colour": "blue"}

    shown = f"{taskqueue.Task(url='/x', headers=headers).headers!r} {deferlib.using(headers=headers)._options!r}"

    assert "canary" not in shown
    assert "'Authorization': '***', 'X-Colour': 'blue'" in shown
