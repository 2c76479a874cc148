"""`deferlib preflight`: which of the calls that wait would not run with the code that is here, told without running any."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import deferlib
from deferlib import config, keys, payload
from deferlib.cli import main
from deferlib.cli.preflight import _PAGE
from deferlib.core.model import MINUTE, Action, ClaimSpec, Outcome

OTHER = keys.parse("another-key-of-sixteen-bytes")
HEAD = """
import functools
import deferlib

def ran(*args, **kwargs):
    open("ran", "w").close()

def app(environ, start_response): ...
"""
GONE = "AttributeError: module 'shop' has no attribute"
MOVED = "; if it was renamed or moved, say so with @deferlib.formerly(…) at its new place"
CODE = """
def send(user_id, subject="Hello", *, urgent=False): ran()

def anything(*args, **kwargs): ran()

def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function("logger", *args, **kwargs)
    return wrapper

@logged
def decorated(logger, what): ran()

class Basket:
    def __init__(self, size=1): ran()

class Mailer:
    def __init__(self):
        self.host = "h"
    def send(self, to): ran()
    @classmethod
    def all(cls, to): ran()
    @staticmethod
    def one(to): ran()
    def __call__(self, to): ran()

class Lazy:
    def __getattr__(self, name):
        raise AttributeError(name)
    def send(self): ran()
"""


class Run(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def broken(self) -> list[tuple[str, int, str]]:
        return [(each["call"], each["tasks"], each["why"]) for each in self.json["broken"]]

    @property
    def unchecked(self) -> list[tuple[str, str]]:
        return [(each["call"], each["why"]) for each in self.json["unchecked"]]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Check = Callable[..., Run]


class Project:
    """A folder with the module `shop`, which is imported, and may be another one afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, code: str, name: str = "shop") -> None:
        (self.path / f"{name}.py").write_text(HEAD + code)
        self.forget()

    def forget(self) -> None:
        for name in [name for name, module in sys.modules.items() if self._own(module)]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def _own(self, module: object) -> bool:
        return str(getattr(module, "__file__", "") or "").startswith(str(self.path))

    @property
    def shop(self) -> Any:
        return importlib.import_module("shop")

    @property
    def ran(self) -> bool:
        return (self.path / "ran").exists()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project as the working directory, and no runtime before and after."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions of a module within a second would be one
    former = config.install(None)
    made = Project(tmp_path)
    made.write(CODE)
    yield made
    made.forget()
    last = config.install(former)
    if last is not None:
        last.close()


@pytest.fixture
def check(project: Project, capfd: pytest.CaptureFixture[str]) -> Check:
    """Runs the command as a process of its own would: nothing is imported or opened."""

    def run(*argv: str) -> Run:
        former = config.install(None)
        if former is not None:
            former.close()
        project.forget()
        capfd.readouterr()
        try:
            code = main(["preflight", *argv])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        made = config.install(None)
        if made is not None:
            made.close()
        return Run(code, *capfd.readouterr())

    return run


def forged(callable_pickle: bytes, label: str = "shop.send") -> bytes:
    body = len(callable_pickle).to_bytes(4, "big") + callable_pickle + pickle.dumps(((), {}), 5)
    return payload.seal(payload.Call(body, label, 0), OTHER.signing, None)


def put(body: bytes, **options: Any) -> None:
    """Add a task with these bytes, as whoever can write to the store might."""
    deferlib.taskqueue.add(url="/_ah/queue/deferred", payload=body, **options)


