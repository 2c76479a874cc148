"""The payload envelope: what can be deferred, and that nothing altered, moved or foreign is ever unpickled."""

from __future__ import annotations

import functools
import hmac
import operator
import re
import struct
import subprocess
import sys
import textwrap
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib import payload
from deferlib.errors import (
    PayloadError,
    PayloadKeyUnknownError,
    PayloadNewerError,
    PayloadUndecodableError,
    PayloadUnverifiedError,
    UnpicklableCallError,
)
from deferlib.keys import Keyring

FORMATS = Path(__file__).parent.parent.parent / "docs" / "reference" / "formats.md"
SECRET = b"example-key-0123456789abcdefghij"
RING = Keyring([SECRET])
TASK = payload.Binding(7397463212345678901, "welcome-7", "mail", "/_ah/queue/deferred", "tenant-1")
FLAGS, CODEC, COMPRESSION, ENCRYPTION, MINOR = 4, 5, 6, 7, 8  # offsets


def add(x: int, y: int = 0) -> int:
    return x + y


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.start = start

    def up(self, by: int) -> int:
        return self.start + by

    @classmethod
    def made(cls, start: int) -> int:
        return cls(start).start

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    def __call__(self, x: int) -> int:
        return self.start * x


class OddMeta(type):
    def __eq__(cls, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Odd(metaclass=OddMeta):
    pass


class Canary:
    """An object that leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sing, ()


SUNG: list[str] = []


def sing() -> str:
    SUNG.append("sung")
    return "sung"


def sealed(fn: Any, *args: Any, **kwargs: Any) -> bytes:
    return payload.seal(payload.dump_call(fn, args, kwargs), RING.signing, TASK)


def resigned(data: bytes) -> bytes:
    """Return *data*, altered, with the signature that the holder of the key would give it."""
    sizes = struct.unpack_from(">5H", data, 25)
    end = 35 + sum(sizes)
    signed, body = data[:end], data[end + 32 :]
    return signed + hmac.digest(RING.signing.payload, signed + body, "sha256") + body


def patched(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + bytes([value]) + data[offset + 1 :]


def loaded(data: bytes) -> Any:
    fn, args, kwargs = payload.load_call(payload.verify(data, RING, TASK))
    return fn(*args, **kwargs)


# --- what can be deferred -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        pytest.param(add, (1, 2), 3, id="function"),
        pytest.param(Counter(3).up, (4,), 7, id="method"),
        pytest.param(Counter.made, (5,), 5, id="class method"),
        pytest.param(Counter.double, (6,), 12, id="static method"),
        pytest.param(Counter(3), (4,), 12, id="callable object"),
        pytest.param(int, ("7",), 7, id="builtin class"),
        pytest.param(len, ([1, 2],), 2, id="builtin function"),
        pytest.param([3, 1].count, (3,), 1, id="builtin method"),
        pytest.param(datetime(2026, 1, 2).isoformat, (), "2026-01-02T00:00:00", id="builtin method of a value"),  # noqa: DTZ001
        pytest.param(functools.partial(add, 1), (2,), 3, id="partial"),
        pytest.param(operator.itemgetter(1), ("ab",), "b", id="operator"),
        pytest.param(lambda x: x + 1, (1,), 2, id="lambda"),
    ],
)
def test_every_kind_of_callable_comes_back(fn: Any, args: tuple[Any, ...], expected: object) -> None:
    assert loaded(sealed(fn, *args)) == expected


def test_closure_takes_what_it_closes_over_along() -> None:
    step = 10

    def up(x: int) -> int:
        return x + step

    assert loaded(sealed(up, 1)) == 11


def test_class_is_called_and_keyword_arguments_arrive() -> None:
    assert loaded(sealed(Counter, start=4)).start == 4
    assert loaded(sealed(add, 1, y=5)) == 6


def test_class_whose_metaclass_has_no_hash_comes_back() -> None:
    assert isinstance(loaded(sealed(Odd)), Odd)


def test_arguments_of_local_classes_travel_by_value() -> None:
    class Local:
        size = 3

    data = sealed(getattr, Local(), "size")

    assert loaded(data) == 3
    assert data[FLAGS] & payload.BY_VALUE


def test_what_has_a_name_travels_by_reference() -> None:
    for fn in (add, Counter, Counter(1), Counter.made, functools.partial(add, 1)):
        assert not sealed(fn, "an argument")[FLAGS] & payload.BY_VALUE


def test_the_text_main_as_an_argument_is_no_code() -> None:
    data = sealed(add, "__main__", "!")

    assert loaded(data) == "__main__!"
    assert not data[FLAGS] & payload.BY_VALUE


def test_functions_and_classes_of_main_run_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from deferlib import payload
            from deferlib.keys import Keyring

            class Point:
                def __init__(self, x): self.x = x
                def up(self, by): return self.x + by

            def first(point, *, named): return helper(point) + named.x
            def helper(point): return point.x

            ring = Keyring([sys.argv[1].encode()])
            for call in ((first, (Point(1),), {"named": Point(20)}), (Point(300).up, (1,), {}), (Point, (5,), {})):
                print(payload.seal(payload.dump_call(*call), ring.signing, None).hex())
            """
        )
    )
    written = subprocess.run([sys.executable, script, SECRET], capture_output=True, text=True, check=True)

    envelopes = [bytes.fromhex(line) for line in written.stdout.split()]

    assert all(data[FLAGS] & payload.BY_VALUE for data in envelopes)
    values = [loaded(data) for data in envelopes]
    assert values[:2] == [21, 301]
    assert values[2].x == 5


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((1, threading.Lock()), {}, "argument 2 of "),
        ((1,), {"guard": threading.Lock()}, "argument 'guard' of "),
        (([{"deep": threading.Lock()}],), {}, "argument 1 of "),
    ],
)
def test_argument_that_cannot_be_pickled_is_named(args: tuple[Any, ...], kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(UnpicklableCallError, match=rf"^{named}.*\.add \(a .*\) can't be pickled"):
        payload.dump_call(add, args, kwargs)


def test_callable_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    with pytest.raises(UnpicklableCallError, match=r"^the callable .*acquire.* can't be pickled"):
        payload.dump_call(lock.acquire, (), {})


def test_error_of_a_reduce_method_is_one_line() -> None:
    class Rude:
        def __reduce__(self) -> str:
            raise RuntimeError("first\nERROR second")

    with pytest.raises(UnpicklableCallError) as caught:
        payload.dump_call(add, (Rude(),), {})

    assert "\n" not in str(caught.value)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_label_is_the_name_a_person_would_use() -> None:
    assert payload.describe(sealed(textwrap.dedent, "x")) == "textwrap.dedent"
    assert payload.describe(sealed(functools.partial(textwrap.dedent), "x")) == "textwrap.dedent"
    assert payload.describe(sealed(Counter(1).up, 1)).endswith(".Counter.up")
    assert payload.describe(sealed(Counter(1), 1)).endswith(".Counter")
    assert payload.describe(b"something else") == ""


@pytest.mark.parametrize("name", ["a\r\nX-Evil: 1", "a\x1b[31m", "a\x00b", "a\u2028b", "a\ud800b", "é" * 300, "x" * 999])
def test_label_is_one_short_printable_line(name: str) -> None:
    def fn() -> None: ...

    fn.__qualname__ = name

    label = payload.describe(sealed(fn))

    assert not re.search(r"[\x00-\x1f\x7f\u2028\ud800-\udfff]", label)
    assert len(label.encode()) <= 200


def test_label_of_a_forged_envelope_is_one_line_too() -> None:
    forged = sealed(textwrap.dedent, "x").replace(b"textwrap.dedent", b"textwrap\nERROR.")

    assert payload.describe(forged) == "textwrap\\nERROR."


def test_error_that_cannot_be_read_is_described_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert payload.describe_error(MuteError()) == "MuteError: <its message can't be read: ValueError>"
    assert payload.describe_error(ValueError("a\nb\x1b")) == r"ValueError: a\nb\x1b"


# --- nothing altered is unpickled -----------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused_and_nothing_of_it_runs() -> None:
    data = sealed(add, Canary(), "x" * 40)
    assert 250 <= len(data) <= 400
    SUNG.clear()

    for bit in range(len(data) * 8):
        altered = patched(data, bit // 8, data[bit // 8] ^ 1 << bit % 8)
        with pytest.raises(PayloadError):
            loaded(altered)

    assert not SUNG
    loaded(data)
    assert SUNG  # the canary does sing when it may


def test_every_truncation_and_addition_is_refused() -> None:
    data = sealed(add, 1)

    for length in range(len(data)):
        with pytest.raises(PayloadError):
            payload.verify(data[:length], RING, TASK)
    with pytest.raises(PayloadUnverifiedError):
        payload.verify(data + b"\0", RING, TASK)


@pytest.mark.parametrize("field", payload.Binding._fields)
def test_payload_moved_to_another_task_is_refused(field: str) -> None:
    other = TASK._replace(**{field: 1 if field == "id" else "other"})

    with pytest.raises(PayloadUnverifiedError, match="another task"):
        payload.verify(sealed(add, 1), RING, other)


def test_texts_cannot_pass_from_one_field_to_the_next() -> None:
    shifted = TASK._replace(name=TASK.name + TASK.queue[:1], queue=TASK.queue[1:])
    call = payload.dump_call(add, (1,), {})

    assert payload.seal(call, RING.signing, TASK) != payload.seal(call, RING.signing, shifted)


def test_payload_of_a_key_that_is_not_in_the_ring_is_refused_by_name() -> None:
    other = Keyring([b"another key of sufficient length"])

    with pytest.raises(PayloadKeyUnknownError, match=RING.signing.id.hex()):
        payload.verify(sealed(add, 1), other, TASK)


def test_every_key_of_the_ring_verifies() -> None:
    ring = Keyring([b"another key of sufficient length", SECRET])

    assert payload.verify(sealed(add, 1), ring, TASK).binding == TASK


def test_key_of_another_purpose_does_not_sign_payloads() -> None:
    key = Keyring([SECRET]).signing
    key.payload = key.dispatch

    with pytest.raises(PayloadUnverifiedError):
        payload.verify(payload.seal(payload.dump_call(add, (1,), {}), key, TASK), RING, TASK)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(3, 2), (3, 0), (CODEC, 2), (CODEC, 0), (COMPRESSION, 1), (ENCRYPTION, 1), (FLAGS, 4 | 1), (FLAGS, 128)],
)
def test_newer_format_is_left_alone_whoever_signed_it(offset: int, value: int) -> None:
    data = patched(sealed(add, 1), offset, value)

    for altered in (data, resigned(data)):
        with pytest.raises(PayloadNewerError):
            payload.verify(altered, RING, TASK)


