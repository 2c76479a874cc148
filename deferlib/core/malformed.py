"""What is wrong with a claimed row that no version of deferlib would have written.

Somebody else wrote it, or the disk is failing. It must neither stop the engine, and with it everybody's tasks, nor put
lines of its own into a request.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from deferlib.core.backoff import policy_of
from deferlib.core.model import DAY, Claim, RetryPolicy

_ODD = re.compile(r"[^!-~]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_METHOD = re.compile(r"[A-Z]{1,20}\Z")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_ODD_NAME = "its name, namespace or target has characters that none may have"
_LONGEST = 64 * 1024  # characters of JSON that are read
LONGEST_TEXTS = _LONGEST  # of headers and retry options together


def malformed(claim: Claim) -> str:
    """Return what is wrong with the row of *claim*; '' if it can be worked with (0.4 µs)."""
    if claim.name and _ODD.search(claim.name):
        return _ODD_NAME
    if not 0 <= claim.deadline <= 30 * DAY:
        return "its deadline is out of range"
    if len(claim.headers) + len(claim.retry) > LONGEST_TEXTS:  # before they are kept below
        return "its headers or retry options are too long"
    problem = _common(claim.method, claim.url, claim.target, claim.namespace, claim.headers, claim.retry)
    return problem or (_history(claim.history) if claim.history else "")


@lru_cache(256)  # most tasks have the same
def _common(method: str, url: str, target: str, namespace: str, headers: str, retry: str) -> str:
    if _ODD.search(namespace + target):
        return _ODD_NAME
    if _ODD.search(url):
        return "its url has characters that must be percent-encoded"
    if _METHOD.match(method) is None:
        return "its method is none of HTTP"
    return _headers(headers) or _retry(retry)


def _headers(text: str) -> str:
    if not text:
        return ""
    headers = _json(text)
    if not isinstance(headers, list):
        return "its headers are no JSON list"
    for pair in headers:
        match pair:
            case [str(name), str(value)] if _HEADER_NAME.match(name) and not _CONTROL.search(value.replace("\t", " ")):
                continue
        return "its headers are no pairs of name and value, or have control characters"
    return ""


def _retry(text: str) -> str:
    if not text:
        return ""
    try:
        policy = policy_of(text[:_LONGEST], RetryPolicy())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "its retry options are no JSON object"
    numbers = (policy.min_backoff, policy.max_backoff, policy.max_doublings)
    limits = (policy.retry_limit, policy.age_limit)
    if not all(type(number) is int and number >= 0 for number in (*numbers, *(x for x in limits if x is not None))):
        return "its retry options are no numbers"
    return ""


def _history(text: str) -> str:
    attempts = _json(text)
    if isinstance(attempts, list) and all(isinstance(attempt, dict) for attempt in attempts):
        return ""
    return "its history is no JSON list"


def _json(text: str) -> Any:
    """Return what *text* says; None if it is no JSON, or longer than any of ours."""
    if len(text) > _LONGEST:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
