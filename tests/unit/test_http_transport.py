"""The HTTP transport against real sockets, most of them badly served."""

from __future__ import annotations

import os
import resource
import select
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deferlib.clock import SystemClock
from deferlib.core.model import SECOND, Claim, Delivery, Kind, Micros, Result
from deferlib.engine.http import HttpTransport
from deferlib.engine.transport import ERROR_LENGTH, Request
from deferlib.engine.wake import Waker
from deferlib.engine.window import LEAST, Window
from tests.unit.bad_servers import (
    CERTIFICATE,
    OK,
    Connection,
    Script,
    answering,
    answering_once,
    closed_port,
    serving,
)

PATIENCE: Micros = 20 * SECOND  # how long a test waits for what should come at once
DEADLINE: Micros = 20 * SECOND
SHORT: Micros = SECOND // 10

Make = Callable[..., HttpTransport]


class StillClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.time: Micros = 0

    def now(self) -> Micros:
        return self.time


def prepare(delivery: Delivery, now: Micros) -> Request:
    claim = delivery.claim
    headers = ["Content-Type: application/octet-stream", "User-Agent: test"]
    return Request(claim.method, delivery.base + claim.url, headers, claim.body)


@pytest.fixture
def make() -> Iterator[Make]:
    """Make transports that are closed at the end."""
    made = []

    def build(prepare: Callable[[Delivery, Micros], Request] = prepare, **options: object) -> HttpTransport:
        clock = options.pop("clock", None) or SystemClock()
        made.append(HttpTransport(prepare, clock, **options))  # type: ignore[arg-type]  # as each test spells them
        return made[-1]

    yield build
    for transport in made:
        transport.close()


@pytest.fixture
def transport(make: Make) -> HttpTransport:
    return make()


def delivery(
    base: str,
    id: int = 1,
    *,
    method: str = "POST",
    body: bytes = b"body",
    deadline: Micros = DEADLINE,
    claims: int = 0,
    queue: str = "default",
) -> Delivery:
    """Return a delivery whose path tells its id."""
    nothing = ("", "", "", "", "", 0, 0, 0, "")  # target, headers, namespace, tag, retry, deadline, ..., history
    claim = Claim(id, claims or id + 1000, queue, None, 0, 0, 1, 0, 0, 0, 0, 0, "", method, f"/task/{id}", *nothing, body)
    return Delivery(claim, base, deadline)


def collect(transport: HttpTransport, count: int) -> list[Result]:
    """Wait for *count* results and return them in order of id."""
    results: list[Result] = []
    until = SystemClock().now() + PATIENCE
    while len(results) < count and SystemClock().now() < until:
        transport.wait(until)
        results += transport.results()
    assert len(results) == count, results
    return sorted(results)


def deliver(transport: HttpTransport, *deliveries: Delivery) -> list[Result]:
    for each in deliveries:
        transport.send(each)
    return collect(transport, len(deliveries))


def deliver_one(transport: HttpTransport, base: str, **options: object) -> Result:
    [result] = deliver(transport, delivery(base, **options))  # type: ignore[arg-type]  # passed on
    return result


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# --- answers ---------------------------------------------------------------------------------------------------------


def test_request_arrives_as_prepared_and_its_answer_is_reported(transport: HttpTransport) -> None:
    with serving(answering(answer("200 OK", "X-Deferlib-Outcome: ok", body=b"fine"))) as server:
        before = SystemClock().now()

        result = deliver_one(transport, server.base, body=b"\0payload\xff", claims=77)

        [received] = server.received
    assert result[:3] == (1, 77, Kind.ANSWERED)
    assert before <= result.started <= result.ended <= SystemClock().now()
    assert result[5:] == (200, "ok", "", 0, False)
    assert received.line == "POST /task/1 HTTP/1.1"
    assert received.body == b"\0payload\xff"
    assert received.headers.keys() == {"host", "accept", "content-type", "user-agent", "content-length"}


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (503, "Retry-After: 7", 7),
        (429, "retry-after:0120 ", 120),
        (503, "Retry-After: 99999999999999999999", 86_400),
        (503, "Retry-After: soon", 0),
        (503, "X: y", 0),
        (500, "Retry-After: 7", 0),
    ],
)
def test_retry_after_of_an_overloaded_target_is_reported(
    transport: HttpTransport, status: int, header: str, seconds: int
) -> None:
    with serving(answering(answer(f"{status} X", header))) as server:
        assert [each.retry_after for each in deliver(transport, delivery(server.base), delivery(server.base, 2))] == [
            seconds * SECOND
        ] * 2


