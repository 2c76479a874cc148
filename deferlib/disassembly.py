"""What a pickle says, read opcode by opcode and never loaded: nothing is imported, called or constructed.

A small machine goes through the opcodes as an unpickler does, but its stack holds plain literals and descriptions. That
is safe for the bytes of an enemy too: it takes time and memory in proportion to the bytes it may read.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

MOST_BYTES = 32 * 1024  # for a line of a list: reading them takes about a millisecond
MOST_OPCODES = 4_000
_DEEPEST = 10  # steps from a callable to the global it hangs on


class Unreadable(Exception):
    """The pickle is longer than it may be, cut short, or none."""


# --- what the stack holds -------------------------------------------------------------------------------------------


class Global(NamedTuple):
    """Something that the pickle names instead of containing it."""

    module: str
    name: str


class Opaque(NamedTuple):
    """Something that the pickle doesn't say: a persistent id, an extension code, a buffer beside it."""

    text: str


class Items:
    """A list, tuple, set or frozenset; it may contain itself."""

    __slots__ = ("items", "kind")

    def __init__(self, kind: str, items: list[Node]) -> None:
        self.kind = kind
        self.items = items


class Pairs:
    """A dict; it may contain itself."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[Node, Node]]) -> None:
        self.pairs = pairs


class Made:
    """What calling *by* returns, or a *new* object of the class *by*, with what is put into it afterwards."""

    __slots__ = ("args", "by", "items", "kwargs", "new", "pairs", "state")

    def __init__(self, by: Node, args: Node, kwargs: Node = None, *, new: bool = False) -> None:
        self.by = by
        self.args = args
        self.kwargs = kwargs
        self.new = new
        self.state: Node = None
        self.items: list[Node] = []
        self.pairs: list[tuple[Node, Node]] = []


Literal: TypeAlias = bool | int | float | str | bytes | bytearray | None
Node: TypeAlias = Global | Opaque | Items | Pairs | Made | Literal


class Reading(NamedTuple):
    """A pickle, read."""

    value: Node
    globals: tuple[Global, ...]  # all that it names, each once, in the order in which an unpickler looks for them
    whole: bool  # False: it also names something in a way that only an unpickler understands


def read(data: bytes, *, most_bytes: int = MOST_BYTES, most_opcodes: int = MOST_OPCODES) -> Reading:
    """Return what the pickle *data* says; `Unreadable` if it is none, or larger than the limits."""
    if len(data) > most_bytes:
        raise Unreadable(f"{len(data)} bytes, more than {most_bytes}")
    machine = _Machine()
    push, left = machine.stack.append, most_opcodes
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            name = opcode.name
            if name in _PUSHED:
                push(argument)
            elif name == "STOP":
                break
            else:
                _DO[name](machine, argument)
            left -= 1
            if left < 0:
                raise Unreadable(f"more than {most_opcodes} opcodes")
        return Reading(machine.stack.pop(), tuple(machine.globals), machine.whole)
    except Unreadable:
        raise
    except Exception as error:  # of the reader of arguments, or of a stack that hasn't what an opcode takes
        raise Unreadable(f"{type(error).__name__}: {error}") from None


class _Machine:
    __slots__ = ("globals", "marks", "memo", "stack", "whole")

    def __init__(self) -> None:
        self.stack: list[Any] = []  # of Node
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[Global, None] = {}
        self.whole = True

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def named(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Unreadable("a global without a name")
        found = Global(module, name)
        self.globals[found] = None
        self.stack.append(found)

    def unknown(self, text: str) -> None:
        self.whole = False
        self.stack.append(Opaque(text))


_Do: TypeAlias = Callable[[_Machine, Any], None]


def _tuple(count: int) -> _Do:
    def do(machine: _Machine, argument: Any) -> None:
        at = len(machine.stack) - count
        if at < 0:
            raise Unreadable("the stack is empty")
        machine.stack[at:] = [Items("tuple", machine.stack[at:])]

    return do


def _gathered(kind: str) -> _Do:
    def do(machine: _Machine, argument: Any) -> None:
        taken = machine.since_mark()
        machine.stack.append(Items(kind, taken))

    return do


def _dict(machine: _Machine, argument: Any) -> None:
    taken = machine.since_mark()
    machine.stack.append(Pairs(_paired(taken)))


def _paired(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _extend(machine: _Machine, items: list[Any]) -> None:
    into = machine.stack[-1]
    if not isinstance(into, Items | Made):
        raise Unreadable("items of what has none")
    into.items.extend(items)


def _set(machine: _Machine, pairs: list[tuple[Any, Any]]) -> None:
    into = machine.stack[-1]
    if not isinstance(into, Pairs | Made):
        raise Unreadable("items of what has none")
    into.pairs.extend(pairs)


def _append(machine: _Machine, argument: Any) -> None:
    item = machine.stack.pop()
    _extend(machine, [item])


def _set_item(machine: _Machine, argument: Any) -> None:
    value = machine.stack.pop()
    key = machine.stack.pop()
    _set(machine, [(key, value)])


def _pop(machine: _Machine, argument: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[argument] = machine.stack[-1]


def _global(machine: _Machine, argument: str) -> None:
    machine.named(*argument.split(" ", 1))


def _stack_global(machine: _Machine, argument: Any) -> None:
    name = machine.stack.pop()
    machine.named(machine.stack.pop(), name)


def _reduce(machine: _Machine, argument: Any) -> None:
    args = machine.stack.pop()
    by = machine.stack.pop()
    machine.stack.append(_called(by, args))


def _called(by: Node, args: Node) -> Node:
    """Return what calling *by* makes, where the pickle module has a meaning for it; else just that it was called."""
    match by, args.items if isinstance(args, Items) else []:
        case Global("_codecs", "encode"), [str() as text, "latin1"]:  # bytes in protocols that have none
            return text.encode("latin-1")
        case Global("copyreg" | "copy_reg", "__newobj__"), [cls, *rest]:
            return Made(cls, Items("tuple", rest), new=True)
        case Global("copyreg" | "copy_reg", "__newobj_ex__"), [cls, rest, kwargs]:
            return Made(cls, rest, kwargs, new=True)
        case Global("copyreg" | "copy_reg", "_reconstructor"), [cls, *_]:
            return Made(cls, Items("tuple", []), new=True)
        case Global(module, name), [Made() as made, state] if module.startswith("cloudpickle") and "setstate" in name:
            made.state = state
    return Made(by, args)


def _new(machine: _Machine, argument: Any) -> None:
    args = machine.stack.pop()
    machine.stack.append(Made(machine.stack.pop(), args, new=True))


def _new_ex(machine: _Machine, argument: Any) -> None:
    kwargs, args = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Made(machine.stack.pop(), args, kwargs, new=True))


def _obj(machine: _Machine, argument: Any) -> None:
    by, *args = machine.since_mark()
    machine.stack.append(Made(by, Items("tuple", args)))


def _inst(machine: _Machine, argument: str) -> None:
    args = machine.since_mark()
    _global(machine, argument)
    machine.stack.append(Made(machine.stack.pop(), Items("tuple", args)))


def _build(machine: _Machine, argument: Any) -> None:
    state = machine.stack.pop()
    if isinstance(made := machine.stack[-1], Made):
        made.state = state


def _persistent(machine: _Machine, argument: Any) -> None:
    machine.stack.pop()
    machine.unknown("persistent id")


_PUSHED = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_DO: dict[str, _Do] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "NONE": lambda machine, argument: machine.stack.append(None),
    "NEWTRUE": lambda machine, argument: machine.stack.append(True),
    "NEWFALSE": lambda machine, argument: machine.stack.append(False),
    "EMPTY_LIST": lambda machine, argument: machine.stack.append(Items("list", [])),
    "EMPTY_TUPLE": lambda machine, argument: machine.stack.append(Items("tuple", [])),
    "EMPTY_SET": lambda machine, argument: machine.stack.append(Items("set", [])),
    "EMPTY_DICT": lambda machine, argument: machine.stack.append(Pairs([])),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": _gathered("tuple"),
    "LIST": _gathered("list"),
    "FROZENSET": _gathered("frozenset"),
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": lambda machine, argument: _extend(machine, machine.since_mark()),
    "ADDITEMS": lambda machine, argument: _extend(machine, machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, argument: _set(machine, _paired(machine.since_mark())),
    "MARK": lambda machine, argument: machine.marks.append(len(machine.stack)),
    "POP": _pop,
    "POP_MARK": lambda machine, argument: machine.since_mark().clear(),
    "DUP": lambda machine, argument: machine.stack.append(machine.stack[-1]),
    "GET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "LONG_BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, argument: _put(machine, len(machine.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "EXT1": lambda machine, code: machine.unknown(f"extension {code}"),
    "EXT2": lambda machine, code: machine.unknown(f"extension {code}"),
    "EXT4": lambda machine, code: machine.unknown(f"extension {code}"),
    "REDUCE": _reduce,
    "BUILD": _build,
    "INST": _inst,
    "OBJ": _obj,
    "NEWOBJ": _new,
    "NEWOBJ_EX": _new_ex,
    "PERSID": lambda machine, key: machine.unknown("persistent id"),
    "BINPERSID": _persistent,
    "NEXT_BUFFER": lambda machine, argument: machine.unknown("buffer"),
    "READONLY_BUFFER": lambda machine, argument: None,
}


# --- what a call needs ----------------------------------------------------------------------------------------------


class Attribute(NamedTuple):
    """A callable that is an attribute: a bound method, most likely."""

    of: Target
    name: str


class Instance(NamedTuple):
    """A callable object, whose class is a global."""

    of: Global
    attributes: frozenset[str] | None  # those that are its own; None if they can't be told


class Partial(NamedTuple):
    """A `functools.partial`."""

    of: Target
    positional: int
    keywords: tuple[str, ...]


Target: TypeAlias = Global | Attribute | Instance | Partial


class Callee(NamedTuple):
    """What a call calls, and what must be there for that."""

    target: Target | None  # None: it can't be told without running it
    globals: tuple[Global, ...]
    whole: bool  # False: more may be needed than *globals*


class Arguments(NamedTuple):
    """The shape of a call's arguments, and what must be there for them."""

    positional: int | None  # how many; None, as *keywords*, if it can't be told
    keywords: tuple[str, ...] | None
    globals: tuple[Global, ...]
    whole: bool


