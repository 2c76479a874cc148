"""The limits profile: how large, how many, how long. App Engine's limits by default, each of which can be lifted.

The setting `limits` names a profile (`appengine` or `deferlib`), and any limits that differ from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from deferlib.errors import ConfigError

DAY = 86_400
MIB = 1024 * 1024


class Limits(NamedTuple):
    """The limits in force. `TABLE` says what each one is; times are in seconds, sizes in bytes."""

    push_task_bytes: int
    pull_task_bytes: int
    call_bytes: int
    tasks_per_add: int
    tasks_per_lease: int
    eta_seconds: int
    lease_seconds: int
    min_deadline_seconds: float
    max_deadline_seconds: float
    url_length: int
    sent_url_bytes: int
    tag_length: int
    task_name_length: int
    queue_name_length: int

    def __str__(self) -> str:
        """Return the shortest text of the setting that means these limits."""
        texts = []
        for name, profile in PROFILES.items():
            other = [f"{key}={value}" for key, value in self._asdict().items() if value != getattr(profile, key)]
            texts.append(",".join([name, *other]))
        return min(texts, key=len)


class Limit(NamedTuple):
    """What one limit is, and how far it can be moved."""

    what: str
    appengine: float
    deferlib: float
    least: float
    most: float


TABLE: Mapping[str, Limit] = {
    "push_task_bytes": Limit(
        "size of a push task: method, URL, headers and payload", 100 * 1024, 32 * MIB, 1024, 256 * MIB
    ),
    "pull_task_bytes": Limit("size of a pull task: method and payload", MIB, 32 * MIB, 1024, 256 * MIB),
    "call_bytes": Limit("size of a deferred call, pickled", 32 * MIB, 32 * MIB, 1024, 256 * MIB),
    "tasks_per_add": Limit("tasks in one `add`", 100, 10_000, 1, 100_000),
    "tasks_per_lease": Limit("tasks in one lease", 1_000, 10_000, 1, 100_000),
    "eta_seconds": Limit("how far ahead an ETA may be", 30 * DAY, 3_650 * DAY, 1, 36_500 * DAY),
    "lease_seconds": Limit("how long a lease may last", 7 * DAY, 365 * DAY, 1, 3_650 * DAY),
    "min_deadline_seconds": Limit("shortest dispatch deadline", 15, 1, 0.001, DAY),
    "max_deadline_seconds": Limit("longest dispatch deadline", DAY, 7 * DAY, 0.001, 30 * DAY),
    "url_length": Limit("characters of a task's path, query excluded", 2_083, 4_000, 1, 4_000),
    "sent_url_bytes": Limit(
        "bytes of path and query as they are sent; what is over 4,000 only warns, because many servers refuse it",
        256 * MIB, 4_000, 1_000, 256 * MIB,
    ),
    "tag_length": Limit("characters of a pull task's tag", 500, 500, 1, 10_000),
    "task_name_length": Limit("characters of a task's name", 500, 500, 1, 2_000),
    "queue_name_length": Limit("characters of a queue's name", 100, 100, 100, 500),
}  # fmt: skip

PROFILES: Mapping[str, Limits] = {
    "appengine": Limits(**{name: limit.appengine for name, limit in TABLE.items()}),  # type: ignore[arg-type]  # whole numbers where the fields are
    "deferlib": Limits(**{name: limit.deferlib for name, limit in TABLE.items()}),  # type: ignore[arg-type]
}
DEFAULT = PROFILES["appengine"]
_FRACTIONS = frozenset({"min_deadline_seconds", "max_deadline_seconds"})


def parse(value: object) -> Limits:
    """Return the limits that the setting *value* means; `ConfigError` says which part of it is wrong.

    >>> parse("deferlib,tag_length=100").tag_length
    100
    """
    if isinstance(value, Limits):
        return value
    if isinstance(value, str):
        profile, given = _parts(value)
    elif isinstance(value, Mapping):
        given = dict(value)
        profile = given.pop("profile", "appengine")
    else:
        raise ConfigError(f"{value!r} is no profile and no table of limits")
    if not isinstance(profile, str) or profile not in PROFILES:
        raise ConfigError(f"profile {profile!r}: {' or '.join(PROFILES)} is allowed, then NAME=NUMBER")
    for name in given:
        if name not in TABLE:
            raise ConfigError(f"there is no limit {name!r}; limits are {', '.join(TABLE)}")
    limits = PROFILES[profile]._replace(**{name: _number(name, number) for name, number in given.items()})  # type: ignore[arg-type]  # whole numbers where the fields are
    if limits.min_deadline_seconds > limits.max_deadline_seconds:
        raise ConfigError("min_deadline_seconds is above max_deadline_seconds")
    return limits


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """Return the profile and the other limits of a text like ``deferlib,tag_length=100``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    profile = parts.pop(0) if parts and "=" not in parts[0] else "appengine"
    given: dict[str, str] = {}
    for part in parts:
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name in given:
            raise ConfigError(f"{name} is given twice")
        given[name] = number
    return profile, given


def _number(name: str, value: object) -> float:
    limit = TABLE[name]
    kind = float if name in _FRACTIONS else int
    problem = ConfigError(f"{name}={value!s:.40}: a number from {limit.least:g} to {limit.most:,} is needed")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise problem
    try:
        number = kind(value)
        exact = isinstance(value, str) or number == value
    except (ValueError, OverflowError):
        raise problem from None
    if not exact or not limit.least <= number <= limit.most:
        raise problem
    return number
