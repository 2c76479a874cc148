"""One queue of a queue.yaml: what each key may be, and what it means; App Engine's keys, and our own under `deferlib:`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deferlib import targets
from deferlib.core.backoff import repair
from deferlib.core.model import DAY, HOUR, MINUTE, SECOND, Micros, Mode, QueueConfig, RetryPolicy
from deferlib.errors import InvalidQueueError
from deferlib.limits import Limits

_NAME = re.compile(r"[a-zA-Z0-9-]{1,500}\Z")  # as the limits allow them at most; `check` has those in force
_RATE = re.compile(r"([0-9]+(?:\.[0-9]*)?)/([smhd])\Z")
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]*)?)([smhd])\Z")
_STORAGE = re.compile(r"([0-9]+|[0-9]*\.?[0-9]+[BKMGT]|[0-9]+\.[BKMGT]|[0-9]+[BKMGT])\Z")
_UNITS: dict[str, Micros] = {"s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}

# What keeps every product of these below 2**63 microseconds, wherever a store or a scheduler multiplies or adds them.
_SLOWEST, _FASTEST = 0.01 * SECOND / DAY, 1e6  # dispatches per second
_LARGEST_BUCKET = 1_000_000
_LARGEST_COUNT = 2**31 - 1
_LONGEST: Micros = 3_650 * DAY

TOP_KEYS = frozenset({"queue", "total_storage_limit", "resume_paused_queues", "application"})
KEYS = frozenset(
    {"name", "mode", "rate", "bucket_size", "max_concurrent_requests", "target", "retry_parameters", "acl", "deferlib"}
)
RETRY_KEYS = frozenset(
    {"task_retry_limit", "task_age_limit", "min_backoff_seconds", "max_backoff_seconds", "max_doublings"}
)
OWN_KEYS = frozenset({"tombstone", "deadline", "lost_limit", "jitter", "first_limit_wins"})
_ACL_KEYS = frozenset({"user_email", "writer_email"})


# --- where a value stands ---------------------------------------------------------------------------------------------


class Marked(dict[Any, Any]):
    """A mapping of a file that knows where it stands, and where each of its values does: line and column, from 1."""

    mark: tuple[int, int] | None
    marks: Mapping[Any, tuple[int, int]]


class Place:
    """Where a value stands, for an error message: `queue.yaml:4:9: queue 'mail': rate`."""

    __slots__ = ("_file", "_mark", "_what")

    def __init__(self, file: str, mark: tuple[int, int] | None = None, what: str = "") -> None:
        self._file = file
        self._mark = mark
        self._what = what

    def of(self, raw: object) -> Place:
        """Return the place of the mapping *raw* itself."""
        return Place(self._file, getattr(raw, "mark", self._mark), self._what)

    def at(self, raw: object, key: object, what: str | None = None) -> Place:
        """Return the place of one of the mapping's values, called *what* or as its key is."""
        mark = getattr(raw, "marks", {}).get(key, self._mark)
        name = str(key) if what is None else what
        return Place(self._file, mark, f"{self._what}: {name}" if self._what and name else self._what or name)

    def __str__(self) -> str:
        file = self._file if self._mark is None else f"{self._file}:{self._mark[0]}:{self._mark[1]}"
        return f"{file}: {self._what}" if self._what else file


# --- one queue --------------------------------------------------------------------------------------------------------