@pytest.mark.parametrize("status", [200, 204, 206, 299, 400, 404, 429, 500, 503])
def test_status_is_reported(transport: HttpTransport, status: int) -> None:
    with serving(answering(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status, result.outcome, result.error) == (Kind.ANSWERED, status, "", "")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_reported_and_not_followed(transport: HttpTransport, status: int) -> None:
    with serving(answering(OK)) as canary:
        moved = answer(f"{status} Elsewhere", f"Location: {canary.base}/")
        with serving(answering(moved)) as server:
            result = deliver_one(transport, server.base)

    assert (result.kind, result.status) == (Kind.ANSWERED, status)
    assert canary.connections == 0


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        (["X-Deferlib-Outcome: retry"], "retry"),
        (["x-dEFERLIB-outcome:key-unknown"], "key-unknown"),
        (["X-Deferlib-Outcome: Retry"], ""),
        (["X-Deferlib-Outcome: retry; x=1"], ""),
        (["X-Deferlib-Outcome: r\xe9try"], ""),
        (["X-Deferlib-Outcome: " + "a" * 40], "a" * 40),
        (["X-Deferlib-Outcome: " + "a" * 41], ""),
        (["X-Deferlib-Outcome:"], ""),
        (["X-Deferlib-Outcomes: retry"], ""),
        ([], ""),
    ],
)
def test_outcome_header_is_a_short_plain_word_or_nothing(
    transport: HttpTransport, headers: list[str], outcome: str
) -> None:
    with serving(answering(answer("500 Oops", *headers, body=b"why"))) as server:
        result = deliver_one(transport, server.base)

    assert (result.status, result.outcome) == (500, outcome)
    assert result.error == ("why" if outcome else "")


def test_outcome_counts_only_in_the_headers_of_the_final_answer(transport: HttpTransport) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nX-Deferlib-Outcome: permanent\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Deferlib-Outcome\r\n\r\n"
    chunks = b"2\r\nhi\r\n0\r\nServer-Timing: x\r\nX-Deferlib-Outcome: permanent\r\n\r\n"
    with serving(answering(early + final + chunks)) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status, result.outcome) == (Kind.ANSWERED, 200, "")


@pytest.mark.parametrize(
    ("status", "outcome", "told"),
    [("200 OK", "ok", False), ("500 Oops", "ok", True), ("200 OK", "permanent", True), ("500 Oops", "retry", True)],
)
def test_body_is_the_error_of_our_own_handler_only(transport: HttpTransport, status: str, outcome: str, told: bool) -> None:
    body = "ValueError: été\r\n\x1b[31m\tat line 1\u202e\xff".encode("latin-1", "replace")
    with serving(answering(answer(status, f"X-Deferlib-Outcome: {outcome}", body=body))) as server:
        result = deliver_one(transport, server.base)

    assert result.error == ("ValueError: \ufffdt\ufffd [31m at line 1?\ufffd" if told else "")


def test_error_text_is_cut(transport: HttpTransport) -> None:
    with serving(answering(answer("500 Oops", "X-Deferlib-Outcome: retry", body=b"x" * 50_000))) as server:
        result = deliver_one(transport, server.base)

    assert result.error == "x" * ERROR_LENGTH


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 P\r\nX: y\r\n\r\n"])
def test_interim_answers_are_skipped(transport: HttpTransport, interim: bytes) -> None:
    with serving(answering(interim * 500 + answer("200 OK", "X-Deferlib-Outcome: ok"))) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status, result.outcome) == (Kind.ANSWERED, 200, "ok")


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_status_decides_once_a_body_is_too_long(transport: HttpTransport, status: str) -> None:
    def script(connection: Connection) -> None:
        connection.read()
        connection.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        while True:  # until the client closes
            connection.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    with serving(script) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status) == (Kind.ANSWERED, int(status[:3]))


