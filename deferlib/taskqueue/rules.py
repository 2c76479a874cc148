"""What a task's arguments may be: one function for each, which returns the value to keep or says what is wrong.

App Engine's rules, in App Engine's words where programs could depend on them; `docs/how-to/appengine.md` has the few
that differ.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from deferlib.context import request_host
from deferlib.core.model import SECOND, Micros
from deferlib.errors import (
    InvalidDispatchDeadlineError,
    InvalidEtaError,
    InvalidTagError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidUrlError,
)
from deferlib.limits import DAY, Limits
from deferlib.namespaces import BadValueError, get_namespace, google_apps_namespace, validate_namespace
from deferlib.targets import Targets
from deferlib.taskqueue import limits as appengine
from deferlib.taskqueue.headers import Headers, checked_value
from deferlib.taskqueue.options import shown

if TYPE_CHECKING:
    from deferlib.outbound import AllowList

log = logging.getLogger("deferlib.client")

CURRENT_NAMESPACE = "X-AppEngine-Current-Namespace"
DEFAULT_NAMESPACE = "X-AppEngine-Default-Namespace"
FAIL_FAST = "X-AppEngine-FailFast"
_KEPT = frozenset({CURRENT_NAMESPACE.lower(), DEFAULT_NAMESPACE.lower(), FAIL_FAST.lower()})
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_ENGINE_HEADERS = ("x-appengine-", "x-cloudtasks-", "x-deferlib-")
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_BLANKS = "".join(map(chr, range(33)))
_ABSOLUTE = re.compile(r"[\x00-\x20]*https?:", re.IGNORECASE)
_SAFE = "/?&=%:@!$'()*+,;~-._[]"  # what stands for itself in a URL
_FIRST: Micros = -62_135_596_800 * SECOND  # the year 1
_FAR = 1e12  # seconds: beyond any time there is
_LAST: Micros = 253_370_764_800 * SECOND  # the year 9999

CALL_TO_URL = "a deferred call goes to an app that has its handler: name a target, not an absolute url"

CALL_HEADERS_GIVEN = {"Content-Type": "application/octet-stream"}  # of a deferred call without headers of its own
CALL_HEADERS = Headers(CALL_HEADERS_GIVEN)
NO_HEADERS = Headers()


class _Version:
    """Stands for a version of the app."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


DEFAULT_APP_VERSION = _Version("<DefaultApplicationVersion>")


# --- name, URL ------------------------------------------------------------------------------------------------------


def name_of(name: object, limits: Limits) -> str:
    if not isinstance(name, str) or not appengine.NAME.match(name) or len(name) > limits.task_name_length:
        raise InvalidTaskNameError(
            f"task name {shown(name, 600)}: 1 to {limits.task_name_length} letters, digits, hyphens and underscores are "
            "allowed"
        )
    return name


def url_of(url: object, limits: Limits) -> str:
    """Return the path and query as they are sent; '' for the queue's default URL."""
    if not isinstance(url, str):
        raise TypeError(f"url is a string, not {type(url).__name__}; leave it out for the queue's default URL")
    return _sent(url, limits.url_length) if url else ""


def is_absolute(url: object) -> bool:
    """Tell whether *url* names a host, whether or not it is spelled as it should be."""
    return isinstance(url, str) and url[:1] != "/" and bool(_ABSOLUTE.match(url))


def absolute_url_of(url: str, limits: Limits, allowed: AllowList | None) -> str:
    """Return an absolute *url* as it is sent, if *allowed* has it."""
    from deferlib import outbound  # a millisecond that few need

    if not allowed:
        raise InvalidUrlError(
            f"url {outbound.shown(url)}: a path that starts with '/' is needed, without scheme, host and fragment; for "
            "absolute urls, name their hosts in the setting allow_urls (DEFERLIB_ALLOW_URLS)"
        )
    parts = outbound.parse(url)
    allowed.check(parts)
    _check_length(parts.path.partition("?")[0], limits.url_length)
    return parts.url


