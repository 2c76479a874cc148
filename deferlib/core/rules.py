"""What an engine's scheduler goes by, and where that leads a claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deferlib.core.model import MINUTE, SECOND, Claim, Micros, QueueConfig
from deferlib.errors import InvalidUrlError


def home_only(url: str) -> str:
    """Refuse every URL that isn't a path of the app: `Rules.origin` of an engine that has only the app."""
    raise InvalidUrlError(
        "the url isn't a path of the app, and this engine calls the app in its own process; for absolute URLs run "
        "`deferlib engine` without --app"
    )


class Rules(NamedTuple):
    """What the scheduler goes by, beside the queues' own configuration."""

    node: str  # this engine's name as an owner
    target: Callable[[str], str | None]  # from a target's name to its base URL; None if there is no such target
    lease: Micros = 30 * SECOND
    in_process: bool = False
    base: str = ""  # base URL of the default target
    quarantine_after: Micros = 10 * MINUTE
    concurrency: int = 32  # deliveries at once to one target
    origin: Callable[[str], str] = home_only  # from an absolute URL to its origin; InvalidUrlError if it isn't allowed

    def resolve(self, target: str) -> str | None:
        """Return the base URL of *target*; None if there is no such target."""
        return self.target(target) if target else self.base

    def destination(self, claim: Claim, config: QueueConfig) -> str:
        """Return the base URL that *claim*, which is fit to be sent, goes to."""
        if leaves(claim.url):
            return self.origin(claim.url)
        return self.resolve(config.target or claim.target) or self.base


def leaves(url: str) -> bool:
    """Tell whether *url* isn't a path: put behind a base URL, '@host' or '.host' would lead to another host."""
    return url[:1] != "/" or url[1:2] == "/"