def files(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def defer_everything(shop: Any) -> None:
    deferlib.defer(shop.send, 7)
    deferlib.defer(shop.send, 7, "Hi", urgent=True)
    deferlib.defer(shop.anything, 1, 2, a=3)
    deferlib.defer(shop.decorated, 1)
    deferlib.defer(shop.Basket, size=2)
    deferlib.defer(shop.Mailer().send, "x")
    deferlib.defer(shop.Mailer.all, "x")
    deferlib.defer(shop.Mailer.one, to="x")
    deferlib.defer(shop.Mailer(), "x")
    deferlib.defer(shop.functools.partial(shop.send, 7), urgent=True)
    deferlib.defer(shop.functools.partial(shop.Mailer().send), "x")
    deferlib.defer(shop.anything, shop.Mailer(), [shop.send])
    deferlib.defer(print, 1)


# --- what would run -------------------------------------------------------------------------------------------------


def test_calls_that_fit_would_run_and_none_of_them_did(project: Project, check: Check) -> None:
    defer_everything(project.shop)
    (project.path / "ran").unlink(missing_ok=True)  # Basket and Mailer were made

    said = check("shop:app", "--json")

    assert said.code == 0, said.out
    assert said.json == {
        "app": "shop:app", "error": None, "tasks": 13, "calls": 13, "would_break": 0, "not_checked": 0, "broken": [],
        "unchecked": [], "more": 0, "ok": True,
    }  # fmt: skip
    assert not project.ran
    assert check("shop:app").out == "13 of 13 calls would run.\n"


def test_nothing_is_changed_by_looking(project: Project, check: Check) -> None:
    defer_everything(project.shop)
    check("shop:app")
    before = files(project.path)

    assert check("shop:app", "--dead").code == 0

    assert files(project.path) == before


def test_empty_store_says_that_nothing_waits(project: Project, check: Check) -> None:
    assert config.runtime().store is not None

    said = check("shop:app")

    assert (said.code, said.out) == (0, "Nothing waits.\n")
    assert not (project.path / ".deferlib" / "tasks.db.key").exists()


def test_missing_store_is_an_error_and_is_not_made(project: Project, check: Check) -> None:
    said = check("shop:app")

    assert said.code == 2
    assert "there is no store yet (setting 'store' from default)" in said.err
    assert not (project.path / ".deferlib").exists()


def test_missing_key_is_an_error_and_is_not_made(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.send, 7)
    key = project.path / ".deferlib" / "tasks.db.key"
    key.unlink()

    said = check("shop:app")

    assert said.code == 2
    assert f"{key}: there is no signing key" in said.err
    assert not key.exists()


def test_tasks_of_other_kinds_are_no_calls(project: Project, check: Check) -> None:
    deferlib.taskqueue.add(url="/x", params={"a": 1})
    deferlib.taskqueue.add(url="/x", method="GET")

    assert check("shop:app").out == "None of 2 tasks is a deferred call.\n"


# --- what would not run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "why"),
    [
        (lambda shop: deferlib.defer(shop.send, 7), CODE.replace("def send", "def post", 1),
         f"shop.send can't be loaded: {GONE} 'send'{MOVED}"),
        (lambda shop: deferlib.defer(shop.send, 7), CODE + "\nsend = 7",
         "shop.send is of type int now, which can't be called"),
        (lambda shop: deferlib.defer(shop.send, 7, "a"), CODE.replace(', subject="Hello"', ""),
         "shop.send doesn't take its arguments any more: too many positional arguments"),
        (lambda shop: deferlib.defer(shop.send, 7), CODE.replace('subject="Hello"', "subject"),
         "shop.send doesn't take its arguments any more: missing a required argument: 'subject'"),
        (lambda shop: deferlib.defer(shop.send, 7, urgent=True), CODE.replace("urgent", "pressing"),
         "shop.send doesn't take its arguments any more: got an unexpected keyword argument 'urgent'"),
        (lambda shop: deferlib.defer(shop.functools.partial(shop.send, 7), "a"), CODE.replace(', subject="Hello"', ""),
         "shop.send doesn't take its arguments any more: too many positional arguments"),
        (lambda shop: deferlib.defer(shop.Mailer().send, 7), CODE.replace("def send(self, to)", "def send(self)"),
         "shop.Mailer.send doesn't take its arguments any more: too many positional arguments"),
        (lambda shop: deferlib.defer(shop.Mailer().send, 7), CODE.replace("def send(self, to)", "def post(self, to)"),
         "shop.Mailer has no send any more"),
        (lambda shop: deferlib.defer(shop.Mailer().send, 7), CODE.replace("class Mailer", "class Post"),
         f"shop.Mailer can't be loaded: {GONE} 'Mailer'{MOVED}"),
        (lambda shop: deferlib.defer(shop.Mailer.all, 7), CODE.replace("def all(cls, to)", "def all(cls)"),
         "shop.Mailer.all doesn't take its arguments any more: too many positional arguments"),
        (lambda shop: deferlib.defer(shop.Mailer.all, 7), CODE.replace("def all(cls, to)", "def every(cls, to)"),
         "shop.Mailer.all can't be loaded: AttributeError: type object 'Mailer' has no attribute 'all'"),
        (lambda shop: deferlib.defer(shop.Mailer(), 7), CODE.replace("def __call__(self, to)", "def __call__(self)"),
         "shop.Mailer doesn't take its arguments any more: too many positional arguments"),
        (lambda shop: deferlib.defer(shop.Mailer(), 7), CODE.replace("def __call__", "def call"),
         "shop.Mailer has no __call__ any more"),
        (lambda shop: deferlib.defer(shop.Basket, 7), CODE.replace(", size=1", ""),
         "shop.Basket doesn't take its arguments any more: too many positional arguments"),
        (lambda shop: deferlib.defer(shop.anything, shop.Basket()), CODE.replace("class Basket", "class Cart"),
         f"shop.Basket can't be loaded: {GONE} 'Basket'{MOVED}"),
    ],
)  # fmt: skip
def test_call_that_does_not_fit_is_found(
    project: Project, check: Check, call: Callable[[Any], object], code: str, why: str
) -> None:
    call(project.shop)
    deferlib.defer(project.shop.anything)
    (project.path / "ran").unlink(missing_ok=True)
    project.write(code)

    said = check("shop:app", "--json")

    assert said.code == 1
    assert [(tasks, reason) for _, tasks, reason in said.broken] == [(1, why)]
    assert said.json["would_break"] == 1
    assert said.json["not_checked"] == 0
    assert not said.json["ok"]
    assert not project.ran


