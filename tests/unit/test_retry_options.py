"""A task's own retry options: what is accepted, and what each refusal says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

import deferlib
from deferlib import config
from deferlib.taskqueue import InvalidTaskRetryOptionsError, Task, TaskRetryOptions


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:")
    yield
    config.install(former)


def text_of(options: TaskRetryOptions) -> str:
    return Task(retry_options=options)._row("default", config.runtime().ring).retry


def test_retry_options_are_kept_and_shown() -> None:
    options = TaskRetryOptions(min_backoff_seconds=0.5, max_backoff_seconds=9, task_age_limit=59.2, task_retry_limit=3)

    assert (options.min_backoff_seconds, options.max_backoff_seconds, options.task_age_limit) == (0.5, 9, 60)
    assert (options.task_retry_limit, options.max_doublings) == (3, None)
    assert repr(options) == (
        "TaskRetryOptions(min_backoff_seconds=0.5, max_backoff_seconds=9, task_age_limit=60, max_doublings=None, "
        "task_retry_limit=3)"
    )
    assert TaskRetryOptions(max_doublings=0).max_doublings == 0


def test_options_that_set_nothing_leave_the_queues() -> None:
    assert text_of(TaskRetryOptions()) == ""
    assert text_of(TaskRetryOptions(task_retry_limit=0)) != ""


@pytest.mark.parametrize(
    "name", ["min_backoff_seconds", "max_backoff_seconds", "task_age_limit", "max_doublings", "task_retry_limit"]
)
@pytest.mark.parametrize(
    "value", [-1, -0.1, math.nan, math.inf, 2**31, 10**400, Decimal("sNaN"), Decimal(-1), Fraction(-1, 9)]
)
def test_retry_option_out_of_range_is_refused(name: str, value: Any) -> None:
    if name == "max_backoff_seconds" and isinstance(value, float) and value == math.inf:  # no limit
        assert TaskRetryOptions(max_backoff_seconds=value).max_backoff_seconds == 2**31 - 1
        return
    with pytest.raises(InvalidTaskRetryOptionsError, match=name):
        TaskRetryOptions(**{name: value})


def test_longest_wait_is_not_below_the_shortest() -> None:
    assert TaskRetryOptions(min_backoff_seconds=2, max_backoff_seconds=2)
    with pytest.raises(InvalidTaskRetryOptionsError, match="smaller than"):
        TaskRetryOptions(min_backoff_seconds=2, max_backoff_seconds=1)


def test_unknown_retry_option_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        TaskRetryOptions(tries=3)  # type: ignore[call-arg]  # what is tested
    with pytest.raises(TypeError):
        TaskRetryOptions(min_backoff_seconds="soon")  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("value", [Decimal("1.5"), Fraction(3, 2), True])
def test_any_kind_of_number_is_one(value: Any) -> None:
    assert text_of(TaskRetryOptions(min_backoff_seconds=value, task_age_limit=value, max_doublings=value))


@pytest.mark.parametrize("value", ["5", [1], {}, 1j, object()])
def test_what_is_no_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        TaskRetryOptions(task_retry_limit=value)
