"""Deferred calls in a bare WSGI app, at http://127.0.0.1:8080/greet/Ada."""

from collections.abc import Callable, Iterable
from typing import Any

import deferlib


def greet(name: str) -> None:
    print(f"Hello, {name}!")


def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    deferlib.defer(greet, environ["PATH_INFO"].rpartition("/")[2])
    start_response("202 Accepted", [("Content-Type", "text/plain")])
    return [b"Later.\n"]


app = deferlib.wrap_wsgi_app(view)
