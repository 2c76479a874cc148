"""The command line, run in this process on a real store: what it shows, what it changes, how it refuses."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deferlib
from deferlib import config, taskqueue
from deferlib.cli import main, show
from deferlib.core.health import Ailment, Condition
from deferlib.core.model import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    Action,
    ClaimSpec,
    Micros,
    NewTask,
    Outcome,
    QueueConfig,
    QueueSource,
)
from deferlib.core.scheduler import Slowdown
from deferlib.engine import troubles
from deferlib.settings import SETTINGS

KEY = "canary-key-0123456789"
PASSWORD = "canary-password"
QUEUES = """\
queue:
- name: default
- name: mail
  rate: 5/m
  max_concurrent_requests: 3
  target: worker
  retry_parameters:
    task_retry_limit: 2
    task_age_limit: 1h
- name: pulled
  mode: pull
"""
LEASE = 30 * SECOND


class Run(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Cli = Callable[..., Run]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a queue.yaml as the working directory, and no runtime before and after."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.yaml").write_text(QUEUES)
    former = config.install(None)
    yield tmp_path
    made = config.install(former)
    if made is not None:
        made.close()


@pytest.fixture
def cli(project: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs a command; its output can't do anything to a terminal, whatever it was."""

    def run(*argv: str) -> Run:
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        for text in (out, err):
            assert all(line.isprintable() for line in text.split("\n")), repr(text)
        return Run(code, out, err)

    log = logging.getLogger("deferlib")
    level = log.level
    yield run
    log.setLevel(level)  # `engine` sets it for its process


@pytest.fixture
def store(project: Path) -> config.Runtime:
    """The project's store, made, with its queues applied as an engine does it."""
    runtime = config.runtime()
    runtime.apply_queues()
    return runtime


def now() -> Micros:
    return config.runtime().clock.now()


def call(number: int = 0) -> None:
    """What the tests defer; never run."""


def lease(queue: str, at: Micros | None = None) -> list[Any]:
    at = now() if at is None else at
    return config.runtime().store.run(lambda tx: tx.claim(at, [ClaimSpec(queue, 100, 1 << 20, at + LEASE)]))


def bury(queue: str, error: str = "it broke") -> None:
    """Make dead letters of all that is due in *queue*."""
    at = now()
    history = json.dumps([{"attempt": 1, "at": at - SECOND, "micros": 250_000, "status": 500, "error": error}])
    outcomes = [
        Outcome(c.id, c.claims, c.queue, Action.DEAD, at + DAY, c.name is not None, 1, 1, 500, f"limits: {error}", history)
        for c in lease(queue)
    ]
    config.runtime().store.run(lambda tx: tx.settle(now(), outcomes))


def finish(queue: str) -> None:
    at = now()
    outcomes = [
        Outcome(c.id, c.claims, c.queue, Action.DONE, at + DAY, c.name is not None, 0, 1, 200) for c in lease(queue)
    ]
    config.runtime().store.run(lambda tx: tx.settle(at, outcomes))


def states(cli: Cli, *argv: str) -> dict[str, str]:
    return {task["name"]: task["state"] for task in cli("tasks", "list", *argv, "--json").json["tasks"]}


# --- the command line itself ------------------------------------------------------------------------------------------

