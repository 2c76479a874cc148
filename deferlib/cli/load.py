"""The app that `--app module:app` names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from types import ModuleType
from typing import Any

import deferlib
from deferlib.errors import AppError

_FORM = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<path>[^\W\d]\w*(\.[^\W\d]\w*)*)(?P<call>\(\))?\Z")
_NOT_THE_USERS = (os.path.dirname(deferlib.__file__) + os.sep, sysconfig.get_path("stdlib") + os.sep, "<frozen ")


def load_app(spec: str) -> Any:
    """Import `module:app` (or `module:make_app()`, which is called), from the working directory first.

    `AppError` says what is missing; if the module itself fails, with its error and the place in the user's code.
    """
    form = check_spec(spec)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _import(form["module"])
    for name in form["path"].split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AppError(f"{spec}: {form['module']} has no {name!r}{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise AppError(f"{spec}: is {_a(found)}, not a WSGI or ASGI app")
    if not form["call"]:
        _check_arguments(spec, found)
        return found
    try:
        made = found()
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise _broken(f"{form['path']}() failed", error) from error
    if not callable(made):
        raise AppError(f"{spec}: returned {_a(made)}, not a WSGI or ASGI app")
    return made


def check_spec(spec: str) -> re.Match[str]:
    """Return *spec* taken apart; `AppError` if it isn't of the form MODULE:APP."""
    form = _FORM.match(spec)
    if form is None:
        module = re.sub(r"[/.]+", ".", spec.partition(":")[0].removesuffix(".py")).strip(".")
        like = f"{module}:app" if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module) else "main:app"
        raise AppError(f"{spec!r} is not MODULE:APP, like {like}")
    return form


class AppBroken(AppError):
    """The app's own code failed while it was imported."""


def _check_arguments(spec: str, app: Any) -> None:
    """Refuse a function that takes the arguments of neither kind of app: it makes one, most likely."""
    if not inspect.isfunction(app):
        return
    signature = inspect.signature(app)
    if not any(_takes(signature, count) for count in (2, 3)):
        hint = f"; did you mean '{spec}()'?" if _takes(signature, 0) else ""
        raise AppError(f"{spec}: is a function that takes the arguments of neither a WSGI nor an ASGI app{hint}")


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class Stopped(SystemExit):
    """A signal came while the engine started."""

    def __init__(self) -> None:
        super().__init__(0)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Stopped:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise AppError(
                f"there is no module {error.name!r} in {os.getcwd()}, on PYTHONPATH or among what is installed; "
                "an app is named by MODULE:APP"
            ) from None
        raise _broken(f"{name} can't be imported", error) from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise _broken(f"{name} can't be imported", error) from error


def _broken(what: str, error: BaseException) -> AppBroken:
    return AppBroken(f"{what}: {type(error).__name__}: {error} ({_place(error)})")


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame that is the user's own; of any but the import system's else."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "no line of it ran"


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
