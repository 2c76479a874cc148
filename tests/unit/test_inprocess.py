"""An engine in the app's own process: `deferlib.running()`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from flask import Flask, request

import deferlib
from deferlib import config, taskqueue
from deferlib.errors import AppError

PATIENCE = 10
RAN: SimpleQueue[Any] = SimpleQueue()


@pytest.fixture(autouse=True)
def _store(tmp_path: Path) -> Iterator[None]:
    while not RAN.empty():
        RAN.get()
    former = config.install(None)
    runtime = deferlib.configure(store=f"sqlite:///{tmp_path / 'tasks.db'}")
    yield
    runtime.close()
    config.install(former)


def ran() -> Any:
    return RAN.get(timeout=PATIENCE)


def note(value: Any) -> None:
    RAN.put((value, threading.current_thread().name))


async def note_loop(value: Any) -> None:
    await asyncio.sleep(0)
    task = deferlib.current_task()
    RAN.put((value, asyncio.get_running_loop(), task and task.queue))


def leave() -> None:
    raise SystemExit(3)


async def leave_loop() -> None:
    leave()


ONCE = taskqueue.TaskRetryOptions(task_retry_limit=0)


def test_deferred_calls_run_without_an_app() -> None:
    with deferlib.running():
        deferlib.defer(note, 1)
        value, thread = ran()

    assert value == 1
    assert thread.startswith("deferlib-")


def test_tasks_with_a_url_reach_a_flask_app() -> None:
    app = Flask(__name__)

    @app.post("/hook/<name>")
    def hook(name: str) -> str:
        task = deferlib.current_task()
        RAN.put((name, request.get_data(), request.headers["X-AppEngine-QueueName"], request.remote_addr, task is not None))
        return ""

    with deferlib.running(app):
        taskqueue.add(b"data", url="/hook/a%20b")
        assert ran() == ("a b", b"data", "default", "0.1.0.2", True)
        deferlib.defer(note, 2)
        assert ran()[0] == 2


def test_what_has_not_started_stays_for_the_next_engine() -> None:
    deferlib.defer(note, "later", _countdown=0)

    with deferlib.running():
        assert ran()[0] == "later"
    deferlib.defer(note, "next")
    assert RAN.empty()
    with deferlib.running():
        assert ran()[0] == "next"


def test_everything_that_is_due_has_run_at_the_end_of_the_block() -> None:
    for _ in range(3):
        with deferlib.running():
            for number in range(50):
                deferlib.defer(note, number)
            deferlib.defer(note, "later", _countdown=3600)

        assert sorted(ran()[0] for _ in range(50)) == list(range(50))
        assert RAN.empty()


def test_block_that_raises_starts_nothing_more() -> None:
    taskqueue.Queue().add([taskqueue.Task(url="/hook") for _ in range(100)])
    started, finish = threading.Semaphore(0), threading.Event()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        started.release()
        finish.wait(PATIENCE)
        start_response("200 OK", [])
        return []

    def broken() -> None:
        with deferlib.running(app):
            assert started.acquire(timeout=PATIENCE)
            threading.Timer(0.05, finish.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()

    runtime = config.runtime()
    with runtime.store.read() as tx:
        assert tx.stats(runtime.clock.now(), ["default"])[0].tasks > 50


def test_end_of_the_block_waits_for_what_runs() -> None:
    started, finish, finished = threading.Event(), threading.Event(), []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        started.set()
        finish.wait(PATIENCE)
        finished.append(True)
        start_response("200 OK", [])
        return []

    with deferlib.running(app):
        taskqueue.add(url="/hook")
        assert started.wait(PATIENCE)
        threading.Timer(0.02, finish.set).start()

    assert finished
    with config.runtime().store.read() as tx:
        assert tx.stats(0, ["default"])[0].tasks == 0


# --- ASGI -----------------------------------------------------------------------------------------------------------


class Asgi:
    """An ASGI app that says what it is told."""

    def __init__(self, *, fail: str = "", lifespan: bool = True) -> None:
        self.fail = fail
        self.lifespan = lifespan
        self.told: list[str] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            if not self.lifespan:
                raise RuntimeError("no lifespan here")
            self.loop = asyncio.get_running_loop()
            scope["state"]["greeting"] = "hello"
            while True:
                message = await receive()
                self.told.append(message["type"])
                if message["type"] == "lifespan.startup" and self.fail:
                    return await send({"type": "lifespan.startup.failed", "message": self.fail})
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return None
        message = await receive()
        headers = dict(scope["headers"])
        task = deferlib.current_task()
        RAN.put((scope["path"], message["body"], headers.get(b"x-appengine-queuename"), scope["client"], task is not None))
        if scope["path"] == "/exit":
            raise SystemExit(3)
        if scope["path"] == "/nothing":
            return None
        assert scope["state"]["greeting"] == "hello" if self.lifespan else True
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body"})
        assert (await receive())["type"] == "http.disconnect"


def test_tasks_reach_an_asgi_app_and_coroutine_functions_its_loop() -> None:
    app = Asgi()

    with deferlib.running(app):
        assert app.told == ["lifespan.startup"]
        taskqueue.add(b"data", url="/caf%C3%A9")
        assert ran() == ("/café", b"data", b"default", ("0.1.0.2", 0), True)
        deferlib.defer(note_loop, 1)
        assert ran() == (1, app.loop, "default")
        deferlib.defer(note, 2)
        value, thread = ran()
        assert value == 2
        assert thread.startswith("deferlib-")

    assert app.told == ["lifespan.startup", "lifespan.shutdown"]
    assert app.loop is not None
    assert app.loop.is_closed()
    assert not [thread for thread in threading.enumerate() if thread.name == "deferlib-asgi"]


def test_app_without_a_lifespan_runs_all_the_same() -> None:
    with deferlib.running(Asgi(lifespan=False)):
        taskqueue.add(url="/hook")
        assert ran()[0] == "/hook"


def test_app_whose_startup_fails_says_why_and_leaves_nothing_behind() -> None:
    with (
        pytest.raises(AppError, match="startup failed: no database"),
        deferlib.running(Asgi(fail="Traceback:\n  ...\nno database\n")),
    ):
        pass
    left = [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("deferlib-") and not any(kept in thread.name for kept in ("unserved", "batches"))
    ]
    for thread in left:  # an idle pool's threads are told to end; nobody waits for them
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]


def test_exit_in_a_task_does_not_end_the_loop() -> None:
    with deferlib.running(Asgi()):
        deferlib.using(retry_options=ONCE).defer(leave_loop)
        deferlib.using(retry_options=ONCE).defer(leave)
        taskqueue.add(url="/exit", retry_options=ONCE)
        assert ran()[0] == "/exit"
        deferlib.defer(note_loop, "alive")
        assert ran()[0] == "alive"


def test_app_that_answers_nothing_has_failed() -> None:
    with deferlib.running(Asgi()):
        taskqueue.add(url="/nothing", name="n", retry_options=ONCE)
        assert ran()[0] == "/nothing"
        deferlib.defer(note_loop, "next")
        assert ran()[0] == "next"

    with config.runtime().store.read() as tx:
        (row,) = tx.find("default", ["n"])
    assert row.died is not None