ALL = [
    ["engine"], ["config"], ["tasks"], ["tasks", "list"], ["tasks", "show"], ["tasks", "run"], ["tasks", "retry"],
    ["tasks", "delete"], ["queues"], ["queues", "list"], ["queues", "show"], ["queues", "pause"], ["queues", "resume"],
    ["queues", "purge"], [],
]  # fmt: skip


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_help_teaches_within_80_columns(cli: Cli, command: list[str]) -> None:
    shown = cli(*command, "--help")

    assert shown.code == 0
    assert command in (["tasks"], ["queues"]) or "\nexample" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["tasks", "list", "--limit", "0"], "'0' is not a whole number from 1 to 100000"),
        (["tasks", "list", "--limit", "x"], "'x' is not a whole number from 1 to 100000"),
        (["tasks", "list", "--state", "undead"], "invalid choice: 'undead'"),
        (["tasks", "list", "--js"], "unrecognized arguments: --js"),
        (["tasks", "show"], "required: NAME; see `deferlib tasks show --help`"),
        (["queues", "purge"], "required: NAME"),
        (["config", "--lease", "x"], "setting 'lease' from --lease: 'x' is not seconds from 0.001 to 86400"),
        (["config", "--target", "x"], "setting 'targets' from --target: 'x' is not NAME=http://HOST"),
        (["config", "--app-url", "h"], "setting 'app' from --app-url: 'h' is not http://HOST"),
        (["config", "--queues", "no.yaml"], "setting 'queues' from --queues: "),
        (["tasks", "show", "caf\udce9"], r"argument 'caf\udce9' is not text"),
        (["config", "\x1b[31m\nforged"], r"unrecognized arguments: \x1b[31m\nforged"),
        (["tasks", "list", "--store", "x"], "setting 'store' from --store: 'x' is not sqlite:///PATH"),
        (["tasks", "list", "--store", "sqlite:///:memory:"], "a store in memory is gone with its process"),
        (["tasks", "list", "--store", "postgresql://h/d"], "isn't available in this version; use sqlite:///PATH"),
    ],
)
def test_mistake_is_one_line_and_code_2(cli: Cli, argv: list[str], message: str) -> None:
    shown = cli(*argv)

    assert shown.code == 2
    assert shown.out == ""
    assert shown.err.startswith("deferlib: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(("argv", "verb"), [([], "doctor"), (["tasks"], "retry"), (["queues"], "purge")])
def test_command_without_a_verb_says_which_there_are(cli: Cli, argv: list[str], verb: str) -> None:
    shown = cli(*argv)

    assert (shown.code, shown.out) == (2, "")
    assert re.search(rf"^    {verb} +\w+", shown.err, re.MULTILINE)


@pytest.mark.parametrize(
    "argv",
    [
        ["tasks", "list"], ["tasks", "show", "x"], ["tasks", "run", "x"], ["tasks", "retry", "x"], ["tasks", "delete", "x"],
        ["queues", "list"], ["queues", "show", "x"], ["queues", "pause", "x"], ["queues", "resume", "x"],
        ["queues", "purge", "x"], ["queues", "put", "x", "rate=5/s"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_missing_store_is_an_error_and_none_is_made(project: Path, cli: Cli, argv: list[str]) -> None:
    shown = cli(*argv, "--store", "sqlite:///folder/typo.db")

    assert shown.code == 2
    assert shown.err.startswith(
        f"deferlib: error: {project}/folder/typo.db: there is no store yet (setting 'store' from --store)"
    )
    assert "`deferlib engine`" in shown.err
    assert os.listdir(project) == ["queue.yaml"]


def test_file_that_is_no_store_is_refused_and_left_alone(project: Path, cli: Cli) -> None:
    (project / "notes.txt").write_text("x" * 5000)

    shown = cli("tasks", "list", "--store", "sqlite:///notes.txt")

    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert (project / "notes.txt").read_text() == "x" * 5000


def test_reading_changes_nothing_in_the_store(project: Path, cli: Cli) -> None:
    with config.runtime().store.read() as tx:
        before = tx.queues()
    (project / "queue.yaml").write_text("queue:\n- name: fresh\n")

    for argv in (["tasks", "list"], ["queues", "list"], ["queues", "show", "mail"], ["tasks", "show", "x"], ["config"]):
        cli(*argv)

    with config.runtime().store.read() as tx:
        assert tx.queues() == before


def test_reader_that_leaves_early_is_no_error(store: config.Runtime) -> None:
    for _ in range(3):
        taskqueue.Queue().add([taskqueue.Task(name=None) for _ in range(100)])
    command = f"{sys.executable} -m deferlib.cli tasks list --limit 300 --json | head -n 1; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)

    assert done.stdout == "{\n0\n"
    assert done.stderr == ""


def test_help_loads_no_database_and_no_engine() -> None:
    code = (
        "import sys, deferlib.cli\ntry: deferlib.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('apsw', 'pycurl', 'yaml', 'cloudpickle', 'asyncio', 'werkzeug') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines()[-1] == "[]"


# --- tasks list -------------------------------------------------------------------------------------------------------


@pytest.fixture
def some(store: config.Runtime) -> None:
    """Tasks in every state."""
    deferlib.defer(call, _name="running", _queue="mail")
    lease("mail")
    deferlib.defer(call, _name="broken")
    bury("default")
    deferlib.defer(call, _name="finished")
    finish("default")
    deferlib.defer(call, 1, _name="ready")
    deferlib.defer(call, 2, _name="later", _countdown=3600)
    taskqueue.add("body", queue_name="mail", name="web", url="/hook?id=1", method="PUT", countdown=60)
    taskqueue.add("body", queue_name="pulled", name="pull", method="PULL", tag="t")


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["ready", "pull", "running", "web", "later"]),
        (["--state", "ready"], ["ready", "pull"]),
        (["--state", "scheduled"], ["web", "later"]),
        (["--state", "leased"], ["running"]),
        (["--state", "dead"], ["broken"]),
        (["mail"], ["running", "web"]),
        (["mail", "--state", "dead"], []),
        (["--limit", "2"], ["ready", "pull"]),
    ],
)
def test_lists_what_is_asked_for_in_the_order_it_is_due(cli: Cli, argv: list[str], expected: list[str]) -> None:
    document = cli("tasks", "list", *argv, "--json").json
    table = cli("tasks", "list", *argv)

    assert [task["name"] for task in document["tasks"]] == expected
    assert document["more"] is (argv == ["--limit", "2"])
    assert table.code == 0
    if expected:
        assert [line.split()[0] for line in table.out.splitlines()[1 : len(expected) + 1]] == expected
    else:
        assert table.out == "No dead tasks.\n"
    assert ("--limit shows more" in table.out) is document["more"]


@pytest.mark.usefixtures("some")
def test_table_has_state_time_tries_and_call(cli: Cli) -> None:
    lines = cli("tasks", "list").out.splitlines()

    assert lines[0].split() == ["NAME", "QUEUE", "STATE", "DUE", "TRIES", "CALL"]
    assert lines[1].split()[:4] == ["ready", "default", "ready", "now"]
    assert lines[1].endswith("test_cli.call(1)")
    assert re.match(r"running +mail +leased +in \d+ s +1 ", lines[3])
    assert re.match(r"web +mail +scheduled +in \d+ s +0 +PUT /hook\?id=1", lines[4])
    assert re.match(r"later +default +scheduled +in \d+ m ", lines[5])


def test_limit_pages_through_many_tasks(cli: Cli, store: config.Runtime) -> None:
    for batch in range(5):
        taskqueue.Queue().add([taskqueue.Task(countdown=0 if batch < 4 else 500) for _ in range(100)])

    listed = cli("tasks", "list", "--limit", "450", "--json").json
    late = cli("tasks", "list", "--state", "scheduled", "--json").json

    assert len({task["id"] for task in listed["tasks"]}) == 450
    assert listed["more"] is True
    assert len(late["tasks"]) == 100
    assert late["more"] is False
    assert len(cli("tasks", "list", "--limit", "1000", "--json").json["tasks"]) == 500


def test_many_dead_letters_are_paged_by_id(cli: Cli, store: config.Runtime) -> None:
    for _ in range(3):
        taskqueue.Queue().add([taskqueue.Task() for _ in range(100)])
        bury("default")

    assert (
        len({task["id"] for task in cli("tasks", "list", "--state", "dead", "--limit", "300", "--json").json["tasks"]})
        == 300
    )


def test_unknown_queue_is_not_found(cli: Cli, store: config.Runtime) -> None:
    shown = cli("tasks", "list", "nope")

    assert (shown.code, shown.out) == (1, "")
    assert "there is no queue 'nope'; known are: default, mail, pulled" in shown.err


# --- tasks show -------------------------------------------------------------------------------------------------------

TASK_KEYS = {
    "name", "id", "queue", "state", "reason", "call", "verified", "method", "url", "target", "namespace", "tag", "headers",
    "payload_bytes", "created", "eta", "due", "next_run", "lease_until", "first_try", "died", "expires", "attempts",
    "executions", "failures", "lost", "fence", "deadline_seconds", "retry", "queue_paused", "history",
    "engine", "key",
}  # fmt: skip


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize("name", ["running", "broken", "finished", "ready", "later", "web", "pull"])
def test_document_has_the_keys_that_the_help_documents(cli: Cli, name: str) -> None:
    document = cli("tasks", "show", name, "--json").json
    documented = cli("tasks", "show", "--help").out

    assert set(document) == TASK_KEYS
    assert all(re.search(rf"\b{key}\b", documented) for key in TASK_KEYS)
    assert cli("tasks", "show", name).code == 0


@pytest.mark.usefixtures("some")
def test_dead_letter_shows_why_and_its_attempts(cli: Cli) -> None:
    document = cli("tasks", "show", "broken", "--json").json
    text = cli("tasks", "show", "broken").out

    assert (document["state"], document["reason"], document["failures"]) == ("dead", "limits: it broke", 1)
    assert document["died"] is not None
    assert document["next_run"] is None
    (attempt,) = document["history"]
    assert (attempt["attempt"], attempt["seconds"], attempt["status"], attempt["error"]) == (1, 0.25, 500, "it broke")
    assert "dead: limits: it broke" in text
    assert "never, unless `deferlib tasks retry broken` brings it back" in text
    assert re.search(r"^ATTEMPT +AT +TOOK +STATUS +ERROR\n1 +1 s ago +0\.250 s +500 +it broke$", text, re.MULTILINE)


@pytest.mark.usefixtures("some")
def test_times_are_iso_in_utc_and_relative(cli: Cli) -> None:
    document = cli("tasks", "show", "later", "--json").json
    text = cli("tasks", "show", "later").out

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document["eta"])
    assert document["next_run"] == document["due"] == document["eta"]
    assert re.search(rf"^eta +{document['eta']} \(in (59|60) m\)$", text, re.MULTILINE)
    assert re.search(rf"^created +{document['created']} \((now|1 s ago)\)$", text, re.MULTILINE)


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize(
    ("name", "next_run"),
    [
        ("running", "running; its lease lasts until "),
        ("finished", "never: it is finished, and its name is free again "),
        ("ready", "as soon as an engine has room: due since "),
    ],
)
def test_next_run_in_words(cli: Cli, store: config.Runtime, name: str, next_run: str) -> None:
    with store.store.serving(lambda: None):
        shown = cli("tasks", "show", name)

    assert re.search(rf"^next run +{next_run}", shown.out, re.MULTILINE)
    assert "no engine" not in shown.out


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize(
    ("name", "next_run"),
    [
        ("running", "its engine is gone; again once its lease has ended, "),
        ("ready", "as soon as an engine has room: due since .*; but no engine serves this store: `deferlib engine`"),
    ],
)
def test_next_run_says_so_where_no_engine_is(cli: Cli, name: str, next_run: str) -> None:
    assert re.search(rf"^next run +{next_run}", cli("tasks", "show", name).out, re.MULTILINE)


@pytest.mark.parametrize("command", ["tasks", "queues"])
def test_lists_warn_once_tasks_have_waited_a_minute_for_an_engine(cli: Cli, store: config.Runtime, command: str) -> None:
    warning = "deferlib: warning: no engine serves this store, and tasks have been due for 2 m: start `deferlib engine`"
    deferlib.defer(call, _name="fresh")
    assert cli(command, "list").err == ""
    deferlib.defer(call, _name="late", _eta=datetime.now(UTC) - timedelta(seconds=130))

    assert cli(command, "list").err.startswith(warning)
    assert cli(command, "list", "--json").err.startswith(warning)

    with store.store.serving(lambda: None):
        assert cli(command, "list").err == ""
    store.store.run(lambda tx: tx.pause(["default"], True))
    assert cli(command, "list").err == "", "a paused queue waits on purpose"


def test_call_is_marked_where_its_key_is_not(project: Path, cli: Cli, store: config.Runtime) -> None:
    deferlib.defer(call, 7, _name="a")
    deferlib.taskqueue.add(name="b")
    shown = cli("tasks", "show", "a", "--json").json
    assert shown["call"].endswith("test_cli.call(7)")
    assert shown["verified"] is True
    assert cli("tasks", "show", "b", "--json").json["verified"] is None

    (project / ".deferlib" / "tasks.db.key").unlink()

    shown = cli("tasks", "show", "a", "--json").json
    assert shown["call"].endswith("test_cli.call(7)  # not verified: no key at hand")
    assert shown["verified"] is False
    assert not (project / ".deferlib" / "tasks.db.key").exists(), "looking makes no key"


@pytest.mark.usefixtures("some")
def test_target_of_the_queue_comes_first(cli: Cli) -> None:
    assert cli("tasks", "show", "web", "--json").json["target"] == "worker"


@pytest.mark.usefixtures("some")
def test_task_is_found_by_its_id_too(cli: Cli) -> None:
    id = cli("tasks", "show", "ready", "--json").json["id"]

    assert cli("tasks", "show", id, "--json").json["name"] == "ready"


def test_name_comes_before_an_id(cli: Cli, store: config.Runtime) -> None:
    id = deferlib.defer(call).name
    assert id is not None
    deferlib.defer(call, _name=id)

    assert cli("tasks", "show", id, "--json").json["id"] != id


def test_own_retry_options_have_app_engines_names(cli: Cli, store: config.Runtime) -> None:
    options = taskqueue.TaskRetryOptions(task_retry_limit=3, task_age_limit=60, min_backoff_seconds=0.5)
    deferlib.defer(call, _name="x", _retry_options=options)

    expected = {"task_retry_limit": 3, "task_age_limit": 60.0, "min_backoff_seconds": 0.5}
    assert cli("tasks", "show", "x", "--json").json["retry"] == expected
    assert re.search(r"^retry .*task_retry_limit 3", cli("tasks", "show", "x").out, re.MULTILINE)


@pytest.mark.parametrize("argv", [["show"], ["run"], ["retry"], ["delete", "--yes"]], ids=" ".join)
def test_name_in_several_queues_needs_the_queue(cli: Cli, store: config.Runtime, argv: list[str]) -> None:
    deferlib.defer(call, _name="twin")
    deferlib.defer(call, _name="twin", _queue="mail")

    shown = cli("tasks", argv[0], "twin", *argv[1:])

    assert shown.code == 2
    assert "task 'twin' is in 2 queues (default, mail): say which one with --queue" in shown.err
    assert states(cli) == {"twin": "ready"}
    assert cli("tasks", "show", "twin", "--queue", "mail", "--json").json["queue"] == "mail"


def test_task_that_is_not_there_is_code_1(cli: Cli, store: config.Runtime) -> None:
    shown = cli("tasks", "show", "nope", "--queue", "mail")

    assert (shown.code, shown.out) == (1, "")
    assert "there is no task 'nope' in queue 'mail'" in shown.err


def test_living_task_comes_before_the_dead_letter_of_its_name(cli: Cli, store: config.Runtime) -> None:
    deferlib.defer(call, _name="again")
    bury("default")
    with_tombstone = now() + 2 * DAY
    store.store.run(lambda tx: tx.sweep(with_tombstone, 100))
    deferlib.defer(call, _name="again")

    assert cli("tasks", "show", "again", "--json").json["state"] == "ready"
    assert cli("tasks", "show", "again").out.count("state") == 2
    refused = cli("tasks", "retry", "again")
    assert refused.code == 1
    assert "stays a dead letter: another task of its name is in the queue" in refused.out


# --- nothing secret, nothing harmful ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/x?token=canary&password=canary&id=7", "/x?token=***&password=***&id=7"),
        ("/x?id=7&api%5Fkey=canary#access_token=canary", "/x?id=7&api%5Fkey=***#access_token=***"),
        ("/x?user%5Bpassword%5D=canary=&a=b=c", "/x?user%5Bpassword%5D=***&a=b=c"),
        ("/x?id=7;token=canary;canary&author=me", "/x?id=7;token=***&author=me"),
        ("/x?id=7?token=canary&&=1&token", "/x?id=7?token=***&&=1&token"),
        ("/x?next=a%26token%3D1;b", "/x?next=a%26token%3D1;b"),
        ("https://me:canary@example.com/a?b=c", "https://***@example.com/a?b=c"),
        ("/caf%C3%A9/token=1", "/caf%C3%A9/token=1"),
    ],
)
def test_secrets_in_a_url_are_never_shown(
    cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, url: str, shown: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    row = NewTask(7, 7, "default", "n", "push", now(), now(), "GET", url, "", "", "", "", "", 0, 0, b"", b"")
    store.store.run(lambda tx: tx.add(now(), [row]))

    for argv in (["tasks", "list"], ["tasks", "show", "n"]):
        plain, document = cli(*argv), cli(*argv, "--json")
        assert "canary" not in plain.out + document.out
        assert f"GET {shown}\n" in plain.out
    assert document.json["url"] == shown


def test_payloads_headers_and_keys_are_never_shown(
    project: Path, cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    deferlib.defer(call, 7, _name="a", _headers={"Authorization": "canary-header"})
    taskqueue.add("canary-body", name="b", url="/x", headers={"Cookie": "canary-cookie"})
    ring = store.ring.signing
    secrets = [
        "canary",
        ring.payload.hex(),
        ring.dispatch.hex(),
        (project / ".deferlib" / "tasks.db.key").read_text().strip(),
    ]
    monkeypatch.setenv("DEFERLIB_TARGETS", "w=http://w")

    for argv in (["tasks", "list"], ["tasks", "show", "a"], ["tasks", "show", "b"], ["queues", "list"], ["config"]):
        for json_flag in ([], ["--json"]):
            shown = cli(*argv, *json_flag)
            assert shown.code == 0
            assert not [secret for secret in secrets if secret in shown.out + shown.err]
    assert cli("tasks", "show", "a", "--json").json["headers"] == ["Authorization", "Content-Type"]


@pytest.mark.parametrize("source", ["flag", "environment"])
def test_passwords_and_keys_of_settings_are_masked_everywhere(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    dsn = f"postgresql://user:{PASSWORD}@host/db?password={PASSWORD}"
    monkeypatch.setenv("DEFERLIB_KEY", KEY)
    flags = ["--store", dsn] if source == "flag" else []
    if source == "environment":
        monkeypatch.setenv("DEFERLIB_STORE", dsn)

    runs = [
        cli("config", *flags), cli("config", "--json", *flags), cli("tasks", "list", *flags),
        cli("queues", "purge", "x", *flags),
        cli("engine", "--log-level", "debug", *flags), cli("config", dsn), cli("config", "--lease", dsn),
        cli("config", "--store", f"mysql://u:{PASSWORD}@h"), cli("config", "--app-url", f"http://u:{PASSWORD}@h"),
        cli("config", "--target", f"w=http://u:{PASSWORD}@h"), cli(dsn), cli("tasks", "list", "--limit", dsn),
    ]  # fmt: skip

    assert [run.code for run in runs[:2]] == [0, 0]
    assert runs[1].json["settings"]["key"] == {"value": "***", "source": "DEFERLIB_KEY"}
    assert {run.code for run in runs[2:]} == {2}
    for run in runs:
        assert PASSWORD not in run.out + run.err
        assert KEY not in run.out + run.err


def test_hostile_text_in_a_store_is_escaped(cli: Cli, store: config.Runtime) -> None:
    evil = "\x1b]0;owned\x07\r\n\x00\x9b31m\u202e\u2028 ok"
    row = NewTask(
        7, 7, "default", evil, "push", now(), now(), "POST", f"/{evil}", evil, json.dumps([[evil, evil]]), evil, "", "",
        0, 0, b"", b"dfr" + bytes(100),
    )  # fmt: skip
    store.store.run(lambda tx: tx.add(now(), [row]))
    bury("default", evil)

    for argv in (
        ["list", "--state", "dead"],
        ["show", "7"],
        ["retry", "7"],
        ["show", "7"],
        ["delete", "7", "--yes"],
        ["show", "7"],
    ):
        shown = cli("tasks", *argv)  # the fixture checks that all of it is printable
        assert shown.code in (0, 1)


@given(st.text())
def test_safe_text_is_one_printable_line_and_printable_text_stays(text: str) -> None:
    shown = show.safe(text)

    assert shown.isprintable()
    assert not text.isprintable() or shown == text
    assert show.safe(shown) == shown


def test_output_that_the_terminal_has_no_letters_for_is_escaped(store: config.Runtime) -> None:
    taskqueue.add("x", name="n", url="/caf\u00e9")
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "50"}

    done = subprocess.run(
        [sys.executable, "-m", "deferlib.cli", "tasks", "list"], capture_output=True, env=environ, timeout=60
    )

    assert done.returncode == 0
    assert done.stdout.isascii()


# --- tables and times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("json_flag", [False, True])
def test_tables_fit_the_terminal(
    cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, columns: int, json_flag: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    queue = "q" * 100
    store.store.run(lambda tx: tx.put_queues([QueueConfig(name=queue, rate=0.001)], QueueSource.COMMAND))
    taskqueue.Queue(queue).add(taskqueue.Task(name="n" * 500, url="/" + "u" * 1000))
    deferlib.defer(call)
    bury("default", "e" * 400)
    if json_flag:
        assert cli("tasks", "list", "--json").json["tasks"][0]["name"] == "n" * 500
        return

    for argv in (["tasks", "list"], ["tasks", "list", "--state", "dead"], ["config"]):
        longest = max(map(len, cli(*argv).out.splitlines()))
        assert longest <= columns or argv == ["config"]
    assert "…" in cli("tasks", "list").out
    titles = "QUEUE  MODE  STATE  WAITING  OLDEST  AT ONCE  RATE  RAN  ERR  DEAD"
    assert max(map(len, cli("queues", "list").out.splitlines())) <= max(columns, len(titles) + 12)


def test_id_stays_whole_in_80_columns_and_a_call_keeps_its_beginning(cli: Cli, store: config.Runtime) -> None:
    name = deferlib.defer(call, _queue="mail").name
    url = "/a" * 100 + "/end"
    taskqueue.add(url=url)

    first, second = cli("tasks", "list").out.splitlines()[1:]

    assert str(name) in first
    assert "POST /a/a" in second
    assert second.endswith("…")
    assert len(second) == 80


def test_wide_characters_are_counted_as_a_terminal_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")

    show.print_table(("A", "B"), [("漢" * 30, "x"), ("e\u0301" * 3, "y")])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "漢" * 18 + "…  x"
    assert lines[2] == "e\u0301" * 3 + " " * 34 + "  y"


@pytest.mark.parametrize(
    ("distance", "text"),
    [
        (0, "now"), (SECOND - 1, "now"), (-SECOND + 1, "now"), (SECOND, "in 1 s"), (-2 * SECOND, "2 s ago"),
        (119 * SECOND, "in 119 s"), (3 * MINUTE + 59 * SECOND, "in 3 m"), (-5 * HOUR, "5 h ago"), (3 * DAY, "in 3 d"),
        (47 * HOUR, "in 47 h"), (2**62, "in 53375995 d"),
    ],
)  # fmt: skip
def test_relative_times(distance: Micros, text: str) -> None:
    assert show.relative(distance, 0) == text


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000_123_456, "2023-11-14T22:13:20.123Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
        (2**62, "9999-12-31T23:59:59.000Z"),
        (-(2**62), "0001-01-01T00:00:00.000Z"),
        (None, None),
    ],
)
def test_iso_times_of_any_integer(at: Micros | None, text: str | None) -> None:
    assert show.iso(at) == text


@pytest.mark.parametrize(
    ("length", "text"),
    [(0, "0 s"), (1_500_000, "1.5 s"), (90 * SECOND, "90 s"), (2 * HOUR, "2 h"), (9 * DAY, "9 d"), (1, "1e-06 s")],
)
def test_spans(length: Micros, text: str) -> None:
    assert show.span(length) == text


# --- run, retry, delete -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("some")
def test_run_moves_waiting_tasks_and_brings_dead_letters_back(cli: Cli) -> None:
    shown = cli("tasks", "run", "later", "broken")

    assert shown.code == 0
    assert shown.out == "default/later: is due now\ndefault/broken: was a dead letter and is due now\n"
    assert states(cli, "default") == {"ready": "ready", "later": "ready", "broken": "ready"}
    assert cli("tasks", "show", "broken", "--json").json["attempts"] == 0


@pytest.mark.usefixtures("some")
def test_run_says_what_it_could_not_do_and_does_the_rest(cli: Cli) -> None:
    shown = cli("tasks", "run", "running", "finished", "nope", "later")

    assert shown.code == 1
    assert "mail/running: runs already (attempt 1)" in shown.out
    assert "default/finished: is finished; only its name is kept" in shown.out
    assert "default/later: is due now" in shown.out
    assert "there is no task 'nope'" in shown.err


def test_run_in_a_paused_queue_says_so(cli: Cli, store: config.Runtime) -> None:
    deferlib.defer(call, _name="x", _countdown=100)
    cli("queues", "pause", "default")

    assert cli("tasks", "run", "x").out == "default/x: is due now; its queue is paused\n"
    assert cli("tasks", "show", "x", "--json").json["queue_paused"] is True
    assert "but its queue is paused" in cli("tasks", "show", "x").out


@pytest.mark.usefixtures("some")
def test_retry_touches_dead_letters_only(cli: Cli) -> None:
    shown = cli("tasks", "retry", "later", "broken")

    assert shown.code == 1
    assert "default/later: is no dead letter, but scheduled" in shown.out
    assert "default/broken: was a dead letter and is due now" in shown.out
    assert states(cli, "default")["later"] == "scheduled"


@pytest.mark.usefixtures("some")
def test_delete_takes_live_and_dead_and_keeps_the_names_used(cli: Cli) -> None:
    shown = cli("tasks", "delete", "later", "broken", "running", "--yes")

    assert shown.code == 0
    assert shown.out == "default/later: deleted\ndefault/broken: deleted\nmail/running: deleted\n"
    assert "later" not in states(cli)
    assert states(cli, "--state", "dead") == {}
    with pytest.raises(taskqueue.TombstonedTaskError):
        deferlib.defer(call, _name="later")
    assert cli("tasks", "delete", "later", "--yes").code == 1


def test_delete_of_a_dead_letter_leaves_the_living_of_its_name(cli: Cli, store: config.Runtime) -> None:
    task = deferlib.defer(call, _name="again")
    bury("default")
    later = now() + 2 * DAY
    store.store.run(lambda tx: tx.sweep(later, 100))
    deferlib.defer(call, _name="again")

    assert cli("tasks", "delete", str(task._id), "--yes").out == "default/again: deleted\n"
    assert states(cli) == {"again": "ready"}
    assert states(cli, "--state", "dead") == {}


# --- asking first -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


DESTROY = [["tasks", "delete", "x"], ["queues", "purge", "default"]]


@pytest.mark.parametrize("argv", DESTROY, ids=" ".join)
@pytest.mark.parametrize("answer", ["y\n", "Yes\n"])
def test_yes_at_the_terminal_is_yes(
    cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, argv: list[str], answer: str
) -> None:
    deferlib.defer(call, _name="x")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))

    shown = cli(*argv)

    assert shown.code == 0
    assert "for good? [y/N] " in shown.out
    assert states(cli) == {}


