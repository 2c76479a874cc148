"""A call of a batch that takes long after all: those behind it don't wait for its end, where the server has threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import series
from tests.unit.batch_senders import BOTH, Post, app_runtime, run, wsgi
from tests.unit.batches import delivery

PATIENCE = 20.0  # seconds; nothing takes so long, unless it is broken
RAN: list[Any] = []
GATE = threading.Event()
THREADED: Post = partial(wsgi, **{"wsgi.multithread": True})


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    RAN.clear()
    GATE.clear()
    with app_runtime():
        yield


def wait_for_the_last() -> None:
    """Hold up those behind: the last of them lets this go on."""
    assert GATE.wait(PATIENCE), "nobody went on with the others"
    RAN.append("waited")


async def wait_on_the_loop() -> None:
    await asyncio.to_thread(wait_for_the_last)


def note() -> None:
    task = deferlib.current_task()
    assert task is not None
    RAN.append(task.id)


def be_the_last() -> None:
    note()
    GATE.set()


def fail() -> None:
    raise ValueError("no")


def threaded(send: Post) -> Post:
    return THREADED if send is wsgi else send


@BOTH
def test_calls_behind_a_long_one_are_run_by_another_thread(send: Post) -> None:
    deliveries = [delivery(1, wait_for_the_last), delivery(2, note), delivery(3, fail), delivery(4, be_the_last)]

    answer = run(threaded(send), deliveries)

    assert answer.outcomes(4) == ["ok", "ok", "retry", "ok"]
    assert RAN == [2, 4, "waited"]


def test_calls_behind_a_long_coroutine_are_run_beside_it() -> None:
    from tests.unit.batch_senders import asgi

    deliveries = [delivery(1, wait_on_the_loop), delivery(2, note), delivery(3, be_the_last)]

    assert run(asgi, deliveries).outcomes(3) == ["ok", "ok", "ok"]
    assert RAN == [2, 3, "waited"]


@BOTH
def test_two_long_calls_hold_up_nobody_either(send: Post) -> None:
    deliveries = [delivery(1, wait_for_the_last), delivery(2, wait_for_the_last), delivery(3, be_the_last)]

    assert run(threaded(send), deliveries).outcomes(3) == ["ok", "ok", "ok"]
    assert RAN == [3, "waited", "waited"]


def interrupt() -> None:
    GATE.set()
    raise KeyboardInterrupt


def test_what_ends_a_helper_ends_the_request() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(THREADED, [delivery(1, wait_for_the_last), delivery(2, interrupt)])


def test_helpers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "HELPERS", 1)
    threading.Timer(5 * series.LOOK, GATE.set).start()
    deliveries = [delivery(1, wait_for_the_last), delivery(2, wait_for_the_last), delivery(3, note)]

    run(THREADED, deliveries)

    assert RAN.count("waited") == 2
    assert RAN.index(3) >= 1, "one helper, who was held up, too"


def test_a_server_without_threads_gets_none() -> None:
    threading.Timer(4 * series.LOOK, GATE.set).start()

    run(wsgi, [delivery(1, wait_for_the_last), delivery(2, note)])

    assert RAN == ["waited", 2]


_FORKED = """
import os, sys
from tests.unit import test_batch_helpers as it

with it.app_runtime():
    it.run(it.THREADED, [it.delivery(1, it.note), it.delivery(2, it.note)])  # begins the watching thread
    if os.fork() == 0:
        it.RAN.clear()
        told = it.run(it.THREADED, [it.delivery(3, it.wait_for_the_last), it.delivery(4, it.be_the_last)]).outcomes(2)
        os._exit(0 if (told, it.RAN) == (["ok", "ok"], [4, "waited"]) else 1)
    _, status = os.wait()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_has_helpers_of_its_own() -> None:
    root = Path(__file__).parents[2]

    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORKED], cwd=root, check=True, timeout=60)
