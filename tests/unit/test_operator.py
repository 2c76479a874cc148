"""The engine's operator port: is it alive, does it take tasks, and what else it answers."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import deferlib
from deferlib import config
from deferlib.core.model import SECOND, Action, Claim, Outcome, Result
from deferlib.engine import operator
from deferlib.engine.build import build
from deferlib.engine.engine import Engine
from deferlib.engine.metrics import Metrics
from deferlib.engine.observer import LogObserver
from deferlib.engine.operator import STUCK, Health, OperatorPort, State, address
from deferlib.errors import ConfigError, StoreUnavailableError

APP = """
import pathlib, time

HERE = pathlib.Path(__file__).parent

def app(environ, start_response):
    start_response("204 No Content", [])
    return []

def hold():
    (HERE / "held").touch()
    while not (HERE / "go").exists():
        time.sleep(0.01)
"""


class Ticks:
    """A monotonic clock that is set."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


class Nobody:
    """An observer who takes no notice."""

    def ended(self, now: int, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        assert outcome.action is not Action.RENEW


class StoppingEngine:
    stopping = True


# --- what is said of the engine ---------------------------------------------------------------------------------------


class Case:
    """An engine's health, by a clock that is set."""

    def __init__(self) -> None:
        self.ticks = Ticks()
        self.metrics = Metrics(Nobody(), self.ticks)
        self.health = Health(self.metrics)

    def turn(self, error: Exception | None = None) -> None:
        with suppress(Exception), self.metrics:
            if error is not None:
                raise error


def test_before_its_first_turn_an_engine_is_starting_for_as_long_as_that_takes() -> None:
    case = Case()
    case.ticks.at += 1000

    assert case.health.alive() == State(True, "starting")
    assert case.health.ready() == State(False, "starting")


def test_after_a_turn_it_is_alive_and_ready() -> None:
    case = Case()
    case.turn()
    case.ticks.at += STUCK - 0.1

    assert case.health.alive() == State(True, "ok")
    assert case.health.ready() == State(True, "ready")


def test_without_a_turn_for_half_a_minute_it_is_neither() -> None:
    case = Case()
    case.turn()
    case.ticks.at += STUCK

    assert case.health.alive() == case.health.ready() == State(False, "no turn has ended for 30 s")


def test_a_turn_that_hangs_is_none_that_ended() -> None:
    case = Case()
    case.turn()
    with case.metrics:
        case.ticks.at += 45

        assert case.health.alive() == State(False, "no turn has ended for 45 s")


def test_an_engine_whose_thread_has_ended_is_not_alive() -> None:
    case = Case()
    thread = threading.Thread(target=case.turn)
    thread.start()
    thread.join()

    assert case.health.alive() == case.health.ready() == State(False, "the engine's thread has ended")


@pytest.mark.parametrize(
    ("error", "text"),
    [(StoreUnavailableError("canary"), "the store failed"), (KeyError("canary"), "the last turn failed")],
)
def test_after_a_turn_that_failed_it_is_alive_but_not_ready_until_one_succeeds(error: Exception, text: str) -> None:
    case = Case()
    case.turn()
    case.turn(error)

    assert case.health.alive() == State(True, "ok")
    assert case.health.ready() == State(False, text)
    case.turn()
    assert case.health.ready() == State(True, "ready")


def test_an_engine_that_is_to_stop_is_not_ready_whatever_else_is_wrong() -> None:
    case = Case()
    case.health.engine = StoppingEngine()  # type: ignore[assignment]
    assert case.health.ready() == State(False, "draining")
    case.turn(StoreUnavailableError("gone"))

    assert case.health.ready() == State(False, "draining")
    assert case.health.alive() == State(True, "ok")


# --- where it listens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        (9100, ("127.0.0.1", 9100)), ("0.0.0.0:9100", ("0.0.0.0", 9100)), ("[::]:9100", ("::", 9100)),
        ("ops.example.com:1", ("ops.example.com", 1)),
    ],
)  # fmt: skip
def test_a_port_alone_is_this_machines(setting: int | str, where: tuple[str, int]) -> None:
    assert address(setting) == where


class Response(NamedTuple):
    status: int
    text: str
    headers: dict[str, str]


