"""A task in words: as a line of a table, in full, and as a JSON document. Never its payload."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote_plus

from deferlib.call_text import CallText, read_call
from deferlib.cli.show import iso, print_fields, print_table, relative, seconds, span, when
from deferlib.core.model import Micros, QueueRow, TaskRow
from deferlib.keys import Keyring
from deferlib.payload import Binding
from deferlib.secret_names import is_secret
from deferlib.settings import mask

J = TypeVar("J", dict[str, Any], list[Any])

TITLES = ("NAME", "QUEUE", "STATE", "DUE", "TRIES", "CALL")
_ATTEMPTS = ("ATTEMPT", "AT", "TOOK", "STATUS", "ERROR")


class View(NamedTuple):
    """What a task is looked at with."""

    now: Micros
    ring: Keyring | None  # without keys no call can be verified
    queues: Mapping[str, QueueRow]
    served: bool  # whether an engine serves the store


def line(row: TaskRow, view: View) -> tuple[str, ...]:
    """Return a task's cells under `TITLES`."""
    now = view.now
    at = row.died if row.died is not None else row.due
    shown = "" if at is None else relative(at, now)
    return (row.public_name, row.queue, row.state(now), shown, str(row.attempts), call_of(row, view))


def call_of(row: TaskRow, view: View) -> str:
    """Return a deferred call as Python; of other tasks, their request. Nothing of it is run."""
    return _call(row, view).text or _request(row)


def _request(row: TaskRow) -> str:
    return f"{row.method} {shown_url(row.url)}".rstrip()


def shown_url(url: str) -> str:
    """Return *url* without passwords, and without the values of parameters whose names say that they are secret."""
    found = re.search(r"[?#]", url)
    end = len(url) if found is None else found.start()
    return mask(url[:end]) + re.sub(r"[^?#&]+", lambda match: _shown_parameter(match[0]), url[end:])


def _shown_parameter(text: str) -> str:
    """Return what stands between two `&`; all that follows a secret's name is masked: servers differ about a `;` in it."""
    shown = ""
    for part in re.split(r"(?<=;)", text):
        name, equals, _ = part.partition("=")
        if equals and is_secret(unquote_plus(name)):
            return f"{shown}{name}=***"
        shown += part
    return shown


def _call(row: TaskRow, view: View) -> CallText:
    return read_call(row.body, view.ring, Binding(row.id, row.name or "", row.queue, row.url, row.namespace))


def document(row: TaskRow, view: View) -> dict[str, Any]:
    """Return all there is to know of a task, for programs: the keys that `tasks show --help` documents."""
    queue = view.queues.get(row.queue)
    state = row.state(view.now)
    call = _call(row, view)
    return {
        "name": row.public_name,
        "id": str(row.id),  # 63 bits: more than a JavaScript number holds
        "queue": row.queue,
        "state": state,
        "reason": row.reason,
        "call": call.text or None,
        "verified": call.verified,
        "method": row.method,
        "url": shown_url(row.url),
        "target": _target(row, queue) or None,
        "namespace": row.namespace,
        "tag": row.tag or None,
        "headers": _header_names(row),
        "payload_bytes": len(row.body),
        "created": iso(row.created),
        "eta": iso(row.eta),
        "due": iso(row.due),
        "next_run": iso(row.due) if state in ("ready", "scheduled") else None,
        "lease_until": iso(row.due) if state == "leased" else None,
        "first_try": iso(row.first_try),
        "died": iso(row.died),
        "expires": iso(row.expires),
        "attempts": row.attempts,
        "executions": row.executions,
        "failures": row.failures,
        "lost": row.lost,
        "fence": row.claims,
        "key": row.key_id.hex() or None,
        "deadline_seconds": seconds(_deadline(row, queue)),
        "retry": _retry(row),
        "queue_paused": queue is not None and bool(queue.held),
        "engine": view.served,
        "history": [
            {
                "attempt": attempt.get("attempt"),
                "at": iso(attempt.get("at")),
                "seconds": seconds(attempt.get("micros")),
                "status": attempt.get("status"),
                "error": attempt.get("error"),
            }
            for attempt in _history(row)
        ],
    }


