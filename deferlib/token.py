"""The dispatch token: what the engine says of one request, signed; made by the engine, verified by the handler.

`docs/reference/formats.md` has the format. The token *contains* all it vouches for, so that proxies which rewrite the
Host, reorder or fold headers do no harm, and a forged header is simply not in it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from deferlib.clock import Clock
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE, Micros
from deferlib.errors import TokenError, TokenMismatchError
from deferlib.keys import Keyring, mac

HEADER = "X-Deferlib-Signature"
OUTCOME = "X-Deferlib-Outcome"
TOOK = "X-Deferlib-Took"  # microseconds; a handler that tells takes batches, too
SKEW: Micros = 10 * MINUTE
MAX_LENGTH = 16_384
_ONE = "v1."  # one attempt's
_BATCH = "b1."  # several attempts', which those who know none refuse
_LONG_QUERY = 200  # longer ones are vouched for by digest: servers take 8 KB of headers, some less

_ENCODED_SLASH = re.compile("%2F", re.IGNORECASE)
_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(separators=(",", ":")).encode


def sign(
    ring: Keyring, now: Micros, dispatch: Dispatch, *, method: str, body: bytes, deadline: Micros, base_path: str = ""
) -> str:
    """Return the token for one request to `task.url` under the path of its target's base URL.

    *base_path* is as it stands in that URL, percent-encoded; *deadline* is how long the attempt may take.
    """
    key, task = ring.signing, dispatch.context
    digest = hashlib.sha256(body).hexdigest()
    name = _encode(task.user_name) if task.user_name else '""'
    # Written out, with what many tasks share encoded once: 3 µs less than one JSON object of it all.
    vouched = (
        f'{{{_request(method, base_path, task.url)},"b":"{digest}","i":"{task.id}","n":{name},'
        f'{_place(task.queue, task.namespace)},"a":{task.attempt},"x":{task.execution_count},"e":{task.eta_micros},'
        f'"f":{task.fence},"t":{now},"l":{deadline},"h":{_encode(dispatch.headers)}}}'
    )
    text = f"{_ONE}{key.id.hex()}.{_b64(vouched.encode())}"
    return f"{text}.{_b64(mac(key.dispatch, text.encode()))}"


@lru_cache(256)
def _request(method: str, base_path: str, url: str) -> str:
    path, mark, query = url.partition("?")
    return _encode({"m": method, "o": base_path, "u": path + mark, **_query_claims(query)})[1:-1]


@lru_cache(256)
def _place(queue: str, namespace: str) -> str:
    return _encode({"d": queue, "s": namespace})[1:-1]


def _query_claims(query: str) -> dict[str, str]:
    """Return a query as the token has it: two fields, so that nobody can pass a digest for a query."""
    if len(query) <= _LONG_QUERY:
        return {"q": query, "r": ""}
    return {"q": "", "r": hashlib.sha256(query.encode("utf-8", "replace")).hexdigest()}


def sign_batch(ring: Keyring, now: Micros, *, url: str, body: bytes, deadline: Micros, base_path: str = "") -> str:
    """Return the token for one POST to *url* with several deferred calls in *body*, which says all else of them.

    *deadline* is the longest of theirs.
    """
    key = ring.signing
    vouched = f'{{{_request("POST", base_path, url)},"b":"{hashlib.sha256(body).hexdigest()}","t":{now},"l":{deadline}}}'
    text = f"{_BATCH}{key.id.hex()}.{_b64(vouched.encode())}"
    return f"{text}.{_b64(mac(key.dispatch, text.encode()))}"


def is_batch(token: str) -> bool:
    """Tell whether *token* says that it is a batch's."""
    return token.startswith(_BATCH)


