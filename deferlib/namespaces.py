"""The current namespace: a tenant's name that travels with every task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from deferlib.errors import Error

current_namespace: ContextVar[str] = ContextVar("deferlib_namespace", default="")
default_namespace: ContextVar[str | None] = ContextVar("deferlib_default_namespace", default=None)
_PATTERN = re.compile(r"[0-9A-Za-z._-]{0,100}\Z")


class BadValueError(Error):
    """A namespace is up to 100 letters, digits, dots, hyphens and underscores."""


def set_namespace(namespace: str | None) -> None:
    """Set the current namespace; None means ''."""
    value = "" if namespace is None else namespace
    validate_namespace(value)
    current_namespace.set(value)


def get_namespace() -> str:
    """Return the current namespace, '' if none was set."""
    return current_namespace.get()


def google_apps_namespace() -> str | None:
    """Return the request's `X-AppEngine-Default-Namespace`, None if it has none: only a task's can have one."""
    return default_namespace.get()


@contextmanager
def namespace(value: str | None) -> Iterator[None]:
    """Make *value* the current namespace inside a `with` block."""
    validate_namespace("" if value is None else value)
    token = current_namespace.set(value or "")
    try:
        yield
    finally:
        current_namespace.reset(token)


def validate_namespace(value: str, exception: type[Exception] = BadValueError) -> None:
    """Raise *exception* unless *value* is up to 100 letters, digits, dots, hyphens and underscores."""
    if not isinstance(value, str):
        raise exception(f"a namespace is a string, not {type(value).__name__}")
    if not _PATTERN.match(value):
        raise exception(f"namespace {value!r}: up to 100 of A-Z a-z 0-9 . _ - are allowed")