@pytest.mark.parametrize("argv", DESTROY, ids=" ".join)
@pytest.mark.parametrize("answer", ["n\n", "\n", "", "yess\n"])
def test_anything_else_is_no(
    cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, argv: list[str], answer: str
) -> None:
    deferlib.defer(call, _name="x")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))

    shown = cli(*argv)

    assert shown.code == 1
    assert "Nothing was changed." in shown.out
    assert states(cli) == {"x": "ready"}


@pytest.mark.parametrize("argv", DESTROY, ids=" ".join)
@pytest.mark.parametrize("stdin", [io.StringIO("y\n"), None])
def test_without_a_terminal_nothing_is_destroyed_without_yes(
    cli: Cli, store: config.Runtime, monkeypatch: pytest.MonkeyPatch, argv: list[str], stdin: io.StringIO | None
) -> None:
    deferlib.defer(call, _name="x")
    monkeypatch.setattr(sys, "stdin", stdin)

    shown = cli(*argv)

    assert shown.code == 2
    assert "repeat the command with --yes" in shown.err
    assert states(cli) == {"x": "ready"}


# --- queues -----------------------------------------------------------------------------------------------------------

QUEUE_KEYS = {
    "name", "mode", "state", "paused", "disabled", "source", "tasks", "waiting", "in_flight", "dead", "oldest_due",
    "oldest_wait_seconds", "executed_last_minute", "failed_last_minute", "rate_now", "rate", "rate_enforced",
    "bucket_size", "max_concurrent", "target", "retry", "first_limit_wins", "jitter", "tombstone_seconds",
    "deadline_seconds", "lost_limit", "sources", "owner", "owned_until", "slowed_since",
}  # fmt: skip