def test_body_of_five_gigabytes_is_not_read(transport: HttpTransport) -> None:
    written = []

    def script(connection: Connection) -> None:
        connection.read()
        connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000000\r\n\r\n")
        while True:
            connection.write(b"x" * 65_536)
            written.append(65_536)

    with serving(script) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status) == (Kind.ANSWERED, 200)
    assert sum(written) < 50_000_000  # what fits into the sockets' buffers


# --- what isn't an answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x00\x01garbage\xff\r\n\r\n", id="garbage"),
        pytest.param(b"<html>old</html>", id="http-0.9"),
        pytest.param(b"HTTP/1.1 abc\r\n\r\n", id="no-status"),
        pytest.param(b"HTTP/7.7 200 OK\r\n\r\n", id="version"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", id="two-lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello!", id="two-lengths-in-one"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", id="negative-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", id="short-body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello", id="bad-chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", id="unended-chunks"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000, id="huge-header"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, id="very-many-headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"Content-Length: 0\r\n\r\n", id="many-headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: %a\r\n" % (b"y" * 900) * 50, id="much-header"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000 + OK, id="endless-interim"),
    ],
)
def test_broken_answer_is_malformed(transport: HttpTransport, data: bytes) -> None:
    with serving(answering_once(data)) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status) == (Kind.MALFORMED, 0)
    assert result.error.startswith(f"malformed answer from {server.base}: ")


