"""HTTP as bytes on a socket, and an app that says what it saw of a request: for tests of what may be believed."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.store.children import need
from tests.system.processes import TIMEOUT, Site, free_port, listens, wait_until, whole_lines
from tests.system.serving import PARSERS

KEY = "the-key-of-the-tests-on-the-wire"
PREFIX = "/tasks"  # what a proxy strips, where one does
TASK_ADDRESS = "0.1.0.2"
ENGINES = (
    "X-AppEngine-QueueName",
    "X-AppEngine-TaskName",
    "X-AppEngine-Anything",
    "X-CloudTasks-TaskName",
    "X-Deferlib-Signature",
    "X-Deferlib-Fence",
)
VIEWS = '''
"""An app whose views say what they see of a request, and keep it if it is a task's."""
import json
import os

import deferlib
import deferlib.contrib.asgi
import systemapp
from django.http.request import HttpHeaders
from starlette.datastructures import Headers
from werkzeug.datastructures import EnvironHeaders
from werkzeug.middleware.proxy_fix import ProxyFix

ENGINES = ("X-AppEngine-QueueName", "X-AppEngine-TaskName", "X-AppEngine-Anything", "X-CloudTasks-TaskName",
           "X-Deferlib-Signature", "X-Deferlib-Fence")

def found(*mappings):
    """What a view finds that asks for a header as its framework tells it to."""
    return {name: mapping.get(name) for mapping in mappings for name in ENGINES if mapping.get(name) is not None}

def report(keys, client, found, method, path, query, body):
    task = deferlib.current_task()
    told = None if task is None else [task.name, task.queue, task.namespace, task.url, task.attempt]
    text = json.dumps({"keys": keys, "client": client, "found": found, "method": method, "path": path, "query": query,
                       "body": len(body), "task": told})
    if task is not None:
        with open(os.environ["SEEN"], "a") as file:
            print(text, file=file)
    return f"<<<{text}>>>".encode()

def wsgi_views(environ, start_response):
    try:
        size = 10_000 if environ.get("wsgi.input_terminated") else int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(size)
    except OSError:  # a server that can't read what it let through
        body = b""
    keys = {key: value for key, value in environ.items() if isinstance(value, str)}
    path = (environ["SCRIPT_NAME"] + environ["PATH_INFO"]).encode("latin-1").decode("utf-8", "replace")
    seen = found(EnvironHeaders(environ), HttpHeaders(environ))
    answer = report(keys, environ.get("REMOTE_ADDR"), seen, environ["REQUEST_METHOD"], path, environ["QUERY_STRING"], body)
    start_response("200 OK", [("Content-Length", str(len(answer))), ("Content-Type", "text/plain")])
    return [answer]

async def asgi_views(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    keys = {"HTTP_" + name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    client = (scope.get("client") or [None])[0]
    query = scope["query_string"].decode("latin-1")
    answer = report(keys, client, found(Headers(scope=scope)), scope["method"], scope["path"], query, body)
    headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})

wsgi = deferlib.wrap_wsgi_app(wsgi_views)
proxied = ProxyFix(wsgi, x_for=1)
asgi = deferlib.contrib.asgi.wrap_asgi_app(asgi_views)
'''


class Wire:
    """A server under test, and where it listens."""

    def __init__(self, name: str, site: Site, port: int) -> None:
        self.name = name
        self.site = site
        self.port = port
        self.seen = site.folder / "seen"

    def tasks_seen(self) -> list[dict[str, Any]]:
        """Return what the views saw of the tasks so far."""
        return [json.loads(line) for line in whole_lines(self.seen)]


@contextmanager
def serving(name: str, folder: Path) -> Iterator[Wire]:
    """Serve the app in *folder* by one of the PARSERS."""
    if name.endswith("httptools"):
        need(importlib.util.find_spec("httptools") is not None, "httptools")
    site = Site(folder)
    (folder / "served.py").write_text(VIEWS)
    site.environ |= {"DEFERLIB_KEY": KEY, "DEFERLIB_PREFIX": PREFIX, "SEEN": str(folder / "seen")}
    port = free_port()
    with site.process(PARSERS[name].command(port), XDG_RUNTIME_DIR=str(folder)) as process:
        wait_until(lambda: listens(port) or process.poll() is not None, "the server listens")
        assert process.poll() is None, site.log()
        yield Wire(name, site, port)


def talk(port: int, said: bytes, patience: float = 0.5) -> bytes:
    """Say *said* and return all that comes back until the other side closes, or is silent for *patience* seconds."""
    parts = []
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.settimeout(patience)
        try:
            connection.sendall(said)
            while part := connection.recv(65_536):
                parts.append(part)
        except (ConnectionError, TimeoutError):
            pass  # a refusal: what came before it counts
    return b"".join(parts)


def request(
    lines: list[bytes],
    *,
    method: str = "GET",
    target: str = "/look",
    body: bytes = b"",
    version: str = "1.1",
    last: bool = True,
) -> bytes:
    """Return a request with the header *lines* as they are."""
    head = [f"{method} {target} HTTP/{version}".encode(), b"Host: localhost", *lines]
    if body:
        head.append(b"Content-Length: %d" % len(body))
    if last:
        head.append(b"Connection: close")
    return b"\r\n".join([*head, b"", body])


def statuses(answer: bytes) -> list[int]:
    """Return the status of each response in *answer*."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})[ \r]", answer)]


def reports(answer: bytes) -> list[dict[str, Any]]:
    """Return what the app said that it saw, in each response in *answer*."""
    return [json.loads(text) for text in re.findall(rb"<<<(.*?)>>>", answer)]


def believed(report: dict[str, Any]) -> list[str]:
    """Return what a view could take for an engine's word in a request that no engine made: nothing, if all is well."""
    wrong = [f"found {name}: {value}" for name, value in report["found"].items()]
    for key, value in report["keys"].items():
        folded = re.sub(r"[-_]", "", key.removeprefix("HTTP_").strip(" \t").lower())
        if folded.startswith(("xappengine", "xcloudtasks", "xdeferlib")):
            wrong.append(f"{key}: {value}")
    wrong += [f"client {report['client']}"] if (report["client"] or "").strip() == TASK_ADDRESS else []
    wrong += [f"task {report['task']}"] if report["task"] is not None else []
    return wrong
