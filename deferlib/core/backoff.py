"""When to try a failed task again, and when to give it up: App Engine's rules."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from deferlib.core.model import SECOND, Micros, RetryPolicy

MIN_WAIT: Micros = 10_000  # the floor under any backoff: a policy of 0 must not spin
_MAX_EXPONENT = 1023


def backoff(policy: RetryPolicy, retry: int, rng: Random) -> Micros:
    """Return how long to wait before retry number *retry* (from 1).

    The wait doubles *max_doublings* times, then grows linearly by the last doubled step, and never exceeds
    *max_backoff* (the public SDK's formula, which App Engine's documented examples follow); at least `MIN_WAIT`. A
    policy's *jitter* (0 to 1, 0 by default) takes up to that share off the wait, at random.
    """
    retry = max(retry, 1)
    exponent = min(retry - 1, policy.max_doublings, _MAX_EXPONENT)
    wait = (policy.min_backoff << exponent) * (retry - exponent)
    wait = min(wait, policy.max_backoff)
    if policy.jitter:
        wait -= int(wait * policy.jitter * rng.random())
    return max(wait, MIN_WAIT)


def may_retry(policy: RetryPolicy, failures: int, age: Micros) -> bool:
    """Tell whether a task that failed *failures* times, *age* after its first attempt began, is tried again.

    With both a retry limit and an age limit the task dies only when both are exceeded (App Engine's rule), unless the
    policy says *first_limit_wins*.
    """
    match policy.retry_limit, policy.age_limit:
        case None, None:
            return True
        case int(limit), None:
            return failures <= limit
        case None, int(limit):
            return age <= limit
        case int(count), int(span):
            if policy.first_limit_wins:
                return failures <= count and age <= span
            return failures <= count or age <= span
    raise AssertionError("unreachable")


def policy_of(options: str, queue: RetryPolicy) -> RetryPolicy:
    """Return the policy of a task whose own options are *options* (JSON as `options_text` makes it, or '').

    A task's options replace the queue's as a whole: what they leave out takes the defaults, not the queue's values. But
    for what only a queue has: jitter, and whether the first limit wins.
    """
    if not options:
        return queue
    raw: dict[str, Any] = json.loads(options)
    known = {
        key: value for key, value in raw.items() if key in RetryPolicy._fields
    }  # a newer version may have added others
    return repair(RetryPolicy(jitter=queue.jitter, first_limit_wins=queue.first_limit_wins), known)


def repair(base: RetryPolicy, raw: dict[str, Any]) -> RetryPolicy:
    """Return *base* with the fields of *raw* (names of `RetryPolicy`), keeping min_backoff <= max_backoff.

    Where only one of the two is given and contradicts the other's default, the default yields (App Engine's repair).
    """
    policy = base._replace(**raw)
    if policy.min_backoff > policy.max_backoff:
        given_min = "min_backoff" in raw
        bound = policy.min_backoff if given_min else policy.max_backoff
        policy = policy._replace(min_backoff=bound, max_backoff=bound)
    return policy


def options_text(
    *,
    min_backoff: float | None = None,
    max_backoff: float | None = None,
    max_doublings: int | None = None,
    retry_limit: int | None = None,
    age_limit: float | None = None,
) -> str:
    """Return a task's own retry options (spans in seconds) as the JSON kept with it; '' if none is set."""
    raw: dict[str, int] = {}
    for key, seconds in (("min_backoff", min_backoff), ("max_backoff", max_backoff), ("age_limit", age_limit)):
        if seconds is not None:
            raw[key] = round(seconds * SECOND)
    for key, count in (("max_doublings", max_doublings), ("retry_limit", retry_limit)):
        if count is not None:
            raw[key] = count
    return json.dumps(raw, separators=(",", ":")) if raw else ""
