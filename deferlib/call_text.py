"""A call as Python, `app.send_mail(7, subject='Welcome')`, read from its payload without running any of it.

Only payloads that one of our keys signed are read any further than their label: whoever can sign can run code anyway.
Even so no class of theirs is imported; stand-ins take their places.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from typing import Any

from deferlib import payload
from deferlib.errors import PayloadError
from deferlib.keys import Keyring

_MOST_BYTES = 32 * 1024  # of pickled arguments: reading them takes half a millisecond
_LONGEST = 200  # characters
_HARMLESS = {
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "uuid": {"UUID"},
}


def call_text(body: bytes, ring: Keyring | None) -> str:
    """Return the call in *body* as a line of Python of at most 200 characters; '' if it isn't a deferred call.

    Without the key that signed it, or with more arguments than anyone reads, `app.send_mail(…)`.
    """
    label = payload.describe(body)
    if not label:
        return ""
    arguments = None if ring is None else _arguments(body, ring)
    text = payload.one_line(f"{label}({'…' if arguments is None else arguments})", 4 * _LONGEST)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _arguments(body: bytes, ring: Keyring) -> str | None:
    try:
        pickled = payload.arguments_of(payload.verify(body, ring, None))
        if len(pickled) > _MOST_BYTES:
            return None
        args, kwargs = _Reader(io.BytesIO(pickled)).load()
        shown = [_repr.repr(value) for value in args]
        shown += [f"{name}={_repr.repr(value)}" for name, value in kwargs.items()]
    except PayloadError:
        return None
    except Exception:  # a pickle that only its own classes could take
        return None
    return ", ".join(shown)


class _Foreign(type):
    """A class of the user's, which isn't looked at."""

    def __repr__(cls) -> str:
        return f"{cls.__module__}.{cls.__qualname__}"


class _Object:
    """Stands for an object of a foreign class, or for what a foreign function returns."""

    shown: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Object:
        made = object.__new__(cls)
        made.shown = args
        return made

    def __setstate__(self, state: object) -> None:
        """Leave the object's content out."""

    def append(self, item: object) -> None:
        """Leave an item out, of a list of its own kind."""

    def extend(self, items: object) -> None:
        """Leave items out."""

    def __setitem__(self, key: object, value: object) -> None:
        """Leave an item out, of a mapping of its own kind."""

    def __repr__(self) -> str:
        return (
            f"{type(self)!r}({', '.join(_repr.repr(value) for value in self.shown)})" if self.shown else f"<{type(self)!r}>"
        )

    __hash__ = object.__hash__


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        if module.startswith("cloudpickle"):
            module, name = "pickled", name.strip("_")
        return _Foreign(name.rpartition(".")[2], (_Object,), {"__module__": module, "__qualname__": name})

    def persistent_load(self, key: object) -> object:
        return ...


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 5, 5, 4
        self.maxstring, self.maxother = 60, 80

    def repr_instance(self, x: Any, level: int) -> str:
        text = repr(x)
        return text if len(text) <= self.maxother else f"{text[: self.maxother - 1]}…"


_repr = _Repr()