@pytest.mark.usefixtures("some")
def test_queues_are_listed_with_their_counts(cli: Cli) -> None:
    document = {queue["name"]: queue for queue in cli("queues", "list", "--json").json["queues"]}
    lines = cli("queues", "list").out.splitlines()

    assert list(document) == ["default", "mail", "pulled"]
    assert all(set(queue) == QUEUE_KEYS for queue in document.values())
    assert [(queue["tasks"], queue["dead"]) for queue in document.values()] == [(2, 1), (2, 0), (1, 0)]
    assert (document["mail"]["rate"], document["mail"]["max_concurrent"]) == (pytest.approx(5 / 60), 3)
    assert re.match(r"default +push +active +2 +now +0 +0\.033/s +2 +1 +1$", lines[1])
    assert re.match(r"mail +push +active +2 +in \d+ s +0/3 +0 of 5/m +0 +0 +0$", lines[2])
    assert re.match(r"pulled +pull +pull +1 +now +0/s +0 +0 +0$", lines[3])
    assert max(map(len, lines)) <= 80


def leave(
    store: config.Runtime, node: str, conditions: list[Condition], slowdowns: list[Slowdown], at: int | None = None
) -> None:
    """Leave the note that the engine *node* would."""
    text = troubles.dated(troubles.note_of(conditions, slowdowns), store.clock.now() if at is None else at)
    store.store.run(lambda tx: tx.put_note(troubles.NOTE + node, text))