class _Claims:
    """What a token says, whose signature and time hold; to be compared with the request that it came with."""

    __slots__ = ("_claims", "_clock")

    def __init__(self, claims: Mapping[str, Any], clock: Clock) -> None:
        self._claims = claims
        self._clock = clock

    def _check(self, method: str, path: str, query: str, body: bytes, prefix: str, inner: str) -> None:
        """Raise `TokenError` unless the request is the one that the engine made.

        *path* is decoded, SCRIPT_NAME included; *prefix* is what a proxy strips from it on the way, *inner* the path as it
        was before the server put its own root path before it, if it did.
        """
        claims = self._claims
        if claims["m"] != method:
            raise TokenMismatchError(f"the token is for a {claims['m']} request, this is {method[:20]!r}")
        sent = unquote(claims["o"] + claims["u"].removesuffix("?"))
        whole = _ENCODED_SLASH.sub("/", path)  # cheroot leaves encoded slashes as they are
        if sent not in (path, prefix + path, inner or path, whole, prefix + whole):
            raise TokenMismatchError(f"the token is for the path {sent!r}, this is {path!r}; see the setting 'prefix'")
        if _query_claims(query) != {"q": claims["q"], "r": claims["r"]}:
            raise TokenMismatchError("the token is for another query")
        if not hmac.compare_digest(hashlib.sha256(body).hexdigest(), claims["b"]):
            raise TokenMismatchError("the token is for another body")


class Vouched(_Claims):
    """A token of one attempt."""

    __slots__ = ()

    def dispatch(self, *, method: str, path: str, query: str, body: bytes, prefix: str = "", inner: str = "") -> Dispatch:
        """Return what the engine vouches for if the request is the one it made; `TokenError` if not.

        *path* is decoded, SCRIPT_NAME included; *prefix* is what a proxy strips from it on the way, *inner* the path as it
        was before the server put its own root path before it, if it did.
        """
        self._check(method, path, query, body, prefix, inner)
        claims = self._claims
        context = TaskContext(
            id=int(claims["i"]),
            user_name=claims["n"],
            queue=claims["d"],
            attempt=claims["a"],
            execution_count=claims["x"],
            eta_micros=claims["e"],
            deadline_micros=claims["t"] + claims["l"],
            fence=claims["f"],
            namespace=claims["s"],
            url=claims["u"] + query,
            clock=self._clock,
        )
        return Dispatch(context, claims["h"])


class VouchedBatch(_Claims):
    """A token of several attempts in one request."""

    __slots__ = ()

    def request(
        self, *, path: str, query: str, body: bytes, prefix: str = "", inner: str = ""
    ) -> tuple[str, Micros]:  # fmt: skip
        """Return the tasks' URL, and when the engine made the request; `TokenError` if it made another one.

        The arguments are those of `Vouched.dispatch`.
        """
        self._check("POST", path, query, body, prefix, inner)
        return self._claims["u"] + query, int(self._claims["t"])


def verify(ring: Keyring, clock: Clock, token: str) -> Vouched:
    """Check signature and time of *token*, before anything of the request's body is read; `TokenError` if they fail."""
    return Vouched(_opened(ring, clock, token, _ONE), clock)


def verify_batch(ring: Keyring, clock: Clock, token: str) -> VouchedBatch:
    """Do what `verify` does, for the token of a batch."""
    return VouchedBatch(_opened(ring, clock, token, _BATCH), clock)


def _opened(ring: Keyring, clock: Clock, token: str, version: str) -> Mapping[str, Any]:
    """Return what a genuine *token* of *version* says."""
    if len(token) > MAX_LENGTH or not token.isascii():
        raise TokenError("the token is too long or not ASCII")
    parts = token.split(".")
    if not token.startswith(version) or len(parts) != 4:
        raise TokenError("the token has an unknown format")
    _, key_hex, payload, signature = parts
    try:
        key_id = bytes.fromhex(key_hex)
    except ValueError:
        raise TokenError("the token isn't well-formed") from None
    key = ring.get(key_id)
    # An unknown key takes the same path, so that the time tells nothing.
    secret = key.dispatch if key is not None else ring.signing.dispatch
    expected = mac(secret, token[: -len(signature) - 1].encode())
    genuine = hmac.compare_digest(_b64(expected), signature)  # as text: decoding ignores the last character's spare bits
    if key is None:
        raise TokenError(f"the token was signed with key {key_id.hex()[:16]}, which isn't in the ring here")
    if not genuine:
        raise TokenError("the token's signature is wrong")
    claims, _ = _decode(_unb64(payload))  # ours, since the signature holds
    now = clock.now()
    if not claims["t"] - SKEW <= now <= claims["t"] + claims["l"] + SKEW:
        raise TokenError("the token has expired, or the clocks differ by more than ten minutes")
    said: Mapping[str, Any] = claims
    return said


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> str:
    return binascii.a2b_base64(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4)).decode()
