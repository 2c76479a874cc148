"""The web servers that deferlib's app is served by in the system tests, and that app's views."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import requests

from deferlib import deferred, payload, taskqueue
from deferlib.taskqueue.limits import MAX_TASKS_PER_ADD
from tests.system.processes import TIMEOUT, Site, end, listens, wait_until, whole_lines

VIEWS = '''
"""The system tests' app with views: one defers, one shows the headers that it was sent."""
import json
from urllib.parse import parse_qsl

import deferlib
import deferlib.contrib.asgi
import systemapp

def answer(path, query, headers):
    if path == "/defer":
        for number in range(query["first"], query["first"] + query["count"]):
            deferlib.defer(systemapp.note, number)
        return b"deferred"
    return json.dumps(headers).encode()

def numbers(query):
    return {name: int(value) for name, value in parse_qsl(query)}

def views(environ, start_response):
    headers = {key[5:].lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
    body = answer(environ["PATH_INFO"], numbers(environ["QUERY_STRING"]), headers)
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi_views(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    headers = {name.decode().lower().replace("-", "_"): value.decode() for name, value in scope["headers"]}
    body = answer(scope["path"], numbers(scope["query_string"].decode()), headers)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

wsgi = deferlib.wrap_wsgi_app(views)
asgi = deferlib.contrib.asgi.wrap_asgi_app(asgi_views)
'''
PRELOADED = '''
"""The same app, whose import uses the store: in a server that preloads it, before the workers are forked."""
import os

import deferlib
import systemapp
from served import wsgi

def store_files():
    """Return the open descriptors of the store's files."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and "tasks.db" in os.readlink(link)]

def tell(who):
    with open("forks", "a") as file:
        print(who, len(store_files()), file=file)

deferlib.defer(systemapp.note, -1)
# "before" runs in the reverse order, so ours comes before deferlib's; "after" comes after it.
os.register_at_fork(before=lambda: tell("parent"), after_in_child=lambda: tell("child"))
'''
_WERKZEUG = (
    "import sys, served; from werkzeug.serving import run_simple;"
    "run_simple('127.0.0.1', int(sys.argv[1]), served.wsgi, threaded=True)"
)


class Server(NamedTuple):
    """How a server is started: its arguments, in which `{port}` stands for the port."""

    arguments: list[str]
    workers: int = 1
    graceful: bool = True  # SIGTERM lets it finish what it works on; others end at once

    def command(self, port: int) -> list[str]:
        return [sys.executable, *(argument.format(port=port) for argument in self.arguments)]


def _module(line: str, workers: int = 1, *, graceful: bool = True) -> Server:
    return Server(["-m", *line.split()], workers, graceful)


# `--header-map dangerous`: else gunicorn itself drops headers with underscores, and deferlib has nothing to do.
_GUNICORN = "gunicorn --bind 127.0.0.1:{port} --log-level error --header-map dangerous --workers 2"
SERVERS = {
    "gunicorn": _module(f"{_GUNICORN} served:wsgi", 2),
    "gunicorn-gthread": _module(f"{_GUNICORN} --threads 8 served:wsgi", 2),
    "gunicorn-preload": _module(f"{_GUNICORN} --threads 8 --preload preloaded:wsgi", 2),
    "gunicorn-recycled": _module(f"{_GUNICORN} --max-requests 20 served:wsgi", 2),
    "waitress": _module("waitress --listen=127.0.0.1:{port} --threads=8 served:wsgi", graceful=False),
    "granian": _module("granian --interface wsgi --port {port} --workers 2 --no-ws --log-level error served:wsgi", 2),
    "cheroot": _module("cheroot --bind 127.0.0.1:{port} served:wsgi", graceful=False),
    "uvicorn": _module("uvicorn --port {port} --log-level error served:asgi"),
    "uvicorn-workers": _module("uvicorn --port {port} --log-level error --workers 2 served:asgi", 2),
    "werkzeug": Server(["-c", _WERKZEUG, "{port}"], graceful=False),
}

# One of each parser of HTTP, for what is said on the wire: one worker, behind a proxy that they trust where they can.
PARSERS = {
    "werkzeug": Server(["-c", _WERKZEUG, "{port}"]),
    "gunicorn": _module(f"{_GUNICORN} --workers 1 served:wsgi"),
    "gunicorn-gthread": _module(f"{_GUNICORN} --workers 1 --threads 4 served:proxied"),
    "waitress": _module(
        "waitress --listen=127.0.0.1:{port} --trusted-proxy=127.0.0.1 --trusted-proxy-headers=x-forwarded-for served:wsgi"
    ),
    "cheroot": _module("cheroot --bind 127.0.0.1:{port} --threads 30 served:wsgi"),
    "granian": _module("granian --interface wsgi --port {port} --workers 1 --no-ws --log-level error served:wsgi"),
    "granian-asgi": _module("granian --interface asgi --port {port} --workers 1 --no-ws --log-level error served:asgi"),
    "uvicorn-h11": _module("uvicorn --port {port} --http h11 --log-level error served:asgi"),
    "uvicorn-httptools": _module("uvicorn --port {port} --http httptools --log-level error served:asgi"),
}


class Web:
    """A site with the views, and the server under test."""

    def __init__(self, site: Site, server: Server, port: int) -> None:
        self.site = site
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        (site.folder / "served.py").write_text(VIEWS)
        (site.folder / "preloaded.py").write_text(PRELOADED)

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[bytes]]:
        """Serve the app; the server is killed at the end of the block, unless it has ended."""
        with self.site.process(self.server.command(self._port), XDG_RUNTIME_DIR=str(self.site.folder)) as process:
            wait_until(lambda: listens(self._port) or process.poll() is not None, "the server listens")
            assert process.poll() is None, self.site.log()
            yield process

    @contextmanager
    def engine(self, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
        """`deferlib engine`, pushing to the server."""
        with self.site.engine(DEFERLIB_APP=self.url, **environ) as engine:
            yield engine

    def defer(self, first: int, count: int) -> None:
        """Defer the calls from *first* on in a view, as one request of the app."""
        requests.get(f"{self.url}/defer?first={first}&count={count}", timeout=TIMEOUT).raise_for_status()

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Stop the server as systemd would, and wait until the port is free."""
        end(process)
        wait_until(lambda: not listens(self._port), "nobody listens any longer")

    def pids(self) -> set[str]:
        """Return the processes that calls have run in."""
        return {line.split()[3] for line in whole_lines(self.site.journal)}


def defer_many(count: int, seconds: float = 0.0) -> None:
    """Defer the calls 0 to *count* - 1, as many at once as one call may add."""
    import systemapp  # type: ignore[import-not-found]  # the site writes it

    queue = taskqueue.Queue("default")
    calls = [payload.dump_call(systemapp.note, (number, seconds), {}) for number in range(count)]
    for first in range(0, count, MAX_TASKS_PER_ADD):
        queue.add(
            [taskqueue.Task.of_call(call, url=deferred.DEFAULT_URL) for call in calls[first : first + MAX_TASKS_PER_ADD]]
        )
