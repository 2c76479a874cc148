"""The payload envelope: a call as bytes, signed, and readable in parts without running any of it.

`docs/reference/formats.md` has the format byte by byte. The order is fixed: sizes first, then the signature, and only
then, by whoever wants the call itself, the pickles.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import io
import pickle
import re
import struct
import sys
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deferlib.core.model import repr_without
from deferlib.errors import (
    PayloadKeyUnknownError,
    PayloadNewerError,
    PayloadUndecodableError,
    PayloadUnverifiedError,
    UnpicklableCallError,
)
from deferlib.keys import Key, Keyring, mac
from deferlib.moved import anything_moved, find

MAGIC = b"dfr"
VERSION = 1
PICKLES = 1  # the only codec of version 1
BOUND = 1  # flag: the signature covers the task's id, name, queue, url and namespace
BY_VALUE = 2  # flag: a pickle carries code, which only the same minor version of Python can load

_HEAD = struct.Struct(">3sBBBBBB8sQ5H")
_ID = struct.Struct(">Q")
_ID_AT = struct.calcsize(">3sBBBBBB8s")
_SIGNATURE = 32
_LENGTH = struct.Struct(">I")
_PROTOCOL = 5  # not the highest: what a newer Python defers, an older one beside it may have to run
_LABEL_BYTES = 200
_ERROR_BYTES = 500
_GONE = (AttributeError, ModuleNotFoundError)
_BY_REFERENCE = (types.FunctionType, type)
# C0 and C1 controls, and what else ends a line or turns the direction of text around for those who print it.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_references: weakref.WeakKeyDictionary[Any, tuple[bytes, str]] = weakref.WeakKeyDictionary()


class Call(NamedTuple):
    """A serialized call."""

    body: bytes  # the length of the first pickle, the callable, then (args, kwargs)
    label: str  # what it calls, for people
    flags: int

    def __repr__(self) -> str:
        return repr_without(self, "body")


class Binding(NamedTuple):
    """The task that a signature binds a payload to."""

    id: int
    name: str  # '' if unnamed
    queue: str
    url: str
    namespace: str


_NO_BINDING = Binding(0, "", "", "", "")


class Envelope(NamedTuple):
    """A payload taken apart; genuine only as `verify` returns it."""

    flags: int
    codec: int
    python_minor: int
    key_id: bytes
    id: int  # of the task
    lengths: tuple[int, ...]  # of the texts in the head, in bytes: name, queue, url, namespace, label
    signature: bytes
    signed: bytes  # all that stands before the signature
    body: bytes

    @property
    def binding(self) -> Binding:
        """The task that it names."""
        name, queue, url, namespace, _ = self._texts()
        return Binding(self.id, name, queue, url, namespace)

    @property
    def raw_label(self) -> str:
        return self._texts()[-1]

    def _texts(self) -> list[str]:
        texts, start = [], _HEAD.size
        for length in self.lengths:
            texts.append(str(self.signed[start : start + length], "utf-8", "replace"))
            start += length
        return texts

    def is_for(self, binding: Binding) -> bool:
        """Tell whether it names the task *binding*; compared as bytes (0.5 µs, 3 as texts)."""
        try:
            fields, lengths = _fields(*binding[1:])
        except UnicodeEncodeError:  # a row that somebody else has written
            return False
        return binding.id == self.id and lengths == self.lengths[:-1] and self.signed.startswith(fields, _HEAD.size)

    @property
    def label(self) -> str:
        """What the call calls, on one line: it is shown to people also where nobody has verified it."""
        return one_line(self.raw_label, _LABEL_BYTES)

    def __repr__(self) -> str:
        return repr_without(self, "signature", "signed", "body")


# --- writing --------------------------------------------------------------------------------------------------------


def dump_call(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Serialize the call of *fn*; `UnpicklableCallError` names what can't be pickled.

    pickle where it suffices; cloudpickle (by value) for lambdas, closures and whatever lives in `__main__`, which the
    worker's `__main__` doesn't have.
    """
    flags = 0
    reference = _reference(fn)
    if reference is None:
        pickled, by_value = _dumps(fn, lambda: f"the callable {describe_callable(fn)}")
        reference = pickled, describe_callable(fn)
        flags |= by_value
    arguments, by_value = _dumps((tuple(args), dict(kwargs)), lambda: _culprit(fn, args, kwargs))
    callable_pickle, label = reference
    return Call(_LENGTH.pack(len(callable_pickle)) + callable_pickle + arguments, label, flags | by_value)


def seal(call: Call, key: Key, binding: Binding | None) -> bytes:
    """Return the signed envelope of *call*, bound to a task unless *binding* is None."""
    flags = call.flags if binding is None else call.flags | BOUND
    bound = _NO_BINDING if binding is None else binding
    before, after = _around(flags, sys.version_info.minor, key.id, *bound[1:], call.label)
    signed = before + _ID.pack(bound.id) + after
    return b"".join([signed, mac(key.payload, signed, call.body), call.body])


