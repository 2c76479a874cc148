"""The format of a batch: what was packed comes out again, and of anything else comes an error of the right kind."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib import batch
from deferlib.batch import Told
from deferlib.context import SYSTEM_CLOCK, current_task
from deferlib.core.model import Delivery, Micros
from deferlib.errors import TokenMismatchError
from tests.unit.batches import BASE, DEADLINE, NOW, claim_of

NAMES = st.text(max_size=60)
NUMBERS = st.integers(0, 2**63 - 1)
HEADERS = st.lists(st.tuples(NAMES, NAMES), max_size=4)
CLAIMS = st.builds(
    claim_of,
    NUMBERS,
    claims=NUMBERS,
    queue=NAMES,
    name=st.none() | NAMES,
    namespace=NAMES,
    eta=st.integers(-(2**63), 2**63 - 1),
    attempts=st.integers(1, 10**6),
    executions=st.integers(0, 10**6),
    body=st.binary(max_size=200),
)
CALLS = st.lists(st.tuples(CLAIMS, st.integers(1, 2**53), HEADERS), max_size=6)
TEXTS = st.text(max_size=batch.TEXT)
TOLD = st.builds(Told, st.integers(100, 599), st.sampled_from(["retry", "ok"]) | NAMES, st.integers(0, 2**40), TEXTS)
ANSWERS = st.lists(st.none() | TOLD | st.builds(Told, st.just(200), st.just("ok"), st.integers(0, 2**40)), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def packed(calls: list[tuple[Any, Micros, list[tuple[str, str]]]]) -> bytes:
    return batch.pack((Delivery(claim, BASE, deadline), json.dumps(headers)) for claim, deadline, headers in calls)


def with_directory(directory: bytes, bodies: bytes = b"") -> bytes:
    return struct.pack(">I", len(directory)) + directory + bodies


ROW = [5, "1", "", "mail", "", 1, 0, NOW, 7, DEADLINE, []]


# --- the request ------------------------------------------------------------------------------------------------------


@given(CALLS)
def test_what_was_packed_comes_back(calls: list[tuple[Any, Micros, list[tuple[str, str]]]]) -> None:
    parts = batch.unpack(packed(calls))

    assert len(parts) == len(calls)
    for part, (claim, deadline, headers) in zip(parts, calls, strict=True):
        assert part[:5] == (claim.id, claim.name or "", claim.queue, claim.namespace, claim.attempts)
        assert part[5:9] == (claim.executions, claim.eta, claim.claims, deadline)
        assert [tuple(header) for header in part.headers] == headers
        assert part.body == claim.body


def test_part_tells_its_call_who_it_is() -> None:
    claim = claim_of(7, name="welcome-7", queue="mail", namespace="tenant-1", attempts=3, executions=1, claims=99)
    (part,) = batch.unpack(packed([(claim, 5_000, [])]))

    task, headers = part.dispatch("/_ah/queue/deferred?x", NOW, SYSTEM_CLOCK)

    assert (task.id, task.name, task.queue, task.namespace, task.url) == (
        7, "welcome-7", "mail", "tenant-1", "/_ah/queue/deferred?x",
    )  # fmt: skip
    assert (task.attempt, task.execution_count, task.fence, task.deadline_micros) == (3, 1, 99, NOW + 5_000)
    assert headers.get("X-AppEngine-Default-Namespace") is None
    assert dict(headers) == {
        "X-AppEngine-QueueName": "mail",
        "X-AppEngine-TaskName": "welcome-7",
        "X-AppEngine-TaskRetryCount": "2",
        "X-AppEngine-TaskExecutionCount": "1",
        "X-AppEngine-TaskETA": str((NOW - 1_000_000) / 1_000_000),
        "X-AppEngine-Current-Namespace": "tenant-1",
    }
    assert current_task() is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_batch_or_a_mismatch(data: bytes) -> None:
    with contextlib.suppress(TokenMismatchError):
        batch.unpack(data)


@given(JSON, st.binary(max_size=20))
def test_any_directory_is_one_or_a_mismatch(directory: Any, bodies: bytes) -> None:
    with contextlib.suppress(TokenMismatchError):
        batch.unpack(with_directory(json.dumps(directory).encode(), bodies))


def test_batch_cut_short_or_longer_is_a_mismatch() -> None:
    data = packed([(claim_of(1, body=b"hello"), DEADLINE, []), (claim_of(2, body=b"world"), DEADLINE, [("a", "b")])])

    for end in range(len(data)):
        with pytest.raises(TokenMismatchError):
            batch.unpack(data[:end])
    for more in (b"\0", b"more of it"):
        with pytest.raises(TokenMismatchError):
            batch.unpack(data + more)


@pytest.mark.parametrize(
    "directory",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{}x", id="no JSON"),
        pytest.param(b"\xff\xfe[]", id="no text"),
        pytest.param(b"null", id="null"),
        pytest.param(b"5", id="a number"),
        pytest.param(b"[5]", id="no row"),
        pytest.param(b"[[]]", id="an empty row"),
        pytest.param(b"[" * 100_000, id="very deep"),
        pytest.param(json.dumps([ROW[:-1]]).encode(), id="a field less"),
        pytest.param(json.dumps([[*ROW, 1]]).encode(), id="a field more"),
        pytest.param(json.dumps([[-1, *ROW[1:]]]).encode(), id="a negative length"),
        pytest.param(json.dumps([[6, *ROW[1:]]]).encode(), id="a length beyond the end"),
        pytest.param(json.dumps([[5.0, *ROW[1:]]]).encode(), id="a length that is a float"),
        pytest.param(json.dumps([["5", *ROW[1:]]]).encode(), id="a length that is a text"),
        pytest.param(json.dumps([[5, "x", *ROW[2:]]]).encode(), id="an id that is no number"),
        pytest.param(json.dumps([[5, float("inf"), *ROW[2:]]]).encode(), id="an infinite id"),
        pytest.param(json.dumps([[5, None, *ROW[2:]]]).encode(), id="no id"),
        pytest.param(b"[[5," + b"9" * 10_000 + b"]]", id="an id of ten thousand digits"),
    ],
)
def test_malformed_directory_is_a_mismatch(directory: bytes) -> None:
    with pytest.raises(TokenMismatchError, match="isn't as engines write it"):
        batch.unpack(with_directory(directory, b"hello"))


# --- the answer -------------------------------------------------------------------------------------------------------


@given(ANSWERS)
def test_what_was_told_is_understood(answers: list[Told | None]) -> None:
    answers = [Told(200, "ok", 1), *answers]

    assert batch.told(batch.tell(answers).encode(), len(answers)) == [
        each._replace(text="") if each and each[:2] == (200, "ok") else each for each in answers
    ]


def test_success_is_told_as_its_time_alone() -> None:
    answers = [Told(200, "ok", 5, "Success"), None, Told(500, "retry", 7, "é"), Told(503, "ok", 9)]

    assert batch.tell(answers) == '[5,null,[500,"retry",7,"\\u00e9"],[503,"ok",9,""]]'


@pytest.mark.parametrize("char", ["x", "é", "\\", "\U0001f600", "\ud800"])
def test_reasons_are_cut_so_that_an_answer_keeps_its_size(char: str) -> None:
    """An override may return any body; the engine reads so much of an answer, and no more."""
    body = batch.tell([Told(500, "permanent", 10**9, char * 10_000)] * 1_000)

    assert len(body.encode()) <= 1_000 * batch.ANSWER_BYTES


@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_answer_is_understood_or_a_value_error(body: bytes, count: int) -> None:
    with contextlib.suppress(ValueError):
        assert len(batch.told(body, count)) == count


@given(st.lists(JSON, min_size=1, max_size=4))
def test_any_list_is_understood_or_a_value_error(answers: list[Any]) -> None:
    try:
        found = batch.told(json.dumps(answers).encode(), len(answers))
    except ValueError:
        return
    for each in found:
        if each is not None:
            assert 100 <= each.status <= 599
            assert 0 <= each.took < 2**63
            each.text.encode()  # as SQLite will


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"Success", id="no JSON"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"null", id="null"),
        pytest.param(b"2", id="a number"),
        pytest.param(b"[1]", id="too few"),
        pytest.param(b"[1,1,1]", id="too many"),
        pytest.param(b"[" * 60_000, id="very deep"),
        pytest.param(b"[1," + b"[" * 30_000 + b"]" * 30_000 + b"]", id="very deep, and whole"),
        pytest.param(b"[1,true]", id="true"),
        pytest.param(b"[1,1.5]", id="a float"),
        pytest.param(b"[1,-1]", id="a negative time"),
        pytest.param(b"[1,1e400]", id="an infinite time"),
        pytest.param(b"[1,9223372036854775808]", id="a time beyond all times"),
        pytest.param(b"[1," + b"9" * 5_000 + b"]", id="a time of five thousand digits"),
        pytest.param(b'[1,"ok"]', id="a text"),
        pytest.param(b"[1,{}]", id="an object"),
        pytest.param(b"[1,[]]", id="an empty list"),
        pytest.param(b'[1,[500,"retry",1]]', id="a field less"),
        pytest.param(b'[1,[500,"retry",1,"",1]]', id="a field more"),
        pytest.param(b'[1,["500","retry",1,""]]', id="a status that is a text"),
        pytest.param(b'[1,[true,"retry",1,""]]', id="a status that is true"),
        pytest.param(b'[1,[0,"retry",1,""]]', id="status 0"),
        pytest.param(b'[1,[-200,"retry",1,""]]', id="a negative status"),
        pytest.param(b'[1,[9223372036854775808,"retry",1,""]]', id="a status beyond SQLite's integers"),
        pytest.param(b'[1,[500,"retry",-1,""]]', id="a failure's negative time"),
        pytest.param(b'[1,[500,"retry",9223372036854775808,""]]', id="a failure's time beyond all times"),
        pytest.param(b'[1,[500,7,1,""]]', id="an outcome that is a number"),
        pytest.param(b'[1,[500,"retry",1,null]]', id="no reason"),
    ],
)
def test_malformed_answer_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # json's own among them
        batch.told(body, 2)


def test_answer_that_has_not_begun_the_first_call_is_a_value_error() -> None:
    """A handler begins one at least. Who answers nothing but nulls would get the same calls again at once, for ever."""
    with pytest.raises(ValueError, match="none"):
        batch.told(b"[null,null]", 2)
    with pytest.raises(ValueError, match="none"):
        batch.told(b"[null,5]", 2)
    assert batch.told(b"[5,null]", 2) == [Told(200, "ok", 5), None]


def test_reason_with_half_a_character_is_mended() -> None:
    """JSON can spell it; SQLite takes no such text, and the turn that settles it would fail again and again."""
    (found,) = batch.told(b'[[500,"retry",1,"a\\ud800b"]]', 1)

    assert found is not None
    assert found.text == "a?b"
