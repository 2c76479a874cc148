"""What a request says of itself, and what of it is true: which headers only an engine may set, and the WSGI side of it.

Every spelling of the engine's headers is deleted from every request, and set anew from what a valid token vouches for
(or from the `Dispatch` that the in-process engine passes as an object). `deferlib.contrib.asgi` does the same for ASGI.
"""

from __future__ import annotations

import io
import re
from enum import Enum
from functools import lru_cache
from typing import Any

from deferlib import config, token
from deferlib.batch import MOST_BYTES, Batch, Part, unpack
from deferlib.config import Runtime
from deferlib.context import ENVIRON_KEY, Dispatch
from deferlib.errors import BodyTooLongError

TASK_ADDRESS = "0.1.0.2"  # where App Engine's tasks come from
NO_ADDRESS = "0.0.0.0"  # stands for a client that claims to be TASK_ADDRESS; nothing is bound to it
_ENVELOPE = 64 * 1024  # more than the envelope of any call takes
BODY_KEY = "deferlib.body"
_SIGNATURE_KEY = "HTTP_X_DEFERLIB_SIGNATURE"
_PLATFORMS = ("x-appengine", "x-cloudtasks")
_FORGEABLE = (*_PLATFORMS, "x-deferlib")
_NOT_IN_NAMES = "".join(char for char in map(chr, range(256)) if not char.isalnum())
_TASK_ADDRESS = re.compile(r"(?<![\d.])0\.1\.0\.2(?![\d.])")
_CLAIMED_KEY = "deferlib.claimed"

Environ = dict[str, Any]


class _Whose(Enum):
    """Who may set a key of an environ."""

    ANYBODYS = 0
    PLATFORMS = 1  # an engine, and an admin
    ENGINES = 2


# What nearly every request has.
_ORDINARY = frozenset(
    """
    REQUEST_METHOD SCRIPT_NAME PATH_INFO QUERY_STRING CONTENT_TYPE CONTENT_LENGTH SERVER_NAME SERVER_PORT SERVER_PROTOCOL
    SERVER_SOFTWARE REMOTE_ADDR REMOTE_PORT RAW_URI REQUEST_URI wsgi.version wsgi.url_scheme wsgi.input wsgi.errors
    wsgi.multithread wsgi.multiprocess wsgi.run_once wsgi.input_terminated wsgi.file_wrapper HTTP_HOST HTTP_USER_AGENT
    HTTP_ACCEPT HTTP_ACCEPT_ENCODING HTTP_ACCEPT_LANGUAGE HTTP_COOKIE HTTP_CONNECTION HTTP_REFERER HTTP_CACHE_CONTROL
    """.split()  # noqa: SIM905  # thirty lines otherwise
)
_USUAL_LENGTH = 64  # of keys that are remembered


def is_engines(name: str) -> bool:
    """Tell whether only an engine may set the header *name*, however it is spelled."""
    return folded(name).startswith(_FORGEABLE)


def is_platforms(name: str) -> bool:
    """Tell whether *name* is a header of App Engine's or Cloud Tasks', which an admin may set by hand."""
    return folded(name).startswith(_PLATFORMS)


def folded(name: str) -> str:
    """Return a header's name as the laxest server might read it."""
    return name.strip(_NOT_IN_NAMES).lower().replace("_", "-")


def is_tasks_address(address: str) -> bool:
    """Tell whether *address* is `TASK_ADDRESS`, however it is written (`0.1.0.2:80`, `::ffff:0.1.0.2`)."""
    return TASK_ADDRESS in address and _TASK_ADDRESS.search(address) is not None


def max_body() -> int:
    """Return how many bytes the body of a task may have."""
    limits = config.runtime().limits
    return max(limits.call_bytes, limits.push_task_bytes) + _ENVELOPE


def max_batch() -> int:
    """Return how many bytes the body of several calls may have: the engine doesn't know this process's `limits`."""
    return max(max_body(), MOST_BYTES)