def test_unbound_payload_is_for_any_task_unless_that_is_refused() -> None:
    data = payload.seal(payload.dump_call(add, (1,), {}), RING.signing, None)

    assert payload.verify(data, RING, TASK).binding == payload.Binding(0, "", "", "", "")
    with pytest.raises(PayloadUnverifiedError, match="no task in particular"):
        payload.verify(data, RING, TASK, unbound=False)


def test_bound_payload_cannot_pass_for_an_unbound_one() -> None:
    data = sealed(add, 1)

    with pytest.raises(PayloadUnverifiedError):
        payload.verify(patched(data, FLAGS, 0), RING, TASK)


@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda rest: b"dfr\x01\x01\x01\x00\x00\x0b" + rest))
def test_garbage_raises_payload_errors_only(data: bytes) -> None:
    with pytest.raises(PayloadError):
        payload.verify(data, RING, TASK)
    assert payload.describe(data).isprintable()


# --- what can't be loaded here --------------------------------------------------------------------------------------


def test_code_of_another_python_is_undecodable_here() -> None:
    data = resigned(patched(sealed(lambda: None), MINOR, sys.version_info.minor + 1))

    with pytest.raises(PayloadUndecodableError, match="importable module"):
        loaded(data)


def test_reference_of_another_python_is_fine() -> None:
    assert loaded(resigned(patched(sealed(add, 1), MINOR, 8))) == 1


