"""Every task queue that is compared, as it comes and as its documentation says to set it up where that matters.

Each runs two worker processes, or what is its own way to have two. All log warnings at most, to /dev/null: what a log
costs says nothing about a queue.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from benchmarks.peers.environment import Peers

REDIS, REDIS_ALWAYS, POSTGRES, FILE = "redis", "redis, appendfsync always", "postgres", "file"
_APPS = "benchmarks.peers.apps"


class Contender(NamedTuple):
    """One task queue in one configuration."""

    name: str
    setting: str  # "defaults" or what is set, for the table
    package: str  # the distribution; "" for deferlib itself
    module: str  # in `apps`
    server: str
    workers: list[list[str]]
    tasks: int  # for one drain: about a second of it, or a few where a second is nothing
    options: dict[str, Any] = {}  # for the module  # noqa: RUF012  # a tuple's default is never changed
    durable: bool = False  # whether an enqueued task survives a power cut the moment that enqueueing returns
    reliable: bool = False  # whether this is the set-up for reliability; else it is the defaults, or for speed
    schedules: bool = False  # whether 100,000 scheduled tasks are tried with this configuration
    kills: bool = False  # whether its workers are killed in the kill test
    imports: str = ""

    @property
    def title(self) -> str:
        """Return the name with the setting."""
        return f"{self.name}, {self.setting}"


def contenders(peers: Peers) -> list[Contender]:
    """Return all of them, deferlib first."""
    return [
        *_deferlib(),
        *_huey(peers),
        *_rq(peers),
        *_dramatiq(peers),
        *_celery(peers),
        *_procrastinate(peers),
        *_pgqueuer(peers),
    ]


def _deferlib() -> list[Contender]:
    app = f"{_APPS}.deferlib_app:application"
    engine = [sys.executable, "-m", "deferlib.cli", "engine", "--log-level", "warning"]
    granian = [sys.executable, "-m", "granian", "--interface", "wsgi", "--workers", "1", "--port", "{port}"]
    # One thread for Python, one for the network: more of them fight for the GIL.
    granian += ["--blocking-threads", "1", "--runtime-mode", "st", "--no-ws", "--log-level", "error", app]
    common: dict[str, Any] = {"package": "", "module": "deferlib_app", "server": FILE, "durable": True, "reliable": True}
    common |= {"schedules": True, "kills": True, "imports": "deferlib"}
    return [
        Contender("deferlib", "in process, defaults", workers=[[*engine, "--app", app]], tasks=30_000, **common),
        Contender("deferlib", "in process, two engines", workers=[[*engine, "--app", app]] * 2, tasks=30_000, **common),
        Contender(
            "deferlib",
            "pushed over HTTP to granian, defaults",
            workers=[granian, [*engine, "--app-url", "http://127.0.0.1:{port}"]],
            tasks=20_000,
            **common,
        ),
    ]


def _huey(peers: Peers) -> list[Contender]:
    # Two processes rather than two threads: https://huey.readthedocs.io/en/latest/consumer.html#worker-types
    consumer = [peers.program("huey_consumer"), f"{_APPS}.huey_app.huey", "-k", "process", "-w", "2", "-q"]
    common: dict[str, Any] = {"package": "huey", "module": "huey_app", "imports": "huey"}
    # No setting makes Huey keep a task until it has run: it is deleted when it is taken.
    # https://huey.readthedocs.io/en/latest/guide.html#understanding-how-tasks-are-executed
    return [
        Contender(
            "Huey, SQLite",
            "defaults",
            server=FILE,
            workers=[consumer],
            tasks=6_000,
            durable=True,
            schedules=True,
            kills=True,
            **common,
        ),
        # https://huey.readthedocs.io/en/latest/consumer.html#options-for-consumer: a shorter delay, no backoff
        Contender(
            "Huey, SQLite",
            "polled each 5 ms",
            server=FILE,
            workers=[[*consumer, "-d", "0.005", "-b", "1"]],
            tasks=6_000,
            durable=True,
            **common,
        ),
        # https://huey.readthedocs.io/en/latest/api.html#SqliteHuey
        Contender(
            "Huey, SQLite", "fsync=False", server=FILE, workers=[consumer], tasks=15_000, options={"fsync": False}, **common
        ),
        Contender("Huey, Redis", "defaults", server=REDIS, workers=[consumer], tasks=10_000, schedules=True, **common),
        Contender(
            "Huey, Redis",
            "appendfsync always",
            server=REDIS_ALWAYS,
            workers=[consumer],
            tasks=6_000,
            durable=True,
            reliable=True,
            kills=True,
            **common,
        ),
    ]


def _rq(peers: Peers) -> list[Contender]:
    # https://python-rq.org/docs/workers/: the default forks for each job, and scheduled jobs need --with-scheduler
    worker = [peers.program("rq"), "worker", "--url", "{store}", "--quiet", "--with-scheduler"]
    # https://github.com/rq/rq/blob/master/docs/benchmark.md: faster for very short jobs, without the fork's isolation
    simple = [*worker, "--worker-class", "rq.worker.SimpleWorker"]
    common: dict[str, Any] = {"package": "rq", "module": "rq_app", "imports": "rq"}
    return [
        Contender("RQ", "defaults", server=REDIS, workers=[worker] * 2, tasks=500, kills=True, **common),
        Contender("RQ", "SimpleWorker", server=REDIS, workers=[simple] * 2, tasks=2_500, schedules=True, **common),
        # Its own clean-up of jobs that died is on by default; the interval is ten minutes:
        # https://python-rq.org/docs/workers/#worker-lifecycle
        Contender(
            "RQ",
            "SimpleWorker, maintenance each 10 s, appendfsync always",
            server=REDIS_ALWAYS,
            workers=[[*simple, "--maintenance-interval", "10"]] * 2,
            tasks=2_000,
            durable=True,
            reliable=True,
            kills=True,
            **common,
        ),
    ]


def _dramatiq(peers: Peers) -> list[Contender]:
    # Its defaults are a process a core and eight threads in each: https://dramatiq.io/guide.html#workers
    worker = [peers.program("dramatiq"), f"{_APPS}.dramatiq_app", "--processes", "2", "--skip-logging"]
    common: dict[str, Any] = {"package": "dramatiq", "module": "dramatiq_app", "imports": "dramatiq", "workers": [worker]}
    return [
        Contender("Dramatiq", "defaults", server=REDIS, tasks=6_000, schedules=True, kills=True, **common),
        # What a dead worker had taken comes back when it has missed its heartbeat *and* another call happens to do the
        # maintenance: https://redis.io/docs/latest/integrate/dramatiq/ (when a worker is killed),
        # https://dramatiq.io/reference.html#dramatiq.brokers.redis.RedisBroker
        Contender(
            "Dramatiq",
            "heartbeat 10 s, maintenance 2 %, appendfsync always",
            server=REDIS_ALWAYS,
            tasks=4_000,
            options={"heartbeat_timeout": 10_000, "maintenance_chance": 20_000},
            durable=True,
            reliable=True,
            kills=True,
            **common,
        ),
    ]


def _celery(peers: Peers) -> list[Contender]:
    worker = [
        peers.program("celery"),
        "--app",
        f"{_APPS}.celery_app",
        "worker",
        "--concurrency",
        "2",
        "--loglevel",
        "ERROR",
    ]
    # https://docs.celeryq.dev/en/stable/userguide/optimizing.html: many short tasks are prefetched by the hundred
    tuned = [*worker, "--without-gossip", "--without-mingle", "--without-heartbeat"]
    common: dict[str, Any] = {"package": "celery", "module": "celery_app", "imports": "celery"}
    # https://docs.celeryq.dev/en/stable/userguide/tasks.html#Task.acks_late and #Task.reject_on_worker_lost; the
    # visibility time-out, an hour by default, is how long what a dead worker had taken stays away:
    # https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/redis.html#visibility-timeout
    late = {
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "broker_transport_options": {"visibility_timeout": 60},
    }
    return [
        Contender("Celery", "defaults", server=REDIS, workers=[worker], tasks=2_000, kills=True, **common),
        Contender(
            "Celery",
            "prefetch 128, no gossip",
            server=REDIS,
            workers=[tuned],
            tasks=2_000,
            schedules=True,
            options={"worker_prefetch_multiplier": 128, "task_ignore_result": True},
            **common,
        ),
        Contender(
            "Celery",
            "acks_late, visibility 60 s, appendfsync always",
            server=REDIS_ALWAYS,
            workers=[worker],
            tasks=1_500,
            options=late,
            durable=True,
            reliable=True,
            kills=True,
            **common,
        ),
    ]


def _procrastinate(peers: Peers) -> list[Contender]:
    worker = [peers.program("procrastinate"), "--app", f"{_APPS}.procrastinate_app.app", "--log-level", "warning", "worker"]
    common: dict[str, Any] = {"package": "procrastinate", "module": "procrastinate_app", "imports": "procrastinate"}
    common |= {"server": POSTGRES, "durable": True}
    return [
        Contender("Procrastinate", "defaults", workers=[worker] * 2, tasks=1_500, schedules=True, kills=True, **common),
        # https://procrastinate.readthedocs.io/en/stable/howto/basics/worker.html (concurrency),
        # https://procrastinate.readthedocs.io/en/stable/howto/production/delete_finished_jobs.html,
        # https://procrastinate.readthedocs.io/en/stable/howto/production/retry_stalled_jobs.html
        Contender(
            "Procrastinate",
            "concurrency 10, deletes, retries stalled jobs",
            workers=[[*worker, "--concurrency", "10", "--delete-jobs", "successful"]] * 2,
            tasks=1_500,
            options={"retry_stalled": 10, "worker": {"update_heartbeat_interval": 2, "stalled_worker_timeout": 10}},
            reliable=True,
            kills=True,
            **common,
        ),
    ]


def _pgqueuer(peers: Peers) -> list[Contender]:
    worker = [peers.python, "-m", f"{_APPS}.pgqueuer_app"]
    common: dict[str, Any] = {"package": "pgqueuer", "module": "pgqueuer_app", "imports": "pgqueuer", "server": POSTGRES}
    common |= {"durable": True, "reliable": True}
    return [
        Contender(
            "PgQueuer",
            "defaults (batch 10)",
            workers=[[*worker, "10"]] * 2,
            tasks=10_000,
            kills=True,
            schedules=True,
            **common,
        ),
        # https://pgqueuer.readthedocs.io/en/latest/ (batch size)
        Contender("PgQueuer", "batch 100", workers=[[*worker, "100"]] * 2, tasks=20_000, **common),
    ]
