"""queue.yaml: the queues, as App Engine writes them, with our own keys under `deferlib:`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deferlib.core.backoff import repair
from deferlib.core.model import DAY, HOUR, MINUTE, SECOND, Micros, Mode, QueueConfig, RetryPolicy
from deferlib.errors import InvalidQueueError
from deferlib.limits import Limits

MAX_BYTES = 256 * 1024
TARGET = re.compile(r"[a-z0-9][a-z0-9.-]*\Z")  # a target's name, here and in the setting `targets`
_NAME = re.compile(r"[a-zA-Z0-9-]{1,500}\Z")  # as the limits allow them at most; `check` has those in force
_RATE = re.compile(r"([0-9]+(?:\.[0-9]*)?)/([smhd])\Z")
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]*)?)([smhd])\Z")
_UNITS: dict[str, Micros] = {"s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}

# What keeps every product of these below 2**63 microseconds, wherever a store or a scheduler multiplies or adds them.
_SLOWEST, _FASTEST = 0.01 * SECOND / DAY, 1e6  # dispatches per second
_LARGEST_BUCKET = 1_000_000
_LARGEST_COUNT = 2**31 - 1
_LONGEST: Micros = 3_650 * DAY

_TOP_KEYS = frozenset({"queue", "total_storage_limit", "resume_paused_queues", "application"})
_KEYS = frozenset(
    {"name", "mode", "rate", "bucket_size", "max_concurrent_requests", "target", "retry_parameters", "acl", "deferlib"}
)
_RETRY_KEYS = frozenset(
    {"task_retry_limit", "task_age_limit", "min_backoff_seconds", "max_backoff_seconds", "max_doublings"}
)
_OWN_KEYS = frozenset({"tombstone", "deadline", "lost_limit", "jitter"})


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[QueueConfig]:
    """Return the queues of the file at *path*; `InvalidQueueError` says where it is wrong and what is allowed."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidQueueError(f"{path}: can't be read: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise InvalidQueueError(f"{path}: is larger than {MAX_BYTES // 1024} KiB")
    raw = _mapping(_load(text, str(path)), _TOP_KEYS, str(path))
    entries = raw.get("queue")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise InvalidQueueError(f"{path}: `queue:` is a list of queues, each beginning with `- name:`")
    configs = [from_mapping(entry, str(path)) for entry in entries]
    refuse_twins(configs, str(path))
    return configs


def refuse_twins(configs: Sequence[QueueConfig], where: str) -> None:
    """Raise `InvalidQueueError` if two of *configs* have the same name."""
    names = set()
    for config in configs:
        if config.name in names:
            raise InvalidQueueError(f"{where}: queue {config.name!r} stands there twice")
        names.add(config.name)


def check(configs: Sequence[QueueConfig], limits: Limits, where: str) -> None:
    """Raise `InvalidQueueError` if one of *configs* is beyond the limits in force."""
    least, most = limits.min_deadline_seconds, limits.max_deadline_seconds
    for config in configs:
        if len(config.name) > limits.queue_name_length:
            raise InvalidQueueError(
                f"{where}: queue {config.name!r}: its name has {len(config.name)} characters, at most "
                f"{limits.queue_name_length} are allowed"
            )
        if not least * SECOND <= config.deadline <= most * SECOND:
            raise InvalidQueueError(
                f"{where}: queue {config.name!r}: deferlib: deadline: {config.deadline / SECOND:g} s: {least:g} s to "
                f"{most:g} s are allowed; the setting `limits` can change that"
            )


