"""The worker in Node: it verifies what the engine signs, as the documents say, and does its tasks."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from deferlib import keys, token
from deferlib.clock import SystemClock
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.inbound import is_engines
from deferlib.keys import Keyring
from tests.store.children import need
from tests.system.processes import TIMEOUT, free_port, kill, listens, wait_until

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "node_worker"
FORMATS = (ROOT / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "how-to" / "other-languages.md").read_text(encoding="utf-8")
SECRET = "example-key-0123456789abcdefghij"
OTHER = "another key with ü and a space"
NOW: Micros = 1_763_700_000_250_000
DEADLINE: Micros = 600 * SECOND
MAX_BODY = (32 * 1024 + 64) * 1024

# Reads a request a line, as JSON, sends it to a real server of Node's, and prints a line: what verify.mjs makes of it.
DRIVER = """
import { createServer } from "node:http";
import { connect } from "node:net";
import { createInterface } from "node:readline";
const { keysFrom, verify } = await import(process.argv[1]);
let environ, options, said;
const server = createServer({ maxHeaderSize: 65536 }, async (request, response) => {
  said = {};
  try {
    const { task, body } = await verify(request, keysFrom(environ), options);
    Object.assign(said, { task, body: body.toString("base64") });
  } catch (error) {
    said.refused = `${error.constructor.name}: ${error.message}`;
  }
  const { headers, headersDistinct: distinct, rawHeaders: raw } = request;
  Object.assign(said, { headers, distinct, raw });
  response.writeHead(200, { Connection: "close" }).end();
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
for await (const line of createInterface({ input: process.stdin })) {
  const sent = JSON.parse(line);
  ({ environ, options } = sent);
  said = "not a request, says Node";
  const client = connect(server.address().port, "127.0.0.1").on("error", () => {}).resume();
  client.write(Buffer.from(sent.head, "latin1"));
  client.write(Buffer.from(sent.body, "base64"));
  await new Promise((done) => client.on("close", done));
  console.log(JSON.stringify(said));
}
server.close();
"""


@pytest.fixture(scope="module")
def node() -> str:
    """The path of node."""
    found = shutil.which("node")
    need(found is not None, "node")
    assert found is not None
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request as it comes to a worker, and what the worker knows."""

    token: str | None
    method: str = "POST"
    url: str = "/invoice"
    body: bytes = b""
    others: Sequence[tuple[str, str]] = ()  # headers beside the token
    environ: Mapping[str, str] = field(default_factory=lambda: {"DEFERLIB_KEY": SECRET})
    prefix: str = ""
    now: Micros = NOW

    def line(self) -> str:
        headers = [("Host", "worker"), *self.others]
        if self.token is not None:
            headers.append((token.HEADER, self.token))
        if not any(name == "Content-Length" for name, _ in headers):
            headers.append(("Content-Length", str(len(self.body))))
        head = [f"{self.method} {self.url} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        options = {"prefix": self.prefix, "now": self.now}
        body = base64.b64encode(self.body).decode()
        return json.dumps({"head": "\r\n".join(head), "body": body, "environ": dict(self.environ), "options": options})


def ask(node: str, requests: Sequence[Sent]) -> list[dict[str, Any]]:
    """Return what verify.mjs makes of each request; one process for all."""
    done = subprocess.run(
        [node, "--input-type=module", "--eval", DRIVER, str(EXAMPLE / "verify.mjs")],
        input="".join(f"{each.line()}\n" for each in requests),
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    said: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(requests)
    return said


def dispatch(url: str, name: str = "invoice-1001", **options: Any) -> Dispatch:
    context = TaskContext(
        id=2**63 - 25, user_name=name, queue="invoices", attempt=3, execution_count=1, eta_micros=NOW - 250_000,
        deadline_micros=NOW + DEADLINE, fence=NOW - 1, namespace="tenant-1", url=url, clock=SystemClock(),
    )  # fmt: skip
    headers = {"X-AppEngine-QueueName": "invoices", "X-AppEngine-TaskName": name, "X-AppEngine-TaskRetryCount": "2"}
    return Dispatch(context._replace(**options), headers)


def signed(
    url: str = "/invoice", *, secret: str = SECRET, method: str = "POST", body: bytes = b"", base: str = "", name: str = ""
) -> str:
    ring = Keyring([secret.encode()])
    return token.sign(ring, NOW, dispatch(url, name), method=method, body=body, deadline=DEADLINE, base_path=base)


def genuine(url: str = "/invoice", *, base: str = "", method: str = "POST", body: bytes = b"order=1", **more: Any) -> Sent:
    """Return the request that the engine sends for a task."""
    text = signed(url, method=method, body=body, base=base)
    return Sent(token=text, method=method, url=base + url, body=body, **more)


def derived(*secrets: str) -> str:
    """Return what DEFERLIB_DISPATCH_KEYS has for these signing keys."""
    ring = Keyring([secret.encode() for secret in secrets])
    return ",".join(f"{id.hex()}:{key.dispatch.hex()}" for id in ring.ids() if (key := ring.get(id)))


def documented(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", FORMATS, re.DOTALL)
    assert found is not None
    return found[1]


# --- what the engine signs ------------------------------------------------------------------------------------------

GENUINE = {
    "plain": genuine(),
    "empty body": genuine(body=b""),
    "large body": genuine(body=bytes(range(256)) * 1_000),
    "GET": genuine("/report?year=2026", method="GET", body=b""),
    "HEAD": genuine(method="HEAD", body=b""),
    "PUT": genuine(method="PUT"),
    "DELETE": genuine(method="DELETE", body=b""),
    "unicode path": genuine(quote("/rechnung/größe/雪/a b")),
    "escapes": genuine("/a%2Fb%25c/~d;e,f=(g)/%zz%"),
    "a proxy that decodes": replace(genuine("/%7Eada/%c3%a9"), url="/~ada/%C3%A9"),
    "query": genuine("/invoice?a=1&b=%20+%C3%A9&c=?"),
    "empty query": genuine("/invoice?"),
    "query of 200": genuine("/invoice?" + "q" * 200),
    "query of 201": genuine("/invoice?" + "q" * 201),
    "query of 3000": genuine("/invoice?" + "%C3%A9" * 500),
    "base path": genuine(base="/tasks/v1"),
    "unicode base path": genuine("/invoice?x=1", base="/t%C3%A4sks"),
    "stripped prefix": replace(genuine(base="/tasks"), url="/invoice", prefix="/tasks"),
    "unused prefix": genuine(prefix="/tasks"),
    "second key": genuine(environ={"DEFERLIB_KEY": f"{OTHER}, {SECRET}"}),
    "keys on lines": genuine(environ={"DEFERLIB_KEY": f"\n  {OTHER}\r\n\t{SECRET} \n\n"}),
    "non-ASCII key": Sent(token=signed(secret=OTHER), environ={"DEFERLIB_KEY": f"{SECRET},{OTHER}"}),
    "derived key": genuine(environ={"DEFERLIB_DISPATCH_KEYS": derived(SECRET), "DEFERLIB_KEY": "not looked at"}),
    "derived keys": genuine(environ={"DEFERLIB_DISPATCH_KEYS": derived(OTHER, SECRET).replace(",", "\n")}),
    "first moment": genuine(now=NOW - 10 * MINUTE),
    "last moment": genuine(now=NOW + DEADLINE + 10 * MINUTE),
}


@pytest.fixture(scope="module")
def believed(node: str) -> dict[str, dict[str, Any]]:
    """What verify.mjs says of the genuine requests, by their names."""
    return dict(zip(GENUINE, ask(node, list(GENUINE.values())), strict=True))


@pytest.mark.parametrize("shape", GENUINE)
def test_what_the_engine_signs_is_believed(shape: str, believed: dict[str, dict[str, Any]]) -> None:
    sent, said = GENUINE[shape], believed[shape]

    assert "refused" not in said
    assert base64.b64decode(said["body"]) == sent.body
    assert said["task"]["attempt"] == 3


def test_task_is_what_the_engine_vouches_for(node: str) -> None:
    named = Sent(token=signed("/a%20b?x=1", base="/base", name="invoice-7"), url="/base/a%20b?x=1")
    unnamed = Sent(token=signed("/a?" + "q" * 300), url="/a?" + "q" * 300)

    of_named, of_unnamed = (said["task"] for said in ask(node, [named, unnamed]))

    assert of_named == {
        "id": str(2**63 - 25), "name": "invoice-7", "queue": "invoices", "namespace": "tenant-1", "path": "/a%20b",
        "url": "/a%20b?x=1", "attempt": 3, "executions": 1, "fence": NOW - 1, "eta": "2025-11-21T04:40:00.000Z",
        "deadline": "2025-11-21T04:50:00.250Z",
    }  # fmt: skip
    assert (of_unnamed["name"], of_unnamed["url"]) == (str(2**63 - 25), "/a?" + "q" * 300)


def test_documented_example_is_believed(node: str) -> None:
    sent = Sent(token=documented("token").replace("\n", ""), url="/_ah/queue/deferred", body=b"hello")
    found = dict(re.findall(r"^\| (key id|dispatch key) \| `(\w+)` \|$", FORMATS, re.MULTILINE))
    by_derived_key = replace(sent, environ={"DEFERLIB_DISPATCH_KEYS": f"{found['key id']}:{found['dispatch key']}"})
    claims = json.loads(documented("claims"))

    for said in ask(node, [sent, by_derived_key]):
        assert said["task"]["name"] == "welcome-7"
        assert said["headers"] == {
            "host": "worker",
            "content-length": "5",
            **{name.lower(): value for name, value in claims["h"].items()},
        }


# --- what it doesn't ------------------------------------------------------------------------------------------------


def with_claims(text: str, **changed: Any) -> str:
    """Return *text* with other claims under the old signature."""
    version, key_id, claims, signature = text.split(".")
    said = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    assert {name: said[name] for name in changed} != changed
    data = json.dumps({**said, **changed}, separators=(",", ":")).encode()
    return ".".join((version, key_id, base64.urlsafe_b64encode(data).rstrip(b"=").decode(), signature))


def spare_bits(text: str) -> str:
    """Return *text* with a last character that decodes to the same signature."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]
    assert base64.urlsafe_b64decode(other[-43:] + "=") == base64.urlsafe_b64decode(text[-43:] + "=")
    return other


def altered(sent: Sent) -> Iterator[tuple[str, Sent]]:
    """Yield *sent* with one part changed, and what must be said of it."""
    assert sent.token is not None
    text = sent.token
    path, mark, query = sent.url.partition("?")
    yield "no dispatch token", replace(sent, token=None)
    yield "no dispatch token", replace(sent, token=None, others=[("X_Deferlib_Signature", text)])
    yield "more than one", replace(sent, others=[(token.HEADER, text)])
    yield "more than one", replace(sent, others=[(token.HEADER.lower(), "v1.a.b.c")])
    yield "request", replace(sent, method="GET" if sent.method == "POST" else "POST")
    yield "another path", replace(sent, url=f"{path}/{mark}{query}")
    yield "another path", replace(sent, url=f"/{path}{mark}{query}")
    yield "another path", replace(sent, url=f"/x{mark}{query}")
    yield "another path", replace(sent, url=f"http://worker{sent.url}")
    yield "another query", replace(sent, url=f"{path}?{query}x")
    yield "another query", replace(sent, url=f"{path}?{query[:-1]}" if query else f"{path}?a=1")
    yield "another body", replace(sent, body=sent.body + b"0")
    yield "another body", replace(sent, body=sent.body[:-1] if sent.body else b"\0")
    yield "signature is wrong", replace(sent, token=spare_bits(text))
    yield "signature is wrong", replace(sent, token=text[:-1])
    yield "signature is wrong", replace(sent, token=text + "=")
    yield "signature is wrong", replace(sent, token=text[: text.rindex(".") + 1])
    yield "signature is wrong", replace(sent, token=with_claims(text, a=1))
    yield "signature is wrong", replace(sent, token=with_claims(text, h={"X-AppEngine-TaskRetryCount": "0"}))
    yield "signature is wrong", replace(sent, token=with_claims(text, u="/other"), url="/other")
    yield "unknown format", replace(sent, token="v2" + text[2:])
    yield "unknown format", replace(sent, token=text + ".")
    yield "unknown format", replace(sent, token=text.rpartition(".")[0])
    yield "unknown format", replace(sent, token=text + "é")
    yield "unknown format", replace(sent, token=text + "A" * 16_384)
    yield "key that isn't known", replace(sent, environ={"DEFERLIB_KEY": "a key that nobody signs with"})
    yield "key that isn't known", replace(sent, environ={"DEFERLIB_DISPATCH_KEYS": derived("nobody signs with it")})
    yield "key that isn't known", replace(sent, token=text.replace(text[3:19], "0" * 16))
    yield "expired", replace(sent, now=NOW - 10 * MINUTE - 1)
    yield "expired", replace(sent, now=NOW + DEADLINE + 10 * MINUTE + 1)


def test_one_altered_part_of_any_request_is_refused(node: str) -> None:
    cases = [(shape, why, sent) for shape, each in GENUINE.items() for why, sent in altered(each)]

    said = ask(node, [sent for _, _, sent in cases])

    assert len(cases) > 700
    for (shape, why, sent), answer in zip(cases, said, strict=True):
        assert answer.get("refused", "believed").startswith("Untrusted: "), (shape, why, sent)
        assert why in answer["refused"], (shape, why, answer)


def test_other_ways_to_pass_for_another_request_are_refused(node: str) -> None:
    long = genuine("/invoice?" + "q" * 300)
    digest = hashlib.sha256(b"q" * 300).hexdigest()
    payload_key = Keyring([SECRET.encode()]).signing.payload.hex()
    cases = {
        "another query": replace(long, url=f"/invoice?{digest}"),  # a digest for a query
        "another path": replace(genuine(base="/tasks"), prefix="/other", url="/invoice"),
        "signature is wrong": genuine(environ={"DEFERLIB_DISPATCH_KEYS": derived(SECRET)[:17] + payload_key}),
        "the body has more": genuine(others=[("Content-Length", str(MAX_BODY + 1))]),
    }

    for why, said in zip(cases, ask(node, list(cases.values())), strict=True):
        assert why in said.get("refused", "believed")


def test_keys_that_are_none_are_an_error_that_tells_nothing_of_them(node: str) -> None:
    cases = [
        ({}, "there is no key"),
        ({"DEFERLIB_KEY": ", \n"}, "there is no key"),
        ({"DEFERLIB_KEY": f"{SECRET},short-secret"}, "signing key 2 has 12 bytes"),
        ({"DEFERLIB_DISPATCH_KEYS": "secret"}, "key 1 isn't 16 hex digits"),
        ({"DEFERLIB_DISPATCH_KEYS": derived(SECRET)[:-1]}, "key 1 isn't 16 hex digits"),
    ]

    for (_, why), said in zip(cases, ask(node, [genuine(environ=environ) for environ, _ in cases]), strict=True):
        assert said["refused"].startswith("Error: ")
        assert why in said["refused"]
        assert "secret" not in said["refused"]


def test_key_file_is_read_as_deferlib_does(node: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.db.key"
    path.write_bytes(f" {OTHER}\r\n\nkey in Latin-1: ".encode() + b"\xe0\xa0\n" + SECRET.encode())
    path.chmod(0o600)
    ring = keys.from_file(str(path))
    environ = {"DEFERLIB_KEY_FILE": str(path)}
    signers = [Keyring([OTHER.encode()]), Keyring([b"key in Latin-1: \xe0\xa0"]), Keyring([SECRET.encode()])]
    assert [each.signing.id for each in signers] == ring.ids()
    requests = [
        Sent(
            token=token.sign(each, NOW, dispatch("/a"), method="POST", body=b"", deadline=DEADLINE),
            url="/a",
            environ=environ,
        )
        for each in signers
    ]

    said = ask(node, requests)
    path.chmod(0o640)
    [open_to_others] = ask(node, requests[:1])

    assert ["refused" in each for each in said] == [False] * 3
    assert "others can read the signing keys" in open_to_others["refused"]


# --- headers --------------------------------------------------------------------------------------------------------

FORGED = [
    "X-AppEngine-TaskName", "x-appengine-queuename", "X_APPENGINE_TASKRETRYCOUNT", "x-AppEngine_User-Is-Admin",
    "X-CloudTasks-QueueName", "x_cloudtasks-taskname", "X-Deferlib-Outcome", "x_deferlib_signature", "X-AppEngine-Country",
]  # fmt: skip
HONEST = ["Host", "Content-Type", "X-App-Engine", "AppEngine-TaskName", "X-Forwarded-For", "X_Request_Id"]


def test_forged_headers_are_deleted_and_true_ones_set(node: str) -> None:
    others = [(name, "forged") for name in FORGED] + [(name, "honest") for name in HONEST[1:]]
    assert [is_engines(name) for name, _ in others] == [True] * len(FORGED) + [False] * (len(HONEST) - 1)
    mine = genuine(others=others)
    true = {name.lower(): value for name, value in dispatch("/invoice", "").headers.items()}

    task, nobody, thief = ask(node, [mine, replace(mine, token=None), replace(mine, body=b"")])

    kept = {name.lower(): "honest" for name in HONEST} | {"host": "worker"}
    assert task["headers"] == kept | {"content-length": "7"} | true
    assert nobody["headers"] == kept | {"content-length": "7"}
    assert thief["headers"] == kept | {"content-length": "0"}
    for said in (task, nobody, thief):
        assert dict(zip(*[iter(map(str.lower, said["raw"]))] * 2, strict=True)) == said["headers"]
        assert said["distinct"] == {name: [value] for name, value in said["headers"].items()}
        assert "forged" not in json.dumps(said)


# --- the example, for real ------------------------------------------------------------------------------------------


@contextmanager
def process(command: Sequence[str], log: Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run *command* in the example's folder while the block lasts."""
    with log.open("wb") as file:
        running = subprocess.Popen(
            command, cwd=EXAMPLE, env=environ, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        yield running
    finally:
        kill(running)


def command_of_page(variable: str) -> list[str]:
    """Return the `python -c` of the page that makes *variable*."""
    [line] = re.findall(rf"^export {variable}=\$\((python -c .+?)\)$", PAGE, re.MULTILINE | re.DOTALL)
    return [sys.executable, *shlex.split(line)[1:]]


class Site:
    """A store, keys and a folder for invoices of the example's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.invoices = folder / "invoices"
        self.port = free_port()
        mine = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        self.environ = {
            **mine,
            "DEFERLIB_STORE": f"sqlite:///{folder}/tasks.db",
            "DEFERLIB_TARGETS": f"node=http://127.0.0.1:{self.port}",
            "INVOICES": str(self.invoices),
            "PORT": str(self.port),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "XDG_RUNTIME_DIR": str(folder),
        }

    def run(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command, cwd=EXAMPLE, env=self.environ, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def tasks(self, state: str) -> list[dict[str, Any]]:
        command = ["-m", "deferlib.cli", "tasks", "list", "invoices", "--state", state, "--json"]
        listed: list[dict[str, Any]] = json.loads(self.run([sys.executable, *command]))["tasks"]
        return listed

    @contextmanager
    def worker(self, node: str, **environ: str) -> Iterator[Path]:
        """Yield the log of a worker that listens."""
        log = self.folder / "worker.log"
        with process([node, "worker.mjs"], log, {**self.environ, **environ}) as running:
            wait_until(lambda: listens(self.port) or running.poll() is not None, "the worker listens")
            assert running.poll() is None, log.read_text()
            yield log

    def post(self, body: bytes, *headers: tuple[str, str], url: str = "/invoice") -> tuple[int, str | None]:
        """Ask the worker without an engine; return status and outcome."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.putrequest("POST", url)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.getheader(token.OUTCOME)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_example_renders_its_invoices_and_keeps_the_one_that_cannot_be(node: str, site: Site) -> None:
    add = [sys.executable, "add_tasks.py"]
    added = site.run(add)

    # The key file was made when the first task was added.
    environ = {"DEFERLIB_KEY_FILE": str(site.folder / "tasks.db.key"), "FAIL_FIRST": "1"}
    engine = [sys.executable, "-m", "deferlib.cli", "engine"]
    with site.worker(node, **environ) as log, process(engine, site.folder / "engine.log", site.environ):
        wait_until(lambda: len(list(site.invoices.glob("*.txt"))) == 3, "three invoices are there")
        wait_until(lambda: site.tasks("dead") and not site.tasks("ready"), "the fourth is given up")
        again = site.run(add)
        said = log.read_text()

    assert added.splitlines() == [f"invoice-{number}: added" for number in range(1001, 1005)]
    assert again.splitlines() == [f"invoice-{number}: added before" for number in range(1001, 1005)]
    assert (site.invoices / "invoice-1001.txt").read_text() == (
        "Invoice for order 1001\n\nTo: Ada Lovelace\nTotal: €1,234.50\n"
    )
    assert "To: Gödel & Söhne\n" in (site.invoices / "invoice-1002.txt").read_text()
    assert len(list(site.invoices.iterdir())) == 3
    [dead] = site.tasks("dead")
    assert (dead["name"], dead["reason"].partition(": ")[0]) == ("invoice-1004", "permanent")
    for number in range(1001, 1005):
        assert f"invoice-{number}, attempt 1: 503 retry the printer is warming up\n" in said
    for number in range(1001, 1004):
        assert f"invoice-{number}, attempt 2: 200 ok done\n" in said
    assert "invoice-1004, attempt 2: 200 permanent order 1004: cents is a lot, a whole number is needed\n" in said


def test_forged_request_is_refused_and_changes_nothing(node: str, site: Site) -> None:
    site.environ["DEFERLIB_KEY"] = f"{SECRET},{OTHER}"
    variable = "DEFERLIB_DISPATCH_KEYS"
    site.environ[variable] = site.run(command_of_page(variable)).strip()  # as the page says
    assert site.environ[variable] == derived(SECRET, OTHER)
    body = urlencode({"order": "1", "customer": "Mallory", "cents": "1"}).encode()
    now = time.time_ns() // 1000

    def made(secret: str = SECRET, at: Micros = now, method: str = "POST") -> tuple[str, str]:
        ring = Keyring([secret.encode()])
        task = dispatch("/invoice", "invoice-1")
        return token.HEADER, token.sign(ring, at, task, method=method, body=body, deadline=DEADLINE)

    with site.worker(node, DEFERLIB_KEY="") as log:
        refused = [
            site.post(body),
            site.post(body, ("X-AppEngine-QueueName", "invoices"), ("X-AppEngine-TaskName", "invoice-1")),
            site.post(body, ("X_Deferlib_Signature", made()[1])),
            site.post(body, made(), made()),
            site.post(body, made("a key that nobody signs with")),
            site.post(body, made(at=now - DEADLINE - 11 * MINUTE)),
            site.post(body, made(method="PUT")),
            site.post(body + b"0", made()),
            site.post(body, made(), url="/invoice?order=2"),
            site.post(body, (token.HEADER, spare_bits(made()[1]))),
            site.post(body, (token.HEADER, "v1." + "x" * 14_000)),
        ]
        before = list(site.invoices.iterdir())
        believed = site.post(body, made()), site.post(body, made(OTHER))
        after = [path.name for path in site.invoices.iterdir()]

    assert refused == [(403, "untrusted")] * len(refused), log.read_text()
    assert before == []
    assert believed == ((200, "ok"), (200, "ok"))
    assert after == ["invoice-1.txt"]


def test_body_without_an_end_is_not_read(node: str, site: Site) -> None:
    ring = Keyring([SECRET.encode()])
    now = time.time_ns() // 1000
    task = dispatch("/invoice", "invoice-1")
    signature = token.sign(ring, now, task, method="POST", body=b"", deadline=DEADLINE)

    with site.worker(node, DEFERLIB_KEY=SECRET) as log:
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=TIMEOUT)
        connection.putrequest("POST", "/invoice")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.putheader(token.HEADER, signature)
        connection.endheaders()
        chunk = b"100000\r\n" + b"0" * 0x100000 + b"\r\n"
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012  # some chunk fails, not the first
            for _ in range(200):
                connection.send(chunk)
        wait_until(lambda: "untrusted" in log.read_text(), "the worker refused it")
        connection.close()

        assert site.post(b"") == (403, "untrusted")  # it is still there
        assert list(site.invoices.iterdir()) == []


def test_doctor_tells_whether_the_keys_agree(node: str, site: Site) -> None:
    site.environ["DEFERLIB_KEY"] = SECRET
    command = [sys.executable, "-m", "deferlib.cli", "doctor"]

    said = []
    for secret in (SECRET, OTHER):
        with site.worker(node, DEFERLIB_KEY=secret):
            done = subprocess.run(
                command, cwd=EXAMPLE, env=site.environ, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        said.append(" ".join(done.stdout.split()))

    assert "its handler is not mounted" in said[0].partition("PROBLEM target node")[2]
    assert "but another key than the one here" in said[1].partition("PROBLEM target node")[2]


def test_readme_and_page_show_the_commands_that_are_run_here() -> None:
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")

    files = {path.name for path in EXAMPLE.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert set(re.findall(r"^\| `(\S+)` \|", readme, re.MULTILINE)) == files - {"README.md"}
    assert "DEFERLIB_KEY_FILE=.deferlib/tasks.db.key FAIL_FIRST=1 node worker.mjs" in readme
    assert "DEFERLIB_TARGETS=node=http://127.0.0.1:8090 deferlib engine" in readme
    assert "`examples/node_worker`" in PAGE
    for name in files - {"README.md", "queue.yaml"}:
        assert f"[{name}](../../examples/node_worker/{name})" in PAGE