@pytest.mark.usefixtures("some")
def test_slowed_queues_and_troubled_targets_are_shown(cli: Cli, store: config.Runtime) -> None:
    now = store.clock.now()
    down = Condition("http://app:1", now - 90 * SECOND, Ailment.UNREACHABLE, "connection refused", 1, now + 5 * SECOND)
    shrunk = Condition("http://app:2", now, Ailment.FAILING, "it broke", 4)
    slowed = Slowdown("mail", now - 60 * SECOND, 0.05, 0)
    leave(store, "one", [down], [slowed])
    leave(store, "two", [shrunk, down._replace(since=now)], [slowed._replace(rate=0.01)])

    listed, shown = cli("queues", "list"), cli("queues", "show", "mail")
    document = cli("queues", "list", "--json").json

    for told in (listed, shown):
        assert "target http://app:1 can't be reached (for 90 s), is tried again in " in told.err
        assert "target http://app:2 loses deliveries, or lets them time out (for 0 s), gets 4 at once: it broke" in told.err
    assert re.search(r"^mail +push +slowed .* 0 of 0\.06/s ", listed.out, re.MULTILINE)
    assert re.search(r"^enforced rate +0\.06/s for 60 s: its target is overloaded \(503\)$", shown.out, re.MULTILINE)
    assert [each["url"] for each in document["troubled_targets"]] == ["http://app:1", "http://app:2"]
    assert document["troubled_targets"][1]["next_try"] is None
    mail = next(queue for queue in document["queues"] if queue["name"] == "mail")
    assert (mail["rate_enforced"], mail["slowed_since"] is not None) == (pytest.approx(0.06), True)

    leave(store, "one", [], [])
    leave(store, "two", [], [])
    assert cli("queues", "list").err == ""