def from_mapping(raw: object, place: Place) -> QueueConfig:
    """Return the queue that *raw*, one entry of a queue.yaml, describes; *place* begins the error messages."""
    place = place.of(raw)
    if not isinstance(raw, Mapping):
        raise InvalidQueueError(f"{place}: a queue is a mapping with at least `name:`, not {type(raw).__name__}")
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidQueueError(
            f"{place.at(raw, 'name', '')}: queue name {shown(name)}: 1 to 100 letters, digits and hyphens are allowed"
        )
    place = place.at(None, None, f"queue {name!r}")
    mapping(raw, KEYS, place)
    own = _own(raw, place)
    at_own = place.at(raw, "deferlib")
    _acl(raw.get("acl"), place.at(raw, "acl"))
    retry = mapping(raw.get("retry_parameters"), RETRY_KEYS, place.at(raw, "retry_parameters"))
    return QueueConfig(
        name=name,
        mode=_mode(raw.get("mode", "push"), place.at(raw, "mode")),
        rate=_rate(raw.get("rate"), place.at(raw, "rate")),
        bucket_size=_count(raw.get("bucket_size", 5), place.at(raw, "bucket_size"), least=1, most=_LARGEST_BUCKET),
        max_concurrent=_optional_count(
            raw.get("max_concurrent_requests"), place.at(raw, "max_concurrent_requests"), least=1
        ),
        target=_target(raw.get("target"), place.at(raw, "target")),
        retry=_retry(retry, place.at(raw, "retry_parameters"))._replace(
            jitter=_share(own.get("jitter", 0), at_own.at(own, "jitter")),
            first_limit_wins=_yes(own.get("first_limit_wins", False), at_own.at(own, "first_limit_wins")),
        ),
        tombstone=_span(own.get("tombstone", "9d"), at_own.at(own, "tombstone")),
        deadline=_span(own.get("deadline", "10m"), at_own.at(own, "deadline"), most=30 * DAY),
        lost_limit=_count(own.get("lost_limit", 3), at_own.at(own, "lost_limit"), least=1),
    )


