"""SQLite's plans for every statement: none walks the tasks or the dead letters, or sorts more than its limit lets in."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from deferlib.core.model import DAY, Action, QueueConfig, QueueSource
from deferlib.store import queries, sqlite_tx
from deferlib.store.sqlite import SqliteStore
from tests.store.stores import NOW, outcome, spec, task

SQL = queries.load("sqlite")
ROWS = 20_000

# What may be sorted or materialised, and why it is small.
SORTS = {
    "ids_by_name": "one name's task and its dead letters",
    "ids_by_id": "one id's",
    "queues_by_id": "one id's",
    "signed_live": "the keys of at most :limit rows, which come in order of their ids",
    "signed_dead": "the same",
}
# What may be walked: tables of a handful of rows, or rows already limited.
WALKS = {
    "next_dues": {"queues"},
    "queues": {"queues"},
    "disown": {"queues"},
    "disown_all": {"queues"},
    "end_leases": {"queues"},
    "queues_by_name": {"queues"},
    "sweep_minutes": {"queues"},
}


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apsw.Connection]:
    """A store that was never analysed, with 20,000 tasks in all their states."""
    rng = random.Random(7)
    store = SqliteStore(str(tmp_path_factory.mktemp("plans") / "tasks.db"))
    store.migrate()
    with store.begin(durable=False) as tx:
        tx.put_queues([QueueConfig(name=name) for name in ("default", "other")], QueueSource.FILE)
        etas = [NOW - DAY + rng.randrange(2 * DAY) for _ in range(ROWS)]
        tx.add(
            NOW,
            [
                task(
                    id,
                    queue=rng.choice(["default", "other"]),
                    name=f"n{id}" if id % 3 == 0 else None,
                    eta=eta,
                    tag=f"t{id % 9}",
                    fail_fast=id % 2,
                )
                for id, eta in enumerate(etas)
            ],
        )
        claims = tx.claim(NOW, [spec(limit=3000), spec("other", 3000)])
        fates = [Action.DONE, Action.DONE, Action.DEAD, Action.DEAD, Action.RETRY, Action.RENEW]
        tx.settle(NOW, [outcome(each, rng.choice(fates), NOW + rng.randrange(DAY), executed=1) for each in claims])
    store.close()
    connection = apsw.Connection(store.path)
    assert connection.execute(
        "select (select count(*) from tasks) > 15000, (select count(*) from dead) > 1500"
    ).fetchall() == [(1, 1)]
    assert not connection.execute("select 1 from sqlite_master where name = 'sqlite_stat1'").fetchall()
    yield connection
    connection.close()


def plan(connection: apsw.Connection, sql: str) -> list[str]:
    values = dict.fromkeys(re.findall(r":(\w+)", sql))
    return [row[3] for row in connection.execute(f"explain query plan {sql}", values)]


@pytest.mark.parametrize("name", sorted(SQL))
def test_no_statement_walks_or_sorts_what_may_be_large(connection: apsw.Connection, name: str) -> None:
    steps = plan(connection, SQL[name])

    walked = {match[1] for step in steps if (match := re.match(r"SCAN (\w+)", step))}
    tables = {"tasks", "dead", "queues", "counts", "minutes", "meta"}
    assert walked & tables <= WALKS.get(name, set()), steps
    assert name in SORTS or not [step for step in steps if "TEMP B-TREE" in step], steps
    assert not [step for step in steps if "AUTOMATIC" in step], steps


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("next_due_fast", "SEARCH tasks USING COVERING INDEX tasks_fast (queue=? AND due>?)"),
        ("in_flight", "SEARCH flights USING PRIMARY KEY (queue=?)"),
        ("next_dues", "SEARCH tasks USING COVERING INDEX tasks_due (queue=? AND due>?)"),
        ("next_due", "SEARCH tasks USING COVERING INDEX tasks_due (queue=? AND due>?)"),
        ("live_page", "SEARCH tasks USING COVERING INDEX tasks_due (queue=? AND due>?)"),
        ("purge_page", "SEARCH tasks USING COVERING INDEX tasks_due (queue=? AND due>?)"),
        ("dead_page", "SEARCH dead USING COVERING INDEX dead_queue (queue=? AND id>?)"),
        ("sweep_tombstones", "SEARCH tasks USING COVERING INDEX tasks_expires (expires<?)"),
        ("name_state", "SEARCH tasks USING INDEX tasks_name (queue=? AND name=?)"),
        ("drop_expired_name", "SEARCH tasks USING INDEX tasks_name (queue=? AND name=?)"),
        ("signed_live", "SEARCH tasks USING INTEGER PRIMARY KEY (rowid>?)"),
        ("signed_dead", "SEARCH dead USING INTEGER PRIMARY KEY (rowid>?)"),
        *(
            (name, "SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)")
            for name in ("lease", "done", "retry", "renew", "release")
        ),
        *((name, "SEARCH dead USING INTEGER PRIMARY KEY (rowid=?)") for name in ("add", "nonce_of", "revive")),
    ],
)
def test_statement_goes_by_its_index(connection: apsw.Connection, name: str, step: str) -> None:
    assert step in plan(connection, SQL[name])


@pytest.mark.parametrize(
    ("name", "index"), [("claim", "tasks_due"), ("claim_tag", "tasks_due"), ("claim_fast", "tasks_fast")]
)
def test_claim_reads_in_order_of_its_index_without_a_sort(connection: apsw.Connection, name: str, index: str) -> None:
    steps = plan(connection, SQL[name])

    assert steps == [f"SEARCH tasks USING INDEX {index} (queue=? AND due<?)"]


@pytest.mark.parametrize(
    "name",
    [
        *("claim", "claim_fast", "next_due", "next_due_fast", "in_flight"),
        *("live_page", "purge_page", "dead_page", "sweep_tombstones", "signed_live", "signed_dead"),
    ],
)
def test_work_doesnt_grow_with_the_queue(connection: apsw.Connection, name: str) -> None:
    """Counted in steps of SQLite's machine, not in time."""
    values = {"queue": "default", "limit": 10, "bytes": 10**9, "until": NOW, "after_due": 0, "after_id": 0, "after": 0}
    steps = 0

    def step() -> bool:
        nonlocal steps
        steps += 1
        return False

    connection.execute("begin immediate")
    connection.set_progress_handler(step, 1)
    try:
        rows = connection.execute(SQL[name], values | {"now": NOW + 10 * DAY}).fetchall()
    finally:
        connection.set_progress_handler(None)
        connection.execute("rollback")

    one = name.startswith("signed") or name in ("next_due", "next_due_fast", "in_flight")  # all have the same key
    assert len(rows) == (1 if one else 10)
    assert steps < 3000, "a few hundred for each row; one look at each of 20,000 tasks would take more"


def test_every_statement_is_used_and_every_used_one_exists() -> None:
    source = Path(str(sqlite_tx.__file__)).read_text(encoding="utf-8")
    words = set(re.findall(r'"(\w+)"', source))

    assert set(SQL) <= words, "dead SQL"
    used = set(re.findall(r'(?:SQL\[|_(?:run|rows|column|value|task)\()"(\w+)"', source))
    assert used <= set(SQL), "missing SQL"
    assert len(used) > 30


def test_no_statement_reads_a_clock_or_rolls_dice() -> None:
    assert not [name for name, sql in SQL.items() if re.search(r"datetime|strftime|unixepoch|julian|random|current_", sql)]


def test_no_query_is_planned_anew_for_its_values(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "tasks.db"))

    with store.begin() as tx:
        assert tx._connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, -1) == 1  # a claim planned anew takes 200 µs more
    store.close()
