"""`deferlib doctor`, run in this process: every finding there is, and that it isn't there where it shouldn't be.

The apps that it asks are served on loopback, by werkzeug, or as badly as a test asks.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import WSGIRequestHandler, make_server

import deferlib
from deferlib import attempt, checkup, config, context, deferred, token
from deferlib.cli import checks, main, probe
from deferlib.context import Dispatch, TaskContext
from deferlib.contrib.asgi import wrap_asgi_app
from deferlib.core.model import DAY, MINUTE, SECOND, Action, ClaimSpec, Micros, NewTask, Outcome, QueueConfig, QueueSource
from deferlib.keys import Keyring
from deferlib.settings import SETTINGS, load_settings
from tests.unit.bad_servers import answering_once, closed_port, serving

KEY = "canary-key-0123456789"
OTHER_KEY = "canary-other-0123456789"
PASSWORD = "canary-password"
URL = deferred.DEFAULT_URL
DEADLINE: Micros = 5 * SECOND
FORM = {"deferlib", "python", "pid", "folder", "store", "server", "threads", "processes", "gunicorn"}


class Run(NamedTuple):
    """What the doctor said, and how it ended."""

    code: int
    out: str
    err: str


class Diagnosis(NamedTuple):
    """What `deferlib doctor --json` found."""

    code: int
    findings: list[tuple[str, str, str]]
    problems: int

    def of(self, subject: str, *levels: str) -> list[str]:
        """Return what was found of *subject*, at any level or at *levels*."""
        return [text for level, about, text in self.findings if about == subject and level in (levels or (level,))]


Cli = Callable[..., Run]
Doctor = Callable[..., Diagnosis]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project as the working directory, no runtime before and after, and nobody where apps are served by default."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "home" / "project"
    folder.mkdir(parents=True)
    (folder / "queue.yaml").write_text("queue:\n- name: default\n- name: mail\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    default = SETTINGS["app"]._replace(default=f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setitem(SETTINGS, "app", default)
    former = config.install(None)
    yield folder
    made = config.install(former)
    if made is not None:
        made.close()


@pytest.fixture
def cli(project: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command; its output shows no secret, and can't do anything to a terminal."""

    def run(*argv: str) -> Run:
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        for text in (out, err):
            assert "canary" not in text
            assert all(line.isprintable() for line in text.split("\n")), repr(text)
        return Run(code, out, err)

    return run


@pytest.fixture
def doctor(cli: Cli) -> Doctor:
    def run(*argv: str) -> Diagnosis:
        code, out, err = cli("doctor", "--json", *argv)
        assert err == ""
        document = json.loads(out)
        assert document.keys() == {"findings", "problems"}
        findings = [(found["level"], found["subject"], found["text"]) for found in document["findings"]]
        return Diagnosis(code, findings, document["problems"])

    return run


@pytest.fixture
def store(project: Path) -> config.Runtime:
    """The project's store and its key, made, with its queues applied as an engine does it."""
    runtime = config.runtime()
    put(*runtime.queues())
    assert runtime.ring.ids()
    return runtime


def put(*queues: QueueConfig) -> None:
    config.runtime().store.run(lambda tx: tx.put_queues(queues, QueueSource.FILE))


def add(
    number: int, queue: str = "default", *, ago: Micros = 0, key_id: bytes = b"", runtime: config.Runtime | None = None
) -> None:
    """Add a task that has been due since *ago*."""
    runtime = runtime or config.runtime()
    now = runtime.clock.now()
    row = NewTask(
        number, number, queue, None, "push", now - ago, now - ago, "POST", "/", "", "", "", "", "", 0, 0, key_id, b""
    )  # fmt: skip
    runtime.store.run(lambda tx: tx.add(now, [row]))


def bury(queue: str = "default") -> None:
    """Make dead letters of all that is due in *queue*."""
    runtime = config.runtime()
    now = runtime.clock.now()
    claims = runtime.store.run(lambda tx: tx.claim(now, [ClaimSpec(queue, 100, 1 << 20, now + MINUTE)]))
    outcomes = [Outcome(claim.id, claim.claims, queue, Action.DEAD, now + DAY) for claim in claims]
    runtime.store.run(lambda tx: tx.settle(now, outcomes))


# --- apps -----------------------------------------------------------------------------------------------------------


class Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log(self, type: str, message: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def served(app: Any, *, threaded: bool = True) -> Iterator[str]:
    """Serve *app* for a while; its base URL."""
    server = make_server("127.0.0.1", 0, app, threaded=threaded, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def bare(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("404 Not Found", [("Content-Length", "0")])
    return []


APP = deferlib.wrap_wsgi_app(bare)


def said(status: str, body: bytes = b"", **headers: str) -> bytes:
    """Return an answer as it stands on the wire."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


@contextmanager
def reporting(**report: Any) -> Iterator[str]:
    """Serve an app that works on our store, and says *report* of itself."""
    here = config.runtime().store_name
    body = json.dumps({"store": here, "folder": "/srv", "gunicorn": None, **report}).encode()
    with serving(answering_once(said("200 OK", body, X_Deferlib_Outcome="ok"))) as server:
        yield server.base


def gunicorn(kind: str = "sync", workers: int = 1, threads: int = 1, timeout: float = 30.0) -> dict[str, Any]:
    return {"kind": kind, "workers": workers, "threads": threads, "timeout": timeout}


# --- the command ----------------------------------------------------------------------------------------------------


def test_help_teaches_within_80_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    shown = cli("doctor", "--help")

    assert shown.code == 0
    assert "\nexample" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def test_all_well_is_code_0_and_a_line_a_finding(cli: Cli, store: config.Runtime) -> None:
    with store.store.serving(lambda: None), served(APP) as base:
        shown = cli("doctor", "--app-url", base)

    assert shown.code == 0, shown.out
    *findings, empty, last = shown.out.splitlines()
    heads = [line.split()[:2] for line in findings if not line.startswith(" ")]
    assert heads == [["ok", subject] for subject in ("settings", "store", "key", "engine", "app")]
    assert (empty, last) == ("", "Nothing stands in the way of a task.")


def test_warnings_leave_the_code_0_and_are_pointed_at(cli: Cli, store: config.Runtime) -> None:
    shown = cli("doctor")

    assert shown.code == 0
    assert "\nwarning engine " in shown.out
    assert shown.out.endswith("\nNothing stands in the way of a task, but read the warnings.\n")


@pytest.mark.parametrize(("broken", "last"), [(1, "1 problem to mend."), (2, "2 problems to mend.")])
def test_problems_are_counted_and_code_1(cli: Cli, store: config.Runtime, broken: int, last: str) -> None:
    put(*[QueueConfig(name=f"q{number}", target="nowhere") for number in range(broken)])

    shown = cli("doctor")

    assert shown.code == 1
    assert shown.out.count("\nPROBLEM queue q") == broken
    assert shown.out.endswith(f"\n\n{last}\n")


def test_json_counts_problems_and_is_code_1(doctor: Doctor, store: config.Runtime) -> None:
    put(QueueConfig(name="lost", target="nowhere"))

    found = doctor()

    assert (found.code, found.problems) == (1, 1)
    assert [subject for level, subject, _ in found.findings if level == "problem"] == ["queue lost"]


def test_text_fits_the_terminal(cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")

    shown = cli("doctor")

    assert max(map(len, shown.out.splitlines())) <= 70
    assert max(map(len, shown.out.splitlines())) > 60


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--store", f"postgresql://u:{PASSWORD}@h/d"], "isn't available in this version"),
        (["--store", f"nonsense://u:{PASSWORD}@h/d"], "setting 'store' from --store"),
        (["--queues", "no.yaml"], "no.yaml is not a file"),
        (["--target", "x"], "setting 'targets' from --target"),
    ],
)
def test_doctor_that_cannot_look_says_why_and_is_code_2(cli: Cli, argv: list[str], message: str) -> None:
    shown = cli("doctor", *argv)

    assert shown.code == 2
    assert shown.err.startswith("deferlib: error: ")
    assert message in shown.err


def test_looking_makes_nothing(project: Path, doctor: Doctor) -> None:
    found = doctor()

    assert found.code == 0
    assert os.listdir(project) == ["queue.yaml"]


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_name_the_root_and_the_queue_file(project: Path, doctor: Doctor) -> None:
    found = doctor()

    assert found.of("settings") == [f"project root {project}; {project}/queue.yaml with 2 queues"]


def test_missing_queue_file_is_told(project: Path, doctor: Doctor) -> None:
    (project / "queue.yaml").unlink()
    (project / "pyproject.toml").touch()

    found = doctor()

    assert found.of("settings", "ok") == [f"project root {project}; no queue.yaml: one queue, default"]


def test_misspelled_variable_is_warned_of_with_what_was_meant(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_STOER", "x")
    monkeypatch.setenv("DEFERLIB_ZZZZZZZZ", "x")
    monkeypatch.setenv("DEFERLIB_GRACE", "3")

    found = doctor()

    assert found.of("settings", "warning") == [
        "DEFERLIB_STOER is set, but is no setting; did you mean DEFERLIB_STORE?",
        "DEFERLIB_ZZZZZZZZ is set, but is no setting; `deferlib config` shows those there are",
    ]


# --- store and key --------------------------------------------------------------------------------------------------


def test_store_that_is_not_there_is_warned_of_and_what_depends_on_it_is_left_out(project: Path, doctor: Doctor) -> None:
    found = doctor()

    path = project / ".deferlib" / "tasks.db"
    [text] = found.of("store")
    assert text.startswith(f"sqlite:///{path} is not there: is this the folder where the app runs?")
    assert found.of("key") == [f"{path}.key is not there yet; the first defer() makes it, or an engine"]
    assert {subject for _, subject, _ in found.findings} == {"settings", "store", "key"}
    assert {level for level, _, _ in found.findings} == {"ok", "note", "warning"}


def test_tasks_that_wait_because_they_fail_are_told_with_the_last_error(doctor: Doctor, store: config.Runtime) -> None:
    deferlib.defer(print)
    assert doctor().of("tasks") == []
    now = store.clock.now()
    spec = ClaimSpec("default", 1, 10_000, now + MINUTE)
    [claim] = store.store.run(lambda tx: tx.claim(now, [spec]))
    fence = (claim.id, claim.claims, claim.queue)
    store.store.run(lambda tx: tx.settle(now, [Outcome(*fence, Action.RETRY, now + MINUTE, reason="refused by http://x")]))

    [text] = doctor().of("tasks")

    assert text == (
        f"waiting for another attempt: 1 task; the last error: refused by http://x (`deferlib tasks show {claim.id}`)"
    )


def test_store_in_memory_is_a_note_and_no_app_is_asked_with_a_made_up_key(doctor: Doctor) -> None:
    found = doctor("--store", "sqlite:///:memory:")

    assert found.of("store") == ["in memory: every process has its own, and no command can look at it"]
    assert {subject for _, subject, _ in found.findings} == {"settings", "store"}


def test_store_is_shown_with_its_counts(doctor: Doctor, store: config.Runtime) -> None:
    add(1)
    bury()
    add(2)
    add(3)

    found = doctor()

    assert found.of("store") == [f"{store.store_name}: 2 tasks, 1 dead letter"]


def test_file_that_is_no_store_is_a_problem(project: Path, doctor: Doctor) -> None:
    (project / "notes.txt").write_text("x" * 5000)

    found = doctor("--store", "sqlite:///notes.txt")

    [text] = found.of("store", "problem")
    assert text.startswith(f"{project}/notes.txt")
    assert found.code == 1
    assert found.of("engine") == []


def test_network_file_system_is_a_problem(doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
    before = doctor()

    monkeypatch.setattr(checks, "_NETWORK", kinds)  # whichever this one is
    after = doctor()

    assert before.of("store", "problem") == []
    [text] = after.of("store", "problem")
    assert text.startswith("it lies on a network file system (")


def test_store_that_is_its_owners_alone_is_not_told(doctor: Doctor, store: config.Runtime) -> None:
    found = doctor()

    assert found.of("store", "warning", "problem") == []
    assert found.of("key", "warning", "problem") == []


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize(
    ("mode", "level", "can"),
    [
        (0o644, "warning", "read"), (0o640, "warning", "read"), (0o660, "warning", "write"), (0o606, "problem", "write"),
        (0o666, "problem", "write"), (0o604, "warning", "read"),
    ],
)  # fmt: skip
def test_store_that_others_can_open_is_told_with_the_remedy(
    doctor: Doctor, store: config.Runtime, suffix: str, mode: int, level: str, can: str
) -> None:
    path = f"{store.store_path}{suffix}"
    os.chmod(path, mode)

    found = doctor()

    assert found.of("store", "warning", "problem") == [f"others can {can} {path} (mode {mode:04o}); run `chmod 600 {path}`"]
    assert found.of("store", level)


def test_key_file_that_is_not_in_use_is_looked_at_all_the_same(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key may well be the one that was put into the environment."""
    file = store.key_file()
    assert file is not None
    os.chmod(file, 0o644)
    monkeypatch.setenv("DEFERLIB_KEY", Path(file).read_text())

    assert doctor().of("store", "warning") == [f"others can read {file} (mode 0644); run `chmod 600 {file}`"]


def test_folder_that_others_can_write_to_is_a_problem(doctor: Doctor, store: config.Runtime) -> None:
    folder = os.path.dirname(str(store.store_path))
    os.chmod(folder, 0o777)

    found = doctor()

    [text] = found.of("store", "problem")
    assert f"others could put a file of theirs in the place of {store.store_path}: " in text
    assert f"`chmod go-w {folder}`" in text
    [text] = found.of("key", "problem")
    assert f"`chmod go-w {folder}`" in text


def test_sticky_folder_is_warned_of(doctor: Doctor, store: config.Runtime) -> None:
    """Nobody can remove our files there, but SQLite would believe a log that somebody else has put beside the store."""
    os.chmod(os.path.dirname(str(store.store_path)), 0o1777)

    found = doctor()

    assert found.of("store", "problem") == []
    [text] = found.of("store", "warning")
    assert text.startswith(f"others can put files beside {store.store_path}, such as the log ")


@pytest.mark.parametrize(("threshold", "warned"), [(0, False), (1 << 62, True)])
def test_disk_that_is_nearly_full_is_warned_of(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, threshold: int, warned: bool
) -> None:
    monkeypatch.setattr(checks, "_LOW_DISK", threshold)

    found = doctor()

    texts = found.of("store", "warning")
    assert len(texts) == warned
    assert all(text.endswith("MB are free on its disk; a full one takes no more tasks") for text in texts)


def test_key_is_shown_by_where_it_comes_from(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_file = doctor()
    monkeypatch.setenv("DEFERLIB_KEY", f"{KEY},{OTHER_KEY}")
    from_setting = doctor()

    assert from_file.of("key") == [f"{store.key_file()}: 1 key"]
    assert from_setting.of("key") == ["from DEFERLIB_KEY: 2 keys"]


@pytest.mark.parametrize("dead", [False, True])
def test_key_file_that_is_gone_is_a_problem_if_the_store_holds_anything(
    doctor: Doctor, store: config.Runtime, dead: bool
) -> None:
    file = store.key_file()
    assert file is not None
    os.unlink(file)
    empty = doctor()

    add(1)
    if dead:
        bury()
    full = doctor()

    assert empty.of("key", "note") == [f"{file} is not there yet; the first defer() makes it, or an engine"]
    assert full.of("key", "problem") == [f"{file} is gone: what the store holds can't be verified any more; bring it back"]
    assert not os.path.exists(file)


def test_key_file_that_others_can_read_is_a_problem(doctor: Doctor, store: config.Runtime) -> None:
    file = store.key_file()
    assert file is not None
    os.chmod(file, 0o644)

    found = doctor()

    [text] = found.of("key", "problem")
    assert "others can read the signing keys" in text
    assert found.of("app") == [], "there is no key to ask with"


def test_key_that_is_too_short_is_a_problem(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", "canary")

    found = doctor()

    [text] = found.of("key", "problem")
    assert text.startswith("setting 'key' from DEFERLIB_KEY: signing key 1 has 6 bytes")


@pytest.mark.parametrize("dead", [False, True])
def test_tasks_of_a_key_that_is_not_here_are_a_problem(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", KEY)
    foreign = Keyring([OTHER_KEY.encode()]).signing.id
    add(1, "mail", key_id=foreign)
    add(2, key_id=Keyring([KEY.encode()]).signing.id)
    add(3)
    if dead:
        bury("mail")

    without = doctor()
    monkeypatch.setenv("DEFERLIB_KEY", f"{KEY},{OTHER_KEY}")
    with_both = doctor()

    assert without.of("key") == [
        f"from DEFERLIB_KEY: tasks in the store were signed with key {foreign.hex()}, which isn't among the keys here; "
        "add it after the first one"
    ]
    assert (without.code, with_both.code) == (1, 0)
    assert with_both.of("key") == ["from DEFERLIB_KEY: 2 keys"]


@pytest.mark.parametrize("place", ["", "sub", "sub/sub/sub"])
@pytest.mark.parametrize(("tasks", "level"), [(0, "note"), (1, "warning"), (2, "warning")])
def test_another_store_is_found(project: Path, doctor: Doctor, place: str, tasks: int, level: str) -> None:
    path = project.parent / ".deferlib" / "tasks.db" if not place else project / place / ".deferlib" / "tasks.db"
    path.parent.mkdir(parents=True)
    other = config.Runtime(settings=load_settings({"store": f"sqlite:///{path}"}))
    assert other.store.served() is False
    for number in range(tasks):
        add(number, runtime=other)
    other.close()

    found = doctor()

    [text] = [text for text in found.of("store", level) if "another one" in text]
    assert text.startswith(f"there is another one, {path}, with {tasks} task{'' if tasks == 1 else 's'}: ")


def test_what_is_no_other_store_of_this_project_is_not_told(project: Path, doctor: Doctor, store: config.Runtime) -> None:
    deep = project / "a" / "b" / "c" / "d" / ".deferlib" / "tasks.db"
    deep.parent.mkdir(parents=True)
    deep.touch()
    (project / "linked").symlink_to(project)

    found = doctor()

    assert not any("another one" in text for text in found.of("store"))


def test_another_store_that_cannot_be_read_has_no_tasks(project: Path, doctor: Doctor) -> None:
    path = project / "sub" / ".deferlib" / "tasks.db"
    path.parent.mkdir(parents=True)
    path.write_text("x" * 5000)

    found = doctor()

    [text] = [text for text in found.of("store", "note") if "another one" in text]
    assert f"{path}, with 0 tasks" in text
    assert path.read_text() == "x" * 5000


# --- queues and engine ----------------------------------------------------------------------------------------------


def test_target_that_is_unknown_is_a_problem_until_it_is_set(doctor: Doctor, store: config.Runtime) -> None:
    put(QueueConfig(name="mail", target="worker"))
    url = f"http://127.0.0.1:{closed_port()}"

    without = doctor()
    with_it = doctor("--target", f"worker={url}")

    assert without.of("queue mail", "problem") == [
        "its target 'worker' is unknown, so nothing of it is pushed; set DEFERLIB_TARGETS=worker=http://HOST:PORT"
    ]
    assert with_it.of("queue mail") == []


def test_paused_queue_is_a_note(doctor: Doctor, store: config.Runtime) -> None:
    store.store.run(lambda tx: tx.pause(["mail"], True))

    found = doctor()

    assert found.of("queue mail", "note") == ["is paused; `deferlib queues resume mail`"]


def test_queue_that_left_queue_yaml_with_tasks_in_it_is_told(project: Path, doctor: Doctor) -> None:
    (project / "queue.yaml").write_text("queue:\n- name: mail\n- name: empty\n")
    config.runtime().apply_queues()
    deferlib.defer(print, _queue="mail")
    (project / "queue.yaml").write_text("queue:\n- name: default\n")
    config.runtime().apply_queues()

    found = doctor()

    assert "has left queue.yaml, and 1 task of it wait" in found.of("queue mail", "warning")[0]
    assert found.of("queue empty", "warning") == []


def test_queue_with_both_retry_limits_is_told(project: Path, doctor: Doctor) -> None:
    both = "{task_retry_limit: 3, task_age_limit: 1h}"
    (project / "queue.yaml").write_text(
        f"queue:\n- name: mail\n  retry_parameters: {both}\n"
        f"- name: first\n  retry_parameters: {both}\n  deferlib: {{first_limit_wins: true}}\n"
        "- name: one\n  retry_parameters: {task_retry_limit: 3}\n"
    )
    config.runtime().apply_queues()

    found = doctor()

    assert "only when both are exceeded" in found.of("queue mail", "warning")[0]
    assert found.of("queue first", "warning") == found.of("queue one", "warning") == []


def test_what_has_no_effect_in_queue_yaml_is_noted(project: Path, doctor: Doctor) -> None:
    (project / "queue.yaml").write_text("total_storage_limit: 5M\nqueue:\n- name: mail\n")

    assert doctor().of("settings", "note") == [f"{project}/queue.yaml:1:22: total_storage_limit isn't enforced"]


def test_dead_letters_are_a_note(doctor: Doctor, store: config.Runtime) -> None:
    add(1, "mail")
    add(2, "mail")
    bury("mail")

    found = doctor()

    assert found.of("queue mail", "note") == ["has 2 dead letters; `deferlib tasks list mail --state dead`"]
    assert found.of("queue default") == []


@pytest.mark.parametrize(
    ("ago", "level", "start"),
    [
        (None, "warning", "none serves this store now: `deferlib engine`"),
        (30 * SECOND, "warning", "none serves this store now: `deferlib engine`"),
        (-DAY, "warning", "none serves this store now: `deferlib engine`"),
        (5 * MINUTE, "problem", "none serves this store, and tasks have been due for 5 m: `deferlib engine`"),
    ],
)
def test_store_without_an_engine_is_worse_the_longer_tasks_wait(
    doctor: Doctor, store: config.Runtime, ago: Micros | None, level: str, start: str
) -> None:
    if ago is not None:
        add(1, ago=ago)

    found = doctor()

    [text] = found.of("engine", level)
    assert text.startswith(start)
    assert len(found.of("engine")) == 1


def test_engine_that_serves_the_store_is_found_whatever_waits(doctor: Doctor, store: config.Runtime) -> None:
    add(1, ago=5 * MINUTE)

    with store.store.serving(lambda: None):
        found = doctor()

    assert found.of("engine", "ok") == ["one serves this store"]
    assert found.code == 0


# --- apps -----------------------------------------------------------------------------------------------------------


def test_app_that_is_well_is_found_so(doctor: Doctor, store: config.Runtime) -> None:
    with served(APP) as base:
        found = doctor("--app-url", base)

    [text] = found.of("app")
    assert text.startswith(f"{base} answers in ")
    assert text.endswith(" ms, has the handler, and has the same key")
    assert ("ok", "app", text) in found.findings


def test_every_target_is_asked(doctor: Doctor, store: config.Runtime) -> None:
    with served(APP) as app, served(APP) as worker:
        found = doctor("--app-url", app, "--target", f"worker={worker}", "--target", "gone=http://127.0.0.1:1")

    assert [text.split()[0] for text in found.of("app", "ok")] == [app]
    assert [text.split()[0] for text in found.of("target worker", "ok")] == [worker]
    assert len(found.of("target gone", "problem")) == 1
    assert found.problems == 1


def test_app_under_a_path_is_asked_there(doctor: Doctor, store: config.Runtime) -> None:
    path = "/caf\u00e9 1".encode().decode("latin-1")  # as WSGI has it
    with served(DispatcherMiddleware(bare, {path: APP})) as base:
        found = doctor("--app-url", f"{base}/caf%C3%A9%201")
        beside = doctor("--app-url", base)

    assert found.code == 0
    assert len(found.of("app", "ok")) == 1
    assert "not mounted" in beside.of("app", "problem")[0]


def test_proxy_of_the_environment_is_not_used(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    with served(APP) as base:
        found = doctor("--app-url", base)

    assert len(found.of("app", "ok")) == 1


def test_app_without_the_handler_is_a_problem(doctor: Doctor, store: config.Runtime) -> None:
    with served(bare) as base:
        found = doctor("--app-url", base)

    assert found.of("app") == [
        f"{base} answers, but its handler is not mounted (HTTP 404 at {URL}): wrap the app, "
        "app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)"
    ]
    assert found.code == 1


def test_app_with_another_key_is_a_problem(doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    deferlib.configure(key=OTHER_KEY)  # the app's; the command makes its own of the settings
    monkeypatch.setenv("DEFERLIB_KEY", KEY)

    with served(APP) as base:
        found = doctor("--app-url", base)

    id = Keyring([KEY.encode()]).signing.id.hex()
    [text] = found.of("app", "problem")
    assert text.startswith(f"{base} has the handler, but another key than the one here: The dispatch token is refused: ")
    assert f"signed with key {id}, which isn't in the ring here" in text
    assert text.endswith("Give both the same DEFERLIB_STORE and DEFERLIB_KEY")


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("sqlite:///elsewhere.db", "sqlite:///{project}/elsewhere.db"),
        (f"postgresql://user:{PASSWORD}@db/tasks", "postgresql://user:***@db/tasks"),
    ],
)
def test_app_on_another_store_is_a_problem(
    project: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch, dsn: str, shown: str
) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", KEY)
    deferlib.configure(store=dsn)

    with served(APP) as base:
        found = doctor("--app-url", base)

    theirs, ours = shown.format(project=project), f"sqlite:///{project}/.deferlib/tasks.db"
    assert found.of("app", "problem") == [
        f"it works on another store, {theirs} (in {project}); here it is {ours}. Set DEFERLIB_STORE to the same for both"
    ]
    assert len(found.of("app", "ok")) == 1, "the key is the same"


def test_app_that_redirects_is_a_problem_and_is_not_followed(doctor: Doctor, store: config.Runtime) -> None:
    with served(APP) as base:
        moved = said("308 Permanent Redirect", Location=f"{base}{URL}")
        with serving(answering_once(moved)) as server:
            found = doctor("--app-url", server.base)

    assert found.of("app") == [
        f"{server.base} redirects (HTTP 308 to {base}{URL}); an engine follows no redirect: push to where the app itself "
        "is served"
    ]
    assert found.code == 1


@pytest.mark.parametrize("chosen", [False, True])
def test_unreachable_app_is_a_problem_only_where_it_was_chosen(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    url = SETTINGS["app"].default
    if chosen:
        monkeypatch.setenv("DEFERLIB_APP", url)

    found = doctor()

    [text] = found.of("app", "problem" if chosen else "warning")
    assert text.startswith(f"{url} can't be reached: connection refused")
    assert ("that is fine if an engine calls the app itself (--app)" in text) is not chosen
    assert found.code == chosen


def test_app_that_does_not_answer_in_time_is_a_problem_even_by_default(
    doctor: Doctor, store: config.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def busy(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        over.wait(60)
        return bare(environ, start_response)

    monkeypatch.setattr(probe, "_SECONDS", 0.1)
    with served(busy) as base:
        monkeypatch.setitem(SETTINGS, "app", SETTINGS["app"]._replace(default=base))
        found = doctor()
        over.set()

    assert found.of("app") == [f"{base} does not answer within 0.1 s: all its workers are busy, or it waits for itself"]
    assert found.code == 1


def test_proxy_that_takes_the_token_away_is_a_problem(doctor: Doctor, store: config.Runtime) -> None:
    def proxy(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        del environ["HTTP_X_DEFERLIB_SIGNATURE"]
        return APP(environ, start_response)

    with served(proxy) as base:
        found = doctor("--app-url", base)

    assert found.of("app") == [
        f"{base} has the handler, but X-Deferlib-Signature did not arrive: let the proxy between pass it on; or its "
        "deferlib is older than this one"
    ]
    assert found.code == 1


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", said("200 OK", Content_Encoding="gzip")[:-4] + b"\r\n\r\nx"])
def test_what_is_no_proper_answer_is_a_problem(doctor: Doctor, store: config.Runtime, answer: bytes) -> None:
    with serving(answering_once(answer)) as server:
        found = doctor("--app-url", server.base)

    [text] = found.of("app", "problem")
    assert text.startswith(f"{server.base} ")


@pytest.mark.parametrize("body", [b"Hello", b"[]", b'"ok"'])
def test_page_that_looks_well_but_is_no_report_is_a_problem(doctor: Doctor, store: config.Runtime, body: bytes) -> None:
    with serving(answering_once(said("200 OK", body, X_Deferlib_Outcome="ok"))) as server:
        found = doctor("--app-url", server.base)

    assert found.of("app", "ok") == []
    assert len(found.of("app", "problem")) == 1


def test_page_of_json_is_no_report(doctor: Doctor, store: config.Runtime) -> None:
    with serving(answering_once(said("200 OK", b'{"status": "ok"}'))) as server:
        found = doctor("--app-url", server.base)

    [text] = found.of("app")
    assert f"its handler is not mounted (HTTP 200 at {URL})" in text


EVIL = "\x1b[31m\x07\u202e\x9b"


@pytest.mark.parametrize(
    ("answer", "escaped"),
    [
        (said("403 No", EVIL.encode(), X_Deferlib_Outcome="untrusted", Content_Type="text/plain; charset=utf-8"), True),
        (said("302 Found", Location="http://h/\x9b31m"), False),
        (said("200 OK", json.dumps({"store": EVIL, "folder": EVIL}).encode(), X_Deferlib_Outcome="ok"), True),
        (said("404 Not Found", EVIL.encode()), False),
    ],
    ids=["refusal", "redirect", "report", "page"],
)  # fmt: skip
def test_what_an_app_says_can_do_nothing_to_a_terminal(
    cli: Cli, store: config.Runtime, answer: bytes, escaped: bool
) -> None:
    with serving(answering_once(answer)) as server:
        shown = cli("doctor", "--app-url", server.base)  # which looks for unprintable characters

    assert shown.code == 1
    assert (r"\x9b" in shown.out) is escaped


def test_what_an_app_says_is_cut(doctor: Doctor, store: config.Runtime) -> None:
    with serving(answering_once(said("403 Forbidden", b"x" * 100_000, X_Deferlib_Outcome="untrusted"))) as server:
        found = doctor("--app-url", server.base)

    [text] = found.of("app", "problem")
    assert 300 <= text.count("x") < 310


# --- what serves the app --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threaded", [False, True])
def test_server_of_one_request_at_a_time_is_warned_of(doctor: Doctor, store: config.Runtime, threaded: bool) -> None:
    with served(APP, threaded=threaded) as base:
        found = doctor("--app-url", base)

    warnings = found.of("app", "warning")
    assert len(warnings) == (not threaded)
    assert all("Werkzeug" in text and "waits for itself; give it more threads" in text for text in warnings)


@pytest.mark.parametrize(("threads", "processes"), [(True, False), (False, True), (True, True)])
def test_server_of_several_requests_at_a_time_is_not(
    doctor: Doctor, store: config.Runtime, threads: bool, processes: bool
) -> None:
    with reporting(server="any", threads=threads, processes=processes) as base:
        found = doctor("--app-url", base)

    assert found.of("app", "warning") == []


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (gunicorn(timeout=0), True),
        (gunicorn(timeout=0, workers=2), False),
        (gunicorn(timeout=0, threads=4), False),
        (gunicorn(kind="gthread", timeout=0, threads=4), False),
        (gunicorn(kind="gevent", timeout=0), False),
    ],
    ids=str,
)
def test_gunicorn_that_waits_for_itself_is_warned_of(
    doctor: Doctor, store: config.Runtime, settings: dict[str, Any], warned: bool
) -> None:
    with reporting(threads=False, processes=False, gunicorn=settings) as base:
        found = doctor("--app-url", base, "--concurrency", "1")

    warnings = found.of("app", "warning")
    assert len(warnings) == warned
    assert all(text.startswith("gunicorn with one sync worker serves one request at a time") for text in warnings)
    assert all(text.endswith("give it --threads 8") for text in warnings)


@pytest.mark.parametrize(
    ("settings", "killed"),
    [
        (gunicorn(workers=2, timeout=30), "calls of mail may take 31 s: give it --timeout 91, or --threads 8"),
        (gunicorn(workers=2, timeout=5), "calls of default, mail may take 31 s: give it --timeout 91, or --threads 8"),
        (gunicorn(workers=2, timeout=31), ""),
        (gunicorn(workers=2, timeout=0), ""),
        (gunicorn(workers=2, timeout=5, kind="gthread", threads=4), ""),
    ],
    ids=str,
)
def test_gunicorn_that_kills_calls_is_warned_of(
    doctor: Doctor, store: config.Runtime, settings: dict[str, Any], killed: str
) -> None:
    put(QueueConfig(name="default", deadline=10 * SECOND), QueueConfig(name="mail", deadline=31 * SECOND))

    with reporting(gunicorn=settings) as base:
        found = doctor("--app-url", base, "--concurrency", "1")

    warnings = found.of("app", "warning")
    assert len(warnings) == bool(killed)
    assert all("gunicorn kills a sync worker after" in text and killed in text for text in warnings)


@pytest.mark.parametrize(
    ("workers", "concurrency", "noted"), [(2, "2", True), (2, "1", False), (32, None, True), (33, None, False)]
)
def test_engine_that_pushes_more_than_all_workers_serve_is_a_note(
    doctor: Doctor, store: config.Runtime, workers: int, concurrency: str | None, noted: bool
) -> None:
    argv = [] if concurrency is None else ["--concurrency", concurrency]

    with reporting(gunicorn=gunicorn(workers=workers, timeout=0)) as base:
        found = doctor("--app-url", base, *argv)

    notes = found.of("app", "note")
    assert len(notes) == noted
    assert all(f"to {workers} sync workers" in text and f"DEFERLIB_CONCURRENCY={workers - 1}," in text for text in notes)


def test_report_of_another_version_is_taken_as_far_as_it_is_understood(doctor: Doctor, store: config.Runtime) -> None:
    with reporting(gunicorn={"workers": "many"}, news=1) as base:
        found = doctor("--app-url", base)

    assert [level for level, subject, _ in found.findings if subject == "app"] == ["ok"]


# --- what the handler tells whom ------------------------------------------------------------------------------------


def signed(method: str = "GET", attempt: int = checkup.ATTEMPT, key: str = KEY) -> dict[str, str]:
    """Return the header of a request that whoever has *key* makes."""
    now = context.SYSTEM_CLOCK.now()
    task = TaskContext(7, "", "default", attempt, 0, now, now + DEADLINE, 1, "", URL, context.SYSTEM_CLOCK)
    signature = token.sign(Keyring([key.encode()]), now, Dispatch(task, {}), method=method, body=b"", deadline=DEADLINE)
    return {token.HEADER: signature}


def wsgi(method: str, headers: dict[str, str]) -> tuple[int, str, str]:
    with served(APP) as base:
        answer = requests.request(method, base + URL, headers=headers, timeout=60)
    return answer.status_code, answer.headers[token.OUTCOME], answer.text


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("the handler's requests aren't the app's")


def asgi(method: str, headers: dict[str, str]) -> tuple[int, str, str]:
    scope = {
        "type": "http", "method": method, "path": URL, "query_string": b"", "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.1", 5),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(wrap_asgi_app(nothing)(scope, receive, send))
    start, body = sent
    return start["status"], dict(start["headers"])[token.OUTCOME.lower().encode()].decode(), body["body"].decode()


def in_process(method: str, headers: dict[str, str]) -> tuple[int, str, str]:
    """The handler as a WSGI app of its own, not in the middleware."""
    found: list[Any] = []
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": URL, "wsgi.input": io.BytesIO()}
    environ |= {"HTTP_" + name.upper().replace("-", "_"): value for name, value in headers.items()}
    [body] = deferred.application(environ, lambda *start: found.append(start))
    [(status, fields)] = found
    return int(status.split()[0]), dict(fields)[token.OUTCOME], body.decode()


@pytest.fixture(params=[wsgi, asgi, in_process])
def ask(project: Path, request: pytest.FixtureRequest) -> Callable[[str, dict[str, str]], tuple[int, str, str]]:
    """Makes a request of the handler of an app that has our key and a password."""
    deferlib.configure(key=KEY, store=f"postgresql://user:{PASSWORD}@db/tasks")
    found: Callable[[str, dict[str, str]], tuple[int, str, str]] = request.param
    return found


Ask = Callable[[str, dict[str, str]], tuple[int, str, str]]
WRONG_METHOD = (int(HTTPStatus.METHOD_NOT_ALLOWED), "retry", attempt.WRONG_METHOD.body)


def test_question_is_answered_with_what_matters_and_no_secrets(ask: Ask, project: Path) -> None:
    status, outcome, body = ask("GET", signed())

    report = json.loads(body)
    assert (status, outcome) == (200, "ok")
    assert report.keys() == FORM
    assert (report["pid"], report["folder"]) == (os.getpid(), str(project))
    assert (report["deferlib"], report["gunicorn"]) == (deferlib.__version__, None)
    assert report["store"] == "postgresql://user:***@db/tasks"
    assert "canary" not in body


@pytest.mark.parametrize("attempt", [1, 2])
def test_token_of_a_real_attempt_asks_nothing(ask: Ask, attempt: int) -> None:
    assert ask("GET", signed(attempt=attempt)) == WRONG_METHOD


def test_get_without_a_token_asks_nothing(ask: Ask) -> None:
    assert ask("GET", {}) == WRONG_METHOD


@pytest.mark.parametrize("forged", [signed(key=OTHER_KEY), signed("POST"), {token.HEADER: "v1.x.y.z"}])
def test_question_with_a_forged_token_is_refused(
    ask: Ask, forged: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    attempt._refused.clear()
    status, outcome, body = ask("GET", forged)

    assert (status, outcome) in [(403, "untrusted"), (403, "mismatched")]
    assert "store" not in body
    assert "an invalid dispatch token was refused" in caplog.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS"])
def test_other_methods_ask_nothing(ask: Ask, method: str) -> None:
    assert ask(method, signed(method)) == WRONG_METHOD


def test_head_asks_nothing(ask: Ask) -> None:
    status, outcome, _ = ask("HEAD", signed("HEAD"))

    assert (status, outcome) == WRONG_METHOD[:2]


def test_question_is_no_call(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    status, outcome, _ = ask("POST", signed("POST"))

    assert status != 200
    assert outcome != "ok"
    assert caplog.records, "a body that is no call is logged"


def test_server_is_told_as_it_is(project: Path) -> None:
    deferlib.configure(key=KEY)

    reports = [json.loads(answer("GET", signed())[2]) for answer in (wsgi, asgi)]

    assert [(report["threads"], report["processes"]) for report in reports] == [(True, False), (True, False)]
    assert reports[0]["server"].startswith("Werkzeug/")
    assert reports[1]["server"] == "ASGI"


def test_app_whose_folder_was_removed_still_answers(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deferlib.configure(key=KEY)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    status, _, body = in_process("GET", signed())

    assert status == 200
    assert json.loads(body)["folder"] == ""