def callee(pickled: bytes, **limits: int) -> Callee:
    """Return what the first pickle of a call needs; `limits` are those of `read`."""
    try:
        reading = read(pickled, **limits)
    except Unreadable:
        return Callee(None, (), False)
    return Callee(_target(reading.value, _DEEPEST), reading.globals, reading.whole)


def arguments(pickled: bytes, **limits: int) -> Arguments:
    """Return what the second pickle of a call needs; `limits` are those of `read`."""
    try:
        reading = read(pickled, **limits)
    except Unreadable:
        return Arguments(None, None, (), False)
    taken = split(reading.value)
    if taken is None:
        return Arguments(None, None, reading.globals, reading.whole)
    names = dict.fromkeys(name for name, _ in taken[1])
    return Arguments(len(taken[0]), tuple(names), reading.globals, reading.whole)


def split(value: Node) -> tuple[list[Node], list[tuple[str, Node]]] | None:
    """Return (args, kwargs) as they stand in *value*; None if it isn't that."""
    match value:
        case Items(kind="tuple", items=[Items(kind="tuple", items=args), Pairs(pairs=pairs)]):
            named = [(name, value) for name, value in pairs if isinstance(name, str)]
            return (args, named) if len(named) == len(pairs) else None
    return None


def attribute(made: Made) -> tuple[Node, str] | None:
    """Return object and name if *made* is an attribute of something; None else."""
    match made.by, made.args:
        case Global("builtins" | "__builtin__", "getattr"), Items(items=[of, str() as name]):
            return of, name
    return None


