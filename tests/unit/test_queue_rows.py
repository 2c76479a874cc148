"""The queues' rows: the file's values, a command's over them, and what has left the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferlib import queue_fields, queue_rows
from deferlib.core.model import QueueConfig, QueueRow, QueueSource
from deferlib.errors import InvalidQueueError
from deferlib.limits import DEFAULT
from deferlib.queue_fields import Place
from deferlib.queue_yaml import QueueFile, read
from deferlib.store import Store
from deferlib.store.sqlite import MEMORY, SqliteStore

MAIL = {"name": "mail", "rate": "5/s", "retry_parameters": {"task_retry_limit": 3}}


@pytest.fixture
def store() -> Iterator[Store]:
    store = SqliteStore(MEMORY)
    store.migrate()
    yield store
    store.close()


def file_of(*entries: dict[str, object], resume: bool = False) -> QueueFile:
    queues = [queue_fields.from_mapping(entry, Place("q")) for entry in entries]
    return QueueFile(queues, list(entries), [Place("q")] * len(entries), resume_paused_queues=resume)


def apply(store: Store, *entries: dict[str, object], whole: bool = True, resume: bool = False) -> queue_rows.Applied:
    return store.run(lambda tx: queue_rows.apply(tx, file_of(*entries, resume=resume), whole=whole))


def put(store: Store, name: str, **changes: object) -> QueueConfig:
    return store.run(lambda tx: queue_rows.put(tx, name, changes, DEFAULT))


def rows(store: Store) -> dict[str, QueueRow]:
    with store.read() as tx:
        return {row.name: row for row in tx.queues()}


def test_commands_value_lies_over_the_files_until_it_is_taken_back(store: Store) -> None:
    apply(store, MAIL)
    put(store, "mail", rate="20/s", retry_parameters={"max_doublings": 2})

    apply(store, {**MAIL, "rate": "7/s", "bucket_size": 9})
    row = rows(store)["mail"]
    assert (row.config.rate, row.config.bucket_size) == (20, 9)
    assert (row.config.retry.retry_limit, row.config.retry.max_doublings) == (3, 2)
    assert queue_rows.sources(row)["rate"] == queue_rows.sources(row)["retry_parameters.max_doublings"] == "command"
    assert queue_rows.sources(row)["bucket_size"] == "file"
    assert queue_rows.sources(row)["target"] == "default"

    put(store, "mail", rate=None)
    assert rows(store)["mail"].config.rate == 7
    store.run(lambda tx: queue_rows.clear(tx, "mail"))
    assert rows(store)["mail"].config == file_of({**MAIL, "rate": "7/s", "bucket_size": 9}).queues[0]


def test_queue_that_leaves_the_file_is_disabled_and_comes_back_as_it_was(store: Store) -> None:
    apply(store, MAIL, {"name": "other"})
    put(store, "mail", rate="20/s")

    assert apply(store, {"name": "other"}) == queue_rows.Applied(["mail"], [])
    assert (rows(store)["mail"].disabled, rows(store)["other"].disabled) == (True, False)
    assert rows(store)["mail"].config.rate == 20, "it keeps what was said of it"
    assert apply(store, {"name": "other"}) == queue_rows.Applied([], []), "told once"
    put(store, "mail", bucket_size=3)
    assert rows(store)["mail"].disabled, "a command doesn't bring it back"

    apply(store, MAIL, {"name": "other"})
    assert (rows(store)["mail"].disabled, rows(store)["mail"].config.rate) == (False, 20)


def test_only_what_a_file_made_is_disabled_and_only_by_a_file(store: Store) -> None:
    store.run(lambda tx: tx.put_queues([QueueConfig(name="used")], QueueSource.LIBRARY))
    put(store, "made", mode="pull")
    apply(store, MAIL)

    apply(store, {"name": "default"}, whole=False)
    assert not any(row.disabled for row in rows(store).values()), "an engine without a file knows nothing of others'"
    apply(store, {"name": "default"})
    assert [name for name, row in rows(store).items() if row.disabled] == ["mail"]


def test_commands_queue_becomes_the_files(store: Store) -> None:
    put(store, "mail", rate="20/s")
    assert rows(store)["mail"].source is QueueSource.COMMAND
    put(store, "mail", bucket_size=3)
    assert (rows(store)["mail"].config.rate, rows(store)["mail"].config.bucket_size) == (20, 3)

    apply(store, MAIL)

    row = rows(store)["mail"]
    assert (row.source, row.config.rate, row.config.retry.retry_limit) == (QueueSource.FILE, 20, 3)


def test_value_over_a_library_queue_keeps_the_rest(store: Store) -> None:
    config = QueueConfig(name="mail", rate=2.5, target="worker")
    store.run(lambda tx: tx.put_queues([config], QueueSource.LIBRARY))
    assert queue_rows.sources(rows(store)["mail"])["rate"] == "settings"

    put(store, "mail", bucket_size=3)

    assert rows(store)["mail"].config == config._replace(bucket_size=3)


def test_contradiction_changes_nothing(store: Store) -> None:
    apply(store, MAIL)
    put(store, "mail", retry_parameters={"min_backoff_seconds": 50})

    with pytest.raises(InvalidQueueError, match="queue 'mail': retry_parameters: min_backoff_seconds is larger"):
        apply(store, {"name": "new"}, {**MAIL, "retry_parameters": {"max_backoff_seconds": 40}})

    assert "new" not in rows(store)
    assert rows(store)["mail"].config.retry.max_backoff == 3_600_000_000


def test_paused_queues_are_resumed_once_by_each_new_file_that_says_so(store: Store) -> None:
    def pause() -> None:
        store.run(lambda tx: tx.pause(["mail"], True))

    apply(store, MAIL)
    pause()
    assert apply(store, {**MAIL, "rate": "6/s"}).resumed == []
    assert apply(store, {**MAIL, "rate": "6/s"}, resume=True).resumed == ["mail"]
    assert not rows(store)["mail"].paused
    pause()
    assert apply(store, {**MAIL, "rate": "6/s"}, resume=True).resumed == [], "an engine that starts again is no new file"
    assert apply(store, {**MAIL, "rate": "7/s"}, resume=True).resumed == ["mail"]


def test_dates_and_the_like_are_kept_as_text(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "queue.yaml"
    path.write_text("queue:\n- name: mail\n  acl:\n  - user_email: 2026-01-01\n")

    store.run(lambda tx: queue_rows.apply(tx, read(path), whole=True))

    assert json.loads(rows(store)["mail"].said)["file"]["acl"] == [{"user_email": "2026-01-01"}]


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"name": st.just("q")},
        optional={
            "mode": st.sampled_from(["push", "pull"]),
            "rate": st.from_regex(r"(0|[1-9][0-9]{0,4}(\.[0-9]{1,3})?)/[smhd]", fullmatch=True),
            "bucket_size": st.integers(1, 500),
            "max_concurrent_requests": st.integers(1, 500),
            "target": st.from_regex(r"[a-z][a-z0-9.-]{0,9}", fullmatch=True),
            "retry_parameters": st.fixed_dictionaries(
                {},
                optional={
                    "task_retry_limit": st.integers(0, 100),
                    "task_age_limit": st.from_regex(r"[1-9][0-9]{0,2}[smhd]", fullmatch=True),
                    "min_backoff_seconds": st.floats(0, 10).map(lambda x: round(x, 3)),
                    "max_backoff_seconds": st.floats(10, 9_999).map(lambda x: round(x, 3)),
                    "max_doublings": st.integers(0, 30),
                },
            ),
            "deferlib": st.fixed_dictionaries(
                {},
                optional={
                    "jitter": st.floats(0, 1),
                    "deadline": st.from_regex(r"[1-9][0-9]{0,2}(\.[0-9]{1,3})?[sm]", fullmatch=True),
                    "tombstone": st.from_regex(r"[1-9][0-9]{0,2}[smhd]", fullmatch=True),
                    "lost_limit": st.integers(1, 9),
                    "first_limit_wins": st.booleans(),
                },
            ),
        },
    )
)
def test_every_configuration_can_be_written_as_an_entry(entry: dict[str, object]) -> None:
    config = queue_fields.from_mapping(entry, Place("q"))

    assert queue_fields.from_mapping(queue_fields.to_mapping(config), Place("q")) == config
    assert set(queue_fields.values_of(config)) == set(queue_fields.ALL_KEYS)


def test_every_key_of_a_queue_is_among_those_shown() -> None:
    shown = {key.partition(".")[2] or key for key in queue_fields.ALL_KEYS}

    assert shown == (queue_fields.KEYS - {"name", "acl", "retry_parameters", "deferlib"}) | (
        queue_fields.RETRY_KEYS | queue_fields.OWN_KEYS
    )
