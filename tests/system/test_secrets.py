"""Secrets stay where they are: real processes with canaries in them, and every word that they say, at DEBUG."""

from __future__ import annotations

import base64
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw
import pytest

import deferlib
from deferlib import config, context, deferred, payload, token
from deferlib.core.model import MINUTE, ClaimSpec, Delivery, Page, TaskState
from deferlib.engine.dispatch import signer, vouch
from deferlib.keys import Keyring
from deferlib.settings import load_settings
from deferlib.taskqueue import Task
from tests.system.processes import TIMEOUT, Site, free_port, listens, wait_until

KEY = "canary-of-the-key-8f3a91c2d4"
OLD_KEY = "canary-of-the-old-key-77b0e1"
PASSWORD = "canary-of-the-password"
ARGUMENT = "canary-of-an-argument"
HEADER = "canary-of-a-header"
PAYLOAD = "canary-of-a-payload"
APP = f'''
"""An app whose tasks fail in every way; it logs all there is to log."""
import logging
import os
import sys

import deferlib

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)

class Unloadable:
    """An object that is pickled, but not unpickled."""

    def __init__(self, secret):
        self.secret = secret

    def __reduce__(self):
        return os.path.join, (self.secret, 3)

def works(*args, **kwargs):
    pass

def fails(*args, **kwargs):
    raise ValueError("no")

def fails_for_good(*args, **kwargs):
    raise deferlib.PermanentTaskFailure("never")

def view(environ, start_response):
    status = "500 No" if "fail" in environ["PATH_INFO"] else "200 OK"
    start_response(status, [("Content-Length", "0")])
    return []

def defer_all():
    from deferlib.taskqueue import Task
    secret = {{"password": "{ARGUMENT}", "api_key": "{ARGUMENT}"}}
    for function in (works, fails, fails_for_good):
        deferlib.defer(function, **secret, _name=function.__name__)
    deferlib.defer(works, password=Unloadable("{ARGUMENT}"), _name="unloadable")
    headers = {{"Authorization": "Bearer {HEADER}", "Cookie": "session={HEADER}", "X-Api-Key": "{HEADER}"}}
    for path in ("/fine", "/fail"):
        Task(url=path, payload=b"{PAYLOAD}", headers=headers, name=path[1:]).add("default")
    Task(url="/fail", payload=b"{PAYLOAD}", headers=headers, name="nowhere", target="nowhere").add("default")
    try:
        deferlib.defer(works, password=(secret["password"], (number for number in [])))
    except Exception:
        logging.exception("can't be deferred")

wsgi = deferlib.wrap_wsgi_app(view)
'''
QUEUES = """\
queue:
- name: default
  retry_parameters:
    min_backoff_seconds: 0.05
    max_backoff_seconds: 0.1
    task_retry_limit: 5
"""


def forms_of(secret: bytes) -> dict[str, bytes]:
    """Return the texts that would give *secret* away."""
    return {
        "itself": secret,
        "hex": secret.hex().encode(),
        "base64": base64.b64encode(secret).rstrip(b"="),
        "base64 for URLs": base64.urlsafe_b64encode(secret).rstrip(b"="),
        "its repr": repr(secret)[2:-1].encode(),
    }


def canaries(*keys: str) -> dict[str, bytes]:
    """Return everything that nobody may read, by what it is."""
    found = {}
    for key in keys:
        made = Keyring([key.encode()]).signing
        for what, secret in {"key": key.encode(), "payload key": made.payload, "dispatch key": made.dispatch}.items():
            found |= {f"{what}, {form}": text for form, text in forms_of(secret).items()}
    for text in (PASSWORD, ARGUMENT, HEADER, PAYLOAD):
        found |= {f"{text}, {form}": hidden for form, hidden in forms_of(text.encode()).items()}
    return found


def signatures_in(path: Path) -> dict[str, bytes]:
    """Return the signature of every payload in the store."""
    found: dict[str, bytes] = {}
    runtime = deferlib.configure(store=f"sqlite:///{path}", key=KEY)
    with runtime.store.read() as tx:
        for state in TaskState:
            for row in tx.tasks("default", Page(1000, state=state)):
                if payload.is_envelope(row.body):
                    signature = payload.parse(row.body).signature
                    found |= {f"signature of {row.name}, {form}": text for form, text in forms_of(signature).items()}
    runtime.close()
    config.install(None)
    return found


def leaks(said: bytes, secrets: dict[str, bytes]) -> list[str]:
    """Return which of *secrets* stand in *said*, each with its line."""
    lines = said.splitlines()
    return [f"{what}: {line[:300]!r}" for what, secret in secrets.items() for line in [x for x in lines if secret in x][:2]]