def _target(node: Node, depth: int) -> Target | None:
    if isinstance(node, Global):
        return node
    if not isinstance(node, Made) or not depth:
        return None
    found = attribute(node)
    if found is not None:
        of = _target(found[0], depth - 1)
        return None if of is None else Attribute(of, found[1])
    if node.by == Global("functools", "partial"):
        match node.state:
            case Items(items=[function, args, kwargs, _]):
                inner, taken = _target(function, depth - 1), split(Items("tuple", [args, kwargs]))
                if inner is not None and taken is not None:
                    return Partial(inner, len(taken[0]), tuple(name for name, _ in taken[1]))
        return None
    if node.new and isinstance(node.by, Global):
        return Instance(node.by, _attributes(node.state))
    return None


def _attributes(state: Node) -> frozenset[str] | None:
    """Return the names of what the state of an object sets, if it has the usual form: a dict, or that and one of slots."""
    match state:
        case None | Items(kind="tuple", items=[None, None]):
            return frozenset()
        case Pairs(pairs=pairs):
            names = frozenset(name for name, _ in pairs if isinstance(name, str))
            return names if all(isinstance(name, str) for name, _ in pairs) else None
        case Items(kind="tuple", items=[first, second]):
            ours, slots = _attributes(first), _attributes(second)
            return None if ours is None or slots is None else ours | slots
    return None
