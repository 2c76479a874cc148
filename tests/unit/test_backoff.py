"""App Engine's retry rules, row by row (its documentation and SDK; see docs)."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib.core.backoff import MIN_WAIT, backoff, may_retry, options_text, policy_of
from deferlib.core.model import HOUR, SECOND, RetryPolicy


def waits(policy: RetryPolicy, count: int) -> list[float]:
    return [backoff(policy, retry, Random(0)) / SECOND for retry in range(1, count + 1)]


def policy(least: float, most: float, doublings: int, **limits: int | None) -> RetryPolicy:
    return RetryPolicy(
        min_backoff=round(least * SECOND), max_backoff=round(most * SECOND), max_doublings=doublings, **limits
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            RetryPolicy(),
            [
                0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 409.6, 819.2, 1638.4, 3276.8,
                3600, 3600,
            ],
            id="defaults",
        ),
        pytest.param(policy(10, 200, 0), [*range(10, 201, 10), 200], id="10-200-0"),
        pytest.param(policy(10, 300, 3), [10, 20, 40, 80, 160, 240, 300, 300], id="10-300-3"),
        pytest.param(policy(10, 200, 3), [10, 20, 40, 80, 160, 200, 200], id="10-200-3"),
        pytest.param(policy(5, 1000, 1), [5, 10, 20, 30, 40, 50], id="5-1000-1"),
        pytest.param(policy(1, 1000, 2), [1, 2, 4, 8, 12, 16, 20, 24], id="1-1000-2"),
        pytest.param(policy(0, 1000, 16), [0.01, 0.01, 0.01], id="0-any: the floor instead of a tight loop"),
    ],
)  # fmt: skip
def test_wait_doubles_then_grows_linearly_up_to_its_maximum(given: RetryPolicy, expected: list[float]) -> None:
    assert waits(given, len(expected)) == expected


@given(
    st.integers(0, HOUR),
    st.integers(0, 24 * HOUR),
    st.integers(0, 2000),
    st.floats(0, 1),
    st.integers(1, 10_000),
    st.integers(),
)
def test_wait_is_bounded_and_never_shrinks(
    least: int, most: int, doublings: int, jitter: float, retry: int, seed: int
) -> None:
    plain = RetryPolicy(min_backoff=min(least, most), max_backoff=most, max_doublings=doublings)
    jittered = RetryPolicy(min_backoff=min(least, most), max_backoff=most, max_doublings=doublings, jitter=jitter)

    wait, later = backoff(plain, retry, Random(seed)), backoff(plain, retry + 1, Random(seed))
    moved = backoff(jittered, retry, Random(seed))

    assert MIN_WAIT <= wait <= later <= max(most, MIN_WAIT)
    assert max(MIN_WAIT, int(wait * (1 - jitter)) - 1) <= moved <= wait


@pytest.mark.parametrize(
    ("retry_limit", "age_limit", "failures", "age", "again"),
    [
        pytest.param(None, None, 10**9, 10**18, True, id="none set: for ever"),
        pytest.param(3, None, 3, 10**18, True, id="limit 3: the 4th attempt"),
        pytest.param(3, None, 4, 0, False, id="limit 3: no 5th"),
        pytest.param(0, None, 1, 0, False, id="limit 0: one attempt"),
        pytest.param(None, 60, 10**9, 60, True, id="age: up to the limit"),
        pytest.param(None, 60, 1, 61, False, id="age: past it"),
        pytest.param(3, 60, 4, 60, True, id="both: retries exceeded alone"),
        pytest.param(3, 60, 3, 61, True, id="both: age exceeded alone"),
        pytest.param(3, 60, 4, 61, False, id="both exceeded"),
    ],
)
def test_limits(retry_limit: int | None, age_limit: int | None, failures: int, age: int, again: bool) -> None:
    limits = RetryPolicy(retry_limit=retry_limit, age_limit=age_limit)

    assert may_retry(limits, failures, age) is again


def test_task_options_replace_the_queue_policy_as_a_whole() -> None:
    queue = RetryPolicy(retry_limit=7, max_doublings=2)

    assert policy_of("", queue) == queue
    assert policy_of(options_text(retry_limit=1), queue) == RetryPolicy(retry_limit=1)


def test_option_of_a_newer_version_is_ignored() -> None:
    assert policy_of('{"retry_limit":1,"from_the_future":2}', RetryPolicy()) == RetryPolicy(retry_limit=1)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"min_backoff": 7200.0}, 2 * HOUR, 2 * HOUR),
        ({"max_backoff": 0.05}, SECOND // 20, SECOND // 20),
        ({"min_backoff": 1.0, "max_backoff": 2.0}, SECOND, 2 * SECOND),
    ],
)
def test_default_that_contradicts_an_option_yields(options: dict[str, float], least: int, most: int) -> None:
    repaired = policy_of(options_text(**options), RetryPolicy())  # type: ignore[arg-type]  # all of them are spans

    assert (repaired.min_backoff, repaired.max_backoff) == (least, most)


def test_first_limit_wins_where_the_queue_says_so() -> None:
    both = RetryPolicy(retry_limit=3, age_limit=10 * SECOND)
    first = both._replace(first_limit_wins=True)

    for failures, age, kept in ((3, 10, True), (4, 10, False), (3, 11, False), (4, 11, False)):
        assert may_retry(first, failures, age * SECOND) is kept
        assert may_retry(both, failures, age * SECOND) is (failures <= 3 or age <= 10)
    own = policy_of(options_text(retry_limit=1, age_limit=1), first)
    assert (own.first_limit_wins, may_retry(own, 2, 0)) == (True, False)
