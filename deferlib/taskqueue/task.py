"""A task: what to send where and when, and how to retry it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from deferlib import config, tracing
from deferlib import payload as payloads
from deferlib.context import moment
from deferlib.core.malformed import LONGEST_TEXTS
from deferlib.core.model import SECOND, Micros, NewTask
from deferlib.errors import InvalidTaskError, InvalidUrlError, TaskTooLargeError
from deferlib.ids import ids
from deferlib.keys import Key
from deferlib.taskqueue import rules
from deferlib.taskqueue.headers import Headers
from deferlib.taskqueue.limits import SAFE_URL_BYTES
from deferlib.taskqueue.options import TaskRetryOptions

if TYPE_CHECKING:
    from deferlib.taskqueue.rpc import UserRPC

_CALL_HEADERS_TEXT = json.dumps(rules.CALL_HEADERS.lines())
_NAMESPACE_BYTES = len(rules.CURRENT_NAMESPACE) + 4


class Task:
    """A unit of work: an HTTP request to be made later, until it is answered with 200 to 299.

    A task's id and nonce are made here, so that adding the same object again after an unknown outcome adds it once.
    It carries the namespace in which it is made.

    *payload* is the body: bytes, or a string, sent as UTF-8. *params* are form-encoded: into the body of a POST or PULL
    task, into the query of any other; a value that holds several is repeated. *url* is a path with or without a query,
    by default `/_ah/queue/` and the queue's name, or an absolute URL that the setting `allow_urls` lets through; *method*
    POST, GET, HEAD, PUT, DELETE or PULL. *headers* is a mapping; a value may be a list. *countdown* is in seconds from
    now, *eta* a datetime (naive: local time), at most 30 days ahead. *target* names a service, *retry_options* replace the
    queue's as a whole, *dispatch_deadline_usec* is how long an attempt may take, and *tag* groups tasks of a pull queue.

    Raises `InvalidTaskError` and its kin (`InvalidTaskNameError`, `InvalidUrlError`, `InvalidEtaError`,
    `TaskTooLargeError`), `InvalidTagError`, `InvalidDispatchDeadlineError`; TypeError for a url that is no string, a
    countdown that is no number, a deadline that is no int, and retry options of another class.
    """

    def __init__(
        self,
        payload: bytes | str | None = None,
        *,
        countdown: float | str | None = None,
        eta: datetime | None = None,
        headers: Mapping[str, str | Iterable[str]] | None = None,
        method: str = "POST",
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
        retry_options: TaskRetryOptions | None = None,
        tag: str | None = None,
        target: Any = None,
        url: str = "",
        dispatch_deadline_usec: int | None = None,
        _size_check: bool = True,
        _call: payloads.Call | None = None,
    ) -> None:
        runtime = config.runtime()
        limits, now = runtime.limits, runtime.clock.now()
        self._name = rules.name_of(name, limits) if name else None
        absolute = rules.is_absolute(url)
        if absolute and _call is not None:
            raise InvalidUrlError(rules.CALL_TO_URL)
        url = rules.absolute_url_of(url, limits, runtime.settings["allow_urls"]) if absolute else rules.url_of(url, limits)
        query = rules.params_of(params) if params else ""
        if query and "?" in url:
            raise InvalidTaskError("give a query in the url or params, not both")
        self._method = rules.method_of(method)
        if tag is not None and self._method != "PULL":
            raise InvalidTaskError("only a task of method PULL has a tag")
        content_type = "application/octet-stream"
        self._payload = None
        if _call is None:
            self._payload, query, content_type = rules.content_of(
                self._method, payload, query, query="?" in url and not absolute, routed=bool(url or headers or target)
            )
            if absolute and payloads.is_envelope(self._payload or b""):
                raise InvalidUrlError(rules.CALL_TO_URL)
        elif "?" in url:
            raise InvalidTaskError("the url of a deferred call has no query")
        self._url = rules.with_query(url, query, limits) if query or len(url) > SAFE_URL_BYTES else url
        self._headers = rules.headers_of(rules.CALL_HEADERS_GIVEN if _call is not None and not headers else headers)
        if content_type and self._headers is not rules.CALL_HEADERS and "Content-Type" not in self._headers:
            self._headers = self._headers.copy()
            self._headers["Content-Type"] = content_type
        self._target, self._shown_target = "", None
        if absolute:
            rules.refuse_target(target, self._headers)
        elif target is not None or headers:
            self._target, self._shown_target = rules.target_of(target, self._headers)
        if runtime.targets and self._shown_target is None and self._method != "PULL" and not absolute:
            self._shown_target = rules.own_target(runtime.targets, trust_host=runtime.settings["trust_host"])
            self._target = self._shown_target or ""
        self._eta = rules.eta_of(countdown, eta, now, limits)
        self._namespace = rules.namespace_of(self._headers)
        self._call = _call
        longest = limits.pull_task_bytes if self._method == "PULL" else limits.push_task_bytes
        if _call is not None:
            longest = limits.call_bytes
        if _size_check:
            self._check_size(longest)
        if self.size > _SHORT_HEADERS:
            self._check_headers()
        if self._method != "PULL" and not absolute:  # a trace is no business of another's host
            self._join_trace(longest)
        self._tag, self._shown_tag = rules.tag_of(tag, limits) if tag else "", tag
        self._deadline = rules.deadline_of(dispatch_deadline_usec, limits) if dispatch_deadline_usec is not None else 0
        if retry_options is not None and not isinstance(retry_options, TaskRetryOptions):
            raise TypeError(f"retry_options is a TaskRetryOptions, not {type(retry_options).__name__}")
        self._retry_options = retry_options
        self._created = now
        self._id = ids.next(now)
        self._nonce = ids.nonce()
        self._queue_name: str | None = None
        self._enqueued = False
        self._deleted = False

    @classmethod
    def of_call(cls, call: payloads.Call, **options: Any) -> Task:
        """Return the task of a deferred call: its payload is sealed when its queue is known, and may be 32 MiB long."""
        return cls(_call=call, **options)

    def _join_trace(self, longest: int) -> None:
        """Take the current trace along, unless the headers have one, or the task would become longer than *longest*."""
        trace = tracing.current()
        if trace is None or tracing.PARENT in self._headers or self.size + trace.size > longest:
            return
        self._headers = self._headers.copy()
        self._headers[tracing.PARENT] = trace.parent
        if trace.state:
            self._headers[tracing.STATE] = trace.state
        else:
            self._headers.pop(tracing.STATE, None)  # it belongs to its own parent only

    def _check_size(self, longest: int) -> None:
        size = self.size
        if size <= longest:
            return
        if self._call is not None:
            raise TaskTooLargeError(
                f"the call of {self._call.label} has {size} bytes, at most {longest} are allowed; store what is large and "
                "pass its name, or raise the limit call_bytes"
            )
        raise TaskTooLargeError(
            f"the task has {size} bytes (method, url, headers and payload), at most {longest} are allowed; store what is "
            f"large and pass its name, or raise the limit {'pull' if self._method == 'PULL' else 'push'}_task_bytes"
        )

    def _check_headers(self) -> None:
        length = len(_headers_text(self._headers))
        if length > _LONGEST_HEADERS:
            raise TaskTooLargeError(
                f"the headers have {length} characters, at most {_LONGEST_HEADERS} are allowed, and servers take 8,000 to "
                "64,000 bytes; put what is long into the payload"
            )

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The name: the one given, or, once the task was added, the one derived from its id."""
        if self._name is None and self._enqueued:
            return str(self._id)
        return self._name

    @property
    def payload(self) -> bytes | None:
        """The body of the request; of a deferred call what `deferred.serialize` makes of it, bound to no task."""
        if self._call is None:
            return self._payload
        return payloads.seal(self._call, config.runtime().ring.signing, None)

    @property
    def url(self) -> str:
        """The path and query, or the absolute URL; without a path for the queue's default URL."""
        return self._url

    @property
    def on_queue_url(self) -> bool:
        """Whether the task goes to the queue's default URL."""
        return self._url[:1] in ("", "?")

    @property
    def method(self) -> str:
        """The HTTP method, or PULL for a pull queue's task."""
        return self._method

    @property
    def headers(self) -> Headers:
        """A copy of the headers, the namespace's included; their names have no letter case."""
        headers = self._headers.copy()
        headers[rules.CURRENT_NAMESPACE] = self._namespace
        return headers

    @property
    def eta(self) -> datetime:
        """When the task is to run (aware, UTC)."""
        return moment(self._eta)

    @property
    def eta_posix(self) -> float:
        """When the task is to run, in seconds since 1970."""
        return self._eta / SECOND

    @property
    def target(self) -> Any:
        """The named target, or `DEFAULT_APP_VERSION`; None for the queue's or the default one."""
        return self._shown_target

    @property
    def tag(self) -> str | None:
        """A pull task's tag; None without one."""
        return self._shown_tag

    @property
    def retry_options(self) -> TaskRetryOptions | None:
        """The task's own retry options; None for the queue's."""
        return self._retry_options

    @property
    def retry_count(self) -> int:
        """How often a task of a pull queue was leased; 0 for one that wasn't."""
        return 0

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
        headers = self._headers.size
        if rules.CURRENT_NAMESPACE not in self._headers:
            headers += _NAMESPACE_BYTES + len(self._namespace)
        return len(self._method) + len(self._url) + headers + self._body_size

    @property
    def _body_size(self) -> int:
        return len(self._call.body if self._call is not None else self._payload or b"")

    # --- what it does -----------------------------------------------------------------------------------------------

    def add(self, queue_name: str = "default", transactional: bool = False) -> Task:
        """Add the task to a queue; return it. Raises what `Queue.add` raises."""
        from deferlib.taskqueue.queue import Queue

        Queue(queue_name).add(self, transactional)
        return self

    def add_async(self, queue_name: str = "default", transactional: bool = False, rpc: UserRPC | None = None) -> UserRPC:
        """Add the task to a queue in the background; `get_result()` of what is returned returns the task."""
        from deferlib.taskqueue.queue import Queue

        return Queue(queue_name).add_async(self, transactional, rpc)

    def extract_params(self) -> dict[str | bytes, bytes | list[bytes]]:
        """Return the params: of a POST or PULL task those of the payload, of any other those of the query.

        Values are bytes, several of one name a list. Names are strings, of a PULL task bytes, as on App Engine. Raises
        ValueError if there is something else in that place.
        """
        in_payload = self._method in ("POST", "PULL")
        text = (self.payload or b"").decode("latin-1") if in_payload else self._url.partition("?")[2]
        if not text:
            return {}
        found: dict[str | bytes, list[bytes]] = {}
        for name, value in parse_qsl(text, keep_blank_values=True, strict_parsing=True, encoding="latin-1"):
            raw = name.encode("latin-1")
            key: str | bytes = raw if self._method == "PULL" else raw.decode("utf-8", "replace")
            found.setdefault(key, []).append(value.encode("latin-1"))
        return {key: values[0] if len(values) == 1 else values for key, values in found.items()}

    def __repr__(self) -> str:
        """Return every attribute, but of payload and headers only how long they are and what they are called."""
        shown: dict[str, object] = {
            "eta": self.eta,
            "method": self._method,
            "name": self.name,
            "payload": None if self._payload is None and self._call is None else f"<{self._body_size} bytes>",
            "queue_name": self._queue_name,
            "retry_options": self._retry_options,
            "size": self.size,
            "was_deleted": self._deleted,
            "was_enqueued": self._enqueued,
        }
        if self._method == "PULL":
            shown["tag"] = self.tag
        else:
            shown |= {"headers": list(self.headers), "target": self.target, "url": self._url}
        return f"Task<{', '.join(f'{name}={shown[name]!r}' for name in sorted(shown))}>"

    # --- for the queue ----------------------------------------------------------------------------------------------

    def _renew_id(self, now: Micros) -> None:
        self._id = ids.next(now)

    def _row(self, queue: str, key: Key) -> NewTask:
        """Return the task as the store takes it; a deferred call is sealed with *key* for its id and queue."""
        mode, url, fail_fast = "pull", "", 0
        if self._method != "PULL":
            mode, url = "push", self._url
            if self.on_queue_url:
                url = f"/_ah/queue/{queue}{url}"
            fail_fast = int(rules.fails_fast(self._headers)) if self._headers is not rules.CALL_HEADERS else 0
        body, key_id = self._payload or b"", b""
        if self._call is not None:
            key_id = key.id
            binding = payloads.Binding(self._id, self._name or "", queue, url, self._namespace)
            body = payloads.seal(self._call, key, binding)
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
            fail_fast,
            key_id,
            body,
        )

    def _added(self, queue: str) -> None:
        self._queue_name = queue
        self._enqueued = True


_LONGEST_HEADERS = LONGEST_TEXTS - 1024  # of JSON; retry options take 200
_SHORT_HEADERS = _LONGEST_HEADERS // 6  # bytes of what surely isn't longer, though JSON takes six characters for some
_COLUMNS = frozenset({rules.CURRENT_NAMESPACE.lower(), rules.FAIL_FAST.lower()})  # kept on their own


def _headers_text(headers: Headers) -> str:
    """Return the headers as the store keeps them: a JSON list of names and values."""
    if headers is rules.CALL_HEADERS:  # json.dumps takes 3 µs
        return _CALL_HEADERS_TEXT
    lines = [line for line in headers.lines() if line[0].lower() not in _COLUMNS]
    return json.dumps(lines) if lines else ""