def _own(raw: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Return the map `deferlib:`, in which hyphens may stand for underscores."""
    given = raw.get("deferlib")
    if isinstance(given, Mapping) and any(isinstance(key, str) and "-" in key for key in given):
        spelled = Marked({_spelled(key): value for key, value in given.items()})
        spelled.mark = getattr(given, "mark", None)
        spelled.marks = {_spelled(key): mark for key, mark in getattr(given, "marks", {}).items()}
        if len(spelled) < len(given):
            raise InvalidQueueError(f"{place.at(raw, 'deferlib')}: the same key stands there twice")
        given = spelled
    return mapping(given, OWN_KEYS, place.at(raw, "deferlib"))


def _spelled(key: object) -> object:
    return key.replace("-", "_") if isinstance(key, str) else key


def _retry(raw: Mapping[str, Any], place: Place) -> RetryPolicy:
    fields: dict[str, Any] = {}
    for key, field in (("task_retry_limit", "retry_limit"), ("max_doublings", "max_doublings")):
        if raw.get(key) is not None:
            fields[field] = _count(raw[key], place.at(raw, key), least=0)
    if raw.get("task_age_limit") is not None:
        fields["age_limit"] = _span(raw["task_age_limit"], place.at(raw, "task_age_limit"))
    for key, field in (("min_backoff_seconds", "min_backoff"), ("max_backoff_seconds", "max_backoff")):
        if raw.get(key) is not None:
            fields[field] = _seconds(raw[key], place.at(raw, key))
    least, most = fields.get("min_backoff"), fields.get("max_backoff")
    if least is not None and most is not None and least > most:
        raise InvalidQueueError(
            f"{place.at(raw, 'min_backoff_seconds', '')}: min_backoff_seconds is larger than max_backoff_seconds"
        )
    return repair(RetryPolicy(), fields)


# --- several ----------------------------------------------------------------------------------------------------------


def refuse_twins(configs: Sequence[QueueConfig], places: Sequence[Place]) -> None:
    """Raise `InvalidQueueError` if two of *configs* have the same name."""
    names = set()
    for config, place in zip(configs, places, strict=True):
        if config.name in names:
            raise InvalidQueueError(f"{place}: queue {config.name!r} stands there twice")
        names.add(config.name)


def check(config: QueueConfig, limits: Limits, place: Place) -> None:
    """Raise `InvalidQueueError` if *config* is beyond the limits in force."""
    least, most = limits.min_deadline_seconds, limits.max_deadline_seconds
    if len(config.name) > limits.queue_name_length:
        raise InvalidQueueError(
            f"{place}: queue {config.name!r}: its name has {len(config.name)} characters, at most "
            f"{limits.queue_name_length} are allowed"
        )
    if not least * SECOND <= config.deadline <= most * SECOND:
        raise InvalidQueueError(
            f"{place}: queue {config.name!r}: deferlib: deadline: {config.deadline / SECOND:g} s: {least:g} s to "
            f"{most:g} s are allowed; the setting `limits` can change that"
        )


# --- one value: each returns it or says what is allowed ---------------------------------------------------------------


def mapping(raw: object, allowed: frozenset[str], place: Place) -> Mapping[str, Any]:
    """Return *raw*, a mapping of nothing but *allowed* keys; nothing written is an empty one."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InvalidQueueError(f"{place}: is a mapping of {', '.join(sorted(allowed))}")
    for key in raw:
        if key not in allowed:
            raise InvalidQueueError(
                f"{place.at(raw, key, '')}: unknown key {shown(key)}; allowed are {', '.join(sorted(allowed))}"
            )
    return raw


def _mode(raw: object, place: Place) -> Mode:
    if raw not in ("push", "pull"):
        raise InvalidQueueError(f"{place} {shown(raw)}: push or pull is allowed")
    return Mode(raw)


def _target(raw: object, place: Place) -> str:
    text = str(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw  # a version: `target: 2`
    if text is None:
        return ""
    if not isinstance(text, str) or not targets.NAME.match(text):
        raise InvalidQueueError(f"{place}: {shown(raw)}: lower-case letters, digits, dots and hyphens are allowed")
    return text


def _rate(raw: object, place: Place) -> float | None:
    if raw is None:
        return None
    text = f"{raw}/s" if raw == "0" or (raw == 0 and not isinstance(raw, bool)) else raw
    match = _RATE.match(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidQueueError(f"{place} {shown(raw)}: a number and a unit are needed, like 5/s, 1.5/m, 20/h or 1/d")
    rate = float(match[1]) * SECOND / _UNITS[match[2]]
    if rate and not _SLOWEST <= rate <= _FASTEST:
        raise InvalidQueueError(f"{place} {shown(raw)}: 0, to pause, or from 0.01/d to 1000000/s is allowed")
    return rate


def _span(raw: object, place: Place, *, most: Micros = _LONGEST) -> Micros:
    match = _SPAN.match(raw) if isinstance(raw, str) else None
    if match is None:
        raise InvalidQueueError(f"{place}: {shown(raw)}: a number and a unit are needed, like 30s, 10m, 2h or 9d")
    span = float(match[1]) * _UNITS[match[2]]
    if not 1 <= span <= most:
        raise InvalidQueueError(f"{place}: {shown(raw)}: more than 0s and at most {most // DAY}d is allowed")
    return round(span)


def _seconds(raw: object, place: Place) -> Micros:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= _LONGEST // SECOND:
        raise InvalidQueueError(f"{place}: {shown(raw)}: a number of seconds from 0 to {_LONGEST // SECOND} is needed")
    return round(raw * SECOND)


def _share(raw: object, place: Place) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= 1:
        raise InvalidQueueError(f"{place}: {shown(raw)}: a number from 0 to 1 is needed")
    return float(raw)


def _count(raw: object, place: Place, *, least: int, most: int = _LARGEST_COUNT) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not least <= raw <= most:
        raise InvalidQueueError(f"{place}: {shown(raw)}: a whole number from {least} to {most} is needed")
    return raw


def _optional_count(raw: object, place: Place, *, least: int) -> int | None:
    return None if raw is None else _count(raw, place, least=least)


def shown(raw: object) -> str:
    """Return *raw* as it stands in the file, nearly, and not all of it if it is long."""
    try:
        text = repr(raw)
    except ValueError:  # an int of more than 4,300 digits
        text = "a number"
    return text if len(text) <= 80 else text[:79] + "…"


def storage_limit(raw: object, place: Place) -> None:
    """Check App Engine's quota of storage, which isn't enforced."""
    if isinstance(raw, bool) or not isinstance(raw, int | str) or not _STORAGE.match(str(raw)):
        raise InvalidQueueError(f"{place}: {shown(raw)}: a number is needed, with B, K, M, G or T behind it, like 500M")


def yes_or_no(raw: object, place: Place) -> bool:
    """Return a value that is true or false."""
    return _yes(raw, place)


def _yes(raw: object, place: Place) -> bool:
    if not isinstance(raw, bool):
        raise InvalidQueueError(f"{place}: {shown(raw)}: true or false is needed")
    return raw


def _acl(raw: object, place: Place) -> None:
    """Check App Engine's access list of a pull queue, which isn't enforced."""
    if raw is None:
        return
    entries = raw if isinstance(raw, list) else [None]
    for entry in entries:
        if not isinstance(entry, Mapping) or not entry or not _ACL_KEYS.issuperset(entry):
            raise InvalidQueueError(f"{place}: a list of `- user_email:` and `- writer_email:` is needed")


# --- the way back -----------------------------------------------------------------------------------------------------

ALL_KEYS = (
    "mode", "rate", "bucket_size", "max_concurrent_requests", "target",
    "retry_parameters.task_retry_limit", "retry_parameters.task_age_limit", "retry_parameters.min_backoff_seconds",
    "retry_parameters.max_backoff_seconds", "retry_parameters.max_doublings",
    "deferlib.first_limit_wins", "deferlib.jitter", "deferlib.deadline", "deferlib.tombstone", "deferlib.lost_limit",
)  # fmt: skip


def values_of(config: QueueConfig) -> dict[str, Any]:
    """Return every value of *config* by its key in a queue.yaml, as it would be written there; None: not limited."""
    retry = config.retry
    values = (
        str(config.mode),
        _rate_text(config.rate),
        config.bucket_size,
        config.max_concurrent,
        config.target or None,
        retry.retry_limit,
        None if retry.age_limit is None else _span_text(retry.age_limit),
        retry.min_backoff / SECOND,
        retry.max_backoff / SECOND,
        retry.max_doublings,
        retry.first_limit_wins,
        retry.jitter,
        _span_text(config.deadline),
        _span_text(config.tombstone),
        config.lost_limit,
    )
    return dict(zip(ALL_KEYS, values, strict=True))


def to_mapping(config: QueueConfig) -> dict[str, Any]:
    """Return *config* as an entry of a queue.yaml, without what is a default anyway."""
    usual = values_of(QueueConfig(name=config.name))
    entry: dict[str, Any] = {"name": config.name}
    for key, value in values_of(config).items():
        if value != usual[key]:
            outer, _, inner = key.rpartition(".")
            (entry.setdefault(outer, {}) if outer else entry)[inner] = value
    return entry


def _rate_text(rate: float | None) -> str | None:
    """Return a rate with the largest unit in which it is exact."""
    if rate is None:
        return None
    for unit, length in _UNITS.items():
        for digits in (15, 16, 17):
            number = f"{rate * length / SECOND:.{digits}g}"
            if "e" not in number and float(number) * SECOND / length == rate and (float(number) >= 1 or rate == 0):
                return f"{number}/{unit}"
    return f"{rate * DAY / SECOND:.20f}/d"


def _span_text(span: Micros) -> str:
    for unit in ("d", "h", "m"):
        if span % _UNITS[unit] == 0:
            return f"{span // _UNITS[unit]}{unit}"
    return f"{span / SECOND:.6f}".rstrip("0").rstrip(".") + "s"