@pytest.fixture(params=["environment", "file"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "queue.yaml").write_text(QUEUES)
    site.environ |= {"PYTHONFAULTHANDLER": "1", "PYTHONDONTWRITEBYTECODE": "1", "DEFERLIB_GRACE": "1"}
    if request.param == "environment":
        site.environ["DEFERLIB_KEY"] = f"{KEY},{OLD_KEY}"
    else:
        (tmp_path / "tasks.db.key").write_text(f"{KEY}\n{OLD_KEY}\n")
        (tmp_path / "tasks.db.key").chmod(0o600)
    yield site
    config.install(None)


def command(site: Site, *arguments: str, **environ: str) -> bytes:
    """Run a command; return all that it said."""
    done = subprocess.run(
        [sys.executable, "-m", "deferlib.cli", *arguments], cwd=site.folder, env={**site.environ, **environ},
        capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return b"$ deferlib " + " ".join(arguments).encode() + b"\n" + done.stdout + done.stderr


def died(site: Site) -> bytes:
    """Return the names of the dead letters."""
    connection = apsw.Connection(str(site.folder / "tasks.db"))
    names = [str(name) for (name,) in connection.execute("select name from dead")]
    connection.close()
    return " ".join(names).encode()


def wait_for_death(site: Site, process: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: b"fails " in died(site) + b" " or process.poll() is not None, "a call has died")
    assert process.poll() is None, site.log()[-2000:]


def python(site: Site, code: str, **environ: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], cwd=site.folder, env={**site.environ, **environ},
        capture_output=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


SERVE = (
    "import sys, app; from werkzeug.serving import run_simple;"
    "run_simple('127.0.0.1', int(sys.argv[1]), app.wsgi, threaded=True)"
)
LOOK = (
    ("tasks", "list"), ("tasks", "list", "--json"),
    ("tasks", "list", "--state", "dead"), ("tasks", "list", "--state", "dead", "--json"),
    *(("tasks", "show", name) for name in ("works", "fails", "unloadable", "fail", "nowhere")),
    *(("tasks", "show", name, "--json") for name in ("works", "fails", "unloadable", "fail", "nowhere")),
    ("queues", "list"), ("queues", "list", "--json"), ("queues", "show", "default"), ("config",), ("config", "--json"),
    ("doctor",), ("doctor", "--json"), ("keys", "list"), ("keys", "list", "--json"),
)  # fmt: skip


def test_nothing_that_is_said_has_a_secret_in_it(site: Site) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    debug = {"DEFERLIB_LOG_LEVEL": "DEBUG", "DEFERLIB_APP": url}
    engine = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG); from deferlib.cli import main; main(sys.argv[1:])"
    )
    with site.process([sys.executable, "-c", SERVE, str(port)]):
        wait_until(lambda: listens(port), "the app listens")
        said = python(site, "import app; app.defer_all()")
        assert b"can't be deferred" in said
        with site.process([sys.executable, "-c", engine, "engine"], **debug) as running:
            wait_for_death(site, running)
            running.send_signal(signal.SIGABRT)  # faulthandler writes what it knows
            running.wait(TIMEOUT)
        for arguments in LOOK:
            said += command(site, *arguments, **debug)
        with site.process([sys.executable, "-c", SERVE, str(free_port())], DEFERLIB_KEY="another-key-0123456789"):
            pass
    said += (site.folder / "log").read_bytes()

    assert b"Fatal Python error: Aborted" in said
    assert b"DEBUG" in said
    assert not leaks(said, canaries(KEY, OLD_KEY) | signatures_in(site.folder / "tasks.db"))


def test_engine_in_process_says_no_secret(site: Site) -> None:
    said = python(site, "import app; app.defer_all()")
    with site.engine("--app", "app:wsgi") as running:
        wait_for_death(site, running)
    said += (site.folder / "log").read_bytes()

    assert b"ValueError: no" in said
    assert not leaks(said, canaries(KEY, OLD_KEY) | signatures_in(site.folder / "tasks.db"))


def test_dev_says_no_secret(site: Site) -> None:
    port = free_port()
    with site.process(
        [sys.executable, "-m", "deferlib.cli", "dev", "app:wsgi", "--port", str(port)], PYTHONUNBUFFERED="1"
    ) as running:
        wait_until(lambda: listens(port), "it serves")
        python(site, "import app; app.defer_all()")
        wait_for_death(site, running)
        running.send_signal(signal.SIGINT)
        running.wait(TIMEOUT)

    said = (site.folder / "log").read_bytes()
    assert b"fails" in said
    assert not leaks(said, canaries(KEY, OLD_KEY) | signatures_in(site.folder / "tasks.db"))


LOGINS = f"http://user:{PASSWORD}@127.0.0.1:1", f"http://{PASSWORD}@127.0.0.1:1", f"http://user:{quote(PASSWORD + '/?#')}@h"
WRONG = [
    *({"DEFERLIB_STORE": store} for store in (
        f"postgresql://user:{PASSWORD}@db.example/tasks", f"postgres://user:{PASSWORD}@db.example/tasks?sslmode=require",
        f"postgresql://db.example/tasks?user=x&password={PASSWORD}", f"mysql://user:{PASSWORD}@db.example/tasks",
    )),
    *({setting: login} for setting in ("DEFERLIB_APP", "DEFERLIB_TARGETS") for login in LOGINS),
    *({"DEFERLIB_TARGETS": f"worker={login}"} for login in LOGINS),
    {"DEFERLIB_KEY": KEY[:15]}, {"DEFERLIB_KEY": f"{KEY},{KEY[:9]}"}, {"DEFERLIB_KEY": f",{KEY[:12]},"},
    {"DEFERLIB_KEY": KEY, "DEFERLIB_STORE": "sqlite:////proc/no/tasks.db"},
    {"DEFERLIB_KEY": KEY, "DEFERLIB_STORE": "sqlite:////dev/null"},
]  # fmt: skip