def test_note_of_a_killed_engine_is_forgotten(cli: Cli, store: config.Runtime) -> None:
    long_ago = store.clock.now() - 200 * SECOND
    gone = Condition("http://app:1", long_ago, Ailment.UNREACHABLE, "", 1, long_ago)
    leave(store, "killed", [gone], [], at=long_ago)

    assert cli("queues", "list", "--json").json["troubled_targets"] == []


def test_queue_is_shown_in_full(cli: Cli, store: config.Runtime) -> None:
    document = cli("queues", "show", "mail", "--json").json
    documented = cli("queues", "show", "--help").out
    text = cli("queues", "show", "mail").out

    assert set(document) == QUEUE_KEYS
    assert all(re.search(rf"\b{key}\b", documented) for key in QUEUE_KEYS)
    assert document["retry"] == {
        "task_retry_limit": 2, "task_age_limit": 3600.0, "min_backoff_seconds": 0.1, "max_backoff_seconds": 3600.0,
        "max_doublings": 16,
    }  # fmt: skip
    assert (document["source"], document["disabled"], document["tombstone_seconds"]) == ("file", False, 777600.0)
    assert document["sources"]["rate"] == document["sources"]["retry_parameters.task_retry_limit"] == "file"
    assert document["sources"]["bucket_size"] == document["sources"]["deferlib.jitter"] == "default"
    assert re.search(r"^rate +5/m +queue.yaml$", text, re.MULTILINE)
    assert re.search(r"^bucket_size +5 +default$", text, re.MULTILINE)
    assert re.search(r"^retry_parameters.task_age_limit +1h +queue.yaml$", text, re.MULTILINE)
    assert re.search(r"^target +worker +queue.yaml$", text, re.MULTILINE)