def content_length(text: str, most: int = 0) -> int | None:
    """Return the length that a request announces, None if it announces none; `TokenError` if it is more than *most*.

    *most* is a task's without it.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    most = most or max_body()
    if len(text) > 18 or int(text) > most:  # int() refuses thousands of digits
        raise too_long(most)
    return int(text)


def too_long(most: int) -> BodyTooLongError:
    """Return the error of a body that has more than *most* bytes."""
    return BodyTooLongError(f"the body has more than {most} bytes; see the setting 'limits'")


# --- WSGI -----------------------------------------------------------------------------------------------------------


def identify(environ: Environ, runtime: Runtime) -> Dispatch | None:
    """Return the dispatch that a request is part of, None for anybody else's; the environ tells the truth afterwards.

    Raises `TokenError` if there is a token, but not a valid one for this request (the environ is cleaned all the same).
    """
    dispatch = recognise(environ, runtime)
    if dispatch is not None:
        for name, value in dispatch.headers.items():
            environ["HTTP_" + name.upper().replace("-", "_")] = value
        environ["REMOTE_ADDR"] = TASK_ADDRESS
    return dispatch


def recognise(environ: Environ, runtime: Runtime) -> Dispatch | None:
    """Do what `identify` does, but leave the true headers out, for a handler that reads none of them (4 µs less)."""
    known = environ.get(ENVIRON_KEY)
    signature = environ.get(_SIGNATURE_KEY)
    _clean(environ)
    if isinstance(known, Dispatch):
        return known
    if not signature:
        return None
    vouched = token.verify(runtime.ring, runtime.clock, signature)
    dispatch = vouched.dispatch(
        method=environ["REQUEST_METHOD"],
        path=decoded(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")),
        query=environ.get("QUERY_STRING", ""),
        body=read_body(environ),
        prefix=runtime.settings["prefix"],
    )
    environ[ENVIRON_KEY] = dispatch
    return dispatch


def is_batch(environ: Environ) -> bool:
    """Tell whether a request, which nobody has looked at, says that it carries several calls."""
    return token.is_batch(environ.get(_SIGNATURE_KEY) or "")


def recognise_batch(environ: Environ, runtime: Runtime) -> Batch:
    """Do what `recognise` does for a request with several calls; `TokenError` for anybody's but an engine's."""
    signature = environ.get(_SIGNATURE_KEY) or ""
    _clean(environ)
    vouched = token.verify_batch(runtime.ring, runtime.clock, signature)
    body = read_body(environ, max_batch())
    url, sent = vouched.request(
        path=decoded(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")),
        query=environ.get("QUERY_STRING", ""),
        body=body,
        prefix=runtime.settings["prefix"],
    )
    return Batch(url, sent, unpack(body))


def alone(environ: Environ, part: Part, dispatch: Dispatch) -> Environ:
    """Return the environ that a call of a batch would have had in a request of its own, once that was recognised.

    Without the headers that only an engine may set, as there: it takes a task's own from the store, where others may write.
    """
    own: Environ = {
        **environ,
        "CONTENT_TYPE": "application/octet-stream",
        "CONTENT_LENGTH": str(len(part.body)),
        "wsgi.input": io.BytesIO(part.body),
        BODY_KEY: part.body,
        ENVIRON_KEY: dispatch,
    }
    for name, value in part.headers:
        key = name.upper().replace("-", "_")
        key = key if key == "CONTENT_TYPE" else f"HTTP_{key}"
        whose = _whose(key) if len(key) <= _USUAL_LENGTH else _whose.__wrapped__(key)
        if whose is _Whose.ANYBODYS:
            own[key] = value
    return own


def read_body(environ: Environ, most: int = 0) -> bytes:
    """Return the request's body, read once; `TokenError` if it has more than *most* bytes, or is longer than any task's."""
    known = environ.get(BODY_KEY)
    if isinstance(known, bytes):
        return known
    most = most or max_body()
    length = content_length(environ.get("CONTENT_LENGTH") or "", most)
    if length is None and environ.get("wsgi.input_terminated"):
        body = _read(environ["wsgi.input"], most + 1)
        if len(body) > most:
            raise too_long(most)
    else:
        body = _read(environ["wsgi.input"], length or 0)
    environ[BODY_KEY] = body
    environ["wsgi.input"] = io.BytesIO(body)
    return body


def _read(stream: Any, length: int) -> bytes:
    """Read *length* bytes, or to the end: some servers' streams return what has come so far."""
    parts = []
    while length > 0 and (part := stream.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def claimed(environ: Environ) -> Environ:
    """Return the headers that were taken away, as they came: what a request says of itself, and an admin may."""
    found = environ.get(_CLAIMED_KEY)
    return found if isinstance(found, dict) else {}


def _clean(environ: Environ) -> None:
    for key in [key for key in environ if key not in _ORDINARY]:  # 2 µs with a task's headers, 0.8 without
        whose = _whose(key) if len(key) <= _USUAL_LENGTH else _whose.__wrapped__(key)
        if whose is not _Whose.ANYBODYS:
            value = environ.pop(key)
            if whose is _Whose.PLATFORMS:
                environ.setdefault(_CLAIMED_KEY, {})[key] = value
    if is_tasks_address(environ.get("REMOTE_ADDR") or ""):  # from a forged X-Forwarded-For: nothing else comes from there
        environ["REMOTE_ADDR"] = NO_ADDRESS


@lru_cache(256)
def _whose(key: str) -> _Whose:
    """Tell who may set what stands under *key* in an environ."""
    # All but a few begin with another letter. What is none at all, cheroot lets through.
    if (key[5:6] not in "xX" and key[5:6].isalpha()) or key[:5].upper() != "HTTP_" or not is_engines(key[5:]):
        return _Whose.ANYBODYS
    return _Whose.PLATFORMS if is_platforms(key[5:]) else _Whose.ENGINES


def decoded(path: str) -> str:
    """Return a WSGI path, which carries bytes as Latin-1, as the text it stands for."""
    return path.encode("latin-1", "replace").decode("utf-8", "replace")