@pytest.mark.parametrize("environ", WRONG, ids=lambda environ: " ".join(environ))
def test_wrong_setting_is_refused_without_showing_it(tmp_path: Path, environ: dict[str, str]) -> None:
    site = Site(tmp_path)
    (tmp_path / "app.py").write_text(APP)

    said = [
        *(
            command(site, *arguments, **environ)
            for arguments in (["config"], ["tasks", "list"], ["engine", "--app", "app:wsgi"])
        ),
        python(site, "import app; app.defer_all()", **environ),
    ]

    secrets = canaries(KEY) | {"part of a key": KEY[:9].encode()}
    assert all(len(text) > 30 for text in said)
    assert not [leak for text in said for leak in leaks(text, secrets)]


# --- what an object shows of itself -----------------------------------------------------------------------------------


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[list[Any]]:
    """One of each thing that the library makes around a secret."""
    former = config.install(None)
    runtime = deferlib.configure(store=f"sqlite:///{tmp_path}/tasks.db", key=f"{KEY},{OLD_KEY}")
    headers = {"Authorization": f"Bearer {HEADER}"}
    made = [
        deferlib.defer(os.path.join, ARGUMENT, _headers=headers),
        Task(url="/x", payload=PAYLOAD.encode(), headers=headers),
    ]
    made[1].add("default")
    now = runtime.clock.now()
    with runtime.store.read() as tx:
        rows = tx.tasks("default", Page())
    claims = runtime.store.run(lambda tx: tx.claim(now + MINUTE, [ClaimSpec("default", 10, 1 << 20, now + 2 * MINUTE)]))
    assert len(claims) == 2
    deliveries = [Delivery(claim, "http://127.0.0.1:1", MINUTE) for claim in claims]
    requests = [signer(runtime.ring, runtime.clock)(delivery, now) for delivery in deliveries]
    dispatches = [vouch(delivery, now, runtime.clock) for delivery in deliveries]
    sent = [d._replace(headers=dict(d.headers)) for d in dispatches]
    tokens = [token.sign(runtime.ring, now, d, method="POST", body=b"", deadline=MINUTE) for d in sent]
    calls = [payload.dump_call(os.path.join, (ARGUMENT,), {})]
    envelopes = [payload.parse(deferred.serialize(os.path.join, ARGUMENT))]
    settings = load_settings({"key": KEY, "store": f"postgresql://user:{PASSWORD}@db.example/tasks"})
    yield [
        runtime, runtime.ring, runtime.ring.signing, runtime.settings, settings, *settings.all.values(), settings.shown(),
        *made, *rows, *claims, *deliveries, *requests, *dispatches, *(d.context for d in dispatches), *calls, *envelopes,
        *(token.verify(runtime.ring, runtime.clock, text) for text in tokens),
        context.SYSTEM_CLOCK, runtime.store,
    ]  # fmt: skip
    runtime.close()
    config.install(former)


def test_no_object_of_the_library_shows_a_secret(objects: list[Any]) -> None:
    ours = [*objects, *(thing for thing in gc.get_objects() if str(type(thing).__module__).partition(".")[0] == "deferlib")]
    secrets = canaries(KEY, OLD_KEY)
    for thing in objects:
        signature = getattr(thing, "signature", None)
        if isinstance(signature, bytes):
            secrets |= {f"signature, {form}": text for form, text in forms_of(signature).items()}

    shown = {type(thing).__qualname__: leaks(f"{thing!r} {thing} {[thing]}".encode(), secrets) for thing in ours}

    assert not [f"{name}: {found}" for name, found in shown.items() if found]
    assert {"Runtime", "Keyring", "Key", "Settings", "Setting", "Task", "Claim", "Dispatch", "Request"} <= set(shown)


def test_no_error_shows_a_secret(objects: list[Any], tmp_path: Path) -> None:
    """What is refused is named, and not repeated."""
    errors = []
    genuine = deferred.serialize(os.path.join, ARGUMENT)
    for data in (genuine[:-1], genuine + b"x", genuine.replace(b"dfr\x01", b"dfr\x02"), PAYLOAD.encode(), b""):
        with pytest.raises(deferlib.Error) as caught:
            deferred.run(data)
        errors.append(caught.value)
    for made in (lambda: Keyring([KEY[:8].encode()]), lambda: Task(url="http://user:" + PASSWORD + "@h/")):
        with pytest.raises(deferlib.Error) as caught:
            made()
        errors.append(caught.value)

    said = "\n".join(f"{error!r} {error} {json.dumps(str(error))}" for error in errors)
    assert not leaks(said.encode(), canaries(KEY, OLD_KEY) | {"part of a key": KEY[:8].encode()})