def test_pause_and_resume(cli: Cli, store: config.Runtime) -> None:
    assert cli("queues", "pause", "default", "mail") == Run(0, "default: paused\nmail: paused\n", "")
    assert [queue["paused"] for queue in cli("queues", "list", "--json").json["queues"]] == [True, True, False]
    assert re.search(r"^mail +push +paused ", cli("queues", "list").out, re.MULTILINE)

    partly = cli("queues", "resume", "mail", "nope")

    assert (partly.code, partly.out) == (1, "mail: resumed\n")
    assert "there is no queue 'nope'; known are: default, mail, pulled" in partly.err
    assert cli("queues", "show", "mail", "--json").json["paused"] is False


def test_purge_deletes_what_waits_and_keeps_dead_letters(cli: Cli, store: config.Runtime) -> None:
    deferlib.defer(call, _name="dead")
    bury("default")
    for _ in range(6):
        taskqueue.Queue().add([taskqueue.Task(countdown=60) for _ in range(100)])

    assert cli("queues", "purge", "default", "--yes") == Run(0, "default: 600 tasks deleted\n", "")

    document = cli("queues", "show", "default", "--json").json
    assert (document["tasks"], document["dead"]) == (0, 1)
    assert cli("queues", "purge", "default", "--yes").out == "default: 0 tasks deleted\n"


@pytest.mark.parametrize("argv", [["show"], ["pause"], ["resume"], ["purge"]], ids=" ".join)
def test_queue_that_is_not_there_is_code_1(cli: Cli, store: config.Runtime, argv: list[str]) -> None:
    shown = cli("queues", *argv, "nope")

    assert (shown.code, shown.out) == (1, "")
    assert "there is no queue 'nope'" in shown.err


def test_queue_that_left_queue_yaml_is_shown_as_disabled(project: Path, cli: Cli, store: config.Runtime) -> None:
    (project / "queue.yaml").write_text("queue:\n- name: pulled\n  mode: pull\n")
    store.apply_queues()

    document = {queue["name"]: queue for queue in cli("queues", "list", "--json").json["queues"]}

    assert {name: queue["disabled"] for name, queue in document.items()} == {
        "default": False,
        "mail": True,
        "pulled": False,
    }
    assert (document["mail"]["state"], document["mail"]["rate_enforced"]) == ("disabled: left queue.yaml", 0.0)
    assert re.search(r"^mail +push +disab", cli("queues", "list").out, re.MULTILINE)


def test_broken_queue_yaml_keeps_nobody_from_looking_and_pausing(project: Path, cli: Cli, store: config.Runtime) -> None:
    (project / "queue.yaml").write_text("queue: [\n")

    shown = cli("queues", "list", "--json")

    assert shown.err.startswith(f"deferlib: warning: queue.yaml isn't applied: {project}/queue.yaml:2:1: ")
    assert shown.json["problem"].startswith(f"{project}/queue.yaml:2:1: ")
    assert cli("queues", "pause", "mail").code == 0


