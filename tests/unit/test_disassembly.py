"""Pickles that are read, never loaded: what they say, what a call needs, and that the worst of them have an end."""

from __future__ import annotations

import copyreg
import datetime
import functools
import os
import pickle
import pickletools
import re
import struct
import sys
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferlib import disassembly
from deferlib.disassembly import (
    Arguments,
    Attribute,
    Callee,
    Global,
    Instance,
    Items,
    Made,
    Opaque,
    Pairs,
    Partial,
    Unreadable,
    arguments,
    attribute,
    callee,
    read,
)

HERE = __name__
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
MAILER = Global(HERE, "Mailer")


def function() -> None: ...


class Mailer:
    def __init__(self) -> None:
        self.host = "h"

    def send(self) -> None: ...

    @classmethod
    def make(cls) -> None: ...

    def __call__(self) -> None: ...


class Slotted:
    __slots__ = ("host",)

    def __init__(self) -> None:
        self.host = "h"

    def send(self) -> None: ...


class Old:
    """Pickled by INST and OBJ in protocols of Python 2, whose bytes the tests write by hand."""


def plain(node: Any) -> Any:
    """Return what *node* stands for, if it consists of literals only."""
    match node:
        case Items(kind=kind, items=items):
            made = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
            return made(plain(item) for item in items)
        case Pairs(pairs=pairs):
            return {plain(key): plain(value) for key, value in pairs}
        case Made(by=Global("builtins" | "__builtin__", name), args=Items(items=items)):
            return {"set": set, "frozenset": frozenset, "bytearray": bytearray, "bytes": bytes}[name](*map(plain, items))
    assert not isinstance(node, Global | Opaque | Made), node
    return node


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.binary().map(bytearray) | st.integers().map(lambda number: number << 3000),
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4) | st.frozensets(st.binary(max_size=3), max_size=4)
    ),
    max_leaves=20,
)  # fmt: skip


@given(LITERALS, st.sampled_from(PROTOCOLS))
@settings(max_examples=300, deadline=None)
def test_literals_are_read_as_an_unpickler_reads_them(value: object, protocol: int) -> None:
    assert plain(read(pickle.dumps(value, protocol)).value) == value


def test_every_opcode_has_a_meaning() -> None:
    known = {opcode.name for opcode in pickletools.opcodes}

    assert known == disassembly._PUSHED | set(disassembly._DO) | {"STOP"}
    assert not disassembly._PUSHED & set(disassembly._DO)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"I01\n.", True), (b"I7\n.", 7), (b"L7L\n.", 7), (b"F1.5\n.", 1.5), (b"S'a\\n'\n.", "a\n"), (b"Vab\n.", "ab"),
        (b"T\2\0\0\0ab.", "ab"), (b"U\2ab.", "ab"), (b"\x8b\2\0\0\0\0\1.", 256), (b"(lI1\na.", [1]),
        (b"(dI1\nI2\ns.", {1: 2}), (b"(I1\nI2\nd.", {1: 2}), (b"(I1\nI2\nl.", [1, 2]), (b"(t.", ()),
        (b"I1\n20.", 1), (b"I1\n(I2\nI3\n1.", 1), (b"I1\n(0.", 1), (b"I1\np5\n0g5\n.", 1), (b"I1\nq\x050h\5.", 1),
        (b"I1\nr\5\0\0\0" b"0j\5\0\0\0.", 1), (b"\x80\4I1\n\x940h\0.", 1), (b"I1\n2\x86.", (1, 1)),
        (b"\x80\5\x96\2\0\0\0\0\0\0\0ab.", bytearray(b"ab")), (b"\x80\4\x95\2\0\0\0\0\0\0\0K\1.", 1),
        (b"\x80\4\x8d\1\0\0\0\0\0\0\0a.", "a"), (b"\x80\4\x8e\1\0\0\0\0\0\0\0a.", b"a"), (b"\x80\4\x8f(K\1\x90.", {1}),
        (b"\x80\4(K\1\x91.", frozenset({1})),
    ],
)  # fmt: skip
def test_opcodes_that_nobody_writes_any_more_are_read_as_an_unpickler_reads_them(data: bytes, value: object) -> None:
    assert pickle.loads(data) == value, "the test's own bytes are right"
    assert plain(read(data).value) == value


