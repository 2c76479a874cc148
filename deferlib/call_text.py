"""A call as Python, `app.send_mail(7, subject='Welcome')`, read from its payload without running any of it.

The payload is disassembled, never unpickled, so that anybody's may be looked at. What names itself a secret is masked.
"""

from __future__ import annotations

import datetime
import re
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from deferlib import payload
from deferlib.disassembly import Global, Items, Made, Node, Opaque, Pairs, Unreadable, attribute, read, split
from deferlib.errors import PayloadError, PayloadKeyUnknownError, PayloadNewerError, PayloadUnverifiedError
from deferlib.keys import Keyring
from deferlib.payload import Binding
from deferlib.secret_names import is_secret
from deferlib.settings import mask

_LONGEST = 200  # characters of a line
_LONGEST_TEXT = 60  # of a string in it
_LONGEST_NAME = 100
_LOOKED_AT = 256  # of a string, for passwords: what is behind isn't shown
_MOST_BITS = 256  # of a number
_MOST_ITEMS = 5
_DEEPEST = 4
_MASKED = "'***'"
_REST = "…"
_ASSIGNED = re.compile(r"([\w.-]{1,40})=([^&\s#;,]+)")


class CallText(NamedTuple):
    """A call for people, and whether it is what it says."""

    text: str  # one printable line of at most 200 characters; '' if it isn't a deferred call
    verified: bool | None  # by one of our keys; None if it isn't a deferred call


def call_text(body: bytes, ring: Keyring | None, binding: Binding | None = None) -> str:
    """Return the text of `read_call`."""
    return read_call(body, ring, binding).text


def read_call(body: bytes, ring: Keyring | None, binding: Binding | None = None) -> CallText:
    """Return the call in *body* as a line of Python, whatever it is: nothing of it is run, and no error comes.

    Arguments that nobody would read, because there are too many, are shown as `…`. If none of the keys in *ring* signed
    it, or signed it for another task than *binding*, a comment at its end says so, and the callable is the one that the
    pickle names: anybody may have written the envelope's label.
    """
    try:
        envelope = payload.parse(body)
    except PayloadNewerError:
        return CallText("…(…)  # not verified: a newer format", False)
    except PayloadUnverifiedError:
        return CallText("", None)
    doubt = _doubt(body, envelope, ring, binding)
    end = f"  # not verified: {doubt}" if doubt else ""
    line = _Line(_LONGEST - len(end))
    with suppress(_Full):
        _write_call(line, envelope, not doubt)
    return CallText(line.text() + end, not doubt)


def _doubt(body: bytes, envelope: payload.Envelope, ring: Keyring | None, binding: Binding | None) -> str:
    """Return what speaks against the payload; '' if nothing."""
    if ring is None:
        return "no key at hand"
    try:
        payload.verify(body, ring, None)
    except PayloadKeyUnknownError:
        return f"unknown key {envelope.key_id.hex()}"
    except PayloadError:
        return "wrong signature"
    bound = envelope.flags & payload.BOUND and binding is not None
    return "signed for another task" if bound and envelope.binding != binding else ""


def _write_call(line: _Line, envelope: payload.Envelope, verified: bool) -> None:
    reference, arguments = payload.pickles_of(envelope)
    if verified:
        line.add(envelope.label)
    else:
        try:
            _write_callable(line, read(reference).value)
        except Unreadable:
            line.add(_REST)
    line.add("(")
    try:
        taken = split(read(arguments).value)
    except Unreadable:
        taken = None
    if taken is None:
        line.add(_REST)
    else:
        args, kwargs = taken
        _write_arguments(line, args, kwargs, 0)
    line.add(")")


# --- a line with an end ---------------------------------------------------------------------------------------------


class _Full(Exception):
    """There is no room left."""


class _Line:
    """Collects a text until its room is used up; so what refers to itself, or to one thing many times, has an end."""

    def __init__(self, room: int) -> None:
        self._parts: list[str] = []
        self._room = room

    def add(self, text: str) -> None:
        """Write *text* as printable characters; `_Full` once there is no more room."""
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        self._parts.append(text)
        self._room -= len(text)
        if self._room < 0:
            whole = "".join(self._parts)
            self._parts = [whole[: self._room - 1], _REST]
            raise _Full

    def text(self) -> str:
        return "".join(self._parts)


# --- values ---------------------------------------------------------------------------------------------------------


def _write(line: _Line, node: Node, depth: int) -> None:
    match node:
        case str():
            line.add(_quoted(node))
        case bytes() | bytearray():
            line.add(_quoted_bytes(node) if isinstance(node, bytes) else f"bytearray({_quoted_bytes(node)})")
        case int():
            line.add(repr(node) if (bits := node.bit_length()) <= _MOST_BITS else f"<a number of {bits} bits>")
        case float() | None:
            line.add(repr(node))
        case Global():
            line.add(_global(node))
        case Opaque():
            line.add(f"<{node.text}>")
        case Items():
            _write_items(line, node, depth)
        case Pairs():
            line.add("{")
            _write_pairs(line, node.pairs, depth + 1)
            line.add("}")
        case Made():
            if depth > _DEEPEST:
                return line.add(_REST)
            known = _KNOWN.get(node.by) if isinstance(node.by, Global) else None
            if known is None or not known(line, node, depth):
                _write_made(line, node, depth)