def refuse_target(target: object, headers: Headers) -> None:
    """Raise `InvalidTaskError` if a task with an absolute URL is given another place to go to."""
    if target or "Host" in headers:
        raise InvalidTaskError("a task with an absolute url has no target and no Host header: the url says where it goes")


@lru_cache(maxsize=256)  # 2 µs of the 3 that checking takes: an app's tasks share a few URLs
def _sent(url: str, longest: int) -> str:
    url = url.lstrip(_BLANKS).rstrip("\t\r\n")  # as App Engine's parser does
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", url):
        raise InvalidUrlError(f"url {shown(url)}: control characters can't be sent")
    try:
        scheme, netloc, path, query, fragment = urlsplit(url)
    except ValueError as error:
        raise InvalidUrlError(f"url {shown(url)}: {error}") from None
    if scheme or netloc or fragment or not path.startswith("/") or path.startswith("//"):
        raise InvalidUrlError(f"url {shown(url)}: a path that starts with '/' is needed, without scheme, host and fragment")
    if not {".", ".."}.isdisjoint(path.lower().replace("%2e", ".").split("/")):
        # libcurl and proxies resolve them, and the token would be for another path than the one that arrives
        raise InvalidUrlError(f"url {shown(url)}: a path without '.' and '..' is needed")
    _check_length(path, longest)
    sent = quote(path, safe=_SAFE)
    if len(sent) > appengine.SAFE_URL_BYTES:  # it stands in the dispatch token too
        raise InvalidUrlError(f"the url's path has more than {appengine.SAFE_URL_BYTES} bytes as it is sent")
    return f"{sent}?{quote(query, safe=_SAFE)}" if query else sent


def _check_length(path: str, longest: int) -> None:
    if len(path) > longest:
        raise InvalidUrlError(f"the url's path has {len(path)} characters, at most {longest} are allowed")


def with_query(url: str, params: str, limits: Limits) -> str:
    """Return *url* with the query *params*, if it isn't too long to be sent."""
    sent = f"{url}?{params}" if params else url
    if len(sent) > limits.sent_url_bytes:
        raise InvalidUrlError(
            f"the url has {len(sent)} bytes as it is sent, at most {limits.sent_url_bytes} are allowed; put what is long "
            "into the payload of a POST task"
        )
    if len(sent) > appengine.SAFE_URL_BYTES:
        _warn_of_length(url.partition("?")[0])
    return sent


@lru_cache(maxsize=256)
def _warn_of_length(path: str) -> None:
    """Warn once for each path."""
    log.warning(
        "the url of a task to %s is longer than %d bytes with its query, which many servers refuse; put what is long into "
        "the payload of a POST task",
        path or "the default URL",
        appengine.SAFE_URL_BYTES,
    )


# --- method, payload, params ----------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What a method makes of payload and params."""

    payload: bytes | None
    query: str
    content_type: str  # '' for none of its own


def content_of(method: str, payload: object, params: str, *, query: bool, routed: bool) -> Content:
    """Return what is sent of *payload* and the encoded *params*.

    *query* tells of a query in the url, *routed* of a url, headers or a target.
    """
    both = payload is not None and payload != b"" and payload != "" and params
    match method:
        case "PULL":
            if routed:
                raise InvalidTaskError("a task of method PULL has no url, headers or target")
            if payload is None and not params:
                raise InvalidTaskError("a task of method PULL needs a payload or params; an empty payload is b''")
            if both:
                raise InvalidTaskError("a task of method PULL has a payload or params, not both")
            return Content(params.encode() if params else _bytes(payload), "", "")
        case "POST":
            if query:
                raise InvalidTaskError("a task of method POST has no query in its url; give params, or another method")
            if both:
                raise InvalidTaskError("a task of method POST has a payload or params, not both")
            if params:
                return Content(params.encode(), "", "application/x-www-form-urlencoded")
            return Content(_bytes(payload), "", _type_of(payload))
        case "PUT":
            return Content(_bytes(payload), params, _type_of(payload))
        case "GET" | "HEAD" | "DELETE":
            if _bytes(payload):
                raise InvalidTaskError(f"a task of method {method} has no payload; its params become the query")
            return Content(None, params, "")
    raise InvalidTaskError(f"method {shown(method)}: one of {', '.join(appengine.METHODS)} is needed")