@pytest.mark.parametrize("data", [b"(i" + f"{HERE}\nOld\n.".encode(), b"(c" + f"{HERE}\nOld\no.".encode()])
def test_objects_of_old_protocols_are_calls_of_their_class(data: bytes) -> None:
    made = read(data).value

    assert isinstance(made, Made)
    assert made.by == Global(HERE, "Old")
    assert plain(made.args) == ()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x82\7.", "extension 7"), (b"\x83\7\1.", "extension 263"), (b"\x84\7\0\0\0.", "extension 7"),
        (b"Pkey\n.", "persistent id"), (b"I1\nQ.", "persistent id"), (b"\x80\5\x97.", "buffer"),
        (b"\x80\5\x97\x98.", "buffer"),
    ],
)  # fmt: skip
def test_what_a_pickle_does_not_say_is_opaque(data: bytes, text: str) -> None:
    reading = read(data)

    assert reading.value == Opaque(text)
    assert not reading.whole


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_globals_are_named_in_the_order_in_which_they_are_looked_for(protocol: int) -> None:
    reading = read(pickle.dumps([function, Mailer, function], protocol))

    assert reading.globals == (Global(HERE, "function"), Global(HERE, "Mailer"))
    assert reading.whole


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_state_belongs_to_the_object_that_it_is_put_into(protocol: int) -> None:
    made = read(pickle.dumps(Mailer(), protocol)).value

    assert isinstance(made, Made)
    assert (made.by, made.new, plain(made.state)) == (MAILER, True, {"host": "h"})


# --- what a call needs ----------------------------------------------------------------------------------------------

HOST = frozenset({"host"})


def shown(value: object) -> str:
    """Return a test's name, which is the same in each process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("value", "target"),
    [
        (function, Global(HERE, "function")),
        (Mailer, MAILER),
        (Mailer.make, Attribute(MAILER, "make")),
        (Mailer().send, Attribute(Instance(MAILER, HOST), "send")),
        (Slotted().send, Attribute(Instance(Global(HERE, "Slotted"), HOST), "send")),
        (Mailer(), Instance(MAILER, HOST)),
        (functools.partial(function, 1, a=2), Partial(Global(HERE, "function"), 1, ("a",))),
        (functools.partial(Mailer().send, 1), Partial(Attribute(Instance(MAILER, HOST), "send"), 1, ())),
        ([].append, None),
        (7, None),
    ],
    ids=shown,
)
def test_target_of_a_call_is_told_from_its_pickle(value: object, target: object, protocol: int) -> None:
    assert callee(pickle.dumps(value, protocol)).target == target


def test_callables_that_differ_in_their_state_only_are_the_same() -> None:
    first, second = Mailer(), Mailer()
    second.host = "another"

    assert callee(pickle.dumps(first.send)) == callee(pickle.dumps(second.send))
    assert hash(callee(pickle.dumps(first.send))) == hash(callee(pickle.dumps(second.send)))


def test_shape_of_arguments_is_their_number_and_names() -> None:
    data = pickle.dumps(((1, Mailer(), [1, 2]), {"a": 1, "b": function}), 5)

    assert arguments(data) == Arguments(3, ("a", "b"), (MAILER, Global(HERE, "function")), True)
    assert arguments(pickle.dumps(((), {}), 5)) == Arguments(0, (), (), True)


@pytest.mark.parametrize("value", [7, ((), {}, 1), ([], {}), ((), []), ((), {1: 2})], ids=repr)
def test_arguments_of_another_form_are_not_told(value: object) -> None:
    assert arguments(pickle.dumps(value))[:2] == (None, None)


def test_unreadable_pickles_need_what_cannot_be_told() -> None:
    assert callee(b"garbage") == Callee(None, (), False)
    assert arguments(b"garbage") == Arguments(None, None, (), False)
    assert arguments(pickle.dumps((("x" * 100,), {})), most_bytes=50) == Arguments(None, None, (), False)


def test_deep_chain_of_attributes_is_not_followed() -> None:
    data = b"\x80\4" + b"cbuiltins\ngetattr\n" * 5000 + b"cos\npath\n" + (b"\x8c\1a\x86R" * 5000) + b"."

    assert callee(data, most_bytes=1 << 20, most_opcodes=100_000).target is None


# --- limits ---------------------------------------------------------------------------------------------------------


def test_more_bytes_than_may_be_read_are_not_read() -> None:
    data = pickle.dumps(b"x" * 1000)

    assert read(data, most_bytes=len(data)).value == b"x" * 1000
    with pytest.raises(Unreadable, match="more than"):
        read(data, most_bytes=len(data) - 1)


def test_opcodes_are_counted() -> None:
    data = b"N" * 99 + b"."

    assert read(data, most_opcodes=99).value is None
    with pytest.raises(Unreadable, match="more than 98 opcodes"):
        read(data, most_opcodes=98)


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"N", b"\xff", b"0.", b"(", b"t.", b"a.", b"R.", b"c\n", b"NR.", b"\x93.", b"NN\x93.", b"I\n.", b"Ix\n.",
        b"\x8a\xff", b"\x8b\xff\xff\xff\xff.", b"h\0.", b"g\n.", b"\x85.", b"NNa.", b"NNNs.", b"](Ne(Nu.", b"}(Nu.",
        b"\x8c\1\xff.", b"V\\ud8\n.", b"S'a\n.", b"X\xff\xff\xff\x7fab.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"I" + b"9" * 10_000 + b"\n.", b"(Nd.", b"cos\nsystem", b"(o.", b"\x81.", b"N\x92.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"\x94.",
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_pickle_is_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable):
        read(data)


def test_deeply_nested_pickle_is_read_and_forgotten_without_recursion() -> None:
    depth = 50_000  # more than any stack holds
    for opcode in (b"\x85", b"]\x94h\0a0h\0"):  # a tuple in a tuple …; lists that contain themselves
        read(b"\x80\4)" + opcode * depth + b".", most_bytes=1 << 22, most_opcodes=10 * depth)
    read(b"\x80\4cos\npath\n" + b")R" * depth + b".", most_bytes=1 << 22, most_opcodes=10 * depth)
    read(b"\x80\4)" + b"2\x86" * depth + b".", most_bytes=1 << 22, most_opcodes=10 * depth)  # 2 ** 50,000 tuples


def test_huge_pickles_cost_no_more_than_their_limits() -> None:
    counted = 0

    def count(machine: Any, argument: Any) -> None:
        nonlocal counted
        counted += 1

    kept = disassembly._DO["NONE"]
    disassembly._DO["NONE"] = count
    try:
        with pytest.raises(Unreadable):
            read(b"N" * (10 << 20) + b".", most_bytes=20 << 20, most_opcodes=1000)
        assert counted == 1001
        with pytest.raises(Unreadable):
            read(b"N" * (10 << 20) + b".")
        assert counted == 1001, "of too many bytes none is read"
    finally:
        disassembly._DO["NONE"] = kept


# --- hostile bytes --------------------------------------------------------------------------------------------------

REAL = [
    pickle.dumps(value, protocol)
    for protocol in PROTOCOLS
    for value in (
        ((1, "a", b"b", 2.5, None), {"a": [1], "b": {"c": {2}}}),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), Decimal("1.5"), uuid.UUID(int=5), Path("/x"), 1 << 100),
        [function, Mailer(), Mailer.make, functools.partial(function, 1), range(3)],
    )
]


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A real pickle of which some bytes are others, missing, or doubled."""
    data = bytearray(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 2)):
            case 0:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 8))]
            case _:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
        if not data:
            break
    return bytes(data)