_BRACKETS = {"list": ("[", "]"), "tuple": ("(", ")"), "set": ("{", "}"), "frozenset": ("frozenset({", "})")}


def _write_items(line: _Line, node: Items, depth: int) -> None:
    items = node.items
    if not items and "set" in node.kind:
        return line.add(f"{node.kind}()")
    opening, closing = _BRACKETS[node.kind]
    line.add(opening)
    if len(items) == 2 and isinstance(items[0], str) and is_secret(items[0]):  # a header, most likely
        line.add(f"{_quoted(items[0])}, {_MASKED}")
    else:
        _write_some(line, [_writer(item, depth + 1) for item in items[: _MOST_ITEMS + 1]], depth + 1)
    line.add(",)" if node.kind == "tuple" and len(items) == 1 else closing)


def _write_pairs(line: _Line, pairs: list[tuple[Node, Node]], depth: int) -> None:
    def writer(key: Node, value: Node) -> _Writer:
        def write(line: _Line) -> None:
            _write(line, key, depth)
            line.add(": ")
            _write_named(line, key, value, depth)

        return write

    _write_some(line, [writer(key, value) for key, value in pairs[: _MOST_ITEMS + 1]], depth)


def _write_arguments(line: _Line, args: list[Node], kwargs: Iterable[tuple[str, Node]], depth: int) -> None:
    """Write what stands between the brackets of a call: of the outermost one all, as far as the line goes."""

    def named(name: str, value: Node) -> _Writer:
        def write(line: _Line) -> None:
            line.add(f"{name[:_LONGEST_NAME]}=")
            _write_named(line, name, value, depth)

        return write

    room = _LONGEST if depth == 0 else _MOST_ITEMS + 1
    writers = [_writer(value, depth) for value in args[:room]]
    writers += [named(name, value) for name, value in kwargs][:room]
    _write_some(line, writers, depth)


def _write_named(line: _Line, name: Node, value: Node, depth: int) -> None:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    if isinstance(text, str) and is_secret(text):
        line.add(_MASKED)
    else:
        _write(line, value, depth)


_Writer = Callable[[_Line], None]


def _writer(value: Node, depth: int) -> _Writer:
    return lambda line: _write(line, value, depth)


def _write_some(line: _Line, writers: list[_Writer], depth: int) -> None:
    """Write the first few of several things, with commas between them; of what lies too deep nothing."""
    if depth > _DEEPEST and writers:
        return line.add(_REST)
    for number, write in enumerate(writers):
        if number:
            line.add(", ")
        if depth and number == _MOST_ITEMS:
            return line.add(_REST)
        write(line)


def _write_callable(line: _Line, node: Node) -> None:
    if isinstance(node, Global | Made):
        _write(line, node, 1)
    else:
        line.add(_REST)


def _write_made(line: _Line, made: Made, depth: int) -> None:
    """Write an attribute as such, and any other object by its class, without what is in it, or by the call that made it."""
    found = attribute(made)
    if found is not None:
        _write(line, found[0], depth + 1)
        return line.add(f".{found[1][:_LONGEST_NAME]}")
    if isinstance(made.by, Made) and attribute(made.by) == (Global("zoneinfo", "ZoneInfo"), "_unpickle"):
        made = Made(Global("zoneinfo", "ZoneInfo"), _first(made.args))
    if isinstance(made.by, Global) and made.by.module.startswith("cloudpickle"):
        return line.add(_by_value(made))
    args = made.args.items if isinstance(made.args, Items) else []
    kwargs = made.kwargs.pairs if isinstance(made.kwargs, Pairs) else []
    named = [(name, value) for name, value in kwargs if isinstance(name, str)]
    hidden = not args and not named and (made.new or made.state is not None or made.items or made.pairs)
    if hidden:
        line.add("<")
    _write(line, made.by, depth + 1)
    if hidden:
        return line.add(">")
    line.add("(")
    _write_arguments(line, args, named, depth + 1)
    line.add(")")


def _first(args: Node) -> Items:
    return Items("tuple", args.items[:1] if isinstance(args, Items) else [])


def _global(node: Global) -> str:
    module, name = node.module[:_LONGEST_NAME], node.name[:_LONGEST_NAME]
    return name if module in ("builtins", "__builtin__") else f"{module}.{name}"


