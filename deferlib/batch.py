"""Several deferred calls in one request: how an engine writes them down, and how a handler tells what became of each.

A POST costs its engine and its server about 100 µs, whatever it carries: more than the calls of most tasks take. So calls
that are known to be quick go together (`deferlib.engine.batching` decides which). The format is in
`docs/reference/formats.md`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from deferlib.clock import Clock
from deferlib.context import Dispatch, LazyHeaders, TaskContext, platform_headers
from deferlib.core.model import DAY, Delivery, Micros
from deferlib.errors import TokenMismatchError

OUTCOME = "batch"  # the X-Deferlib-Outcome of an answer to a batch
PATIENCE: Micros = 50_000  # when a batch has taken so long, its handler begins no more of it
MOST_BYTES = 256 * 1024  # of the body of a request: engines make smaller ones, whatever the setting `limits` says
TEXT = 300  # characters of a call's answer
ANSWER_BYTES = 4_096  # that what is told of one call takes at most: JSON makes twelve of a character

_LENGTH = struct.Struct(">I")
_encode = json.JSONEncoder(separators=(",", ":")).encode
_FIELDS = 11
_LONGEST: Micros = 31 * DAY  # than any deadline can be


class Part(NamedTuple):
    """One call of a batch, as its handler gets it."""

    id: int
    name: str  # '' if the task has none
    queue: str
    namespace: str
    attempt: int
    executions: int
    eta: Micros
    fence: int
    deadline: Micros  # how long the attempt may take
    headers: Sequence[Sequence[str]]  # names and values that the task's adder set
    body: bytes

    def dispatch(self, url: str, begun: Micros, clock: Clock) -> Dispatch:
        """Return what the engine vouches for, of an attempt that is *begun* then, by the engine's clock."""
        context = TaskContext(
            id=self.id,
            user_name=self.name,
            queue=self.queue,
            attempt=self.attempt,
            execution_count=self.executions,
            eta_micros=self.eta,
            deadline_micros=begun + self.deadline,
            fence=self.fence,
            namespace=self.namespace,
            url=url,
            clock=clock,
        )
        return Dispatch(context, LazyHeaders(lambda: platform_headers(context), None))


class Batch(NamedTuple):
    """A request with several calls, as its handler gets it."""

    url: str  # path and query, as its tasks have it
    sent: Micros  # by the engine's clock
    parts: list[Part]


class Told(NamedTuple):
    """What became of one call of a batch."""

    status: int
    outcome: str
    took: Micros
    text: str = ""  # for people: why it failed


# --- the request ------------------------------------------------------------------------------------------------------


def pack(deliveries: Iterable[tuple[Delivery, str]]) -> bytes:
    """Return the body of a batch: each delivery with its headers, as the JSON of a list of names and values."""
    rows, bodies = [], []
    for (claim, _, deadline), headers in deliveries:
        place = _encode([claim.name or "", claim.queue, claim.namespace])[1:-1]
        rows.append(
            f'[{len(claim.body)},"{claim.id}",{place},{claim.attempts},{claim.executions},{claim.eta},{claim.claims},'
            f"{deadline},{headers}]"
        )
        bodies.append(claim.body)
    directory = f"[{','.join(rows)}]".encode()
    return b"".join([_LENGTH.pack(len(directory)), directory, *bodies])


def unpack(data: bytes) -> list[Part]:
    """Return the calls in the body of a batch whose token holds; `TokenMismatchError` for what no engine writes."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        start = _LENGTH.size + length
        parts = []
        for size, id, *fields in json.loads(data[_LENGTH.size : start]):
            end = start + size
            if len(fields) != _FIELDS - 2 or not start <= end <= len(data):
                raise ValueError
            parts.append(Part._make((int(id), *fields, data[start:end])))
            start = end
        if start != len(data):
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError, struct.error):
        raise TokenMismatchError("the body of this batch isn't as engines write it") from None
    return parts


# --- the answer -------------------------------------------------------------------------------------------------------


def tell(answers: Sequence[Told | None]) -> str:
    """Return the body of the answer to a batch; None stands for what wasn't begun."""
    return _encode([_briefly(each) if each is not None else None for each in answers])


def _briefly(answer: Told) -> Micros | Told:
    if answer.outcome == "ok" and answer.status == 200:  # nearly all of them
        return answer.took
    # As a number: JSON knows nothing of an override's HTTPStatus.
    return Told(int(answer.status), answer.outcome, answer.took, answer.text[:TEXT])


def told(body: bytes, count: int) -> list[Told | None]:
    """Return what the answer to a batch of *count* calls says of each; ValueError if it doesn't. Trusts nothing in it."""
    try:
        answers: Any = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(answers, list) or len(answers) != count:
        raise ValueError("another number of answers than calls")
    if answers and answers[0] is None:  # they would come again at once, for ever
        raise ValueError("it has begun none of them")
    return [_told(answer) for answer in answers]


def _told(answer: Any) -> Told | None:
    match answer:
        case None:
            return None
        case int(took) if _is_time(took):  # nearly all of them
            return Told(200, "ok", took)
        case [int(status), str(outcome), int(took), str(text)] if 100 <= status <= 599 and _is_time(took):
            return Told(status, outcome, took, text.encode("utf-8", "replace").decode())
    raise ValueError("not an answer")


def _is_time(took: int) -> bool:
    return took is not True and took is not False and 0 <= took <= _LONGEST
