"""Quick calls that go together in one request, in real life: servers and engines die in the middle, and no call is lost."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deferlib import deferred, payload, taskqueue
from tests.system.nginx import proxy
from tests.system.processes import Site, free_port, kill, listens, wait_until, whole_lines

SEED = 20_261_128
CONCURRENCY = 4
MOST = 32  # calls in one request
APP = '''
"""The system tests' app, behind what notes of each request to the handler which kind of token it has."""
import itertools, os

import deferlib.contrib.asgi
import systemapp

numbers = itertools.count()

def quick(number, deadly=False):
    if deadly and deferlib.current_task().attempt <= 2:
        os._exit(9)
    systemapp.note(number)

def noted(kind, refused=False):
    file = os.open("requests", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{kind} {'refused' if refused else 'taken'}\\n".encode())
    os.close(file)

def counting(app, old=lambda: False):
    def counted(environ, start_response):
        kind = (environ.get("HTTP_X_DEFERLIB_SIGNATURE") or "none")[:2]
        refused = kind == "b1" and old()
        noted(kind, refused)
        if refused:
            start_response("403 Forbidden", [("X-Deferlib-Outcome", "untrusted"), ("Content-Length", "0")])
            return []
        return app(environ, start_response)
    return counted

async def nothing_here(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        noted(dict(scope["headers"]).get(b"x-deferlib-signature", b"none")[:2].decode())
    await deferlib.contrib.asgi.wrap_asgi_app(nothing_here)(scope, receive, send)

wsgi = counting(systemapp.application)
# Every second request reaches a version that knows no batches.
mixed = counting(systemapp.application, lambda: next(numbers) % 2)
'''
SERVERS = {
    "granian": "granian --interface wsgi --workers 1 --port {port} --no-ws --log-level error batched:{app}",
    "gunicorn": "gunicorn --bind 127.0.0.1:{port} --workers 2 --log-level error batched:{app}",
    "waitress": "waitress --listen=127.0.0.1:{port} --threads=4 batched:{app}",
    "uvicorn": "uvicorn --port {port} --log-level error batched:asgi",
}


class Batched:
    """A site whose requests to the handler are counted."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.port = free_port()
        (site.folder / "batched.py").write_text(APP)

    @contextmanager
    def server(self, name: str = "granian", app: str = "wsgi") -> Iterator[object]:
        command = SERVERS[name].format(port=self.port, app=app).split()
        with self.site.process([sys.executable, "-m", *command]) as process:
            wait_until(lambda: listens(self.port), "the server listens")
            yield process

    @contextmanager
    def engine(self, port: int = 0, **environ: str) -> Iterator[object]:
        app = {"DEFERLIB_APP": f"http://127.0.0.1:{port or self.port}", "DEFERLIB_CONCURRENCY": str(CONCURRENCY)}
        with self.site.engine(**app, **environ) as engine:
            yield engine

    def defer(self, count: int, deadly: int = -1) -> None:
        """Defer the calls 0 to *count* - 1; the one numbered *deadly* kills its worker the first two times."""
        import batched  # type: ignore[import-not-found]  # written above

        calls = [payload.dump_call(batched.quick, (number, number == deadly), {}) for number in range(count)]
        for first in range(0, count, 100):
            tasks = [taskqueue.Task.of_call(call, url=deferred.DEFAULT_URL) for call in calls[first : first + 100]]
            taskqueue.Queue("default").add(tasks)

    def requests(self) -> Counter[str]:
        """Return how many requests of each kind have come: `b1 taken`, `v1 taken`, `b1 refused`."""
        return Counter(whole_lines(self.site.folder / "requests"))

    def emptied(self) -> None:
        wait_until(lambda: not self.site.waiting(), "the queue is empty")


@pytest.fixture
def batched(site: Site) -> Iterator[Batched]:
    yield Batched(site)
    sys.modules.pop("batched", None)


def each_once(count: int) -> dict[str, int]:
    return {str(number): 1 for number in range(count)}


@pytest.mark.parametrize("name", SERVERS)
def test_quick_calls_come_together_and_run_once(batched: Batched, name: str) -> None:
    """How many of them depends on how evenly the machine runs: one that takes 20 ms sends 22 singly."""
    batched.defer(1_500)

    with batched.server(name), batched.engine():
        batched.emptied()

    assert batched.site.runs() == batched.site.finished() == each_once(1_500)
    requests = batched.requests()
    assert requests["b1 taken"] > 0
    assert requests.total() < 1_500


def test_setting_turns_it_off(batched: Batched) -> None:
    batched.defer(200)

    with batched.server(), batched.engine(DEFERLIB_BATCH="1"):
        batched.emptied()

    assert batched.site.runs() == each_once(200)
    assert batched.requests() == {"v1 taken": 200}


def test_server_killed_in_the_middle_repeats_only_what_it_had(batched: Batched) -> None:
    rng, rounds, count = random.Random(SEED), 4, 4_000
    batched.defer(count)

    with batched.engine():
        for round in range(rounds):
            goal = 100 + round * 600 + rng.randrange(300)
            with batched.server() as server:
                wait_until(lambda goal=goal: len(batched.site.finished()) >= goal, f"{goal} calls ran")
                kill(server)  # type: ignore[arg-type]  # a process
        with batched.server():
            batched.emptied()

    runs = batched.site.runs()
    assert set(batched.site.finished()) == set(each_once(count))
    assert runs.total() - count <= rounds * CONCURRENCY * MOST, "a kill repeats at most what was on its way"
    assert batched.requests()["b1 taken"] > 0


def test_engine_killed_in_the_middle_loses_nothing(batched: Batched) -> None:
    rng, rounds, count = random.Random(SEED), 3, 3_000
    batched.defer(count)

    with batched.server():
        for round in range(rounds):
            goal = 100 + round * 600 + rng.randrange(300)
            with batched.engine() as engine:
                wait_until(lambda goal=goal: len(batched.site.finished()) >= goal, f"{goal} calls ran")
                kill(engine)  # type: ignore[arg-type]  # a process
        with batched.engine():
            batched.emptied()

    assert set(batched.site.finished()) == set(each_once(count))
    assert max(batched.site.runs().values()) <= 1 + rounds


def test_call_that_kills_its_worker_takes_its_mates_with_it_once(batched: Batched) -> None:
    """They come again by themselves, and so does it: it kills its worker once more, and nobody else is in it."""
    count, deadly = 600, 300
    batched.defer(count, deadly)

    with batched.server("gunicorn"), batched.engine():
        batched.emptied()

    runs = batched.site.runs()
    assert set(batched.site.finished()) == set(each_once(count))
    assert runs[str(deadly)] == 1, "it got to its journal in its third attempt"
    attempts = {line.split()[1]: int(line.split()[2]) for line in whole_lines(batched.site.journal)}
    assert attempts[str(deadly)] == 3
    assert runs.total() - count < MOST
    assert Counter(attempts.values())[2] < MOST, "those who were with it, and nobody else"
    assert set(attempts.values()) <= {1, 2, 3}


def test_two_versions_behind_one_address_run_each_call_once(batched: Batched) -> None:
    """One of them refuses batches: their calls go singly, at once, and no more are tried for a minute."""
    batched.defer(600)

    with batched.server(app="mixed"), batched.engine():
        batched.emptied()

    assert batched.site.runs() == each_once(600)
    assert 1 <= batched.requests()["b1 refused"] <= CONCURRENCY
    assert {line.split()[2] for line in whole_lines(batched.site.journal)} == {"1"}, "none was charged an attempt"
    assert "refuses this engine's requests" not in batched.site.log()


def test_batches_pass_nginx(batched: Batched) -> None:
    batched.defer(500)

    with batched.server(), proxy(batched.site.folder, batched.port) as ports:
        for configuration in ("plain", "kept-alive"):
            with batched.engine(ports[configuration]):
                batched.emptied()
            assert batched.site.runs() == each_once(500)
            assert batched.requests()["b1 taken"] > 0
            for name in ("journal", "requests"):
                (batched.site.folder / name).unlink()
            batched.defer(500)
