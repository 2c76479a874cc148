"""A captured request of the engine is worth nothing for anything else: another path, another body, another time."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import deferlib
from deferlib import config, token
from deferlib.clock import SystemClock
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE, SECOND
from deferlib.deferred import DEFAULT_URL
from deferlib.keys import parse
from deferlib.taskqueue import Task
from tests.system.processes import TIMEOUT, Site, wait_until
from tests.system.serving import PARSERS
from tests.system.wire import KEY, Wire, reports, request, serving, statuses, talk


class Captured(NamedTuple):
    """What an engine sent: of a deferred call, and of a task to a view."""

    call: bytes
    view: bytes


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Let a real engine push to a listener of our own, which keeps what it hears."""
    site = Site(tmp_path_factory.mktemp("captured"))
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site.folder))
        import systemapp  # type: ignore[import-not-found]  # the site writes it

        runtime = deferlib.configure(store=site.environ["DEFERLIB_STORE"], key=KEY)
        threading.Thread(target=_hear, args=(listener, heard), daemon=True).start()
        deferlib.defer(systemapp.note, 1)
        Task(url="/work/here", payload=b"a body").add("default")
        with site.engine(DEFERLIB_KEY=KEY, DEFERLIB_APP=f"http://127.0.0.1:{listener.getsockname()[1]}"):
            wait_until(lambda: len(heard) == 2, "both tasks came")
        runtime.close()
        config.install(None)
    return Captured(*sorted(heard, key=lambda said: DEFAULT_URL.encode() not in said))


def _hear(listener: socket.socket, heard: list[bytes]) -> None:
    """Answer each request with a success, on a connection of its own."""
    while len(heard) < 2:
        connection, _ = listener.accept()
        with connection:
            said = connection.recv(65_536)
            while len(said.partition(b"\r\n\r\n")[2]) < int(re.findall(rb"(?i)content-length: (\d+)", said)[0]):
                said += connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        heard.append(said.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))


@pytest.fixture(scope="module", params=PARSERS)
def wire(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with serving(request.param, tmp_path_factory.mktemp("replay")) as wire:
        yield wire


def altered(said: bytes, what: bytes, by: bytes) -> bytes:
    assert what in said
    return said.replace(what, by, 1)


def other_token(said: bytes) -> bytes:
    """Return the request with one character of its token changed, in the middle of what it vouches for."""
    start = said.lower().index(b"x-deferlib-signature: ") + 80
    return said[:start] + (b"A" if said[start : start + 1] != b"A" else b"B") + said[start + 1 :]


@pytest.mark.parametrize("kind", Captured._fields)
def test_captured_request_is_refused_for_anything_else(captured: Captured, wire: Wire, kind: str) -> None:
    said: bytes = getattr(captured, kind)
    path = re.findall(rb"POST (\S+)", said)[0]
    body = said.partition(b"\r\n\r\n")[2]
    others = {
        "another path": altered(said, path, b"/work/there"),
        "the handler's path": altered(said, path, DEFAULT_URL.encode() + (b"/" if kind == "call" else b"")),
        "a path below": altered(said, path, path + b"/x"),
        "a query": altered(said, path, path + b"?a=1"),
        "another case": altered(said, path, path.upper()),
        "PUT": altered(said, b"POST", b"PUT"),
        "GET": altered(said, b"POST", b"GET"),
        "another body": said[:-1] + bytes([said[-1] ^ 1]),
        "another token": other_token(said),
        "a token with a comma": altered(said, b"X-Deferlib-Signature: v1", b"X-Deferlib-Signature: v1.,v1"),
        "two tokens": altered(said, b"\r\n\r\n", b"\r\nX-Deferlib-Signature: v1.x.y.z\r\n\r\n"),
        "no body": altered(said.removesuffix(body), b"Content-Length: %d" % len(body), b"Content-Length: 0"),
    }

    for what, other in others.items():
        answer = talk(wire.port, other, TIMEOUT)
        assert set(statuses(answer)) <= {400, 403, 405}, f"{what}: {answer[:400]!r}"
        assert statuses(answer), what

    assert not wire.site.runs()
    assert not wire.tasks_seen()


def test_late_request_is_refused(wire: Wire) -> None:
    now = SystemClock().now()
    for signed_at, status in ((now - 2 * MINUTE, 200), (now - 21 * MINUTE, 403), (now + 11 * MINUTE, 403)):
        task = TaskContext(7, "", "default", 1, 0, now, now + MINUTE, 1, "", "/look", SystemClock())
        dispatch = Dispatch(task, {"X-AppEngine-TaskName": "7"})
        signature = token.sign(parse(KEY), signed_at, dispatch, method="GET", body=b"", deadline=600 * SECOND)

        answer = talk(wire.port, request([f"X-Deferlib-Signature: {signature}".encode()]), TIMEOUT)

        assert statuses(answer) == [status]
    wire.seen.unlink()


def test_changed_headers_are_as_if_they_were_not(captured: Captured, wire: Wire) -> None:
    """The token contains the true ones; they take the place of whatever came."""
    said = altered(
        captured.view, b"X-AppEngine-TaskRetryCount: 0", b"X-AppEngine-TaskRetryCount: 7\r\nX_AppEngine_Queuename: forged"
    )

    (report,) = reports(talk(wire.port, said, TIMEOUT))

    assert report["found"]["X-AppEngine-QueueName"] == "default"
    assert "forged" not in str(report)
    assert "7" not in [value for key, value in report["keys"].items() if "RETRYCOUNT" in key.upper()]
    wire.seen.unlink()


def test_captured_request_itself_runs(captured: Captured, wire: Wire) -> None:
    """Or the tests above would say nothing. A repeated delivery is possible at any time: a task runs at least once."""
    assert statuses(talk(wire.port, captured.call, TIMEOUT)) == [200]
    assert statuses(talk(wire.port, captured.view, TIMEOUT)) == [200]

    assert wire.site.runs() == {"1": 1}
    assert len(wire.tasks_seen()) == 1
