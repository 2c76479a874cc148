"""Which claims must not be sent, and what becomes of them instead."""

from __future__ import annotations

from random import Random

from deferlib.core.backoff import may_retry, policy_of
from deferlib.core.malformed import malformed
from deferlib.core.model import SECOND, Claim, Micros, Outcome, QueueConfig
from deferlib.core.rules import Rules, leaves
from deferlib.core.verdict import failed_fast, given_up, release
from deferlib.errors import InvalidUrlError

ISOLATION_DELAY: Micros = SECOND // 50
UNRESOLVED_DELAY: Micros = 5 * SECOND


class Fitness:
    """Judges claims by an engine's rules. Changes nothing."""

    def __init__(self, rules: Rules, rng: Random) -> None:
        self._rules = rules
        self._rng = rng

    def suspect(self, claim: Claim, config: QueueConfig) -> bool:
        """Tell whether this is the last chance of a task that may be killing its process."""
        return self._rules.in_process and claim.lost >= max(config.lost_limit - 1, 1)

    def unfit(self, now: Micros, claim: Claim, config: QueueConfig, isolated: int | None, full: bool) -> Outcome | None:
        """Return the outcome of a claim that must not be sent, or None; none of a *full* queue may be.

        Suspects run one at a time, so that one of them takes no other with it; *isolated* is the one that runs.
        """
        if claim.lost and self._rules.in_process and claim.lost >= config.lost_limit:
            return given_up(now, claim, config, f"lost: its process died {claim.lost} times while it ran")
        problem = malformed(claim)
        if problem:
            return given_up(now, claim._replace(history=""), config, f"quarantine: the row is malformed: {problem}")
        if claim.failures:
            policy = policy_of(claim.retry, config.retry)
            if policy.age_limit is None and not may_retry(policy, claim.failures, 0):
                return given_up(now, claim, config, f"retry limit: {claim.failures} failures")
        if full:
            return failed_fast(now, claim, config, self._rng)
        if leaves(claim.url):
            try:
                self._rules.origin(claim.url)
            except InvalidUrlError as error:  # not dropped: it may be the setting that is wrong
                return release(claim, now + UNRESOLVED_DELAY, str(error))
            return None
        if self._rules.in_process:
            if claim.lost and self.suspect(claim, config) and isolated not in (None, claim.id):
                return release(claim, now + ISOLATION_DELAY, "waiting to run alone: its process died before")
            return None
        target = config.target or claim.target
        base = self._rules.resolve(target)
        if base is None:
            return release(claim, now + UNRESOLVED_DELAY, f"target {target!r} is not configured")
        return None