@functools.lru_cache(256)  # all but the id, and a name, is mostly the same: 1 µs of 3
def _around(
    flags: int, minor: int, key_id: bytes, name: str, queue: str, url: str, namespace: str, label: str
) -> tuple[bytes, bytes]:
    """Return what stands before the task's id in the signed part of an envelope, and what stands after it."""
    fields, lengths = _fields(name, queue, url, namespace)
    text = label.encode()
    head = _HEAD.pack(MAGIC, VERSION, flags, PICKLES, 0, 0, minor, key_id, 0, *lengths, len(text))
    return head[:_ID_AT], head[_ID_AT + _ID.size :] + fields + text


@functools.lru_cache(256)  # most tasks have the same
def _fields(name: str, queue: str, url: str, namespace: str) -> tuple[bytes, tuple[int, ...]]:
    """Return the texts of a binding as they stand in a head, and their lengths."""
    fields = [text.encode() for text in (name, queue, url, namespace)]
    return b"".join(fields), tuple(map(len, fields))


def describe_callable(fn: object) -> str:
    """Return what a person would call *fn*, `module.qualname`, on one line of at most 200 bytes."""
    if isinstance(fn, functools.partial):
        fn = fn.func
    owner = fn if isinstance(getattr(fn, "__qualname__", None), str) else type(fn)
    return one_line(f"{getattr(owner, '__module__', None) or 'builtins'}.{owner.__qualname__}", _LABEL_BYTES)  # type: ignore[attr-defined]  # one of the two has it


def describe_error(error: BaseException) -> str:
    """Return *error*'s type and message as one line of at most 500 bytes, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception as problem:  # the error is a user's
        text = f"<its message can't be read: {type(problem).__name__}>"
    return one_line(f"{type(error).__name__}: {text}", _ERROR_BYTES)


def one_line(text: str, limit: int) -> str:
    """Return *text* as one printable line of at most *limit* bytes in UTF-8, for logs and answers.

    Whoever chooses a name or raises an error can't write lines of their own into a log.
    """
    if not (text.isascii() and text.isprintable()):
        text = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text[:limit])
    return text.encode()[:limit].decode("utf-8", "ignore")


def _reference(fn: Callable[..., Any]) -> tuple[bytes, str] | None:
    """Return the pickle of an importable function or class, which is a name only: cached (0.9 µs to 0.1)."""
    if not isinstance(fn, _BY_REFERENCE) or fn.__module__ == "__main__":
        return None
    try:
        known = _references.get(fn)
        if known is None:
            known = _references[fn] = pickle.dumps(fn, _PROTOCOL), describe_callable(fn)
    except Exception:  # pickle raises what it likes, and so may a metaclass's hash; the caller tries cloudpickle next
        return None
    return known


def _dumps(value: object, name: Callable[[], str]) -> tuple[bytes, int]:
    """Pickle *value*; the flag says whether any of it by value."""
    try:
        data = pickle.dumps(value, _PROTOCOL)
    except Exception:  # a user's __reduce__ may raise anything
        data = b"__main__"
    if b"__main__" not in data:
        return data, 0
    import cloudpickle  # 20 ms: only where it is needed

    try:
        data = cloudpickle.dumps(value, _PROTOCOL)
        return data, BY_VALUE if b"cloudpickle" in data else 0  # whatever it writes by value is built by its functions
    except Exception as error:
        remedy = "pass what can be written down, like an id or a path, and open it inside the call"
        if callable(value):  # it travels by value, with all that it refers to
            remedy = (
                "define it in a module that is imported by its name; a program that is started travels with its globals"
            )
        raise UnpicklableCallError(f"{name()} can't be pickled ({describe_error(error)}); {remedy}") from error


def _culprit(fn: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return which argument it is that can't be pickled."""
    import cloudpickle

    named = [(f"argument {number}", value) for number, value in enumerate(args, 1)]
    named += [(f"argument {key!r}", value) for key, value in kwargs.items()]
    for name, value in named:
        try:
            cloudpickle.dumps(value, _PROTOCOL)
        except Exception:  # the search is for just that
            return f"{name} of {describe_callable(fn)} (a {type(value).__qualname__})"
    return f"the arguments of {describe_callable(fn)}"