def test_people_read_a_line_for_each_call_and_an_end(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.send, 1, _name="welcome-1")
    deferlib.defer(project.shop.send, 2, _name="welcome-2")
    deferlib.defer(project.shop.decorated, 2, _name="one", _countdown=100)
    deferlib.defer(project.shop.anything)
    project.write("def anything(): ...")

    said = check("shop:app")

    assert said.code == 1
    lines = said.out.splitlines()
    assert lines[0].startswith("BROKEN: shop.send, 2 tasks like welcome-1 in default: shop.send can't be loaded: ")
    assert lines[1].startswith("BROKEN: shop.decorated, task one in default: ")
    assert lines[2:] == ["", "3 of 4 calls would not run."]


def test_module_that_is_gone_or_fails_is_told_once_with_its_error(project: Project, check: Check) -> None:
    for name in ("gone", "exits", "raises"):
        project.write("def f(): ...", name)
        deferlib.defer(importlib.import_module(name).f)
        deferlib.defer(importlib.import_module(name).f, 1)  # another shape, of which the same is to be said
    (project.path / "gone.py").unlink()
    project.write("import sys\nwith open('imported', 'a') as file:\n    file.write('x')\nsys.exit('no')", "exits")
    project.write("class Stop(BaseException): ...\nraise Stop('not here')", "raises")

    said = check("shop:app", "--json")

    assert said.code == 1
    assert [(call, tasks, why.partition("; if")[0]) for call, tasks, why in said.broken] == [
        ("gone.f", 2, "gone.f can't be loaded: ModuleNotFoundError: No module named 'gone'"),
        ("exits.f", 2, "exits.f can't be loaded: SystemExit: no"),
        ("raises.f", 2, "raises.f can't be loaded: Stop: not here"),
    ]
    assert (project.path / "imported").read_text() == "x", "each module is asked once"


def test_former_names_are_looked_for(project: Project, check: Check) -> None:
    project.write("def known_by_another_name(user_id): ran()")
    deferlib.defer(project.shop.known_by_another_name, 7)
    project.write('@deferlib.formerly("shop.known_by_another_name")\ndef post(user_id): ran()')

    assert check("shop:app").out == "1 of 1 call would run.\n"


def test_code_of_another_python_is_found_and_of_this_one_is_not_looked_into(project: Project, check: Check) -> None:
    runtime = config.runtime()
    call = payload.dump_call(lambda: project.ran, (), {})
    own = payload.seal(call, runtime.ring.signing, None)
    minor = sys.version_info.minor
    sealed = bytearray(own)
    sealed[8] = minor + 1
    envelope = payload.parse(bytes(sealed))
    start = len(envelope.signed)
    sealed[start : start + 32] = hmac_of(runtime.ring, envelope)
    put(own)
    put(bytes(sealed))

    said = check("shop:app", "--json")

    assert said.code == 1
    [(_, tasks, why)] = said.broken
    assert (tasks, why.partition(";")[0]) == (
        1,
        f"it was pickled by value on Python 3.{minor + 1}, which 3.{minor} can't load",
    )
    assert [why for _, why in said.unchecked] == ["its code travels in the pickle"]
    assert said.json["not_checked"] == 1