def print_task(row: TaskRow, view: View) -> None:
    """Print all there is to know of a task, for people."""
    queue, now = view.queues.get(row.queue), view.now
    retry = _retry(row)
    print_fields(
        [
            ("task", row.public_name if row.name is None else f"{row.name} (id {row.id})"),
            ("queue", row.queue),
            ("state", _state(row, now)),
            ("next run", _next_run(row, queue, view)),
            ("call", _call(row, view).text),
            ("request", _request(row)),
            ("target", _target(row, queue)),
            ("namespace", row.namespace),
            ("tag", row.tag),
            ("headers", ", ".join(_header_names(row))),
            ("payload", f"{len(row.body)} bytes" if row.died is not None or row.due is not None else ""),
            ("created", when(row.created, now)),
            ("eta", when(row.eta, now)),
            ("first tried", when(row.first_try, now)),
            ("died", when(row.died, now)),
            ("attempts", f"{row.attempts}: {row.executions} executed, {row.failures} charged, {row.lost} lost"),
            ("last status", str(row.status) if row.status else ""),
            ("deadline", span(length) if (length := _deadline(row, queue)) else ""),
            ("retry", ", ".join(f"{name} {value:g}" for name, value in retry.items()) if retry else ""),
            ("fence", str(row.claims) if row.claims else ""),
            ("key", row.key_id.hex()),
        ]
    )
    history = _history(row)
    if history:
        print()
        print_table(_ATTEMPTS, [_attempt_line(attempt, now) for attempt in history])


def _attempt_line(attempt: dict[str, Any], now: Micros) -> tuple[str, ...]:
    at, micros = attempt.get("at"), attempt.get("micros")
    return (
        str(attempt.get("attempt", "")),
        relative(at, now) if isinstance(at, int) else "",
        f"{micros / 1e6:.3f} s" if isinstance(micros, int) else "",
        str(attempt.get("status") or "none"),
        str(attempt.get("error") or ""),
    )


def _state(row: TaskRow, now: Micros) -> str:
    state = row.state(now)
    if not row.reason:
        return state
    return f"{state}, attempt {row.attempts}; the last one: {row.reason}" if state == "leased" else f"{state}: {row.reason}"


def _next_run(row: TaskRow, queue: QueueRow | None, view: View) -> str:
    """Say when the task runs next, as far as its row and its queue's tell."""
    now = view.now
    paused = f"; but its queue {queue.held}" if queue is not None and queue.held else ""
    if not paused and not view.served:
        paused = "; but no engine serves this store: `deferlib engine`, or `deferlib dev`"
    match row.state(now):
        case "dead":
            return f"never, unless `deferlib tasks retry {row.public_name}` brings it back"
        case "tombstone":
            return f"never: it is finished, and its name is free again {when(row.expires, now)}"
        case "leased":
            if not view.served:
                return f"its engine is gone; again once its lease has ended, {when(row.due, now)}"
            return f"running; its lease lasts until {when(row.due, now)}"
        case "ready":
            return f"as soon as an engine has room: due since {when(row.due, now)}{paused}"
    return f"{when(row.due, now)}{paused}"


def _target(row: TaskRow, queue: QueueRow | None) -> str:
    """Return the target that an engine would choose: the queue's comes first."""
    return (queue.config.target if queue is not None else "") or row.target


def _deadline(row: TaskRow, queue: QueueRow | None) -> Micros | None:
    return row.deadline or (queue.config.deadline if queue is not None else None)


def _header_names(row: TaskRow) -> list[str]:
    """Return the names only: a value may be a password."""
    return [str(pair[0]) for pair in _json(row.headers, list) if isinstance(pair, list) and pair]


def _history(row: TaskRow) -> list[dict[str, Any]]:
    return [attempt for attempt in _json(row.history, list) if isinstance(attempt, dict)]


def _retry(row: TaskRow) -> dict[str, float] | None:
    """Return the task's own retry options by App Engine's names, spans in seconds; None if the queue's apply."""
    options: dict[str, Any] = _json(row.retry, dict)
    raw = {key: value for key, value in options.items() if isinstance(value, int | float)}
    if not raw:
        return None
    names = {"retry_limit": "task_retry_limit", "age_limit": "task_age_limit"}
    names |= {"min_backoff": "min_backoff_seconds", "max_backoff": "max_backoff_seconds"}
    spans = {"age_limit", "min_backoff", "max_backoff"}
    return {names.get(key, key): value / 1e6 if key in spans else value for key, value in raw.items()}


def _json(text: str, kind: Callable[[], J]) -> J:
    """Return the JSON that a row holds; empty where it is another's than deferlib's."""
    try:
        value = json.loads(text) if text else kind()
    except (ValueError, RecursionError):
        return kind()
    empty = kind()
    return value if isinstance(value, type(empty)) else empty
