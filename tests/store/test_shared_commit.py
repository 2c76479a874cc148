"""Threads that write at once share a commit: each gets its own result, or its own error, and nothing of another's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deferlib import errors
from deferlib.core.model import AddResult
from deferlib.store.shared_commit import MOST
from deferlib.store.sqlite import MEMORY, SqliteStore
from tests.store.stores import NOW, add, ids, live, open_store, task

Work = Callable[[Any], Any]


@pytest.fixture(params=["file", "memory"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SqliteStore]:
    path = MEMORY if request.param == "memory" else str(tmp_path / "tasks.db")
    store = open_store(lambda folder: SqliteStore(path), tmp_path)
    assert isinstance(store, SqliteStore)
    yield store
    store.close()


@contextmanager
def in_line(store: SqliteStore, works: list[Work]) -> Iterator[list[Future[Any]]]:
    """Have threads wait for a turn with *works*, in that order; they begin when the block ends."""
    pool = ThreadPoolExecutor(len(works))
    futures: list[Future[Any]] = []
    try:
        with store.begin():
            for number, work in enumerate(works, 1):
                futures.append(pool.submit(store.run, work))
                while len(store._line._jobs) < number:
                    threading.Event().wait(0.001)
            yield futures
    finally:
        pool.shutdown()


def adding(id: int) -> Work:
    return lambda tx: tx.add(NOW, [task(id)])


def failing(tx: Any) -> None:
    tx.add(NOW, [task(99)])
    raise LookupError("on purpose")


def misusing(tx: Any) -> None:
    tx.add(NOW, [task(98)])
    tx._rows("next_due", {"no": "such parameter"})


def swallowing(tx: Any) -> str:
    tx.add(NOW, [task(97)])
    try:
        tx._rows("next_due", {"no": "such parameter"})
    except Exception:
        return "swallowed"
    return "sound"


def test_all_who_wait_share_one_commit(store: SqliteStore) -> None:
    with in_line(store, [adding(id) for id in range(1, 17)]) as futures:
        before = store.commits

    assert [future.result() for future in futures] == [[AddResult.ADDED]] * 16
    assert store.commits - before == 2, "the block's own, and one for all"
    assert ids(live(store)) == list(range(1, 17))


def test_one_alone_has_a_commit_of_its_own(store: SqliteStore) -> None:
    before = store.commits

    add(store, task(1))
    add(store, task(2))

    assert store.commits - before == 2


def test_more_than_fit_into_one_take_the_next(store: SqliteStore) -> None:
    with in_line(store, [adding(id) for id in range(1, MOST + 3)]) as futures:
        before = store.commits

    assert [future.result() for future in futures] == [[AddResult.ADDED]] * (MOST + 2)
    assert store.commits - before == 3


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize(
    ("work", "error"), [(failing, LookupError), (misusing, Exception), (swallowing, errors.StoreError)]
)
def test_work_that_fails_takes_no_other_with_it(store: SqliteStore, work: Work, error: type[Exception], place: int) -> None:
    works = [adding(id) for id in range(1, 5)]
    works.insert(place, work)

    with in_line(store, works) as futures:
        pass

    with pytest.raises(error):
        futures.pop(place).result()
    assert [future.result() for future in futures] == [[AddResult.ADDED]] * 4
    assert ids(live(store)) == [1, 2, 3, 4]


def test_same_task_twice_in_one_commit_is_one(store: SqliteStore) -> None:
    with in_line(store, [adding(1), adding(1)]) as futures:
        pass

    assert [future.result() for future in futures] == [[AddResult.ADDED], [AddResult.EXISTS]]


def test_full_disk_is_each_ones_own_error_and_half_of_nothing_is_kept(store: SqliteStore) -> None:
    add(store, task(1))
    connection = store._writer.connection
    assert connection is not None
    pages = connection.pragma("page_count")
    connection.pragma("max_page_count", pages + 4)

    with in_line(store, [lambda tx, id=id: tx.add(NOW, [task(id, body=b"x" * 9_000)]) for id in range(2, 8)]) as futures:
        pass

    results = [future.exception() for future in futures]
    stored = [id for id, error in zip(range(2, 8), results, strict=True) if error is None]
    assert all(isinstance(error, errors.StoreFullError) for error in results if error is not None)
    assert ids(live(store)) == [1, *stored]
    assert len(stored) < 6
    connection.pragma("max_page_count", 1_000_000)
    assert add(store, task(9)) == [AddResult.ADDED]


def test_commit_of_unknown_outcome_is_unknown_to_all_of_them(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(connection: Any, tx: Any) -> None:
        raise errors.EnqueueUnknownError("the disk didn't say")

    with in_line(store, [adding(1), failing, adding(2)]) as futures:
        monkeypatch.setattr(store, "_commit", lambda connection, tx: connection.execute("commit"))
        monkeypatch.setattr(
            store, "_transaction", _then(store._transaction, lambda: monkeypatch.setattr(store, "_commit", unknown))
        )

    for future in (futures[0], futures[2]):
        assert isinstance(future.exception(), errors.EnqueueUnknownError)
    assert isinstance(futures[1].exception(), LookupError)


def _then(open_transaction: Callable[..., Any], before: Callable[[], None]) -> Callable[..., Any]:
    def opened(*args: Any, **kwargs: Any) -> Any:
        before()
        return open_transaction(*args, **kwargs)

    return opened


def test_interrupted_leader_leaves_the_others_to_themselves(store: SqliteStore) -> None:
    def interrupted(tx: Any) -> None:
        tx.add(NOW, [task(96)])
        raise KeyboardInterrupt

    with in_line(store, [interrupted, adding(1), adding(2)]) as futures:
        pass

    assert isinstance(futures[0].exception(), KeyboardInterrupt)
    assert [future.result() for future in futures[1:]] == [[AddResult.ADDED]] * 2
    assert ids(live(store)) == [1, 2]


def test_threads_at_full_speed_lose_and_double_nothing(store: SqliteStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda id: store.run(adding(id)), range(1, 801)))

    assert results == [[AddResult.ADDED]] * 800
    assert ids(live(store)) == list(range(1, 801))
    assert not store._line._jobs
