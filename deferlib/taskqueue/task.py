"""A task: what to send where and when, and how to retry it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

from deferlib import config, payload
from deferlib.context import moment
from deferlib.core.backoff import options_text
from deferlib.core.model import SECOND, Micros, NewTask
from deferlib.errors import (
    InvalidDispatchDeadlineError,
    InvalidEtaError,
    InvalidTagError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
    TaskTooLargeError,
)
from deferlib.ids import ids
from deferlib.keys import Keyring
from deferlib.namespaces import get_namespace
from deferlib.taskqueue import limits

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*\Z")
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_ENGINE_HEADERS = ("x-appengine-", "x-cloudtasks-", "x-deferlib-")
_CALL_HEADERS = {"Content-Type": "application/octet-stream"}  # of a deferred call without headers of its own
_CALL_HEADERS_TEXT = json.dumps(list(_CALL_HEADERS.items()))
_FIRST: Micros = -62_135_596_800 * SECOND  # the year 1
_LAST: Micros = 253_370_764_800 * SECOND  # the year 9999


class TaskRetryOptions:
    """A task's own retry options: they replace the queue's as a whole. None: not set (App Engine's defaults apply)."""

    __slots__ = ("_max_backoff", "_max_doublings", "_min_backoff", "_task_age_limit", "_task_retry_limit")

    def __init__(
        self,
        *,
        min_backoff_seconds: float | None = None,
        max_backoff_seconds: float | None = None,
        task_age_limit: float | None = None,
        max_doublings: int | None = None,
        task_retry_limit: int | None = None,
    ) -> None:
        given = {
            "min_backoff_seconds": min_backoff_seconds,
            "max_backoff_seconds": max_backoff_seconds,
            "task_age_limit": task_age_limit,
            "max_doublings": max_doublings,
            "task_retry_limit": task_retry_limit,
        }
        for name, value in given.items():
            if value is not None and not 0 <= value < 2**31:
                raise InvalidTaskRetryOptionsError(f"{name} is {value!r}; a number from 0 to 2147483647 is needed")
        if None not in (min_backoff_seconds, max_backoff_seconds) and max_backoff_seconds < min_backoff_seconds:  # type: ignore[operator]  # neither is None
            raise InvalidTaskRetryOptionsError(
                f"max_backoff_seconds ({max_backoff_seconds}) is smaller than min_backoff_seconds ({min_backoff_seconds})"
            )
        self._min_backoff = min_backoff_seconds
        self._max_backoff = max_backoff_seconds
        self._task_age_limit = None if task_age_limit is None else math.ceil(task_age_limit)
        self._max_doublings = None if max_doublings is None else int(max_doublings)
        self._task_retry_limit = None if task_retry_limit is None else int(task_retry_limit)

    @property
    def min_backoff_seconds(self) -> float | None:
        """The wait before the first retry."""
        return self._min_backoff

    @property
    def max_backoff_seconds(self) -> float | None:
        """The longest wait between two attempts."""
        return self._max_backoff

    @property
    def task_age_limit(self) -> int | None:
        """Seconds after the first attempt began in which the task may be retried."""
        return self._task_age_limit

    @property
    def max_doublings(self) -> int | None:
        """How often the wait doubles before it grows linearly."""
        return self._max_doublings

    @property
    def task_retry_limit(self) -> int | None:
        """How often the task may be retried: limit 3 means 4 attempts."""
        return self._task_retry_limit

    def text(self) -> str:
        """Return the options as the store keeps them; '' if none is set."""
        return options_text(
            min_backoff=self._min_backoff,
            max_backoff=self._max_backoff,
            age_limit=self._task_age_limit,
            max_doublings=self._max_doublings,
            retry_limit=self._task_retry_limit,
        )

    def __repr__(self) -> str:
        fields = (
            "min_backoff_seconds", "max_backoff_seconds", "task_age_limit", "max_doublings", "task_retry_limit"
        )  # fmt: skip
        given = (f"{name}={getattr(self, name)!r}" for name in fields if getattr(self, name) is not None)
        return f"TaskRetryOptions({', '.join(given)})"


class Task:
    """A unit of work: an HTTP request to be made later, until it is answered with 200 to 299.

    A task's id and nonce are made here, so that adding the same object again after an unknown outcome adds it once.
    """

    def __init__(
        self,
        payload: bytes | str | None = None,
        *,
        name: str | None = None,
        url: str = "",
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        retry_options: TaskRetryOptions | None = None,
        target: str | None = None,
        tag: str | None = None,
        dispatch_deadline_usec: int | None = None,
    ) -> None:
        now = config.runtime().clock.now()
        if name and not (isinstance(name, str) and limits.TASK_NAME.match(name)):
            raise InvalidTaskNameError(f"task name {name!r}: 1 to 500 letters, digits, hyphens and underscores are allowed")
        self._name = name or None
        self._url = _checked_url(url)
        self._method = _checked_method(method, self._url, headers, target)
        self._headers = _checked_headers(headers)
        self._payload = _checked_payload(payload, self._method, self._headers)
        self._tag = _checked_tag(tag, self._method)
        self._target = _checked_target(target)
        self._eta = _checked_eta(countdown, eta, now)
        self._retry_options = retry_options
        self._deadline = _checked_deadline(dispatch_deadline_usec)
        self._namespace = get_namespace()
        self._created = now
        self._id = ids.next(now)
        self._nonce = ids.nonce()
        self._call: payloads.Call | None = None
        self._queue_name: str | None = None
        self._enqueued = False
        self._deleted = False
        limit = limits.MAX_PULL_TASK_SIZE_BYTES if self._method == "PULL" else limits.MAX_PUSH_TASK_SIZE_BYTES
        if self.size > limit:
            raise TaskTooLargeError(f"the task has {self.size} bytes, at most {limit} are allowed")

    @classmethod
    def of_call(cls, call: payloads.Call, **options: Any) -> Task:
        """Return the task of a deferred call: its payload is sealed when its queue is known, and may be 32 MiB long."""
        size = len(call.body)
        if size > limits.MAX_DEFERRED_BYTES:
            raise TaskTooLargeError(
                f"the call of {call.label} has {size} bytes, at most {limits.MAX_DEFERRED_BYTES} are allowed; "
                "store what is large and pass its name"
            )
        task = cls(**options)
        task._call = call
        return task

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The name: the one given, or, once the task was added, the one derived from its id."""
        if self._name is None and self._enqueued:
            return str(self._id)
        return self._name

    @property
    def payload(self) -> bytes | None:
        """The body of the request; of a deferred call, its serialized form."""
        return self._call.body if self._call is not None else self._payload

    @property
    def url(self) -> str:
        """The path and query; '' for the queue's default URL."""
        return self._url

    @property
    def method(self) -> str:
        """The HTTP method, or PULL for a pull queue's task."""
        return self._method

    @property
    def headers(self) -> dict[str, str]:
        """A copy of the headers."""
        return dict(self._headers)

    @property
    def eta(self) -> datetime:
        """When the task is to run (aware, UTC)."""
        return moment(self._eta)

    @property
    def target(self) -> str | None:
        """The named target; None for the queue's or the default one."""
        return self._target or None

    @property
    def tag(self) -> str | None:
        """A pull task's tag; None without one."""
        return self._tag or None

    @property
    def retry_options(self) -> TaskRetryOptions | None:
        """The task's own retry options; None for the queue's."""
        return self._retry_options

    @property
    def dispatch_deadline_usec(self) -> int | None:
        """How long an attempt may take, in microseconds; None for the queue's deadline."""
        return self._deadline or None

    @property
    def queue_name(self) -> str | None:
        """The queue, once the task was added."""
        return self._queue_name

    @property
    def was_enqueued(self) -> bool:
        """Whether the task was added to a queue."""
        return self._enqueued

    @property
    def was_deleted(self) -> bool:
        """Whether the task was deleted by way of this object."""
        return self._deleted

    @property
    def size(self) -> int:
        """The size in bytes that the limits count: method, URL, headers and payload."""
        headers = sum(len(key) + len(value) + 4 for key, value in self._headers.items())
        return len(self._method) + len(self._url) + headers + len(self._payload or b"")

    def add(self, queue_name: str = "default", transactional: bool = False) -> None:
        """Add the task to a queue."""
        from deferlib.taskqueue.queue import Queue

        Queue(queue_name).add(self, transactional)

    def __repr__(self) -> str:
        return f"<Task {self.name or self._id} {self._method} {self._url or 'default URL'} eta={self.eta.isoformat()}>"

    # --- for the queue ----------------------------------------------------------------------------------------------

    def _renew_id(self, now: Micros) -> None:
        self._id = ids.next(now)

    def _row(self, queue: str, ring: Keyring) -> NewTask:
        """Return the task as the store takes it; a deferred call is sealed for its id and queue."""
        mode = "pull" if self._method == "PULL" else "push"
        url = "" if mode == "pull" else self._url or f"/_ah/queue/{queue}"
        body, key_id = self._payload or b"", b""
        if self._call is not None:
            key_id = ring.signing.id
            binding = payloads.Binding(self._id, self._name or "", queue, url, self._namespace)
            body = payloads.seal(self._call, ring.signing, binding)
        return NewTask(
            self._id,
            self._nonce,
            queue,
            self._name,
            mode,
            self._eta,
            self._created,
            self._method,
            url,
            self._target,
            _headers_text(self._headers),
            self._namespace,
            self._tag,
            self._retry_options.text() if self._retry_options is not None else "",
            self._deadline,
            0,
            key_id,
            body,
        )

    def _added(self, queue: str) -> None:
        self._queue_name = queue
        self._enqueued = True


payloads = payload  # the module: `payload` is an argument's and a property's name above


def _headers_text(headers: dict[str, str]) -> str:
    if headers == _CALL_HEADERS:  # 0.05 µs, json.dumps takes 3
        return _CALL_HEADERS_TEXT
    return json.dumps(list(headers.items())) if headers else ""


def _checked_url(url: str) -> str:
    if not url:
        return ""
    if not isinstance(url, str):
        raise InvalidUrlError(f"url {url!r}: a string is needed")
    return _sound_url(url)


@lru_cache(maxsize=256)  # 2 µs of the 3 that checking takes: an app's tasks share a few URLs
def _sound_url(url: str) -> str:
    try:
        scheme, netloc, path, _query, fragment = urlsplit(url)
    except ValueError as error:
        raise InvalidUrlError(f"url {url!r}: {error}") from None
    if scheme or netloc or fragment or not path.startswith("/") or re.search(r"[\x00-\x20\x7f]", url):
        raise InvalidUrlError(
            f"url {url!r}: a path that starts with '/' is needed, without scheme, host, fragment or spaces"
        )
    if not {".", ".."}.isdisjoint(path.lower().replace("%2e", ".").split("/")):
        # libcurl and proxies resolve them, and the token would be for another path than the one that arrives
        raise InvalidUrlError(f"url {url!r}: a path without '.' and '..' is needed")
    if len(path) > limits.MAX_URL_LENGTH:
        raise InvalidUrlError(f"the url's path has {len(path)} characters, at most {limits.MAX_URL_LENGTH} are allowed")
    sent = url if url.isascii() else quote(url, safe="/?&=%:@!$'()*+,;~-._#[]")
    if len(sent) > limits.MAX_SENT_URL_LENGTH:  # in the dispatch token too, and servers take 8 KB of headers
        raise InvalidUrlError(
            f"the url has {len(sent)} bytes as it is sent, at most {limits.MAX_SENT_URL_LENGTH} are allowed; put what is "
            "long into the payload"
        )
    return sent


def _checked_method(method: str, url: str, headers: object, target: object) -> str:
    upper = method.upper() if isinstance(method, str) else ""
    if upper not in limits.METHODS:
        raise InvalidTaskError(f"method {method!r}: one of {', '.join(sorted(limits.METHODS))} is needed")
    if upper == "PULL" and (url or headers or target):
        raise InvalidTaskError("a task of method PULL has no url, headers or target")
    return upper


def _checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    if not headers:
        return {}
    if headers == _CALL_HEADERS:
        return dict(_CALL_HEADERS)
    checked = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.match(name):
            raise InvalidTaskError(f"header name {name!r}: letters, digits and hyphens are allowed")
        if not isinstance(value, str) or not _HEADER_VALUE.match(value):
            raise InvalidTaskError(f"header {name}: its value is a line of text in Latin-1")
        # The engine's own are dropped, as on App Engine, also where a server's folding would make them its own.
        if not name.lower().replace("_", "-").startswith(_ENGINE_HEADERS):
            checked[name] = value
    return checked


def _checked_payload(payload: bytes | str | None, method: str, headers: dict[str, str]) -> bytes | None:
    if payload is None:
        if method == "PULL":
            raise InvalidTaskError("a task of method PULL needs a payload")
        return None
    if isinstance(payload, str):
        data = payload.encode()
        if method != "PULL" and not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "text/plain; charset=utf-8"
    elif isinstance(payload, bytes):
        data = payload
    else:
        raise InvalidTaskError(f"the payload is bytes or a string, not {type(payload).__name__}")
    if data and method not in limits.BODY_METHODS:
        raise InvalidTaskError(f"a task of method {method} has no payload")
    return data


def _checked_target(target: str | None) -> str:
    if not target:
        return ""
    if not isinstance(target, str) or not _TARGET.match(target):
        raise InvalidTaskError(f"target {target!r}: up to 100 letters, digits, dots, hyphens and underscores are allowed")
    return target


def _checked_tag(tag: str | None, method: str) -> str:
    if tag is None:
        return ""
    if method != "PULL":
        raise InvalidTaskError("only a task of method PULL has a tag")
    if len(tag) > limits.MAX_TAG_LENGTH:
        raise InvalidTagError(f"the tag has {len(tag)} characters, at most {limits.MAX_TAG_LENGTH} are allowed")
    return tag


def _checked_eta(countdown: float | None, eta: datetime | None, now: Micros) -> Micros:
    if countdown is not None and eta is not None:
        raise InvalidTaskError("give a countdown or an eta, not both")
    if eta is not None:
        if not isinstance(eta, datetime):
            raise InvalidTaskError(f"an eta is a datetime, not {type(eta).__name__}")
        try:
            at = (eta.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)  # naive: local time
        except (OverflowError, ValueError, OSError) as error:
            raise InvalidTaskError(f"eta {eta!r}: {error}") from None
    elif countdown is not None:
        try:
            seconds = float(countdown)
        except (ValueError, OverflowError) as error:
            raise InvalidTaskError(f"countdown {countdown!r}: {error}") from None
        if not math.isfinite(seconds):
            raise InvalidTaskError(f"countdown {countdown!r}: a finite number of seconds is needed")
        at = round(now + seconds * SECOND)
    else:
        return now
    if at - now > limits.MAX_COUNTDOWN // timedelta(microseconds=1):
        raise InvalidEtaError(f"the eta is {(at - now) / SECOND / 86_400:.1f} days ahead, at most 30 are allowed")
    return max(min(at, _LAST), _FIRST)


def _checked_deadline(deadline: int | None) -> Micros:
    if deadline is None:
        return 0
    if isinstance(deadline, bool) or not isinstance(deadline, int):
        raise TypeError(f"dispatch_deadline_usec is a whole number of microseconds, not {type(deadline).__name__}")
    least, most = (
        limit // timedelta(microseconds=1) for limit in (limits.MIN_DISPATCH_DEADLINE, limits.MAX_DISPATCH_DEADLINE)
    )
    if not least <= deadline <= most:
        raise InvalidDispatchDeadlineError(
            f"dispatch_deadline_usec is {deadline}; {least} to {most} (15 s to 24 h) are allowed"
        )
    return deadline