def _by_value(made: Made) -> str:
    """Return what is known of code that travels in the pickle: its name."""
    match made.state:
        case Items(items=[_, Pairs(pairs=slots)]):
            names = [value for key, value in slots if key == "__qualname__" and isinstance(value, str)]
            if names:
                name = names[0].rpartition(".")[2][:_LONGEST_NAME]
                return name if name.startswith("<") else f"<function {name}>"  # a lambda's is <lambda>
    match made.args:
        case Items(items=[_, str() as name, *_]) if "class" in str(made.by):
            return f"<class {name[:_LONGEST_NAME]}>"
    return "<pickled by value>"


# --- values that have a form of their own ---------------------------------------------------------------------------


def _moment(line: _Line, made: Made, depth: int) -> bool:
    """Write a datetime or a time, whose pickle has ten or six bytes and perhaps a time zone."""
    match made.args:
        case Items(items=[bytes() as raw, *zone]) if len(raw) in (6, 10) and len(zone) <= 1:
            pass
        case _:
            return False
    dated = len(raw) == 10
    mixed = raw[2 if dated else 0]  # the month or the hour, with a bit for the second of two same hours
    hour, minute, second = raw[4:7] if dated else (mixed & 127, raw[1], raw[2])
    micros, fold = int.from_bytes(raw[-3:], "big"), mixed >> 7
    moment: datetime.datetime | datetime.time
    try:
        if dated:
            day = datetime.date(raw[0] << 8 | raw[1], mixed & 127, raw[3])
            moment = datetime.datetime.combine(day, datetime.time(hour, minute, second, micros, fold=fold))
        else:
            moment = datetime.time(hour, minute, second, micros, fold=fold)
    except ValueError:
        return False
    if not zone:
        line.add(repr(moment))
        return True
    line.add(f"{repr(moment)[:-1]}, tzinfo=")
    _write(line, zone[0], depth + 1)
    line.add(")")
    return True


def _date(line: _Line, made: Made, depth: int) -> bool:
    match made.args:
        case Items(items=[bytes() as raw]) if len(raw) == 4:
            with suppress(ValueError):
                line.add(repr(datetime.date(raw[0] << 8 | raw[1], raw[2], raw[3])))
                return True
    return False


def _timedelta(line: _Line, made: Made, depth: int) -> bool:
    match made.args:
        case Items(items=[int() as days, int() as seconds, int() as micros]):
            with suppress(OverflowError):
                line.add(repr(datetime.timedelta(days, seconds, micros)))
                return True
    return False


def _timezone(line: _Line, made: Made, depth: int) -> bool:
    match made.args:
        case Items(items=[Made(by=Global("datetime", "timedelta"), args=Items(items=[0, 0, 0]))]):
            line.add("datetime.timezone.utc")
            return True
    return False


def _uuid(line: _Line, made: Made, depth: int) -> bool:
    match made.state:
        case Pairs(pairs=pairs):
            for key, value in pairs:
                if key == "int" and isinstance(value, int) and 0 <= value < 1 << 128:
                    line.add(f"uuid.UUID('{uuid.UUID(int=value)}')")
                    return True
    return False


def _partial(line: _Line, made: Made, depth: int) -> bool:
    match made.state:
        case Items(items=[function, args, kwargs, _]) if (taken := split(Items("tuple", [args, kwargs]))) is not None:
            line.add("functools.partial(")
            _write_arguments(line, [function, *taken[0]], taken[1], depth + 1)
            line.add(")")
            return True
    return False


_KNOWN: dict[Global, Callable[[_Line, Made, int], bool]] = {  # each writes what it understands, or nothing
    Global("datetime", "datetime"): _moment,
    Global("datetime", "time"): _moment,
    Global("datetime", "date"): _date,
    Global("datetime", "timedelta"): _timedelta,
    Global("datetime", "timezone"): _timezone,
    Global("functools", "partial"): _partial,
    Global("uuid", "UUID"): _uuid,
}


# --- texts --------------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    shown = _clean(text[:_LOOKED_AT], "@" in text[_LOOKED_AT:])
    if len(shown) > _LONGEST_TEXT or len(text) > _LOOKED_AT:
        shown = shown[: _LONGEST_TEXT - 1] + _REST
    return repr(shown)


def _quoted_bytes(data: bytes | bytearray) -> str:
    text = _clean(data[:_LOOKED_AT].decode("latin-1"), b"@" in data[_LOOKED_AT:])
    shown = repr(text.encode("latin-1"))
    if len(shown) > _LONGEST_TEXT or len(data) > _LOOKED_AT:
        shown = f"{shown[:-1][: _LONGEST_TEXT - 1]}{_REST}{shown[-1]}"
    return shown


def _clean(text: str, at_behind: bool) -> str:
    """Return *text* without the passwords in it; with an `@` behind it, a URL's password may reach beyond its end."""
    if "://" in text:
        text = mask(f"{text}@" if at_behind else text)
    if "=" in text:
        text = _ASSIGNED.sub(lambda match: f"{match[1]}=***" if is_secret(match[1]) else match[0], text)
    return text
