"""Tasks with an absolute URL: what `add` takes, and what an engine connects to, whatever stands in the store.

The canary is a socket that must never be connected to; it listens where nearly every spelling of "this machine" leads.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pycurl
import pytest

import deferlib
from deferlib import config, deferred, testing
from deferlib.cli import main
from deferlib.context import SYSTEM_CLOCK
from deferlib.core.fitness import UNRESOLVED_DELAY
from deferlib.core.model import SECOND, Claim, Delivery, Kind, Micros, NewTask, TaskRow
from deferlib.engine import exchange
from deferlib.engine.build import build
from deferlib.engine.http import HttpTransport
from deferlib.engine.transport import Request, Transport
from deferlib.errors import ConfigError, InvalidTaskError, InvalidUrlError
from deferlib.outbound import parse_list
from deferlib.taskqueue import DEFAULT_APP_VERSION, Queue, Task
from tests.unit.bad_servers import CERTIFICATE, OK, Server, answering, serving

PATIENCE: Micros = 20 * SECOND
NO_APP = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A project of this test's own, without settings."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    (tmp_path / "queue.yaml").write_text("queue: []\n")
    monkeypatch.chdir(tmp_path)
    former = config.install(None)
    yield
    with suppress(ConfigError):
        config.runtime().close()
    config.install(former)


class Canary:
    """A port of this machine, on all its loopback addresses; `hits` tells how often it was connected to."""

    def __init__(self) -> None:
        first = socket.create_server(("127.0.0.1", 0))
        self.port: int = first.getsockname()[1]
        self._sockets = [first]
        for family, address in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
            with suppress(OSError):  # a machine without IPv6
                self._sockets.append(socket.create_server((address, self.port), family=family))
        for each in self._sockets:
            each.setblocking(False)

    @property
    def hits(self) -> int:
        """How many connections the kernel has taken for it; each counts once."""
        count = 0
        for each in self._sockets:
            with suppress(BlockingIOError):
                while True:
                    each.accept()[0].close()
                    count += 1
        return count

    def close(self) -> None:
        for each in self._sockets:
            each.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.close()


def configure(allow: str = "", **settings: Any) -> config.Runtime:
    return deferlib.configure(**{"store": "sqlite:///:memory:", "app": NO_APP, **settings}, allow_urls=allow)


def put(url: str, **fields: Any) -> int:
    """Write a task for *url* into the store as it stands, past all that `add` looks at; return its id."""
    runtime = config.runtime()
    task: NewTask = Task(b"body", url="/")._row("default", runtime.ring)._replace(url=url, **fields)
    runtime.store.run(lambda tx: tx.add(runtime.clock.now(), [task]))
    return task.id


def work(**options: Any) -> None:
    """Let an engine of the settings deliver what is due."""
    runtime = config.runtime()
    transports: list[Transport] = []

    def around(transport: Transport) -> Transport:
        transports.append(transport)
        return transport

    engine = build(runtime, around=around, **options)
    try:
        again = engine.turn()
        until = runtime.clock.now() + PATIENCE
        while not engine.idle and runtime.clock.now() < until:
            transports[0].wait(min(again, until))
            again = engine.turn()
    finally:
        engine.close()


def found(id: int) -> TaskRow | None:
    """Return the task as it is in the store; None once it is done."""
    with config.runtime().store.read() as tx:
        rows = tx.find(None, [str(id)])
    return rows[0] if rows else None


def resolve(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """Let libcurl resolve names as `name:port:address,address` says, instead of asking."""
    monkeypatch.setattr(exchange, "_OPTIONS", (*exchange._OPTIONS, (pycurl.RESOLVE, list(names))))


# --- spellings of this machine -----------------------------------------------------------------------------------------

# None of these may be added or connected to where every public host is allowed, at the canary's port too.
SPELLINGS = [
    # the address itself, and what resolvers and kernels take for it
    "http://127.0.0.1:{port}/", "http://127.0.0.2:{port}/", "HTTP://127.0.0.1:{port}/", "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/", "http://[::]:{port}/", "http://[0:0:0:0:0:0:0:1]:{port}/", "http://[0::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/", "http://[::FFFF:7F00:0001]:{port}/",
    "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/", "http://[::ffff:0.0.0.0]:{port}/", "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/", "http://[64:ff9b:1::7f00:1]:{port}/", "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::]:{port}/", "http://[fe80::1]:{port}/", "http://[fc00::1]:{port}/", "http://[::1%25lo]:{port}/",
    "http://[::1%lo]:{port}/", "http://[::1", "http://[127.0.0.1]:{port}/", "http://::1:{port}/", "http://[v7.x]:{port}/",
    # other spellings of IPv4
    "http://2130706433:{port}/", "http://017700000001:{port}/", "http://0x7f000001:{port}/", "http://0X7F000001:{port}/",
    "http://127.1:{port}/", "http://127.0.1:{port}/", "http://0x7f.1:{port}/", "http://0177.0.0.1:{port}/",
    "http://0x7f.0x0.0x0.0x1:{port}/", "http://127.0.0.01:{port}/", "http://00000000177.0.0.1:{port}/", "http://0:{port}/",
    "http://00:{port}/", "http://0x0:{port}/", "http://127.0.0.1.:{port}/", "http://127.0.0.1..:{port}/", "http://127.:{port}/",
    "http://4294967295:{port}/", "http://127.0.0.256:{port}/", "http://169.254.169.254/", "http://10.0.0.1/",
    # another host than it seems
    "http://public.test@127.0.0.1:{port}/", "http://user:pw@127.0.0.1:{port}/", "http://@127.0.0.1:{port}/",
    "http://public.test:80@127.0.0.1:{port}/", "http://public.test#@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@public.test/", "http://127.0.0.1:{port}?@public.test/", "http://127.0.0.1:{port}/@public.test",
    "http://public.test\\@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@public.test/", "http:\\\\127.0.0.1:{port}\\",
    "http:/127.0.0.1:{port}/", "http:127.0.0.1:{port}/", "http:///127.0.0.1:{port}/", "http:////127.0.0.1:{port}/",
    "http://public.test%40127.0.0.1:{port}/", "http://public.test%2f@127.0.0.1:{port}/",
    "http://public.test:{port}@127.0.0.1:{port}@public.test/", "http://public.test&@127.0.0.1:{port}#@public.test/",
    # control characters, blanks, and what isn't ASCII
    "http://127.0.0.1:{port}/\r\nHost: x", "http://127.0.0.1\r\n:{port}/", "http://127.0.0.1\t:{port}/", "ht\ttp://127.0.0.1:{port}/",
    " http://127.0.0.1:{port}/", "\nhttp://127.0.0.1:{port}/", "\x00http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/\x00",
    "http://127.0.0.1 :{port}/", "http:// 127.0.0.1:{port}/", "http://127.0.0.1%00.public.test:{port}/",
    "http://127\u30020\u30020\u30021:{port}/", "http://127\uff0e0\uff0e0\uff0e1:{port}/", "http://127.0.0.\uff11:{port}/",
    "http://\u2460\u2461\u2466.0.0.1:{port}/", "http://\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54:{port}/",
    "http://loc\u0430lhost:{port}/", "http://localho\u017ft:{port}/", "http://local\u00adhost:{port}/", "http://\u06f1\u06f2\u06f7.1:{port}/",
    "http://%31%32%37.0.0.1:{port}/", "http://127.0.0.1%2f:{port}/", "http://localhost%2e:{port}/", "http://\ud800.test:{port}/",
    # ports and names
    "http://127.0.0.1:0{port}/", "http://127.0.0.1:+{port}/", "http://127.0.0.1:{port}:80/", "http://127.0.0.1:80:{port}/",
    "http://localhost.:{port}/", "http://LOCALHOST.:{port}/", "http://.localhost:{port}/", "http://local..host:{port}/",
    "http://localhost:{port}/..", "http://localhost:{port}/x/%2e%2e/y", "http://localhost:{port}/ x", "http://:{port}/", "http://",
    # other schemes
    "ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/_x", "file:///etc/passwd", "dict://127.0.0.1:{port}/x",
    "httpx://127.0.0.1:{port}/", "https+unix://127.0.0.1:{port}/", "view-source:http://127.0.0.1:{port}/", "url:http://127.0.0.1/",
    "//127.0.0.1:{port}/", "\\\\127.0.0.1:{port}\\",
    # no URL at all, but one when it is joined to an app's
    "@127.0.0.1:{port}/", ":{port}/", ":x@127.0.0.1:{port}/", ".127.0.0.1:{port}/", "#@127.0.0.1:{port}/", "x",
    "////127.0.0.1:{port}/", "  //127.0.0.1:{port}/",
]  # fmt: skip

# These may be added, since their text doesn't say where they lead: to addresses that are nobody else's business.
NAMES = [
    ("localhost", None), ("LOCALHOST", None), ("a.localhost", None), ("127.0.0.1.nip.test", "127.0.0.1"),
    ("7f000001.rbndr.test", "127.0.0.2"), ("six.test", "[::1]"), ("mapped.test", "[::ffff:127.0.0.1]"),
    ("zero.test", "0.0.0.0"), ("none.test", "[::]"), ("both.test", "[::1],127.0.0.1"), ("meta.test", "169.254.169.254"),
    ("ten.test", "10.0.0.1"), ("compatible.test", "[::127.0.0.1]"), ("nat64.test", "[64:ff9b::7f00:1]"),
    ("xn--bcher-kva.test", "127.0.0.1"),
]  # fmt: skip


def test_there_are_enough_spellings() -> None:
    assert len(SPELLINGS) + len(NAMES) >= 80
    assert len(set(SPELLINGS)) == len(SPELLINGS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("allow", ["", "*,*:{port}"], ids=["off", "on"])
def test_spelling_is_refused_when_it_is_added(canary: Canary, spelling: str, allow: str) -> None:
    configure(allow.format(port=canary.port))
    url = spelling.replace("{port}", str(canary.port))

    with pytest.raises(InvalidUrlError) as raised:
        Queue().add(Task(url=url, method="GET"))

    assert "pw" not in str(raised.value)
    assert str(raised.value).isprintable()


# The first three are paths of the app where they are added: the queue's own, and one without the two slashes too many.
@pytest.mark.parametrize("spelling", ["", "?@127.0.0.1:{port}/", "///127.0.0.1:{port}/", *SPELLINGS])
@pytest.mark.parametrize("app", ["canary", "other"])
def test_spelling_in_the_store_is_never_connected_to(canary: Canary, spelling: str, app: str) -> None:
    """The app may be at the canary itself: then a URL that isn't its path doesn't get there either."""
    configure(f"*,*:{canary.port}", app=f"http://127.0.0.1:{canary.port}" if app == "canary" else "http://public.test")
    try:
        id = put(spelling.replace("{port}", str(canary.port)))
    except UnicodeEncodeError:  # no store takes half a character
        return
    before = config.runtime().clock.now()

    work()

    row = found(id)
    assert canary.hits == 0
    assert row is not None
    assert row.reason
    assert row.reason.isprintable()
    assert "pw" not in row.reason
    assert (row.executions, row.failures) == (0, 0)
    if not spelling.isascii() or not spelling.isprintable() or " " in spelling:  # no version of deferlib writes such a row
        assert row.died is not None
        assert row.reason.startswith("quarantine: the row is malformed: its url ")
        return
    assert row.attempts == 0
    assert row.due is not None
    assert row.due >= before + UNRESOLVED_DELAY


@pytest.mark.parametrize(("name", "address"), NAMES)
def test_name_of_a_private_address_is_never_connected_to(
    canary: Canary, monkeypatch: pytest.MonkeyPatch, name: str, address: str | None
) -> None:
    if address is not None:
        resolve(monkeypatch, [f"{name}:{canary.port}:{address}"])
    configure(f"*,*:{canary.port}")
    task = Queue().add(Task(url=f"http://{name}:{canary.port}/"))

    work()

    row = found(int(task.name or ""))
    assert canary.hits == 0
    assert row is not None
    assert row.reason.startswith(f"{name.lower()} resolves to ")
    assert row.reason.endswith(", which allow_urls doesn't cover; add that address if it is meant")
    assert (row.attempts, row.executions, row.failures) == (1, 0, 0)
    assert json.loads(row.history)[0]["error"] == row.reason


# --- what is allowed arrives -------------------------------------------------------------------------------------------


@pytest.fixture
def hook() -> Iterator[Server]:
    with serving(answering(OK)) as server:
        yield server


def port_of(server: Server) -> str:
    return server.base.rpartition(":")[2]


def test_allowed_url_is_posted_to_once(hook: Server) -> None:
    configure(f"127.0.0.1:{port_of(hook)}")
    task = Queue().add(
        Task(
            b"\x00payload", url=f"HTTP://127.0.0.1:{port_of(hook)}/in/%2F;x?a=b&c=%20", method="PUT", headers={"X-Own": "1"}
        )
    )

    work()

    [received] = hook.received
    assert found(int(task.name or "")) is None
    assert received.line == "PUT /in/%2F;x?a=b&c=%20 HTTP/1.1"
    assert received.body == b"\x00payload"
    assert received.headers["host"] == f"127.0.0.1:{port_of(hook)}"
    assert received.headers["x-own"] == "1"
    assert received.headers["x-appengine-taskname"] == task.name
    assert received.headers["x-appengine-queuename"] == "default"


def test_no_dispatch_token_leaves_for_an_absolute_url(hook: Server) -> None:
    runtime = configure(f"127.0.0.1:{port_of(hook)}", app=hook.base)
    put("/for-the-app")
    Queue().add(Task(url=f"{hook.base}/abroad"))

    work()

    signatures = {received.task: received.headers.get("x-deferlib-signature") for received in hook.received}
    assert signatures.keys() == {"/for-the-app", "/abroad"}
    assert str(signatures["/for-the-app"]).startswith(f"v1.{runtime.ring.signing.id.hex()}.")
    assert signatures["/abroad"] is None


def test_query_of_an_absolute_url_is_kept_with_any_method(hook: Server) -> None:
    configure(f"127.0.0.1:{port_of(hook)}")
    Queue().add(Task(b"x", url=f"{hook.base}/x?shop=7"))  # a path of the app has none, as on App Engine
    with pytest.raises(InvalidTaskError, match="no query in its url"):
        Task(b"x", url="/x?shop=7")

    work()

    assert [received.line for received in hook.received] == ["POST /x?shop=7 HTTP/1.1"]


def test_params_become_the_query_of_a_get(hook: Server) -> None:
    configure(f"127.0.0.1:{port_of(hook)}")
    Queue().add(Task(url=f"{hook.base}/x", method="GET", params={"a": "é&b"}))

    work()

    assert [received.line for received in hook.received] == ["GET /x?a=%C3%A9%26b HTTP/1.1"]


def test_name_arrives_where_a_network_of_the_list_has_its_address(hook: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, [f"hooks.test:{port_of(hook)}:10.0.0.1,127.0.0.1"])  # the first isn't allowed
    configure(f"*.test:{port_of(hook)},127.0.0.0/8:{port_of(hook)}")
    Queue().add(Task(url=f"http://hooks.test:{port_of(hook)}/x"))

    work()

    assert [received.headers["host"] for received in hook.received] == [f"hooks.test:{port_of(hook)}"]


def test_https_is_spoken_with_the_certificate_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "both.pem"
    certificate.write_text(CERTIFICATE)
    with serving(answering(OK), certificate) as server:
        configure(f"127.0.0.1:{port_of(server)}")
        put(f"{server.base}/untrusted")
        work()
        assert server.received == []

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        put(f"{server.base}/trusted")
        work()

        assert [received.task for received in server.received] == ["/trusted"]


def test_redirect_is_not_followed(canary: Canary) -> None:
    moved = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{canary.port}/\r\nContent-Length: 0\r\n\r\n"
    with serving(answering(moved.encode())) as server:
        configure(f"127.0.0.1:{port_of(server)},127.0.0.1:{canary.port}")
        id = put(f"{server.base}/x")

        work()

    row = found(id)
    assert row is not None
    assert (row.reason, row.failures) == ("HTTP 302", 1)
    assert canary.hits == 0


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_proxies_of_the_environment_are_ignored(
    hook: Server, canary: Canary, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    configure(f"127.0.0.1:{port_of(hook)},localhost", app=hook.base)
    put("/path")
    put(f"{hook.base}/absolute")
    secure = put("https://localhost/")

    work()

    row = found(secure)
    assert {received.line for received in hook.received} == {"POST /path HTTP/1.1", "POST /absolute HTTP/1.1"}
    assert row is not None
    assert "localhost resolves to" in row.reason
    assert canary.hits == 0


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [("500 Oops", "permanent", "HTTP 500"), ("403 No", "untrusted", "HTTP 403"), ("200 OK", "retry", None)],
)
def test_only_the_status_of_a_foreign_answer_counts(status: str, outcome: str, reason: str | None) -> None:
    answer = f"HTTP/1.1 {status}\r\nX-Deferlib-Outcome: {outcome}\r\nContent-Length: 6\r\n\r\nsecret"
    with serving(answering(answer.encode())) as server:
        configure(f"127.0.0.1:{port_of(server)}")
        id = put(f"{server.base}/x")

        work()

    row = found(id)
    assert (None if row is None else row.reason) == reason
    assert row is None or (row.state(0), row.failures) == ("scheduled", 1)


# --- the connection that is there already ------------------------------------------------------------------------------


def test_connection_that_was_opened_for_the_app_is_not_used_for_an_absolute_url(hook: Server) -> None:
    base = f"http://localhost:{port_of(hook)}"
    transport = transport_with(f"localhost:{port_of(hook)}")
    try:
        [first] = deliver(transport, delivery(1, base, "/path"))
        [second] = deliver(transport, delivery(2, base, f"{base}/absolute"))
        [third] = deliver(transport, delivery(3, base, "/path"))
    finally:
        transport.close()

    assert (first.kind, third.kind) == (Kind.ANSWERED, Kind.ANSWERED)  # an app is exempt: it is meant
    assert second.kind is Kind.UNREACHABLE
    assert second.error.startswith("localhost resolves to 127.0.0.1, which allow_urls doesn't cover")
    assert [received.task for received in hook.received] == ["/path", "/path"]


def test_transport_by_itself_connects_to_no_absolute_url(hook: Server) -> None:
    transport = HttpTransport(prepare, SYSTEM_CLOCK)
    try:
        [result] = deliver(transport, delivery(1, hook.base, f"{hook.base}/absolute"))
    finally:
        transport.close()

    assert result.kind is Kind.UNREACHABLE
    assert hook.connections == 0


def transport_with(allow: str) -> HttpTransport:
    return HttpTransport(prepare, SYSTEM_CLOCK, covers=parse_list(allow).covers)


def prepare(delivery: Delivery, now: Micros) -> Request:
    url = delivery.claim.url
    return Request("POST", delivery.base + url if url.startswith("/") else url, [], b"")


def delivery(id: int, base: str, url: str) -> Delivery:
    claim = Claim(id, id, "default", None, 0, 0, 1, 0, 0, 0, 0, 0, "", "POST", url, "", "", "", "", "", 0, 0, 0, "", b"")
    return Delivery(claim, base, PATIENCE)


def deliver(transport: HttpTransport, *deliveries: Delivery) -> list[Any]:
    for each in deliveries:
        transport.send(each)
    results: list[Any] = []
    while len(results) < len(deliveries):
        transport.wait(SYSTEM_CLOCK.now() + PATIENCE)
        results += transport.results()
    return results


# --- what `add` says ---------------------------------------------------------------------------------------------------


def note(text: str = "") -> None:
    """A call to defer."""


def test_absolute_url_is_off_by_default_and_the_error_names_the_setting() -> None:
    configure()

    with pytest.raises(InvalidUrlError, match=r"without scheme, host and fragment; .* allow_urls \(DEFERLIB_ALLOW_URLS\)"):
        Task(url="https://other.example/x")


def test_host_that_is_not_allowed_is_refused_with_the_remedy() -> None:
    configure("hooks.example.com")

    assert Task(url="https://Hooks.example.com/x").url == "https://hooks.example.com/x"
    with pytest.raises(InvalidUrlError, match=r"^https://other\.example is not in allow_urls; add other\.example to"):
        Task(url="https://other.example/x")
    with pytest.raises(InvalidUrlError, match=r"add hooks\.example\.com:8443 to that setting"):
        Task(url="https://hooks.example.com:8443/x")


@pytest.mark.parametrize("allow", ["", "*"])
def test_deferred_call_is_not_sent_to_an_absolute_url(allow: str) -> None:
    configure(allow)

    with pytest.raises(InvalidUrlError, match="name a target, not an absolute url"):
        deferlib.defer(note, _url="https://hooks.example.com/")


def test_serialized_call_is_not_sent_to_an_absolute_url_either(hook: Server) -> None:
    configure(f"127.0.0.1:{port_of(hook)}")
    call = deferred.serialize(note, "secret")

    with pytest.raises(InvalidUrlError, match="name a target, not an absolute url"):
        Task(call, url=f"{hook.base}/")
    id = put(f"{hook.base}/", body=call)
    work()

    row = found(id)
    assert row is not None
    assert "a deferred call goes to an app" in row.reason
    assert hook.connections == 0


@pytest.mark.parametrize("given", [{"target": "worker"}, {"target": DEFAULT_APP_VERSION}, {"headers": {"host": "x"}}])
def test_absolute_url_is_the_only_place_to_go_to(given: dict[str, Any]) -> None:
    configure("*", targets="worker=http://worker")

    with pytest.raises(InvalidTaskError, match="no target and no Host header"):
        Task(url="https://hooks.example.com/", **given)


def test_absolute_url_of_a_pull_task_is_refused() -> None:
    configure("*")

    with pytest.raises(InvalidTaskError, match="PULL"):
        Task(b"", method="PULL", url="https://hooks.example.com/")


def test_length_of_an_absolute_url_is_limited() -> None:
    configure("*")

    with pytest.raises(InvalidUrlError, match="2084 characters, at most 2083"):
        Task(url=f"https://hooks.example.com/{'x' * 2083}")


def test_task_tells_its_absolute_url() -> None:
    configure("*")
    task = Task(url="https://hooks.example.com?a=1", method="GET")

    assert (task.url, task.on_queue_url, task.target) == ("https://hooks.example.com/?a=1", False, None)
    assert task._row("default", config.runtime().ring).url == task.url


def test_setting_is_text_or_a_list_and_is_shown_as_text() -> None:
    runtime = deferlib.configure(store="sqlite:///:memory:", allow_urls=["Hooks.example.com", "10.0.0.0/8:81"])

    assert runtime.settings.all["allow_urls"].shown == "hooks.example.com,10.0.0.0/8:81"
    with pytest.raises(ConfigError, match=r"setting 'allow_urls' from argument: 'https://x' is no entry .* allowed are"):
        deferlib.configure(allow_urls="a.test,https://x")


# --- what an engine does with the rest ---------------------------------------------------------------------------------


def test_engine_with_another_setting_keeps_the_task_and_says_why(
    hook: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"sqlite:///{tmp_path}/tasks.db"
    configure(f"127.0.0.1:{port_of(hook)}", store=store)
    task = Queue().add(Task(url=f"{hook.base}/x"))
    id = int(task.name or "")
    configure(store=store)

    work()

    row = found(id)
    assert row is not None
    assert row.reason == f"{hook.base} is not in allow_urls; add 127.0.0.1:{port_of(hook)} to that setting if it is meant"
    assert hook.connections == 0
    assert main(["tasks", "show", str(id), "--store", store]) == 0
    assert row.reason in capsys.readouterr().out


def test_engine_in_process_keeps_the_task_and_names_the_engine_that_pushes(canary: Canary) -> None:
    called: list[str] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        called.append(environ["PATH_INFO"])
        start_response("200 OK", [])
        return [b""]

    configure(f"127.0.0.1:{canary.port}")
    ids = [put(f"http://127.0.0.1:{canary.port}/"), put("@127.0.0.1/"), put("/path")]

    work(app=app)

    rows = [found(id) for id in ids]
    assert called == ["/path"]
    assert rows[2] is None
    for row in rows[:2]:
        assert row is not None
        assert "`deferlib engine` without --app" in row.reason
    assert canary.hits == 0


def test_test_engine_keeps_the_task_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_ALLOW_URLS", "*")
    with testing.engine() as engine:
        Queue().add(Task(url="https://hooks.example.com/"))

        assert engine.run_until_idle() == []
        [view] = engine.tasks()
        assert "without --app" in view.reason


def test_queues_target_does_not_matter_to_an_absolute_url(hook: Server) -> None:
    configure(f"127.0.0.1:{port_of(hook)}", queues=[{"name": "default", "target": "nowhere"}])
    put(f"{hook.base}/x")
    waiting = put("/path")

    work()

    row = found(waiting)
    assert [received.task for received in hook.received] == ["/x"]
    assert row is not None
    assert row.reason == "target 'nowhere' is not configured"


def test_each_origin_has_slots_of_its_own(hook: Server) -> None:
    configure(f"127.0.0.1:{port_of(hook)},localhost:{port_of(hook)}", concurrency=2)
    for host in ("127.0.0.1", "localhost"):
        put(f"http://{host}:{port_of(hook)}/x")
    runtime = config.runtime()
    transports: list[Transport] = []

    def around(transport: Transport) -> Transport:
        transports.append(transport)
        return transport

    engine = build(runtime, around=around)
    try:
        engine.turn()
        assert transports[0].room(f"http://127.0.0.1:{port_of(hook)}") == 1
        assert transports[0].room(f"http://localhost:{port_of(hook)}") == 1
        assert transports[0].room(NO_APP) == 2
    finally:
        engine.close()