def ask(port: int, path: str, method: str = "GET", host: str | None = None) -> Response:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Response(response.status, response.read().decode(), headers)
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Open(NamedTuple):
    """An open port, and the engine it tells of, which is turned by hand."""

    number: int
    port: OperatorPort
    engine: Engine

    def turn(self) -> None:
        with self.port.metrics:
            self.engine.turn()


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Callable[..., config.Runtime]]:
    former = config.install(None)
    made: list[config.Runtime] = []

    def make(port: int | str, **settings: Any) -> config.Runtime:
        made.append(config.configure(store=f"sqlite:///{tmp_path}/tasks.db", queues=[], port=port, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()
    config.install(former)


@contextmanager
def opened(runtime: config.Runtime) -> Iterator[Open]:
    port = OperatorPort(runtime, LogObserver())
    engine = build(runtime, deferlib.handler, observer=port.metrics, monitor=port.metrics)
    try:
        port.tell(engine)
        yield Open(port.address[1], port, engine)
    finally:
        engine.close()
        port.close()


@pytest.fixture
def site(runtime: Callable[..., config.Runtime]) -> Iterator[Open]:
    with opened(runtime(free_port())) as site:
        yield site


def test_the_three_paths_answer(site: Open) -> None:
    before = ask(site.number, "/readyz")
    site.turn()

    assert (before.status, before.text) == (503, "starting\n")
    assert ask(site.number, "/healthz")[:2] == (200, "ok\n")
    assert ask(site.number, "/readyz")[:2] == (200, "ready\n")
    metrics = ask(site.number, "/metrics")
    assert metrics.status == 200
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "deferlib_turn_seconds_count 1.0\n" in metrics.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_head_answers_as_get_without_a_body(site: Open, path: str) -> None:
    got, head = ask(site.number, path), ask(site.number, path, "HEAD")

    assert (head.status, head.text) == (got.status, "")
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize("path", ["/", "/metrics/", "/healthz/x", "/Metrics", "/_ah/queue/deferred", "/%00"])
def test_everything_else_is_not_there(site: Open, path: str) -> None:
    assert ask(site.number, path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "get"])
def test_other_methods_are_refused(site: Open, method: str) -> None:
    answer = ask(site.number, "/metrics", method)

    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert "deferlib_" not in answer.text


@pytest.mark.parametrize("host", ["evil.test", "localhost.evil.test", "127.0.0.1.evil.test:9100", "0.0.0.0", "10.0.0.1"])
def test_a_page_that_leads_its_own_name_here_reads_nothing(site: Open, host: str) -> None:
    for path in ("/metrics", "/healthz", "/readyz", "/x"):
        answer = ask(site.number, path, host=host)
        assert (answer.status, answer.text) == (403, "this port answers to localhost only\n")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "127.1.2.3:80", "[::1]:9100", "LOCALHOST"])
def test_this_machine_has_several_names(site: Open, host: str) -> None:
    assert ask(site.number, "/healthz", host=host).status == 200


def test_a_port_for_other_machines_has_any_name(runtime: Callable[..., config.Runtime]) -> None:
    with opened(runtime(f"0.0.0.0:{free_port()}")) as site:
        assert ask(site.number, "/healthz", host="engine-7.pods.example.com").status == 200