def hmac_of(ring: keys.Keyring, envelope: payload.Envelope) -> bytes:
    import hmac

    return hmac.digest(ring.signing.payload, envelope.signed + envelope.body, "sha256")


# --- no false alarm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "call", "why"),
    [
        ("", lambda shop: deferlib.defer([1].append, 2), "what it calls is made when it runs"),
        ("", lambda shop: deferlib.defer(max, 1, 2), "its signature can't be told"),
        ("send.__signature__ = 7", lambda shop: deferlib.defer(shop.send), "it states a signature of its own"),
        ("", lambda shop: deferlib.defer(shop.send, list(range(60_000)) * 2), None),
    ],
)
def test_what_cannot_be_told_is_not_checked_and_no_alarm(
    project: Project, check: Check, code: str, call: Callable[[Any], object], why: str | None
) -> None:
    project.write(CODE + code)
    call(project.shop)

    said = check("shop:app", "--json")

    assert said.code == 0
    assert said.json["not_checked"] == 1
    assert [reason for _, reason in said.unchecked] == [why or "its arguments are too large, or of a form of their own"]
    assert check("shop:app").out.endswith("Nothing speaks against 1 call; 1 couldn't be checked in full.\n")


@pytest.mark.parametrize("code", [
    CODE.replace("    def send(self): ran()", "    pass"),  # `Lazy` may still make it
    CODE.replace("class Lazy:", "class Lazy:\n    send = functools.partial(ran)").replace("    def send(self): ran()", ""),
    CODE.replace("class Lazy:", "class Lazy:\n    def __getattribute__(self, name): ...\n    send = 7"),
])  # fmt: skip
def test_method_that_an_object_may_have_by_itself_is_no_alarm(project: Project, check: Check, code: str) -> None:
    deferlib.defer(project.shop.Lazy().send)
    project.write(code)

    said = check("shop:app", "--json")

    assert (said.code, said.broken) == (0, [])


def test_wrapper_that_passes_an_argument_of_its_own_is_no_alarm(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.decorated, 1)

    assert check("shop:app", "--json").json["not_checked"] == 0
    assert check("shop:app").code == 0


# --- what is not verified -------------------------------------------------------------------------------------------


def test_what_is_not_verified_is_told_and_imports_nothing(project: Project, check: Check) -> None:
    project.write("open('imported', 'w').close()", "canary")
    genuine = payload.seal(payload.dump_call(project.shop.send, (7,), {}), config.runtime().ring.signing, None)
    put(forged(b"\x80\5ccanary\nf\n."))
    put(forged(b"\x80\5ccanary\nf\n.").replace(OTHER.signing.id, config.runtime().ring.signing.id))
    put(genuine[:-3] + b"\x94\x94.")
    put(b"no envelope")

    said = check("shop:app", "--json")

    assert said.code == 1
    assert said.broken == [
        ("canary.f", 1, f"the payload was signed with key {OTHER.signing.id.hex()}, which isn't in the ring here; add the "
         "key, it may stand last"),
        ("canary.f", 1, "the payload's signature is wrong"),
        ("shop.send", 1, "the payload's signature is wrong"),
        ("…", 1, "not a deferlib payload: unsigned, or cut short"),
    ]  # fmt: skip
    assert "canary" not in sys.modules
    assert not (project.path / "imported").exists()


def test_call_that_was_moved_to_another_task_is_told(project: Project, check: Check) -> None:
    task = deferlib.defer(project.shop.send, 7)
    with config.runtime().store.read() as tx:
        [row] = tx.find("default", [task.name])
    put(row.body, name="moved")

    assert check("shop:app", "--json").broken == [("shop.send", 1, "the payload was signed for another task")]