def method_of(method: object) -> str:
    if not isinstance(method, str):
        raise InvalidTaskError(f"method: one of {', '.join(appengine.METHODS)} is needed, not {type(method).__name__}")
    return method.upper()


def params_of(params: object) -> str:
    """Return *params* form-encoded; a value that holds several is repeated."""
    if not params:
        return ""
    if not isinstance(params, Mapping):
        raise InvalidTaskError(f"params is a mapping of names and values, not {type(params).__name__}")
    pairs: list[tuple[str | bytes, str | bytes]] = []
    for name, value in params.items():
        values: Iterable[Any] = [value]
        if not isinstance(value, str | bytes) and isinstance(value, Iterable):
            values = value
        pairs += [(_part(name), _part(each)) for each in values]
    try:
        return urlencode(pairs)
    except UnicodeEncodeError as error:
        raise InvalidTaskError(f"params: {error}") from None


def _part(value: object) -> str | bytes:
    if isinstance(value, str | bytes):
        return value
    try:
        return str(value)
    except Exception as error:  # a user's __str__
        raise InvalidTaskError(f"params: a {type(value).__name__} has no text: {type(error).__name__}") from error


def _bytes(payload: object) -> bytes | None:
    if payload is None or isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        try:
            return payload.encode()
        except UnicodeEncodeError as error:
            raise InvalidTaskError(f"the payload is no text that can be sent: {error}") from None
    raise InvalidTaskError(f"the payload is bytes or a string, not {type(payload).__name__}")


def _type_of(payload: object) -> str:
    return "text/plain; charset=utf-8" if payload and isinstance(payload, str) else ""


# --- headers, namespace, target -------------------------------------------------------------------------------------


def headers_of(headers: object) -> Headers:
    """Return the headers to keep: the engine's own are dropped, but for those that App Engine lets a task choose."""
    if not headers:
        kept = NO_HEADERS
    elif headers == CALL_HEADERS_GIVEN:
        kept = CALL_HEADERS
    else:
        kept = _checked(headers)
    default = google_apps_namespace()
    if default is not None and DEFAULT_NAMESPACE not in kept:
        kept = kept.copy()
        kept[DEFAULT_NAMESPACE] = default
    return kept


def _checked(headers: object) -> Headers:
    try:
        given = headers.items() if isinstance(headers, Mapping) else dict(headers).items()  # type: ignore[call-overload]  # pairs, perhaps
    except (TypeError, ValueError):
        raise InvalidTaskError(f"headers is a mapping of names and values, not {shown(headers)}") from None
    kept = Headers()
    for name, value in given:
        if not isinstance(name, str) or not _HEADER_NAME.match(name):
            raise InvalidTaskError(f"header name {shown(name)}: letters, digits and hyphens are allowed")
        checked = checked_value(name, value)
        # Dropped also where a server's folding would make them the engine's own.
        if name.lower() in _KEPT or not name.lower().replace("_", "-").startswith(_ENGINE_HEADERS):
            kept[name] = checked
    for name in (CURRENT_NAMESPACE, DEFAULT_NAMESPACE):
        if name in kept:
            _check_namespace(name, kept[name])
    return kept


def _check_namespace(name: str, value: str | list[str]) -> None:
    if not isinstance(value, str):
        raise InvalidTaskError(f"header {name}: one value is allowed")
    try:
        validate_namespace(value)
    except BadValueError as error:
        raise InvalidTaskError(f"header {name}: {error}") from None


def namespace_of(headers: Headers) -> str:
    """Return the namespace that the headers choose, else the current one."""
    if headers is CALL_HEADERS or headers is NO_HEADERS or CURRENT_NAMESPACE not in headers:
        return get_namespace()
    return str(headers[CURRENT_NAMESPACE])


def fails_fast(headers: Headers) -> bool:
    """Tell whether the task asks to fail at once where no slot is free."""
    return FAIL_FAST in headers and str(headers[FAIL_FAST]).strip().lower() not in ("", "0", "false", "no")


