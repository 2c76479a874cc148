"""The whole comparison: install what is needed, start what is needed, measure everybody in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from benchmarks.peers import environment, servers
from benchmarks.peers.arena import Stores
from benchmarks.peers.contenders import Contender, contenders
from benchmarks.peers.contest import Effort, Figures, compete, imported
from benchmarks.peers.environment import Peers
from benchmarks.peers.kills import Toll, kill_test
from benchmarks.stage import scratch

_QUICK = Effort(rounds=1, share=0.2, scheduled=10_000, patience=20)
_FULL = Effort()
_KILLED_TASKS, _KILLED_QUICKLY = 5_000, 1_000
_KILL_PATIENCE, _SHORT_PATIENCE = 120.0, 90.0  # seconds: Celery's visibility time-out is 60


class Contest(NamedTuple):
    """All figures, and of what versions."""

    figures: list[Figures]
    versions: dict[str, str]
    effort: Effort


def compare(*, quick: bool, wanted: str, say: Callable[[str], None]) -> Contest:
    """Measure every contender whose title has *wanted* in it."""
    peers = _installed(say)
    effort = _QUICK if quick else _FULL
    figures = []
    with scratch() as folder, Stores(peers, folder) as stores:
        for contender in _chosen(peers, wanted):
            figures.append(compete(contender, peers, stores, effort, say))
    measured: dict[str, float | None] = {}
    for each in figures:
        package = each.contender.imports
        if package not in measured:
            imported(each, peers, 3 if quick else 7)
            measured[package] = each.imported
        each.imported = measured[package]
    return Contest(figures, _versions(peers), effort)


def kill(*, quick: bool, wanted: str, say: Callable[[str], None]) -> list[Toll]:
    """Kill workers of every contender for which that is worth knowing."""
    peers = _installed(say)
    tasks, patience = (_KILLED_QUICKLY, _SHORT_PATIENCE) if quick else (_KILLED_TASKS, _KILL_PATIENCE)
    with scratch() as folder, Stores(peers, folder) as stores:
        chosen = [each for each in _chosen(peers, wanted) if each.kills]
        return [kill_test(each, peers, stores, tasks, patience, say) for each in chosen]


def _installed(say: Callable[[str], None]) -> Peers:
    peers = environment.install()
    for name, reason in peers.missing.items():
        say(f"not installed: {name}: {reason}")
    return peers


def _chosen(peers: Peers, wanted: str) -> list[Contender]:
    return [each for each in contenders(peers) if wanted.lower() in each.title.lower()]


def _versions(peers: Peers) -> dict[str, str]:
    """Return the versions of the peers, their clients and servers."""
    found = {name: peers.versions[name] for name in _NAMED if name in peers.versions}
    with suppress(servers.NoServerError):
        found["redis-server"] = servers.redis_version(peers)
    with suppress(servers.NoServerError):
        found["postgres"] = servers.postgres_version(peers)
    return found | {name: f"not installed: {reason}" for name, reason in peers.missing.items()}


_NAMED = ("huey", "rq", "dramatiq", "celery", "procrastinate", "pgqueuer", "redis", "asyncpg", "psycopg", "uvloop")
