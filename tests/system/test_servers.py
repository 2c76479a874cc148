"""deferlib's app under the web servers that people use: calls run once, on all workers, and a restart loses none."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.system.processes import Site, free_port, wait_until
from tests.system.serving import SERVERS, Web, defer_many

COUNT = 200
FORGED = (
    "X-AppEngine-QueueName",
    "X_AppEngine_TaskName",
    "x-appengine_taskretrycount",
    "X-CloudTasks-TaskName",
    "X_CloudTasks_QueueName",
    "X-Deferlib-Fence",
)


@pytest.fixture(params=SERVERS)
def web(site: Site, request: pytest.FixtureRequest) -> Web:
    return Web(site, SERVERS[request.param], free_port())


def numbers(first: int, count: int) -> dict[str, int]:
    return {str(number): 1 for number in range(first, first + count)}


def test_calls_run_once_and_on_every_worker(web: Web) -> None:
    def every_worker_ran_some() -> bool:
        if len(web.pids()) >= web.server.workers:
            return True
        web.defer(2000, 20)  # a worker may have started late
        return False

    defer_many(COUNT, 0.005)

    with web.serving(), web.engine():
        web.defer(1000, 20)
        wait_until(lambda: not web.site.waiting(), "the queue is empty")
        ran = web.site.runs()
        wait_until(every_worker_ran_some, "every worker ran some")

    ran.pop("-1", None)  # what the preloaded app deferred at its start
    assert ran == numbers(0, COUNT) | numbers(1000, 20), web.site.log()


def test_headers_that_only_an_engine_may_set_are_stripped(web: Web) -> None:
    forged = dict.fromkeys(FORGED, "forged")

    with web.serving():
        seen = requests.get(f"{web.url}/headers", headers={**forged, "X-Harmless": "yes"}, timeout=30).json()
        call = requests.post(f"{web.url}/_ah/queue/deferred", headers=forged, data=b"x" * 10_000, timeout=30)

    assert seen["x_harmless"] == "yes"
    assert "forged" not in json.dumps(seen)
    assert call.status_code == 403


def test_server_stopped_under_load_and_started_again_loses_nothing(web: Web) -> None:
    defer_many(COUNT, 0.05)

    with web.engine(DEFERLIB_CONCURRENCY="8"):
        with web.serving() as process:
            wait_until(lambda: len(web.site.finished()) > COUNT // 8, "some calls ran")
            assert web.site.waiting() > 8, "there is more to do than what it works on"
            web.stop(process)
        with web.serving():
            wait_until(lambda: not web.site.waiting(), "the queue is empty")

    runs, finished = web.site.runs(), web.site.finished()
    for found in (runs, finished):
        found.pop("-1", None)  # what the preloaded app deferred at each start
    assert set(finished) == set(numbers(0, COUNT)), web.site.log()
    assert runs.total() - COUNT <= (0 if web.server.graceful else 8), "at most what it worked on ran again"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc for open descriptors")
def test_preforked_workers_never_share_their_parents_connection(site: Site) -> None:
    web = Web(site, SERVERS["gunicorn-preload"], free_port())

    with web.serving(), web.engine():
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda first: web.defer(first, 10), range(0, COUNT, 10)))
        wait_until(lambda: not site.waiting(), "the queue is empty")

    assert site.runs() == numbers(-1, COUNT + 1)
    forks = [line.split() for line in (site.folder / "forks").read_text().splitlines()]
    assert forks[0][0] == "parent"
    assert int(forks[0][1]) > 0, "it had the store open"
    assert [count for who, count in forks if who == "child"] == ["0", "0"]
    with sqlite3.connect(site.folder / "tasks.db") as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    connection.close()