def _load(text: bytes, where: str) -> object:
    """Parse YAML without what a list of queues never needs: anchors, aliases, tags, and the same key twice."""
    import yaml  # 15 ms: only where there is a file

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves it out
            # An alias that repeats its anchor nine times, nine levels deep, is a gigabyte ("billion laughs").
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                raise yaml.MarkedYAMLError(None, None, "anchors and aliases aren't allowed", event.start_mark)
            if event.tag is not None:
                raise yaml.MarkedYAMLError(None, None, "tags (!) aren't allowed", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = set()
            for key, _value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise yaml.MarkedYAMLError(None, None, f"{key.value!r} stands there twice", key.start_mark)
                    keys.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise InvalidQueueError(f"{where}: is not the YAML of a queue.yaml: {error.problem}{place}") from None
    except yaml.YAMLError as error:
        raise InvalidQueueError(f"{where}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InvalidQueueError(f"{where}: is not the YAML of a queue.yaml: it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise InvalidQueueError(f"{where}: is not YAML: {error}") from None


# --- one queue --------------------------------------------------------------------------------------------------------


def from_mapping(raw: object, where: str) -> QueueConfig:
    """Return the queue that *raw*, one entry of a queue.yaml, describes; *where* begins the error messages."""
    if not isinstance(raw, Mapping):
        raise InvalidQueueError(f"{where}: a queue is a mapping with at least `name:`, not {type(raw).__name__}")
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidQueueError(f"{where}: queue name {_shown(name)}: 1 to 100 letters, digits and hyphens are allowed")
    where = f"{where}: queue {name!r}"
    _mapping(raw, _KEYS, where)
    own = _mapping(raw.get("deferlib"), _OWN_KEYS, f"{where}: deferlib")
    return QueueConfig(
        name=name,
        mode=_mode(raw.get("mode", "push"), where),
        rate=_rate(raw.get("rate"), f"{where}: rate"),
        bucket_size=_count(raw.get("bucket_size", 5), f"{where}: bucket_size", least=1, most=_LARGEST_BUCKET),
        max_concurrent=_optional_count(raw.get("max_concurrent_requests"), f"{where}: max_concurrent_requests", least=1),
        target=_target(raw.get("target"), f"{where}: target"),
        retry=_retry(_mapping(raw.get("retry_parameters"), _RETRY_KEYS, f"{where}: retry_parameters"), where)._replace(
            jitter=_share(own.get("jitter", 0), f"{where}: deferlib: jitter")
        ),
        tombstone=_span(own.get("tombstone", "9d"), f"{where}: deferlib: tombstone"),
        deadline=_span(own.get("deadline", "10m"), f"{where}: deferlib: deadline", most=30 * DAY),
        lost_limit=_count(own.get("lost_limit", 3), f"{where}: deferlib: lost_limit", least=1),
    )


def _retry(raw: Mapping[str, Any], where: str) -> RetryPolicy:
    where = f"{where}: retry_parameters"
    fields: dict[str, Any] = {}
    for key, field in (("task_retry_limit", "retry_limit"), ("max_doublings", "max_doublings")):
        if raw.get(key) is not None:
            fields[field] = _count(raw[key], f"{where}: {key}", least=0)
    if raw.get("task_age_limit") is not None:
        fields["age_limit"] = _span(raw["task_age_limit"], f"{where}: task_age_limit")
    for key, field in (("min_backoff_seconds", "min_backoff"), ("max_backoff_seconds", "max_backoff")):
        if raw.get(key) is not None:
            fields[field] = _seconds(raw[key], f"{where}: {key}")
    least, most = fields.get("min_backoff"), fields.get("max_backoff")
    if least is not None and most is not None and least > most:
        raise InvalidQueueError(f"{where}: min_backoff_seconds is larger than max_backoff_seconds")
    return repair(RetryPolicy(), fields)


# --- one value: each returns it or says what is allowed ---------------------------------------------------------------


def _mapping(raw: object, allowed: frozenset[str], where: str) -> Mapping[str, Any]:
    """Return *raw*, a mapping of nothing but *allowed* keys; nothing written is an empty one."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InvalidQueueError(f"{where}: is a mapping of {', '.join(sorted(allowed))}")
    for key in raw:
        if key not in allowed:
            raise InvalidQueueError(f"{where}: unknown key {_shown(key)}; allowed are {', '.join(sorted(allowed))}")
    return raw


def _mode(raw: object, where: str) -> Mode:
    if raw not in ("push", "pull"):
        raise InvalidQueueError(f"{where}: mode {_shown(raw)}: push or pull is allowed")
    return Mode(raw)


def _target(raw: object, where: str) -> str:
    text = str(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw  # a version: `target: 2`
    if text is None:
        return ""
    if not isinstance(text, str) or not TARGET.match(text):
        raise InvalidQueueError(f"{where}: {_shown(raw)}: lower-case letters, digits, dots and hyphens are allowed")
    return text


def _rate(raw: object, where: str) -> float | None:
    if raw is None:
        return None
    text = f"{raw}/s" if raw == "0" or (raw == 0 and not isinstance(raw, bool)) else raw
    match = _RATE.match(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidQueueError(f"{where} {_shown(raw)}: a number and a unit are needed, like 5/s, 1.5/m, 20/h or 1/d")
    rate = float(match[1]) * SECOND / _UNITS[match[2]]
    if rate and not _SLOWEST <= rate <= _FASTEST:
        raise InvalidQueueError(f"{where} {_shown(raw)}: 0, to pause, or from 0.01/d to 1000000/s is allowed")
    return rate


def _span(raw: object, where: str, *, most: Micros = _LONGEST) -> Micros:
    match = _SPAN.match(raw) if isinstance(raw, str) else None
    if match is None:
        raise InvalidQueueError(f"{where}: {_shown(raw)}: a number and a unit are needed, like 30s, 10m, 2h or 9d")
    span = float(match[1]) * _UNITS[match[2]]
    if not 1 <= span <= most:
        raise InvalidQueueError(f"{where}: {_shown(raw)}: more than 0s and at most {most // DAY}d is allowed")
    return round(span)


def _seconds(raw: object, where: str) -> Micros:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= _LONGEST // SECOND:
        raise InvalidQueueError(f"{where}: {_shown(raw)}: a number of seconds from 0 to {_LONGEST // SECOND} is needed")
    return round(raw * SECOND)


def _share(raw: object, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= 1:
        raise InvalidQueueError(f"{where}: {_shown(raw)}: a number from 0 to 1 is needed")
    return float(raw)


def _count(raw: object, where: str, *, least: int, most: int = _LARGEST_COUNT) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not least <= raw <= most:
        raise InvalidQueueError(f"{where}: {_shown(raw)}: a whole number from {least} to {most} is needed")
    return raw


def _optional_count(raw: object, where: str, *, least: int) -> int | None:
    return None if raw is None else _count(raw, where, least=least)


def _shown(raw: object) -> str:
    """Return *raw* as it stands in the file, nearly, and not all of it if it is long."""
    try:
        text = repr(raw)
    except ValueError:  # an int of more than 4,300 digits
        text = "a number"
    return text if len(text) <= 80 else text[:79] + "…"