def test_upgrade_that_nobody_asked_for_is_malformed(transport: HttpTransport) -> None:
    with serving(answering(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")) as server:
        assert deliver_one(transport, server.base).kind is Kind.MALFORMED


def test_connection_refused_is_unreachable(transport: HttpTransport) -> None:
    port = closed_port()

    result = deliver_one(transport, f"http://127.0.0.1:{port}")

    assert (result.kind, result.error) == (Kind.UNREACHABLE, f"connection refused by http://127.0.0.1:{port}")


def test_password_of_a_target_is_not_told(transport: HttpTransport) -> None:
    port = closed_port()

    result = deliver_one(transport, f"http://user:secret@127.0.0.1:{port}")

    assert result.error == f"connection refused by http://127.0.0.1:{port}"


def test_unknown_name_is_unreachable(transport: HttpTransport) -> None:
    result = deliver_one(transport, "http://no..such..name")  # not even asked for, over the network

    assert (result.kind, result.error) == (Kind.UNREACHABLE, "the name of http://no..such..name could not be resolved")


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher", "telnet"])
def test_only_http_is_spoken(transport: HttpTransport, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "1").touch()
    with serving(answering(OK)) as server:
        base = f"file://{tmp_path}" if scheme == "file" else server.base.replace("http", scheme)

        assert deliver_one(transport, base).kind is Kind.UNREACHABLE
        assert server.connections == 0


@pytest.mark.parametrize("base", ["http://127.0.0.1:99999", "http://", "nonsense://x", ""])
def test_target_that_is_no_http_url_is_unreachable(transport: HttpTransport, base: str) -> None:
    assert deliver_one(transport, base).kind is Kind.UNREACHABLE


def test_untrusted_certificate_is_unreachable(transport: HttpTransport, tmp_path: Path) -> None:
    certificate = tmp_path / "both.pem"
    certificate.write_text(CERTIFICATE)
    with serving(answering(OK), certificate) as server:
        result = deliver_one(transport, server.base)

    assert result.kind is Kind.UNREACHABLE
    assert "certificate" in result.error
    assert server.received == []


def test_trusted_certificate_is_accepted(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "both.pem"
    certificate.write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(answering(OK), certificate) as server:
        transport = make()
        first, second = (deliver_one(transport, server.base, id=id) for id in (1, 2))

        assert (first.status, second.status) == (200, 200)
        assert server.connections == 1


def test_connecting_has_its_own_time(make: Make) -> None:
    with serving(Connection.hold) as server:
        base = server.base.replace("http", "https")  # the handshake never comes

        result = deliver_one(make(connect_timeout=0.1), base)

    assert (result.kind, result.error) == (Kind.UNREACHABLE, f"no connection to {base} within 0.1 s")
    assert result.ended - result.started >= SHORT - 1000


def _silent(connection: Connection) -> None:
    connection.hold()


def _dripping_headers(connection: Connection) -> None:
    connection.read()
    connection.write(b"HTTP/1.1 200 OK\r\n")
    connection.drip(b"X: y\r\n")


def _dripping_status(connection: Connection) -> None:
    connection.read()
    connection.write(b"HTTP/1.1 200 ")
    connection.drip(b"O")


def _dripping_interim(connection: Connection) -> None:
    connection.read()
    connection.drip(b"HTTP/1.1 100 Continue\r\n\r\n")


def _dripping_body(connection: Connection) -> None:
    connection.read()
    connection.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.drip(b"1\r\nx\r\n")


@pytest.mark.parametrize("script", [_silent, _dripping_status, _dripping_headers, _dripping_interim, _dripping_body])
def test_deadline_covers_the_whole_exchange(transport: HttpTransport, script: Script) -> None:
    with serving(script) as server:
        result = deliver_one(transport, server.base, deadline=SHORT)

        assert (result.kind, result.status) == (Kind.TIMEOUT, 0)
        assert result.error == f"no complete answer from {server.base} within 0.1 s"
        assert SHORT - 1000 <= result.ended - result.started < 10 * SHORT


def test_deadline_counts_from_the_start_of_each_delivery(make: Make) -> None:
    transport = make(concurrency=1)
    with serving(Connection.hold) as server:
        first, second = deliver(transport, *(delivery(server.base, id, deadline=SHORT) for id in (1, 2)))

    assert (first.kind, second.kind) == (Kind.TIMEOUT, Kind.TIMEOUT)
    assert second.started >= first.ended
    assert second.ended - second.started >= SHORT - 1000


def test_deadline_of_a_day_and_one_of_a_microsecond(transport: HttpTransport) -> None:
    with serving(Connection.hold) as server:
        transport.send(delivery(server.base, 1, deadline=24 * 3600 * SECOND))
        result = deliver_one(transport, server.base, id=2, deadline=1)

    assert (result.id, result.kind) in [(2, Kind.TIMEOUT), (2, Kind.UNREACHABLE)]  # a millisecond, connecting included


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
def test_connection_that_breaks_without_an_answer_is_unknown(
    transport: HttpTransport, end: Callable[[Connection], None]
) -> None:
    def script(connection: Connection) -> None:
        connection.read()
        end(connection)

    with serving(script) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, len(server.received)) == (Kind.UNKNOWN, 1)
    assert server.base in result.error


def test_reset_in_the_middle_of_a_body_is_unknown(transport: HttpTransport) -> None:
    def script(connection: Connection) -> None:
        connection.read()
        connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello")
        connection.reset()

    with serving(script) as server:
        result = deliver_one(transport, server.base)

    assert (result.kind, result.status) == (Kind.UNKNOWN, 0)


# --- connections -----------------------------------------------------------------------------------------------------


def test_connection_is_kept_and_used_again(transport: HttpTransport) -> None:
    with serving(answering(OK)) as server:
        for id in range(20):
            assert deliver_one(transport, server.base, id=id).status == 200

        assert (server.connections, len(server.received)) == (1, 20)


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_request_is_not_sent_again_when_a_kept_connection_dies(
    transport: HttpTransport, end: Callable[[Connection], None], method: str
) -> None:
    def script(connection: Connection) -> None:
        connection.read()
        connection.write(OK)
        if connection.number == 1:
            connection.read()  # the task may have run by now
            end(connection)

    with serving(script) as server:
        first = deliver_one(transport, server.base, id=1, method=method)
        second = deliver_one(transport, server.base, id=2, method=method)
        third = deliver_one(transport, server.base, id=3, method=method)

        assert (first.kind, second.kind, third.kind) == (Kind.ANSWERED, Kind.UNKNOWN, Kind.ANSWERED)
        assert second.error == f"{server.base} closed the connection without an answer"
        assert [received.task for received in server.received] == ["/task/1", "/task/2", "/task/3"]


def test_kept_connection_that_dies_with_its_server_is_unknown(transport: HttpTransport) -> None:
    def script(connection: Connection) -> None:
        connection.read()
        connection.write(OK)
        connection.read()
        connection.server.stopping.set()
        connection.server._listener.close()  # libcurl's second try is refused; the request was on its way all the same
        connection.reset()

    with serving(script) as server:
        deliver_one(transport, server.base, id=1)
        result = deliver_one(transport, server.base, id=2)

    assert result.kind is Kind.UNKNOWN


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
def test_connection_closed_while_idle_is_replaced(transport: HttpTransport, end: Callable[[Connection], None]) -> None:
    closed = threading.Semaphore(0)

    def script(connection: Connection) -> None:
        connection.read()
        connection.write(OK)
        end(connection)
        closed.release()

    with serving(script) as server:
        for round in range(5):
            results = deliver(transport, *(delivery(server.base, 3 * round + id) for id in range(3)))
            assert [result.kind for result in results] == [Kind.ANSWERED] * 3
            for _ in range(3):
                assert closed.acquire(timeout=10)

        assert (server.connections, len(server.received)) == (15, 15)


def test_proxies_of_the_environment_are_ignored(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(answering(answer("418 Proxy"))) as proxy, serving(answering(OK)) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.base)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)

        assert deliver_one(make(), server.base).status == 200
        assert proxy.connections == 0


def test_netrc_is_ignored(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with serving(answering(OK)) as server:
        deliver_one(make(), server.base)

        assert "authorization" not in server.received[0].headers


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT", "POST", "PATCH"])
@pytest.mark.parametrize("before", ["POST", "HEAD", "GET"])
def test_methods_leave_no_trace_on_a_reused_handle(make: Make, method: str, before: str) -> None:
    def script(connection: Connection) -> None:
        while received := connection.read():
            is_head = received.line.startswith("HEAD")
            connection.write(answer("200 OK", body=b"hello")[: -5 if is_head else None])

    body = b"body" if method in ("PUT", "POST", "PATCH") else b""
    transport = make(concurrency=1)
    with serving(script) as server:
        deliver_one(transport, server.base, method=before, body=b"before" if before == "POST" else b"")
        result = deliver_one(transport, server.base, method=method, body=body)

        assert (result.kind, result.status) == (Kind.ANSWERED, 200)
        assert server.received[1].line == f"{method} /task/1 HTTP/1.1"
        assert server.received[1].body == body
        assert server.connections == 1


def test_empty_post_has_a_length_and_no_content_type_of_libcurls_own(make: Make) -> None:
    bare = make(lambda delivery, now: Request("POST", delivery.base, [], b""))
    with serving(answering(OK)) as server:
        deliver_one(bare, server.base)

        assert server.received[0].headers.keys() == {"host", "accept", "user-agent", "content-length"}


def test_large_body_is_sent_without_asking_first(transport: HttpTransport) -> None:
    body = os.urandom(3_000_000)
    with serving(answering(OK)) as server:
        assert deliver_one(transport, server.base, body=body).status == 200

        assert server.received[0].body == body
        assert "expect" not in server.received[0].headers


def test_empty_and_latin_headers_arrive(make: Make) -> None:
    transport = make(lambda delivery, now: Request("POST", delivery.base, ["X-Empty;", "X-Latin: caf\xe9"], b""))
    with serving(answering(OK)) as server:
        deliver_one(transport, server.base)

        assert server.received[0].headers["x-empty"] == ""
        assert server.received[0].headers["x-latin"] == "caf\xe9"


# --- preparing -------------------------------------------------------------------------------------------------------


def test_request_is_prepared_when_it_is_sent(make: Make) -> None:
    clock, prepared = StillClock(), []

    def note(delivery: Delivery, now: Micros) -> Request:
        prepared.append((delivery.claim.id, now))
        return prepare(delivery, now)

    def script(connection: Connection) -> None:
        while connection.read():
            clock.time += 10
            connection.write(OK)

    transport = make(note, clock=clock, concurrency=1)
    with serving(script) as server:
        transport.send(delivery(server.base, 1))
        transport.send(delivery(server.base, 2))
        results = collect(transport, 2)

    assert prepared == [(1, 0), (2, 10)]
    assert [(result.started, result.ended) for result in results] == [(0, 10), (10, 20)]


@pytest.mark.parametrize(
    "header",
    ["X-Evil: a\r\nX-Admin: yes", "X-Evil: a\nb", "X-Evil: a\rb", "X-Evil: a\0b", "X-Evil: \u65e5", None],
)
def test_request_that_cannot_be_made_is_unreachable_and_blocks_nothing(make: Make, header: str | None) -> None:
    def refuse(delivery: Delivery, now: Micros) -> Request:
        request = prepare(delivery, now)
        if delivery.claim.id % 2:
            if header is None:
                raise LookupError("no key to sign with")
            request.headers.append(header)
        return request

    transport = make(refuse, concurrency=1)
    with serving(answering(OK)) as server:
        results = deliver(transport, *(delivery(server.base, id) for id in range(6)))

        assert [result.kind for result in results] == [Kind.ANSWERED, Kind.UNFIT] * 3
        assert results[1].error.startswith("the request could not be made: ")
        assert len(server.received) == 3
        assert transport.room(server.base) >= 1


# --- slots -----------------------------------------------------------------------------------------------------------


def test_no_more_than_concurrency_run_at_once_and_all_finish(make: Make) -> None:
    active = peak = 0
    change = threading.Condition()

    def script(connection: Connection) -> None:
        nonlocal active, peak
        while connection.read():
            with change:
                active += 1
                peak = max(peak, active)
                if peak < 4:
                    change.wait(10)  # for the other slots
                change.notify_all()
                active -= 1
            connection.write(OK)

    transport = make(concurrency=4)
    with serving(script) as server:
        results = deliver(transport, *(delivery(server.base, id) for id in range(40)))

        assert {result.kind for result in results} == {Kind.ANSWERED}
        assert sorted(received.task for received in server.received) == sorted(f"/task/{id}" for id in range(40))
        assert (peak, server.connections) == (4, 4)


def test_slots_are_counted_for_each_target(make: Make) -> None:
    transport = make(concurrency=2)
    with serving(Connection.hold) as stuck, serving(answering(OK)) as server:
        for id in range(5):
            transport.send(delivery(stuck.base, id))
        assert transport.room(stuck.base) == 0
        assert transport.room(server.base) == 2

        assert deliver_one(transport, server.base, id=9).kind is Kind.ANSWERED


def test_room_looks_ahead_only_where_answers_are_fast(make: Make) -> None:
    clock = StillClock()

    def script(connection: Connection) -> None:
        while received := connection.read():
            clock.time += 1000 if received.task == "/task/1" else 10 * SECOND
            connection.write(OK)

    transport = make(clock=clock, concurrency=4)
    with serving(script) as server:
        deliver_one(transport, server.base, id=1)
        assert transport.room(server.base) == 4  # one fast answer is no trend
        for _ in range(300):
            deliver_one(transport, server.base, id=1)
        assert 80 <= transport.room(server.base) <= 4 + 4 * 40  # 40 ms of answers of about 1 ms in 4 slots
        deliver_one(transport, server.base, id=2)
        assert transport.room(server.base) == 4


def test_waiting_deliveries_start_without_another_call(make: Make) -> None:
    transport = make(concurrency=1)
    with serving(answering(OK)) as server:
        for id in range(3):
            transport.send(delivery(server.base, id))
        while len(transport.results()) < 1:
            transport.wait(SystemClock().now() + PATIENCE)

        # The second may be answered as well by now, but it has been started: nothing but the third can be withdrawn.
        assert {result.id for result in transport.withdraw()} <= {2}


def test_queues_take_turns_in_the_line_for_a_slot(make: Make) -> None:
    transport = make(concurrency=1)
    with serving(answering(OK)) as server:
        for id in range(6):
            transport.send(delivery(server.base, id))
        transport.send(delivery(server.base, 6, queue="other"))

        results = sorted(collect(transport, 7), key=lambda result: result.started)

    assert [result.id for result in results] == [6, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("url", ["/_ah/queue/deferred", "/view"])
def test_long_calls_dont_hold_up_others_of_a_server_that_has_workers_for_them(make: Make, url: str) -> None:
    transport = make(concurrency=8)

    def script(connection: Connection) -> None:
        while received := connection.read():
            if received.body == b"long":
                connection.hold()
                return
            connection.write(OK)

    with serving(script) as server:
        deliver_one(transport, server.base)
        target = transport._targets[server.base]
        target.window = Window(8)
        target.window.size = LEAST
        for id in range(4):
            claim = delivery(server.base, id)
            transport.send(claim._replace(claim=claim.claim._replace(url=url, body=b"long")))
        transport.send(delivery(server.base, 5))

        assert collect(transport, 1)[0].id == 5


def test_targets_are_forgotten_only_where_nothing_waits(make: Make) -> None:
    transport = make()
    for port in range(1, 1_026):
        transport.send(delivery(f"http://127.0.0.1:{port}", port))

    assert len(transport.withdraw()) == 1_025


def test_what_was_taken_back_holds_nothing(make: Make) -> None:
    transport = make(concurrency=8, clock=StillClock())
    with serving(Connection.hold) as server:
        transport.send(delivery(server.base, 0, deadline=SHORT))
        transport.wait(0)
        transport._targets[server.base].window = window = Window(8)
        window.answered(0, 0, 0, full=False, shared=False)  # it hasn't stalled
        window.size = 0.0
        transport.send(delivery(server.base, 1))
        transport.wait(0)
        assert transport._held

        transport.withdraw()
        collect(transport, 1)

    assert not transport._held


def test_withdraw_returns_what_has_not_started(make: Make) -> None:
    transport = make(concurrency=2)
    with serving(Connection.hold) as server:
        for id in range(5):
            transport.send(delivery(server.base, id, deadline=SHORT))
        transport.wait(0)

        withdrawn = transport.withdraw()

        assert [(result.id, result.claims, result.kind) for result in withdrawn] == [
            (id, id + 1000, Kind.UNSENT) for id in (2, 3, 4)
        ]
        assert transport.withdraw() == []
        assert [(result.id, result.kind) for result in collect(transport, 2)] == [(0, Kind.TIMEOUT), (1, Kind.TIMEOUT)]


def test_cancelled_delivery_is_stopped_and_not_reported(make: Make) -> None:
    gone = threading.Event()
    transport = make(concurrency=1)

    def script(connection: Connection) -> None:
        while received := connection.read():
            if received.task == "/task/1":
                transport.wake()
                connection.hold()
                gone.set()
                return
            connection.write(OK)

    with serving(script) as server:
        for id in (1, 2, 3):
            transport.send(delivery(server.base, id))
        transport.wait(SystemClock().now() + PATIENCE)  # until the first has arrived

        transport.cancel(2, 1002)
        transport.cancel(1, 1001)

        assert gone.wait(10)
        assert [result.id for result in collect(transport, 1)] == [3]
        assert [received.task for received in server.received] == ["/task/1", "/task/3"]


def test_cancel_leaves_other_claims_of_the_task_alone(make: Make) -> None:
    transport = make(concurrency=2)
    with serving(answering(OK)) as server:
        for claims in (5, 6, 7, 8):
            transport.send(delivery(server.base, 1, claims=claims))

        transport.cancel(1, 5)
        transport.cancel(1, 8)

        assert [result.claims for result in collect(transport, 2)] == [6, 7]
        transport.cancel(1, 6)  # over: nothing to do


def test_thousands_in_flight(make: Make) -> None:
    """More descriptors than `select` could take; the server is one thread that answers when all have come."""
    count = 1500
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * count + 100:
        pytest.skip("too few file descriptors allowed")
    transport = make(concurrency=count)
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:

        def serve() -> None:
            accepted = [listener.accept()[0] for _ in range(count)]
            for sock in accepted:
                sock.recv(65_536)
            for sock in accepted:
                sock.sendall(OK)
                sock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        results = deliver(
            transport, *(delivery(f"http://127.0.0.1:{listener.getsockname()[1]}", id) for id in range(count))
        )
        thread.join()

    assert {result.kind for result in results} == {Kind.ANSWERED}


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_wait_ends_at_its_time(transport: HttpTransport) -> None:
    until = SystemClock().now() + SHORT

    transport.wait(until)
    transport.wait(0)

    assert until <= SystemClock().now() < until + 10 * SHORT


def test_wake_ends_the_next_wait_and_only_that(transport: HttpTransport) -> None:
    for _ in range(3):
        transport.wake()
    transport.wait(2**62)

    until = SystemClock().now() + SHORT
    transport.wait(until)

    assert SystemClock().now() >= until


def test_wake_from_another_thread_ends_the_present_wait(transport: HttpTransport) -> None:
    def script(connection: Connection) -> None:
        connection.read()  # the transport must be in its wait to have sent this
        transport.wake()
        connection.hold()

    with serving(script) as server:
        transport.send(delivery(server.base))
        transport.wait(2**62)

    assert transport.results() == []


def test_wake_from_a_signal_handler_ends_the_wait(transport: HttpTransport) -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: transport.wake())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        transport.wait(2**62)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_closing_twice_and_waking_late_do_no_harm(make: Make) -> None:
    transport = make(concurrency=1)
    with serving(Connection.hold) as server:
        transport.send(delivery(server.base, 1))
        transport.send(delivery(server.base, 2))
        transport.wait(0)

        transport.close()
        transport.close()
        transport.wake()

    assert transport.results() == []
    assert transport.withdraw() == []


def test_works_without_epoll(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.PollSelector)
    transport = make(concurrency=4)
    with serving(answering(OK)) as server:
        results = deliver(transport, *(delivery(server.base, id, body=b"x" * 1_000_000) for id in range(20)))
        refused = deliver_one(transport, f"http://127.0.0.1:{closed_port()}")

    assert {result.kind for result in results} == {Kind.ANSWERED}
    assert refused.kind is Kind.UNREACHABLE


# --- the waker -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[sys.platform, "other"])
def waker(request: pytest.FixtureRequest) -> Iterator[Waker]:
    """A waker of this platform's best kind, and one on a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", request.param)
        waker = Waker()
    yield waker
    waker.close()


def is_set(waker: Waker) -> bool:
    return bool(select.select([waker], [], [], 0)[0])


def test_waker_is_set_by_any_number_of_wakes_and_cleared_by_one_clear(waker: Waker) -> None:
    assert not is_set(waker)
    for _ in range(100_000):  # a pipe would be full
        waker.wake()
    assert is_set(waker)
    waker.clear()
    waker.clear()
    assert not is_set(waker)
    waker.wake()
    assert is_set(waker)


def test_no_wake_is_lost_between_clearing_and_waiting(waker: Waker) -> None:
    announced = 0
    seen = threading.Semaphore(0)

    def announce() -> None:
        nonlocal announced
        for _ in range(5_000):
            announced += 1
            waker.wake()
            if announced % 3 == 0:  # sometimes in step, sometimes racing
                seen.acquire(timeout=10)

    thread = threading.Thread(target=announce)
    thread.start()
    looked = 0
    while looked < 5_000:
        assert select.select([waker], [], [], 10)[0], "a wake was lost"
        waker.clear()
        looked = announced
        seen.release()
    thread.join()


def test_closed_waker_ignores_wakes(waker: Waker) -> None:
    waker.close()
    waker.close()
    waker.wake()
    waker.clear()

    assert waker.fileno() == -1
