"""Would a call run with the code that is here? Answered without running it, from what its pickles name."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any, NamedTuple, assert_never

from deferlib import payload
from deferlib.disassembly import Arguments, Attribute, Callee, Global, Instance, Partial, Target

_KEPT = 10_000  # answers, and globals
_GONE = (AttributeError, ModuleNotFoundError)
_NOTHING = object()
_RENAMED = "; if it was renamed or moved, say so with @deferlib.formerly(…) at its new place"


class Verdict(NamedTuple):
    """What is to be said of a call."""

    problem: str = ""  # why it would not run
    unchecked: str = ""  # what of it couldn't be looked at


class Code:
    """The code of this process, to be asked about calls. Looking for what they name imports its modules."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Callee, Arguments], Verdict] = {}
        self._found: dict[Global, tuple[Any, str]] = {}

    def verdict(self, callee: Callee, arguments: Arguments) -> Verdict:
        """Return what is to be said of a call, whose payload must be verified; calls of one shape are judged once."""
        key = callee, arguments
        known = self._verdicts.get(key)
        if known is None:
            if len(self._verdicts) >= _KEPT:
                self._verdicts.clear()
            known = self._verdicts[key] = self._judge(callee, arguments)
        return known

    def _judge(self, callee: Callee, arguments: Arguments) -> Verdict:
        try:
            for each in (*callee.globals, *arguments.globals):
                self._find(each)
            if callee.target is None:
                if any(each.module.startswith("cloudpickle") for each in callee.globals):
                    raise _Unchecked("its code travels in the pickle")
                raise _Unchecked("what it calls is made when it runs")
            if arguments.positional is None or arguments.keywords is None:
                raise _Unchecked("its arguments are too large, or of a form of their own")
            self._fit(callee.target, arguments.positional, arguments.keywords)
            if not (callee.whole and arguments.whole):
                raise _Unchecked("it names something in a way that isn't understood")
        except _Broken as broken:
            return Verdict(problem=str(broken))
        except _Unchecked as unchecked:
            return Verdict(unchecked=str(unchecked))
        return Verdict()

    def _find(self, named: Global) -> Any:
        """Return what a pickle means by a global, as an unpickler finds it."""
        known = self._found.get(named)
        if known is None:
            if len(self._found) >= _KEPT:
                self._found.clear()
            try:
                known = payload.find_global(*named), ""
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # imports run the user's code, which may raise anything
                hint = _RENAMED if isinstance(error, _GONE) else ""
                known = None, f"{_name(named)} can't be loaded: {payload.describe_error(error)}{hint}"
            self._found[named] = known
        found, problem = known
        if problem:
            raise _Broken(problem)
        return found

    def _fit(self, target: Target, positional: int, keywords: tuple[str, ...]) -> None:
        """Look whether *target* takes so many positional arguments and those keywords."""
        if isinstance(target, Partial):
            names = dict.fromkeys((*target.keywords, *keywords))
            return self._fit(target.of, target.positional + positional, tuple(names))
        function, bound = self._function(target)
        if not callable(function):
            raise _Broken(f"{_name(target)} is of type {type(function).__name__} now, which can't be called")
        signature = _signature(function)
        try:
            signature.bind(*[None] * (bound + positional), **dict.fromkeys(keywords))
        except TypeError as error:
            raise _Broken(f"{_name(target)} doesn't take its arguments any more: {error}") from None

    def _function(self, target: Target) -> tuple[Any, int]:
        """Return the function behind *target*, and how many arguments it gets beforehand: 1 for `self`."""
        match target:
            case Global():
                return self._find(target), 0
            case Instance(of, attributes):
                return self._method(of, "__call__", attributes)
            case Attribute(Instance(of, attributes), name):
                return self._method(of, name, attributes)
            case Attribute(of, name):
                owner, bound = self._function(of)
                if bound:
                    raise _Unchecked("it calls an attribute of a method")
                try:
                    return getattr(owner, name), 0
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # the owner is the user's
                    raise _Broken(f"{_name(target)} can't be loaded: {payload.describe_error(error)}") from None
            case Partial():
                raise _Unchecked("it calls an attribute of a partial")
        assert_never(target)

    def _method(self, of: Global, name: str, attributes: frozenset[str] | None) -> tuple[Any, int]:
        """Return a method of objects of the class *of*, none of which is made."""
        owner = self._find(of)
        if not isinstance(owner, type):
            raise _Broken(f"{_name(of)} is of type {type(owner).__name__} now, not a class")
        found = _of_class(owner, name)
        if found is _NOTHING and _fixed(owner) and attributes is not None and name not in attributes:
            raise _Broken(f"{_name(of)} has no {name} any more")
        if name == "__call__" or (attributes is not None and name not in attributes):
            match found:
                case FunctionType():
                    return found, 1
                case classmethod():
                    return found.__func__, 1
                case staticmethod():
                    return found.__func__, 0
        raise _Unchecked(f"{_name(of)}.{name} is no plain method")


class _Broken(Exception):
    """The call would not run."""


class _Unchecked(Exception):
    """It can't be told without running it."""


def _of_class(owner: type, name: str) -> Any:
    """Return what a class has by *name*, without asking any code of it."""
    return next((vars(each)[name] for each in type.mro(owner) if name in vars(each)), _NOTHING)


def _fixed(owner: type) -> bool:
    """Tell whether objects of the class have no other attributes than their pickle and the class say."""
    own = [vars(each) for each in type.mro(owner) if each is not object]
    return not any(name in each for each in own for name in ("__getattr__", "__getattribute__", "__setstate__"))


def _signature(function: Any) -> inspect.Signature:
    """Return what *function* itself takes: a decorator's wrapper may take other arguments than what it wraps."""
    try:
        owners = type.mro(function) if isinstance(function, type) else [function, type(function)]
        if any("__signature__" in vars(each) for each in owners if hasattr(each, "__dict__")):
            raise _Unchecked("it states a signature of its own")
        return inspect.signature(function, follow_wrapped=False)
    except (_Unchecked, KeyboardInterrupt):
        raise
    except BaseException:  # a builtin's isn't known; a user's object may raise anything
        raise _Unchecked("its signature can't be told") from None


def _name(target: Target) -> str:
    match target:
        case Global(module, name):
            return name if module == "builtins" else f"{module}.{name}"
        case Attribute(of, name):
            return f"{_name(of)}.{name}"
        case Instance(of) | Partial(of):
            return _name(of)
    assert_never(target)


def name_of(callee: Callee) -> str:
    """Return what a call calls, as its pickle has it; `…` if that can't be told."""
    return "…" if callee.target is None else _name(callee.target)
