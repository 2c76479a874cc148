"""What the end of one delivery means for its task: done, again at t, dead, or as if it had never been claimed."""

from __future__ import annotations

import json
from random import Random
from typing import assert_never

from deferlib.core.backoff import backoff, may_retry, policy_of
from deferlib.core.model import HOUR, SECOND, Action, Claim, Kind, Micros, Outcome, QueueConfig, Result

HISTORY = 3  # attempts kept with a task
INTERRUPTED_DELAY: Micros = SECOND // 100
NO_SLOT = "no free slot, and the task asks to fail fast (X-AppEngine-FailFast)"
LONGEST_RETRY_AFTER: Micros = HOUR
_PATIENT = frozenset({429, 503})  # the answers whose Retry-After counts
_REASON_LENGTH = 500
_DEFERRED_URL = "/_ah/queue/deferred"

UNTRUSTED = "untrusted"  # our dispatch token is refused: the target's keys are wrong, not the task
MISMATCHED = "mismatched"  # something on the way has changed the request: no other task's trouble, nor its own failure
# Outcomes that say that the call could not even be started: not charged, and kept for people after a while.
_UNRUNNABLE = frozenset({"undecodable", "key-unknown", "newer"})
_NOTHING_SPECIAL = ("ok", "")  # of the handler, and of any view
_LONGEST_WAIT: Micros = 30 * SECOND  # between attempts of what a deploy will mend


def verdict(
    now: Micros, claim: Claim, result: Result, config: QueueConfig, *, quarantine_after: Micros, rng: Random
) -> Outcome:
    """Return the outcome of *result*, the end of *claim*'s delivery.

    RetryCount rises with every attempt that was sent. ExecutionCount and the limits rise only with what the target
    reported, or failed to report by the deadline: an unreachable target or a broken connection isn't the task's failure.
    """
    match result.kind:
        case Kind.ANSWERED:
            return _answered(now, claim, result, config, quarantine_after, rng)
        case Kind.TIMEOUT | Kind.MALFORMED:
            return _failed(now, claim, result, config, rng)
        case Kind.UNREACHABLE | Kind.UNKNOWN | Kind.UNFIT:
            return _again(now, claim, result, config, rng)
        case Kind.INTERRUPTED:
            return _again(now, claim, result, config, rng)._replace(at=now + INTERRUPTED_DELAY)
        case Kind.UNSENT:
            return release(claim, now, result.error)
        case _:
            assert_never(result.kind)


def release(claim: Claim, at: Micros, reason: str) -> Outcome:
    """Return the outcome of a claim that isn't delivered: its attempt is refunded."""
    return Outcome(claim.id, claim.claims, claim.queue, Action.RELEASE, at, reason=reason)


def given_up(now: Micros, claim: Claim, config: QueueConfig, reason: str) -> Outcome:
    """Return the outcome of a claim that is past its limits before it is delivered."""
    return Outcome(*_end(now, claim, config, Action.DEAD), 0, 0, claim.status, reason[:_REASON_LENGTH], claim.history)


def failed_fast(now: Micros, claim: Claim, config: QueueConfig, rng: Random) -> Outcome:
    """Return the outcome of a claim that doesn't wait for a slot and found none: as if its target were unreachable."""
    result = Result(claim.id, claim.claims, Kind.UNREACHABLE, now, now, error=NO_SLOT)
    return _again(now, claim, result, config, rng)


def _answered(
    now: Micros, claim: Claim, result: Result, config: QueueConfig, quarantine_after: Micros, rng: Random
) -> Outcome:
    # The outcome is looked at before the status: a view that turned the handler's answer into a 200 made it no success.
    said = result.outcome
    if said in _NOTHING_SPECIAL and 200 <= result.status <= 299:  # nearly all: before six comparisons
        return Outcome(*_end(now, claim, config, Action.DONE), 0, 1, result.status)
    if said == "permanent":
        return _dead(now, claim, result, config, "permanent", executed=1)
    if said == "unverified":
        return _dead(now, claim, result, config, f"quarantine: {said}")
    if said in _UNRUNNABLE:
        since = _unrunnable_since(claim) or result.started
        if now - since >= quarantine_after:
            return _dead(now, claim, result, config, f"quarantine: {said}")
        return _soon(now, claim, result, config, rng, since)
    if said in (UNTRUSTED, MISMATCHED):
        return _soon(now, claim, result, config, rng)
    if 200 <= result.status <= 299 and said != "retry":  # what a newer handler says
        return Outcome(*_end(now, claim, config, Action.DONE), 0, 1, result.status)
    return _failed(now, claim, result, config, rng)