def test_engines_trouble_with_its_queue_yaml_is_told(cli: Cli, store: config.Runtime) -> None:
    store.store.run(lambda tx: tx.put_note("queue_file_error", "/elsewhere/queue.yaml:3:1: nonsense"))

    assert "queue.yaml isn't applied: /elsewhere/queue.yaml:3:1: nonsense" in cli("queues", "list").err

    store.apply_queues()
    assert cli("queues", "list").err == ""
    assert cli("queues", "list", "--json").json["problem"] is None


def test_values_are_put_over_queue_yaml_and_taken_back(project: Path, cli: Cli, store: config.Runtime) -> None:
    put = cli("queues", "put", "mail", "rate=20/s", "retry_parameters.task_retry_limit=9", "deferlib.first-limit-wins=true")
    assert put == Run(0, "mail: rate=20/s, retry_parameters.task_retry_limit=9, deferlib.first_limit_wins=true\n", "")
    document = cli("queues", "show", "mail", "--json").json
    assert (document["rate"], document["retry"]["task_retry_limit"], document["retry"]["task_age_limit"]) == (20, 9, 3600)
    assert (document["sources"]["rate"], document["sources"]["target"]) == ("command", "file")

    store.apply_queues()
    assert cli("queues", "show", "mail", "--json").json["rate"] == 20, "it stays, whatever the file says"

    assert cli("queues", "put", "mail", "rate=").out == (
        "mail: retry_parameters.task_retry_limit=9, deferlib.first_limit_wins=true\n"
    )
    assert cli("queues", "show", "mail", "--json").json["rate"] == pytest.approx(5 / 60)
    assert cli("queues", "put", "mail", "--clear").out == "mail: nothing is put over it\n"
    assert cli("queues", "show", "mail", "--json").json["retry"]["task_retry_limit"] == 2


def test_queue_can_be_made_by_a_command_and_stays(cli: Cli, store: config.Runtime) -> None:
    assert cli("queues", "put", "extra", "mode=pull").out == "extra: mode=pull\n"

    store.apply_queues()

    document = cli("queues", "show", "extra", "--json").json
    assert (document["mode"], document["source"], document["disabled"]) == ("pull", "command", False)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["mail"], 2, "say what to put"),
        (["mail", "rate"], 2, "KEY=VALUE is needed"),
        (["mail", "=5"], 2, "KEY=VALUE is needed"),
        (["mail", "a.b.c=5"], 2, "KEY=VALUE is needed"),
        (["mail", "name=x"], 2, "KEY=VALUE is needed"),
        (["mail", "rate=5"], 2, "queue 'mail': rate 5: a number and a unit are needed"),
        (["mail", "colour=red"], 2, "unknown key 'colour'"),
        (["mail", "deferlib.deadline=1s"], 2, "15 s to 86400 s are allowed"),
        (["mail", "mode=pull"], 2, "is a push queue, and stays one"),
        (["a_b", "rate=5/s"], 2, "queue name 'a_b'"),
        (["mail", "rate=["], 2, "rate '['"),
        (["nope", "--clear"], 1, "there is no queue 'nope'"),
    ],
)
def test_what_cannot_be_put_is_refused(cli: Cli, store: config.Runtime, argv: list[str], code: int, message: str) -> None:
    before = cli("queues", "list", "--json").json

    refused = cli("queues", "put", *argv)

    assert (refused.code, refused.out) == (code, "")
    assert message in refused.err
    after = cli("queues", "list", "--json").json
    assert [queue["sources"] for queue in after["queues"]] == [queue["sources"] for queue in before["queues"]]


# --- config -----------------------------------------------------------------------------------------------------------


def test_config_shows_every_setting_with_its_source_and_the_places(
    project: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "pyproject.toml").write_text("[tool.deferlib]\ngrace = 5\n")
    monkeypatch.setenv("DEFERLIB_LEASE", "7")
    monkeypatch.setenv("DEFERLIB_LAESE", "8")

    flags = ["--store", "sqlite:///x.db", "--target", "a=http://a", "--target", "b=http://b"]
    document = cli("config", "--json", *flags).json
    text = cli("config", *flags).out

    assert set(document) == {"root", "queue_file", "store_path", "key_file", "settings", "unknown"}
    assert list(document["settings"]) == list(SETTINGS)
    assert document["settings"]["store"] == {"value": "sqlite:///x.db", "source": "--store"}
    assert document["settings"]["targets"] == {"value": {"a": "http://a", "b": "http://b"}, "source": "--target"}
    assert document["settings"]["lease"] == {"value": 7.0, "source": "DEFERLIB_LEASE"}
    assert document["settings"]["grace"] == {"value": 5.0, "source": "pyproject.toml [tool.deferlib]"}
    assert document["settings"]["port"] == {"value": None, "source": "default"}
    assert document["unknown"] == ["DEFERLIB_LAESE"]
    assert [document["root"], document["queue_file"], document["store_path"], document["key_file"]] == [
        str(project), f"{project}/queue.yaml", f"{project}/x.db", f"{project}/x.db.key"
    ]  # fmt: skip
    assert re.search(r"^targets +a=http://a, b=http://b +--target$", text, re.MULTILINE)
    assert re.search(rf"^store +{project}/x.db$", text, re.MULTILINE)
    assert "DEFERLIB_LAESE" in text
    assert not (project / "x.db").exists()


def test_config_without_queue_yaml_and_with_a_key(project: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "queue.yaml").unlink()
    monkeypatch.setenv("DEFERLIB_KEY", KEY)

    document = cli("config", "--json", "--store", "sqlite:///:memory:").json

    assert [document["queue_file"], document["store_path"], document["key_file"]] == [None, None, None]
    assert cli("config").code == 0


def test_every_setting_has_a_flag_unless_there_is_a_reason() -> None:
    from deferlib.cli.settings import FLAGS

    without = set(SETTINGS) - set(FLAGS)

    # A key on the command line is seen by every user of the machine; prefix, limits and margin are the app's business;
    # the others are a project's policy, not one process's.
    assert without == {"key", "prefix", "limits", "deadline_margin"} | {
        *("quarantine_after", "allow_urls", "accept_unbound", "trust_host"),
    }
