"""The lock before the store's connections: in order, and never lost, whatever interrupts its waiters."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deferlib.store.fairlock import FairLock
from deferlib.store.sqlite import SqliteStore
from tests.store.stores import add, ids, live, open_store, stats, task


class Interrupted(BaseException):
    """What Ctrl-C, or a deadline, raises between any two steps of a thread."""


def in_line(lock: FairLock) -> int:
    """Return how many threads have come to *lock*, as far as its line tells: a waiter changes the line's end."""
    return id(lock._last)


def test_waiters_are_served_in_the_order_they_came() -> None:
    lock = FairLock()
    turn = lock.acquire()
    order: list[int] = []

    def work(number: int) -> None:
        mine = lock.acquire()
        order.append(number)
        lock.release(mine)

    threads = []
    for number in range(10):
        before = in_line(lock)
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        while in_line(lock) == before:
            threading.Event().wait(0.001)
    lock.release(turn)
    for thread in threads:
        thread.join(10)

    assert order == list(range(10))


def test_one_that_comes_again_waits_behind_those_who_wait() -> None:
    lock = FairLock()
    turns: list[str] = []
    done = threading.Event()

    def greedy() -> None:
        while not done.is_set():
            mine = lock.acquire()
            turns.append("greedy")
            lock.release(mine)

    thread = threading.Thread(target=greedy)
    thread.start()
    for _ in range(50):
        mine = lock.acquire()
        turns.append("modest")
        lock.release(mine)
    done.set()
    thread.join(10)

    first = turns.index("modest")
    waits = "".join(turn[0] for turn in turns[first:]).split("m")
    assert sorted(map(len, waits))[len(waits) // 2] <= 200, "threading.Lock lets one thread have thousands"
    assert turns.count("modest") == 50


def test_only_the_holder_has_it() -> None:
    lock = FairLock()
    seen: list[bool] = [lock.mine()]
    turn = lock.acquire()
    seen.append(lock.mine())
    thread = threading.Thread(target=lambda: seen.append(lock.mine()))
    thread.start()
    thread.join(10)
    lock.release(turn)
    seen.append(lock.mine())

    assert seen == [False, True, False, False]


@pytest.fixture
def alarm() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
def test_waiter_that_is_interrupted_passes_its_place_on() -> None:
    lock = FairLock()
    held, release = threading.Event(), threading.Event()
    served = threading.Event()

    def holder() -> None:
        turn = lock.acquire()
        held.set()
        release.wait(10)
        lock.release(turn)

    def later() -> None:
        lock.release(lock.acquire())
        served.set()

    first = threading.Thread(target=holder)
    first.start()
    held.wait(10)
    for _ in range(3):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Interrupted):
            lock.acquire()
    second = threading.Thread(target=later)
    second.start()
    assert not served.is_set()
    release.set()

    assert served.wait(10)
    first.join(10)
    second.join(10)
    lock.release(lock.acquire())


def test_store_outlives_exceptions_raised_anywhere_in_its_threads(tmp_path: Path) -> None:
    """A task's deadline is an exception raised between any two steps of the thread that runs it (DESIGN section 5)."""
    store = open_store(lambda folder: SqliteStore(str(folder / "tasks.db"), busy_seconds=5), tmp_path)
    stop = threading.Event()
    interrupted = 0
    failures: list[BaseException] = []
    acknowledged: list[int] = []

    def work(first: int) -> None:
        nonlocal interrupted
        id = first
        while not stop.is_set():
            try:
                while not stop.is_set():
                    id += 1
                    with store.begin(durable=False) as tx:
                        tx.add(0, [task(id)])
                    acknowledged.append(id)
                    live(store, limit=1)
            except Interrupted:
                interrupted += 1
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=work, args=(number * 10**6,)) for number in range(3)]
    for thread in threads:
        thread.start()
    victims = [thread.ident for thread in threads]
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    pause = threading.Event()
    for number in range(600):
        raise_in(ctypes.c_ulong(victims[number % 3] or 0), ctypes.py_object(Interrupted))
        pause.wait(0.001)
    stop.set()
    for thread in threads:
        thread.join(20)

    assert not [thread for thread in threads if thread.is_alive()], "a turn was lost"
    assert failures == []
    assert interrupted > 50
    found = set(ids(live(store, limit=10**6)))
    assert set(acknowledged) <= found
    assert stats(store).tasks == len(found)
    assert add(store, task(10**9)) == ["added"]
    store.close()


@pytest.mark.parametrize("seat", ["_writer", "_reader"])
def test_transaction_left_by_an_interrupted_thread_is_rolled_back(tmp_path: Path, seat: str) -> None:
    """Nobody can raise an exception between two given steps of C and Python, so this is what one would leave."""
    store = SqliteStore(str(tmp_path / "tasks.db"))
    open_store(lambda folder: store, tmp_path)
    live(store)
    connection = getattr(store, seat).connection
    connection.execute("begin")

    add(store, task(1))

    assert ids(live(store)) == [1]
    assert not connection.in_transaction
    store.close()