def _failed(now: Micros, claim: Claim, result: Result, config: QueueConfig, rng: Random) -> Outcome:
    """Charge a failure that the target reported: again, or dead once the limits are exceeded."""
    failures = claim.failures + 1
    if may_retry(policy_of(claim.retry, config.retry), failures, now - claim.first_try):
        return _again(now, claim, result, config, rng, charged=1, executed=1)
    return _dead(now, claim, result, config, f"limits: {failures} failures", charged=1, executed=1)


def _again(
    now: Micros, claim: Claim, result: Result, config: QueueConfig, rng: Random, *, charged: int = 0, executed: int = 0
) -> Outcome:
    at = now + backoff(policy_of(claim.retry, config.retry), claim.attempts - claim.lost, rng)
    if result.retry_after and result.status in _PATIENT:
        at = max(at, now + min(result.retry_after, LONGEST_RETRY_AFTER))
    story = _story(claim, result)
    fence = (claim.id, claim.claims, claim.queue)
    return Outcome(*fence, Action.RETRY, at, False, charged, executed, result.status, _reason(claim, result), story)


def _soon(now: Micros, claim: Claim, result: Result, config: QueueConfig, rng: Random, since: Micros = 0) -> Outcome:
    """Return the outcome of what could not even be started: not charged, and tried again soon, whatever its backoff says.

    *since* is when it could not be started first, as far as that counts.
    """
    again = _again(now, claim, result, config, rng)
    return again._replace(at=min(again.at, now + _LONGEST_WAIT), history=_story(claim, result, since))


def _unrunnable_since(claim: Claim) -> Micros:
    """Return since when all attempts have found the call unrunnable; 0 if the last one didn't, or was in a former life."""
    attempts = json.loads(claim.history) if claim.history else []
    since = int(attempts[-1].get("unrunnable_since", 0)) if attempts else 0
    return since if since >= claim.first_try else 0


def _dead(
    now: Micros, claim: Claim, result: Result, config: QueueConfig, reason: str, *, charged: int = 0, executed: int = 0
) -> Outcome:
    if result.error:
        reason = f"{reason}: {result.error}"[:_REASON_LENGTH]
    end = _end(now, claim, config, Action.DEAD)
    return Outcome(*end, charged, executed, result.status, reason, _story(claim, result))


def _end(now: Micros, claim: Claim, config: QueueConfig, action: Action) -> tuple[int, int, str, Action, Micros, bool]:
    """Return the head of an outcome that ends the task; a named one leaves its tombstone."""
    named = claim.name is not None
    return claim.id, claim.claims, claim.queue, action, now + config.tombstone if named else 0, named


def _reason(claim: Claim, result: Result) -> str:
    """Return what went wrong in one line."""
    if result.error:
        return result.error[:_REASON_LENGTH]
    if result.kind is not Kind.ANSWERED:
        return str(result.kind)
    if result.status == 404 and not result.outcome and claim.url == _DEFERRED_URL:
        return "HTTP 404: the handler of deferred calls is not mounted there; wrap the app with deferlib.wrap_wsgi_app"
    if result.status == 414:
        return f"HTTP 414: the server refuses a URL of {len(claim.url)} bytes; put what is long into a POST task's payload"
    return f"HTTP {result.status}"


def _story(claim: Claim, result: Result, unrunnable_since: Micros = 0) -> str:
    """Return the task's last attempts as JSON, this one added: what people will ask for when it fails."""
    attempts = json.loads(claim.history) if claim.history else []
    attempts.append(
        {
            "attempt": claim.attempts,
            "at": result.started,
            "micros": result.ended - result.started,
            "status": result.status,
            "error": _reason(claim, result),
        }
        | ({"unrunnable_since": unrunnable_since} if unrunnable_since else {})
    )
    return json.dumps(attempts[-HISTORY:], separators=(",", ":"), ensure_ascii=False)