def test_answers_say_nothing_of_the_server_and_are_not_kept(site: Open) -> None:
    answer = ask(site.number, "/metrics")

    assert answer.headers["server"] == "deferlib"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_port_in_use_is_an_error_that_names_the_setting(runtime: Callable[..., config.Runtime]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            OperatorPort(runtime(number), LogObserver())

    text = f"setting 'port' from argument: can't listen on 127.0.0.1:{number}: Address already in use; "
    assert str(caught.value).startswith(text)


def test_a_host_that_isnt_this_one_is_an_error(runtime: Callable[..., config.Runtime]) -> None:
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1:9100: "):
        OperatorPort(runtime("192.0.2.1:9100"), LogObserver())


def test_once_it_is_closed_nobody_listens_and_no_thread_is_left(runtime: Callable[..., config.Runtime]) -> None:
    with opened(runtime(free_port())) as site:
        ask(site.number, "/metrics")

    with pytest.raises(ConnectionRefusedError):
        ask(site.number, "/healthz")
    assert "deferlib-port" not in {thread.name for thread in threading.enumerate()}


def test_the_answers_need_no_turn_to_end(site: Open) -> None:
    """The engine's thread hangs in its transaction."""
    site.turn()
    inside, go_on = threading.Event(), threading.Event()

    def step(name: str) -> None:
        if name == "commit":
            inside.set()
            go_on.wait(20)

    site.engine._step = step
    deferlib.defer(print)
    hanging = threading.Thread(target=site.turn)
    site.engine.wake()
    hanging.start()
    inside.wait(20)
    try:
        answers = [ask(site.number, path) for path in ("/healthz", "/readyz", "/metrics")]
    finally:
        go_on.set()
        hanging.join()

    assert [answer.status for answer in answers] == [200, 200, 200]
    assert "deferlib_store_up 1.0\n" in answers[2].text


def test_clients_that_send_nothing_keep_nobody_waiting(site: Open) -> None:
    idle = [socket.create_connection(("127.0.0.1", site.number)) for _ in range(20)]
    try:
        assert ask(site.number, "/healthz").status == 200
    finally:
        for each in idle:
            each.close()


# --- clients that take their time --------------------------------------------------------------------------------------


def knock(number: int, data: bytes = b"GET /healthz HTTP/1.1\r\nX: ") -> socket.socket:
    """Open a connection whose request isn't all there."""
    client = socket.create_connection(("127.0.0.1", number), timeout=20)
    client.sendall(data)
    return client


def is_ended(client: socket.socket) -> bool:
    """Tell whether the port has ended the connection, without waiting for that."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "start", [b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"]
)
def test_as_many_slow_clients_as_there_are_places_keep_nobody_out(site: Open, start: bytes) -> None:
    slow = [knock(site.number, start) for _ in range(operator._REQUESTS)]
    try:
        answers = [ask(site.number, "/healthz").status for _ in range(5)]
    finally:
        for each in slow:
            each.close()

    assert answers == [200] * 5


def test_the_oldest_gives_way(site: Open) -> None:
    slow = [knock(site.number) for _ in range(operator._REQUESTS)]
    try:
        assert ask(site.number, "/healthz").status == 200
        wait_for(lambda: is_ended(slow[0]))
        assert [is_ended(each) for each in slow[1:]] == [False] * (operator._REQUESTS - 1)
    finally:
        for each in slow:
            each.close()


def test_a_client_whose_answer_is_being_made_gives_way_to_nobody(site: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def text() -> bytes:
        inside.set()
        go_on.wait(20)
        return b"slow but sure"

    monkeypatch.setattr(site.port._exposition, "text", text)
    first = knock(site.number, b"GET /metrics HTTP/1.0\r\n\r\n")
    inside.wait(20)
    slow = [knock(site.number) for _ in range(2 * operator._REQUESTS)]
    try:
        assert ask(site.number, "/healthz").status == 200
        go_on.set()
        assert b"".join(iter(lambda: first.recv(4096), b"")).endswith(b"slow but sure")
    finally:
        go_on.set()
        for each in (first, *slow):
            each.close()


def test_more_answers_at_once_than_there_are_places_are_not_made(site: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Semaphore(0), threading.Event()

    def text() -> bytes:
        started.release()
        go_on.wait(20)
        return b"done"

    monkeypatch.setattr(site.port._exposition, "text", text)
    asked = [knock(site.number, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(operator._REQUESTS)]
    try:
        for _ in asked:
            assert started.acquire(timeout=20)
        with pytest.raises(ConnectionError):
            ask(site.number, "/healthz")
        go_on.set()
        assert all(b"".join(iter(partial(each.recv, 4096), b"")).endswith(b"done") for each in asked)
    finally:
        go_on.set()
        for each in asked:
            each.close()


def test_a_connection_ends_at_its_time_however_busily_it_sends(
    runtime: Callable[..., config.Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "_PATIENCE", 0.5)
    with opened(runtime(free_port())) as site:
        client = knock(site.number)
        client.settimeout(0.02)
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 10:
                with suppress(TimeoutError):
                    client.recv(1)
                    break
                client.sendall(b"a")
        client.close()

        assert 0.4 <= time.monotonic() - began < 10
        assert ask(site.number, "/healthz").status == 200


def test_closing_ends_what_is_open(runtime: Callable[..., config.Runtime]) -> None:
    with opened(runtime(free_port())) as site:
        client = knock(site.number)
        assert ask(site.number, "/healthz").status == 200, "so the one before has its place"

    client.settimeout(5)  # its own patience is longer
    assert client.recv(1) == b""
    client.close()


# --- `deferlib engine` ------------------------------------------------------------------------------------------------


@contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start an engine, and give it with its first line; kill it at the end."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "deferlib.cli", "engine", "--app", "opsapp:app", *options],
            cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_engine_is_ready_then_draining_and_its_port_is_open_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Callable[..., config.Runtime]
) -> None:
    (tmp_path / "opsapp.py").write_text(APP)
    (tmp_path / "queue.yaml").write_text("queue:\n- name: default\n")
    monkeypatch.syspath_prepend(tmp_path)
    import opsapp  # type: ignore[import-not-found]  # written above

    number = free_port()
    runtime(number)
    with running(tmp_path, "--port", str(number), "--store", f"sqlite:///{tmp_path}/tasks.db") as (process, line):
        assert f", health and metrics at http://127.0.0.1:{number}, " in line
        wait_for(lambda: ask(number, "/readyz").status == 200)
        deferlib.defer(opsapp.hold)
        wait_for((tmp_path / "held").exists)
        busy = ask(number, "/metrics").text
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: ask(number, "/readyz").status == 503)
        draining = [ask(number, path) for path in ("/readyz", "/healthz", "/metrics")]
        (tmp_path / "go").touch()
        assert process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            ask(number, "/healthz")
    sys.modules.pop("opsapp")

    assert 'deferlib_in_flight{target="default"} 1.0\n' in busy
    assert [(answer.status, answer.text) for answer in draining[:2]] == [(503, "draining\n"), (200, "ok\n")]
    assert draining[2].status == 200
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_an_engine_whose_port_is_taken_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "opsapp.py").write_text(APP)
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        with running(tmp_path, "--port", str(number)) as (process, line):
            assert process.wait(30) == 2

    said = (tmp_path / "stderr").read_text()
    assert line == ""
    assert said.startswith(f"deferlib: error: setting 'port' from --port: can't listen on 127.0.0.1:{number}: ")
    assert said.count("\n") == 1


def test_without_a_port_the_engine_counts_nothing(runtime: Callable[..., config.Runtime]) -> None:
    engine = build(runtime(free_port()), deferlib.handler)
    try:
        assert engine._observer is None
        assert not isinstance(engine._monitor, Metrics)
        engine.stop(SECOND)
        assert engine.stopping
    finally:
        engine.close()