def test_call_for_no_task_in_particular_is_told_where_the_settings_refuse_it(
    project: Project, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(deferlib.deferred.serialize(project.shop.send, 7))
    assert check("shop:app").code == 0

    monkeypatch.setenv("DEFERLIB_ACCEPT_UNBOUND", "false")

    [(call, _, why)] = check("shop:app", "--json").broken
    assert (call, why) == ("shop.send", "the payload is signed for no task in particular, which the settings refuse")


def test_newer_format_says_to_upgrade_first(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.send, 7)
    body = bytearray(payload.seal(payload.dump_call(project.shop.send, (7,), {}), config.runtime().ring.signing, None))
    body[3] = 9
    put(bytes(body))

    said = check("shop:app", "--json")

    assert said.broken == [("…", 1, "payload version 9, this deferlib reads 1; upgrade deferlib first")]


# --- which tasks ----------------------------------------------------------------------------------------------------


def bury_all() -> None:
    """Make dead letters of all that is due."""
    store, at = config.runtime().store, config.runtime().clock.now()
    claims = store.run(lambda tx: tx.claim(at, [ClaimSpec("default", 100, 1 << 20, at + MINUTE)]))
    outcomes = [
        Outcome(c.id, c.claims, c.queue, Action.DEAD, at, c.name is not None, 1, 1, 500, "broke", "") for c in claims
    ]
    store.run(lambda tx: tx.settle(at, outcomes))


def test_dead_letters_are_checked_where_asked(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.send, 7, _name="given-up")
    bury_all()
    project.write("")

    assert check("shop:app").out == "Nothing waits.\n"
    said = check("shop:app", "--dead")
    assert said.code == 1
    assert "task given-up" in said.out


def test_only_one_queue_is_looked_at_where_it_is_named(project: Project, check: Check) -> None:
    (project.path / "queue.yaml").write_text("queue:\n- name: default\n- name: mail\n")
    deferlib.defer(project.shop.send, 7, _queue="mail")
    project.write("")

    assert check("shop:app", "--queue", "default").out == "Nothing waits.\n"
    assert check("shop:app", "--queue", "mail").code == 1
    said = check("shop:app", "--queue", "post")
    assert said.code == 2
    assert "there is no queue 'post'; known are: " in said.err


def test_all_pages_are_read(project: Project, check: Check) -> None:
    for number in range(3 * _PAGE):
        deferlib.defer(project.shop.send, number)
    project.write("")

    said = check("shop:app", "--json")

    assert said.json["tasks"] == said.json["would_break"] == 3 * _PAGE
    assert len(said.broken) == 1


def test_kinds_beyond_a_thousand_are_only_counted(project: Project, check: Check) -> None:
    for number in range(1005):
        put(forged(f"\x80\5cmodule{number}\nf\n.".encode("latin-1")))

    said = check("shop:app", "--json")
    assert len(said.broken) == 1000
    assert (said.json["would_break"], said.json["more"]) == (1005, 5)


# --- the app --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_module", "shop can't be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "shop can't be imported: ZeroDivisionError: division by zero"),
        ("def", "shop can't be imported: SyntaxError: "),
        ("import sys; sys.exit(0)", "shop can't be imported: SystemExit: 0"),
        ("class Stop(BaseException): ...\nraise Stop('no')", "shop:app can't be imported: Stop: no"),
        ("del app", "shop:app: shop has no 'app'"),
    ],
)
def test_app_that_cannot_be_imported_is_the_finding(project: Project, check: Check, code: str, why: str) -> None:
    deferlib.defer(project.shop.send, 7)
    project.write(code)

    said = check("shop:app")
    assert said.code == 1
    assert said.err.startswith(f"deferlib: error: {why}")
    document = check("shop:app", "--json")
    assert document.code == 1
    assert document.json["error"].startswith(why)
    assert not document.json["ok"]


def test_what_is_no_app_is_a_mistake(check: Check) -> None:
    assert check("shop.py").code == 2
    assert check().code == 2


def test_what_the_app_prints_does_not_spoil_the_document(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.send, 7)
    project.write(CODE + "print('printed')\nimport os\nos.system('echo by a process')")

    said = check("shop:app", "--json")

    assert said.json["ok"]
    assert "printed" in said.err
    assert "by a process" in said.err


def test_settings_that_the_app_makes_itself_count_and_flags_come_first(project: Project, check: Check) -> None:
    deferlib.configure(store="sqlite:///own.db", key="a-key-of-the-apps-own")
    deferlib.defer(project.shop.send, 7)
    project.write(CODE + "deferlib.configure(store='sqlite:///own.db', key='a-key-of-the-apps-own')")

    assert check("shop:app").out == "1 of 1 call would run.\n"
    assert "other.db: there is no store yet" in check("shop:app", "--store", "sqlite:///other.db").err


def test_thread_of_the_apps_keeps_nobody_waiting(project: Project, check: Check) -> None:
    deferlib.defer(project.shop.send, 7)
    project.write(CODE + "import threading\nthreading.Thread(target=threading.Event().wait).start()")
    config.runtime().close()

    done = subprocess.run(
        [sys.executable, "-m", "deferlib.cli", "preflight", "shop:app"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, "1 of 1 call would run.\n"), done.stderr