@given(st.binary(max_size=300) | mutants() | st.lists(st.sampled_from(REAL)).map(b"".join))
@settings(max_examples=1500, deadline=None)
def test_any_bytes_are_read_or_unreadable(data: bytes) -> None:
    callee(data), arguments(data)
    try:
        reading = read(data)
    except Unreadable:
        return
    assert isinstance(reading.globals, tuple)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo ran > /tmp/deferlib-must-not-exist",)


def test_nothing_is_imported_called_or_made() -> None:
    copyreg.add_extension("deferlib_no_such", "thing", 240)
    data = [pickle.dumps(Hostile()), b"cdeferlib_no_such\nthing\n.", b"(S'x'\nideferlib_no_such\nthing\n.", b"\x82\xf0."]
    data.append(b"\x80\4\x8c\5antigravity\x8c\1x\x93.".replace(b"\5", b"\x0b"))
    before = set(sys.modules)

    try:
        named = [read(each).globals for each in data]
    finally:
        copyreg.remove_extension("deferlib_no_such", "thing", 240)

    assert named[0] == (Global("posix", "system"),)
    assert named[4] == (Global("antigravity", "x"),)
    assert set(sys.modules) == before
    assert not Path("/tmp/deferlib-must-not-exist").exists()


def test_attribute_is_recognised_by_getattr_alone() -> None:
    made = read(pickle.dumps(Mailer.make)).value
    assert isinstance(made, Made)
    assert attribute(made) == (MAILER, "make")
    other = read(struct.pack("<B", 0x80) + b"\4cos\ngetattr\ncos\npath\n\x8c\1a\x86R.").value
    assert isinstance(other, Made)
    assert attribute(other) is None
