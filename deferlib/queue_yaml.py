"""queue.yaml: the queues, as App Engine writes them, with our own keys under `deferlib:`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deferlib.core.backoff import repair
from deferlib.core.model import DAY, HOUR, MINUTE, SECOND, Micros, Mode, QueueConfig, RetryPolicy
from deferlib.errors import InvalidQueueError

MAX_BYTES = 256 * 1024
_NAME = re.compile(r"[a-zA-Z0-9-]{1,100}\Z")
_RATE = re.compile(r"(\d+(?:\.\d*)?)/([smhd])\Z")
_SPAN = re.compile(r"(\d+(?:\.\d*)?)([smhd])\Z")
_UNITS: dict[str, Micros] = {"s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}
_KEYS = frozenset(
    {"name", "mode", "rate", "bucket_size", "max_concurrent_requests", "target", "retry_parameters", "acl", "deferlib"}
)
_RETRY_KEYS = frozenset(
    {"task_retry_limit", "task_age_limit", "min_backoff_seconds", "max_backoff_seconds", "max_doublings"}
)
_OWN_KEYS = frozenset({"tombstone", "deadline", "lost_limit", "jitter"})
_TOP_KEYS = frozenset({"queue", "total_storage_limit", "resume_paused_queues", "application"})


def read(path: Path) -> list[QueueConfig]:
    """Return the queues of the file at *path*; `InvalidQueueError` says where it is wrong and what is allowed."""
    import yaml  # 15 ms: only where there is a file

    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidQueueError(f"{path}: can't be read: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise InvalidQueueError(f"{path}: is larger than {MAX_BYTES // 1024} KiB")
    if b"*" in text and re.search(rb"(?m)(^|[\s\[{,:-])[&*]\w", text):
        raise InvalidQueueError(f"{path}: YAML anchors and aliases aren't allowed; write the queues out")
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidQueueError(f"{path}: is not YAML: {error}") from None
    if raw is None:
        return []
    if not isinstance(raw, dict) or set(raw) - _TOP_KEYS:
        raise InvalidQueueError(f"{path}: the top level is a mapping with `queue:`, a list of queues")
    entries = raw.get("queue") or []
    if not isinstance(entries, list):
        raise InvalidQueueError(f"{path}: `queue:` is a list of queues, each beginning with `- name:`")
    configs = [from_mapping(entry, str(path)) for entry in entries]
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidQueueError(f"{path}: queue {name!r} stands there twice")
    return configs


def from_mapping(raw: object, where: str) -> QueueConfig:
    """Return the queue that *raw*, one entry of a queue.yaml, describes; *where* begins the error messages."""
    if not isinstance(raw, Mapping):
        raise InvalidQueueError(f"{where}: a queue is a mapping with at least `name:`, not {type(raw).__name__}")
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidQueueError(f"{where}: queue name {name!r}: 1 to 100 letters, digits and hyphens are allowed")
    where = f"{where}: queue {name!r}"
    _only(raw, _KEYS, where)
    mode = raw.get("mode", "push")
    if mode not in ("push", "pull"):
        raise InvalidQueueError(f"{where}: mode {mode!r}: push or pull is allowed")
    own = raw.get("deferlib") or {}
    _only(own, _OWN_KEYS, f"{where}: deferlib")
    return QueueConfig(
        name=name,
        mode=Mode(mode),
        rate=_rate(raw.get("rate"), where),
        bucket_size=_count(raw.get("bucket_size", 5), f"{where}: bucket_size", least=1),
        max_concurrent=_optional_count(raw.get("max_concurrent_requests"), f"{where}: max_concurrent_requests", least=1),
        target=str(raw.get("target") or ""),
        retry=replace(
            _retry(raw.get("retry_parameters") or {}, f"{where}: retry_parameters"),
            jitter=_share(own.get("jitter", 0), f"{where}: deferlib: jitter"),
        ),
        tombstone=_span(own.get("tombstone", "9d"), f"{where}: deferlib: tombstone"),
        deadline=_span(own.get("deadline", "10m"), f"{where}: deferlib: deadline"),
        lost_limit=_count(own.get("lost_limit", 3), f"{where}: deferlib: lost_limit", least=1),
    )


def _retry(raw: object, where: str) -> RetryPolicy:
    _only(raw, _RETRY_KEYS, where)
    assert isinstance(raw, Mapping)
    fields: dict[str, Any] = {}
    if raw.get("task_retry_limit") is not None:
        fields["retry_limit"] = _count(raw["task_retry_limit"], f"{where}: task_retry_limit", least=0)
    if raw.get("max_doublings") is not None:
        fields["max_doublings"] = _count(raw["max_doublings"], f"{where}: max_doublings", least=0)
    if raw.get("task_age_limit") is not None:
        fields["age_limit"] = _span(raw["task_age_limit"], f"{where}: task_age_limit")
    for key, field in (("min_backoff_seconds", "min_backoff"), ("max_backoff_seconds", "max_backoff")):
        if raw.get(key) is not None:
            fields[field] = _seconds(raw[key], f"{where}: {key}")
    least, most = fields.get("min_backoff"), fields.get("max_backoff")
    if least is not None and most is not None and least > most:
        raise InvalidQueueError(f"{where}: min_backoff_seconds is larger than max_backoff_seconds")
    return repair(RetryPolicy(), fields)


def _only(raw: object, allowed: frozenset[str], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise InvalidQueueError(f"{where}: is a mapping of {', '.join(sorted(allowed))}")
    for key in raw:
        if key not in allowed:
            raise InvalidQueueError(f"{where}: unknown key {key!r}; allowed are {', '.join(sorted(allowed))}")


def _rate(raw: object, where: str) -> float | None:
    if raw is None:
        return None
    if raw == 0 or raw == "0":
        return 0.0
    match = _RATE.match(str(raw))
    if match is None:
        raise InvalidQueueError(f"{where}: rate {raw!r}: a number and a unit are needed, like 5/s, 1.5/m, 20/h or 1/d")
    return float(match[1]) * SECOND / _UNITS[match[2]]


def _span(raw: object, where: str) -> Micros:
    match = _SPAN.match(raw) if isinstance(raw, str) else None
    if match is None or float(match[1]) <= 0:
        raise InvalidQueueError(f"{where}: {raw!r}: a number and a unit are needed, like 30s, 10m, 2h or 9d")
    return round(float(match[1]) * _UNITS[match[2]])


def _seconds(raw: object, where: str) -> Micros:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw) or raw < 0:
        raise InvalidQueueError(f"{where}: {raw!r}: a number of seconds from 0 is needed")
    return round(raw * SECOND)


def _share(raw: object, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= 1:
        raise InvalidQueueError(f"{where}: {raw!r}: a number from 0 to 1 is needed")
    return float(raw)


def _count(raw: object, where: str, *, least: int) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < least:
        raise InvalidQueueError(f"{where}: {raw!r}: a whole number from {least} is needed")
    return raw


def _optional_count(raw: object, where: str, *, least: int) -> int | None:
    return None if raw is None else _count(raw, where, least=least)
