"""A call as people read it, from its payload, with nothing of it run."""

from __future__ import annotations

import collections
import enum
import pickle
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from deferlib import keys, payload
from deferlib.call_text import call_text

RING = keys.parse("a-key-of-sixteen-bytes-or-more")
OTHER = keys.parse("another-key-of-sixteen-bytes")
PLACE = __name__
ran: list[str] = []


def call(*args: Any, **kwargs: Any) -> None:
    """The call that is described."""


class Colour(enum.Enum):
    RED = 1


class User:
    def __init__(self) -> None:
        ran.append("init")

    def __setstate__(self, state: object) -> None:
        ran.append("setstate")

    def __getstate__(self) -> object:
        return {"secret": "hunter2"}


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return trapped, ("x",)


def trapped(text: str) -> str:
    ran.append(text)
    return text


class Names(list[str]):
    pass


def sealed(*args: Any, **kwargs: Any) -> bytes:
    return payload.seal(payload.dump_call(call, args, kwargs), RING.signing, None)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, ""),
        (("Hello, world!", 42, True), {}, "'Hello, world!', 42, True"),
        ((None,), {"subject": "Welcome", "to": ["a", "b"]}, "None, subject='Welcome', to=['a', 'b']"),
        ((datetime(2026, 1, 2, tzinfo=UTC), Decimal("1.5"), {1}), {},
         "datetime.datetime(2026, 1, 2, 0, 0, tzinfo=datetime.timezone.utc), Decimal('1.5'), {1}"),
        ((Colour.RED,), {}, f"{PLACE}.Colour(1)"),
        ((Path("/tmp/x"),), {}, None),
        ((Names(["a"]), collections.OrderedDict(a=1)), {}, f"<{PLACE}.Names>, <collections.OrderedDict>"),
        (("x" * 1000,), {}, None),
        ((list(range(1000)),), {}, "[0, 1, 2, 3, 4, ...]"),
    ],
)  # fmt: skip
def test_arguments_are_shown_as_python(args: tuple[Any, ...], kwargs: dict[str, Any], text: str | None) -> None:
    shown = call_text(sealed(*args, **kwargs), RING)

    assert shown.startswith(f"{PLACE}.call(")
    assert len(shown) <= 200
    assert shown.isprintable()
    if text is not None:
        assert shown == f"{PLACE}.call({text})"


def test_nothing_of_the_call_is_run_or_shown_of_foreign_objects() -> None:
    ran.clear()
    user = User()
    ran.clear()

    shown = call_text(sealed(user, Trap(), User), RING)

    assert shown == f"{PLACE}.call(<{PLACE}.User>, {PLACE}.trapped('x'), {PLACE}.User)"
    assert ran == []
    assert "hunter2" not in shown


def test_lambda_is_shown_without_its_code() -> None:
    body = payload.seal(payload.dump_call(call, (lambda: 1,), {}), RING.signing, None)

    assert call_text(body, RING).startswith(f"{PLACE}.call(")


@pytest.mark.parametrize("ring", [None, OTHER])
def test_without_the_key_only_the_name_is_shown(ring: keys.Keyring | None) -> None:
    assert call_text(sealed("secret"), ring) == f"{PLACE}.call(…)"


def test_forged_arguments_are_not_even_unpickled() -> None:
    body = bytearray(sealed("Hello"))
    body[-4] ^= 1

    assert call_text(bytes(body), RING) == f"{PLACE}.call(…)"


def test_many_arguments_are_not_read() -> None:
    assert call_text(sealed(b"x" * 40_000), RING) == f"{PLACE}.call(…)"


def test_broken_call_with_a_right_signature_is_shown_by_its_name() -> None:
    for body in (b"", b"\0\0\0\1", b"\0\0\0\0" + pickle.dumps(7), b"\0\0\0\0" + b"garbage"):
        data = payload.seal(payload.Call(body, "app.f", 0), RING.signing, None)

        assert call_text(data, RING) == "app.f(…)"


def test_what_is_no_deferred_call_has_no_text() -> None:
    assert call_text(b"a=1&b=2", RING) == ""


def test_arguments_with_line_ends_stay_on_one_line() -> None:
    assert call_text(sealed("a\nb\x1b[31m"), RING) == f"{PLACE}.call('a\\nb\\x1b[31m')"
