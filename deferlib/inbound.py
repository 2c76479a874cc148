"""What a request says of itself, and what of it is true: the WSGI side of the dispatch token.

Every spelling of the engine's headers is deleted from every request, and set anew from what a valid token vouches for
(or from the `Dispatch` that the in-process engine passes as an object).
"""

from __future__ import annotations

import io
from typing import Any

from deferlib import token
from deferlib.config import Runtime
from deferlib.context import ENVIRON_KEY, Dispatch
from deferlib.errors import TokenError
from deferlib.taskqueue.limits import MAX_DEFERRED_BYTES

TASK_ADDRESS = "0.1.0.2"  # where App Engine's tasks come from
MAX_BODY = MAX_DEFERRED_BYTES + 64 * 1024
BODY_KEY = "deferlib.body"
_SIGNATURE_KEY = "HTTP_X_DEFERLIB_SIGNATURE"
# Servers fold '-' and '_' into one before an app sees a name, so a prefix finds every spelling.
_FORGEABLE = ("HTTP_X_APPENGINE_", "HTTP_X_CLOUDTASKS_", "HTTP_X_DEFERLIB_")

Environ = dict[str, Any]


def identify(environ: Environ, runtime: Runtime) -> Dispatch | None:
    """Return the dispatch that a request is part of, None for anybody else's; the environ tells the truth afterwards.

    Raises `TokenError` if there is a token, but not a valid one for this request (the environ is cleaned all the same).
    """
    known = environ.get(ENVIRON_KEY)
    if isinstance(known, Dispatch):
        _tell(environ, known)
        return known
    signature = environ.get(_SIGNATURE_KEY)
    _clean(environ)
    if not signature:
        return None
    vouched = token.verify(runtime.ring, runtime.clock, signature)
    dispatch = vouched.dispatch(
        method=environ["REQUEST_METHOD"],
        path=_decoded(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")),
        query=environ.get("QUERY_STRING", ""),
        body=read_body(environ),
        prefix=runtime.settings["prefix"],
    )
    environ[ENVIRON_KEY] = dispatch
    _tell(environ, dispatch)
    return dispatch


def read_body(environ: Environ) -> bytes:
    """Return the request's body, read once; `TokenError` if it is longer than any task's."""
    known = environ.get(BODY_KEY)
    if isinstance(known, bytes):
        return known
    length = environ.get("CONTENT_LENGTH") or ""
    if length.isdigit():
        if int(length) > MAX_BODY:
            raise TokenError(f"the body has {length} bytes, at most {MAX_BODY} are allowed")
        body: bytes = environ["wsgi.input"].read(int(length))
    elif environ.get("wsgi.input_terminated"):
        body = environ["wsgi.input"].read(MAX_BODY + 1)
        if len(body) > MAX_BODY:
            raise TokenError(f"the body has more than {MAX_BODY} bytes")
    else:
        body = b""
    environ[BODY_KEY] = body
    environ["wsgi.input"] = io.BytesIO(body)
    return body


def _clean(environ: Environ) -> None:
    for key in [key for key in environ if key.startswith(_FORGEABLE)]:
        del environ[key]


def _tell(environ: Environ, dispatch: Dispatch) -> None:
    _clean(environ)
    for name, value in dispatch.headers.items():
        environ["HTTP_" + name.upper().replace("-", "_")] = value
    environ["REMOTE_ADDR"] = TASK_ADDRESS


def _decoded(path: str) -> str:
    """Return a WSGI path, which carries bytes as Latin-1, as the text it stands for."""
    return path.encode("latin-1", "replace").decode("utf-8", "replace")