@pytest.mark.parametrize("raised", ["ImportError('no')", "ZeroDivisionError()", "SystemExit(3)", "RecursionError()"])
def test_module_that_fails_to_import_makes_its_calls_undecodable(
    raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "w3_broken.py").write_text("def fn(): pass\n")
    data = sealed(__import__("w3_broken").fn)
    del sys.modules["w3_broken"]
    (tmp_path / "w3_broken.py").write_text(f"# now it is longer than before\nraise {raised}\n")

    with pytest.raises(PayloadUndecodableError, match=r"w3_broken\.fn can't be loaded"):
        loaded(data)


def test_machine_without_memory_is_not_the_payloads_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> None:
        raise MemoryError

    class Large:
        def __reduce__(self) -> tuple[Any, ...]:
            return exhausted, ()

    data = sealed(add, Large())

    with pytest.raises(MemoryError):
        loaded(data)


# --- the format doesn't drift ---------------------------------------------------------------------------------------


def documented(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", FORMATS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_document_shows_the_bytes_that_are_made() -> None:
    data = sealed(textwrap.dedent, "Hello, world!", 42, True)
    if sys.version_info.minor != 11:
        data = resigned(patched(data, MINOR, 11))

    assert data.hex() == documented("envelope").replace("\n", "")
    text = FORMATS.read_text(encoding="utf-8")
    for part in (data[:35], payload.parse(data).signature):
        assert part.hex() in text


def test_document_shows_the_derived_keys() -> None:
    key, text = RING.signing, FORMATS.read_text(encoding="utf-8")

    assert f"`{SECRET.decode()}`" in text
    for part in (key.id, key.payload, key.dispatch):
        assert f"`{part.hex()}`" in text


def test_example_of_the_document_can_be_taken_apart_with_the_table_alone() -> None:
    data = bytes.fromhex(documented("envelope").replace("\n", ""))

    magic, *numbers, key_id, id, s1, s2, s3, s4, s5 = struct.unpack(">3s6B8sQ5H", data[:35])
    texts, rest = [], data[35:]
    for size in (s1, s2, s3, s4, s5):
        texts.append(rest[:size].decode())
        rest = rest[size:]

    assert (magic, numbers) == (b"dfr", [1, 1, 1, 0, 0, 11])  # version, flags, codec, compression, encryption, minor
    assert (key_id, id) == (RING.signing.id, TASK.id)
    assert texts == [TASK.name, TASK.queue, TASK.url, TASK.namespace, "textwrap.dedent"]
    assert hmac.digest(RING.signing.payload, data[: -len(rest)] + rest[32:], "sha256") == rest[:32]