def target_of(target: object, headers: Headers) -> tuple[str, str | _Version | None]:
    """Return the target to keep ('' for the queue's or the default one), and what `Task.target` shows."""
    host = headers.get("Host") if headers else None
    if target is not None and host is not None:
        raise InvalidTaskError("give a target or a Host header, not both")
    if not target:
        return ("", None) if host is None else _target_of_host(host)
    if target is DEFAULT_APP_VERSION:
        return "", DEFAULT_APP_VERSION
    if not isinstance(target, str) or not _TARGET.match(target):
        raise InvalidTaskError(
            f"target {shown(target)}: up to 100 letters, digits, dots, hyphens and underscores are allowed"
        )
    return target, target


def own_target(targets: Targets, *, trust_host: bool) -> str | None:
    """Return the target that serves the current request: its tasks stay with the version that adds them.

    With *trust_host* the request's Host may be any that the targets' template makes.
    """
    host = request_host.get()
    return None if host is None else targets.name_of(host, by_template=trust_host)


def _target_of_host(host: str | list[str]) -> tuple[str, str | _Version | None]:
    """Return the target that stands before the app's own host name; any other host means the default version."""
    own = os.environ.get("DEFAULT_VERSION_HOSTNAME")
    if own and isinstance(host, str) and host.endswith(f".{own}"):
        prefix = host.removesuffix(f".{own}")
        if _TARGET.match(prefix):
            return prefix, prefix
    return "", DEFAULT_APP_VERSION


# --- time -----------------------------------------------------------------------------------------------------------


def eta_of(countdown: Any, eta: object, now: Micros, limits: Limits) -> Micros:
    if countdown is not None and eta is not None:
        raise InvalidTaskError("give a countdown or an eta, not both")
    if eta is not None:
        if not isinstance(eta, datetime):
            raise InvalidTaskError(f"an eta is a datetime, not {type(eta).__name__}")
        try:
            at = (eta.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)  # naive: local time
        except Exception as error:  # beyond the calendar, or a tzinfo of the user's
            raise InvalidTaskError(f"eta {shown(eta)}: {error}") from None
    elif countdown is not None:
        try:
            seconds = float(countdown)
        except (ValueError, OverflowError) as error:
            raise InvalidTaskError(f"countdown {shown(countdown)}: {error}") from None
        if not math.isfinite(seconds):
            raise InvalidTaskError(f"countdown {shown(countdown)}: a finite number of seconds is needed")
        at = round(now + min(max(seconds, -_FAR), _FAR) * SECOND)
    else:
        return now
    if at - now > limits.eta_seconds * SECOND:
        raise InvalidEtaError(
            f"the eta is {(at - now) / SECOND / DAY:.1f} days ahead, at most {limits.eta_seconds / DAY:g} are allowed"
        )
    return max(min(at, _LAST), _FIRST)


def tag_of(tag: object, limits: Limits) -> str:
    if tag is None:
        return ""
    if isinstance(tag, bytes):
        tag = tag.decode("utf-8", "surrogateescape")
    if not isinstance(tag, str):
        raise InvalidTagError(f"a tag is a string, not {type(tag).__name__}")
    if len(tag) > limits.tag_length:
        raise InvalidTagError(f"the tag has {len(tag)} characters, at most {limits.tag_length} are allowed")
    if re.search(r"[\x00\ud800-\udfff]", tag):
        raise InvalidTagError("the tag is text that can't be stored: it has a NUL or half a character")
    return tag


def deadline_of(deadline: object, limits: Limits) -> Micros:
    """Return the dispatch deadline in microseconds."""
    if not isinstance(deadline, int):
        raise TypeError(f"dispatch_deadline_usec is a whole number of microseconds, not {type(deadline).__name__}")
    least, most = limits.min_deadline_seconds, limits.max_deadline_seconds
    if not least * SECOND <= deadline <= most * SECOND:
        raise InvalidDispatchDeadlineError(
            f"dispatch_deadline_usec is {shown(deadline)}: {least:g} to {most:g} seconds, in microseconds, are allowed"
        )
    return int(deadline)