# --- reading --------------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Envelope:
    """Take *data* apart without trusting it.

    `PayloadNewerError` for a later version, codec or flag; `PayloadUnverifiedError` for anything that isn't whole.
    """
    if not data.startswith(MAGIC) or len(data) < _HEAD.size:
        raise PayloadUnverifiedError("not a deferlib payload: unsigned, or cut short")
    # Each length by its name, and the fields by their places: 0.6 µs of 1.6.
    _, version, flags, codec, compression, encryption, minor, key_id, id, name, queue, url, namespace, label = (
        _HEAD.unpack_from(data)
    )
    if version != VERSION:
        raise PayloadNewerError(f"payload version {version}, this deferlib reads {VERSION}")
    if codec != PICKLES or compression or encryption or flags & ~(BOUND | BY_VALUE):
        raise PayloadNewerError(f"payload with codec {codec}/{compression}/{encryption} and flags {flags}: a newer format")
    end = _HEAD.size + name + queue + url + namespace + label
    body = end + _SIGNATURE
    if len(data) < body:
        raise PayloadUnverifiedError("the payload is cut short")
    lengths = (name, queue, url, namespace, label)
    return Envelope(flags, codec, minor, key_id, id, lengths, data[end:body], data[:end], data[body:])


def verify(data: bytes, ring: Keyring, binding: Binding | None, *, unbound: bool = True) -> Envelope:
    """Return the envelope of *data* if one of the ring's keys signed it, for the task *binding*.

    An envelope that is bound to no task is accepted for any if *unbound*. With *binding* None, for looking only, the
    binding isn't compared. Raises the `PayloadError` that says what is wrong.
    """
    envelope = parse(data)
    key = ring.get(envelope.key_id)
    # An unknown key takes the same path, so that the time tells nothing.
    secret = key.payload if key is not None else ring.signing.payload
    expected = mac(secret, envelope.signed, envelope.body)
    genuine = hmac.compare_digest(expected, envelope.signature)
    if key is None:
        raise PayloadKeyUnknownError(
            f"the payload was signed with key {envelope.key_id.hex()}, which isn't in the ring here"
        )
    if not genuine:
        raise PayloadUnverifiedError("the payload's signature is wrong")
    if envelope.flags & BOUND:
        if binding is not None and not envelope.is_for(binding):
            raise PayloadUnverifiedError("the payload was signed for another task")
    elif not unbound:
        raise PayloadUnverifiedError("the payload is signed for no task in particular, which the settings refuse")
    return envelope


def load_call(envelope: Envelope) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Unpickle the call of a *verified* envelope; `PayloadUndecodableError` if it can't be done here."""
    here = sys.version_info.minor
    if envelope.flags & BY_VALUE and envelope.python_minor != here:
        raise PayloadUndecodableError(
            f"{envelope.label} was pickled by value on Python 3.{envelope.python_minor}, which 3.{here} can't load; "
            "define it in an importable module"
        )
    try:
        try:
            return _load(envelope.body)
        except KeyError:  # also how a module is missing whose import has just failed in another thread
            return _load(envelope.body)
    except MemoryError:
        raise  # the machine's trouble, not the payload's
    except (Exception, SystemExit) as error:  # imports run user code, which may raise anything
        hint = "; if it was renamed or moved, say so with @deferlib.formerly(…) at its new place"
        raise PayloadUndecodableError(
            f"{envelope.label} can't be loaded: {describe_error(error)}{hint if isinstance(error, _GONE) else ''}"
        ) from error


def _load(body: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    loads = _loads_moved if anything_moved() else pickle.loads
    (length,) = _LENGTH.unpack_from(body)
    fn = loads(body[4 : 4 + length])
    args, kwargs = loads(body[4 + length :])
    return fn, args, kwargs


def find_global(module: str, name: str) -> Any:
    """Return what a pickle means by *name* in *module*: what moved from there (`deferlib.formerly`), else what is there.

    Imports the module, which runs its code, and raises what that raises.
    """
    found = find(module, name)
    if found is None:
        __import__(module)
        found = sys.modules[module]
        for part in name.split("."):
            found = getattr(found, part)
    return found


class _Unpickler(pickle.Unpickler):
    """Finds what has moved."""

    def find_class(self, module: str, name: str) -> Any:
        found = find(module, name)
        return super().find_class(module, name) if found is None else found


def _loads_moved(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


def pickles_of(envelope: Envelope) -> tuple[bytes, bytes]:
    """Return the two pickles of a call, the callable's and that of (args, kwargs); empty ones if it isn't whole.

    Unpickle them only if the envelope is *verified*.
    """
    try:
        (length,) = _LENGTH.unpack_from(envelope.body)
    except struct.error:
        return b"", b""
    return envelope.body[4 : 4 + length], envelope.body[4 + length :]


def is_envelope(data: bytes) -> bool:
    """Tell whether *data* looks like a call, genuine or not."""
    return data.startswith(MAGIC)


def describe(data: bytes) -> str:
    """Return what *data* calls, without running, unpickling or trusting any of it; '' if it isn't an envelope."""
    with contextlib.suppress(PayloadUnverifiedError, PayloadNewerError):
        return parse(data).label
    return ""
