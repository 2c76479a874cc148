"""A task's own retry options."""

from __future__ import annotations

import math

from deferlib.core.backoff import options_text
from deferlib.errors import InvalidTaskRetryOptionsError

_MOST = 2**31 - 1


def shown(value: object, longest: int = 200) -> str:
    """Return *value* for an error message: whatever it is, and however long."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, or a user's __repr__
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 1] + "…"


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
        if isinstance(max_backoff_seconds, float) and max_backoff_seconds == math.inf:  # no limit: as long as can be kept
            max_backoff_seconds = _MOST
        _check("min_backoff_seconds", min_backoff_seconds)
        _check("max_backoff_seconds", max_backoff_seconds)
        if (
            min_backoff_seconds is not None
            and max_backoff_seconds is not None
            and max_backoff_seconds < min_backoff_seconds
        ):
            raise InvalidTaskRetryOptionsError(
                f"max_backoff_seconds ({max_backoff_seconds}) is smaller than min_backoff_seconds ({min_backoff_seconds})"
            )
        _check("max_doublings", max_doublings)
        _check("task_retry_limit", task_retry_limit)
        _check("task_age_limit", task_age_limit)
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
        return f"TaskRetryOptions({', '.join(f'{name}={getattr(self, name)!r}' for name in fields)})"


def _check(name: str, value: float | None) -> None:
    if value is not None and not _in_range(value):
        raise InvalidTaskRetryOptionsError(f"{name} is {shown(value)}; a number from 0 to {_MOST} is needed")


def _in_range(value: float) -> bool:
    """Tell whether *value* can be an option; TypeError, from the comparison, if it is no number."""
    try:
        return 0 <= value <= _MOST
    except ArithmeticError:  # a signalling NaN
        return False
