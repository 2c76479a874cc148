"""`deferlib keys`, run in this process on a real store and real key files: what it shows, changes and refuses."""

from __future__ import annotations

import json
import os
import pwd
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import deferlib
from deferlib import config, deferred, keys, taskqueue
from deferlib.cli import key_file, key_use, main
from deferlib.core.model import DAY, MINUTE, Action, ClaimSpec, Outcome
from deferlib.errors import KeyringError
from deferlib.keys import Key

OLD, NEW, OTHER = "canary-old-0123456789", "canary-new-0123456789", "canary-other-0123456789"


def id_of(secret: str) -> str:
    return Key(secret.encode()).id.hex()


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
    """A project as the working directory, and no runtime before and after."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    former = config.install(None)
    yield tmp_path
    made = config.install(former)
    if made is not None:
        made.close()


@pytest.fixture
def raw_cli(project: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command."""

    def run(*argv: str) -> Run:
        try:
            code = main(("keys", *argv))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        assert all(line.isprintable() for text in (out, err) for line in text.split("\n"))
        return Run(code, out, err)

    return run


@pytest.fixture
def cli(raw_cli: Cli) -> Cli:
    """Runs a command; its output shows no secret."""

    def run(*argv: str) -> Run:
        done = raw_cli(*argv)
        assert "canary" not in done.out + done.err
        return done

    return run


class KeyFile:
    """The project's key file, as old as other processes need to notice it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *lines: str) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in lines))
        self.path.chmod(0o600)
        self.age(60)

    def age(self, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(self.path, (then, then))

    @property
    def secrets(self) -> list[str]:
        return [secret.decode() for secret in keys.split(self.path.read_text())]


@pytest.fixture
def file(project: Path) -> KeyFile:
    file = KeyFile(project / ".deferlib" / "tasks.db.key")
    file.write(OLD)
    return file


def call() -> None:
    """What the tests defer; never run."""


def add(count: int = 1, *, key: str | None = None) -> None:
    """Defer calls, signed by the project's first key or by *key*."""
    if key is not None:
        deferlib.configure(key=key)
    for _ in range(count):
        deferlib.defer(call)
    if key is not None:
        made = config.install(None)
        assert made is not None
        made.close()


def bury() -> None:
    """Make dead letters of all that is due."""
    runtime = config.runtime()
    now = runtime.clock.now()
    claims = runtime.store.run(lambda tx: tx.claim(now, [ClaimSpec("default", 100, 1 << 20, now + MINUTE)]))
    outcomes = [Outcome(claim.id, claim.claims, "default", Action.DEAD, now + DAY) for claim in claims]
    runtime.store.run(lambda tx: tx.settle(now, outcomes))


# --- new ------------------------------------------------------------------------------------------------------------


def test_new_key_is_all_that_is_printed_and_differs_each_time(raw_cli: Cli, project: Path) -> None:
    first, second = raw_cli("new"), raw_cli("new")

    assert (first.code, first.err) == (0, "")
    assert re.fullmatch(r"[\w-]{43}\n", first.out)
    assert first.out != second.out
    assert os.listdir(project) == ["pyproject.toml"], "nothing is kept"


def test_new_key_can_be_exported_by_a_shell_and_used(project: Path) -> None:
    command = (
        f'export DEFERLIB_KEY=$("{sys.executable}" -m deferlib.cli keys new); '
        f'"{sys.executable}" -c "from deferlib import config; print(config.runtime().ring.signing.id.hex())"'
    )

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True, cwd=project)

    assert re.fullmatch(r"[0-9a-f]{16}\n", done.stdout)
    assert not (project / ".deferlib").exists()


# --- list -----------------------------------------------------------------------------------------------------------


def test_list_shows_role_and_use_of_each_key(cli: Cli, file: KeyFile) -> None:
    add(2)
    bury()
    add(3)
    cli("rotate")

    shown, document = cli("list"), cli("list", "--json").json

    new = id_of(file.secrets[1])
    assert shown.err == ""
    assert [line.split() for line in shown.out.splitlines()[1:]] == [
        [id_of(OLD), "signs", "3", "2"],
        [new, "next", "0", "0"],
    ]
    assert document == {
        "source": str(file.path),
        "file": str(file.path),
        "keys": [
            {"id": id_of(OLD), "role": "signs", "tasks": 3, "dead": 2},
            {"id": new, "role": "next", "tasks": 0, "dead": 0},
        ],
        "missing": [],
    }


def test_list_tells_loudly_of_a_key_that_tasks_need_and_that_is_not_here(cli: Cli, file: KeyFile) -> None:
    add(2, key=OTHER)
    bury()
    add(1, key=OTHER)

    shown, document = cli("list"), cli("list", "--json")

    assert [id_of(OTHER), "MISSING", "1", "2"] in [line.split() for line in shown.out.splitlines()]
    assert shown.err == document.err
    assert shown.err.startswith(
        f"deferlib: warning: 1 task and 2 dead letters can't run: signed with key {id_of(OTHER)}, which isn't among"
    )
    assert document.json["missing"] == [{"id": id_of(OTHER), "tasks": 1, "dead": 2}]


def test_list_counts_payloads_that_were_made_by_hand(cli: Cli, file: KeyFile) -> None:
    taskqueue.add(url="/_ah/queue/deferred", payload=deferred.serialize(call))
    taskqueue.add(url="/other", payload=b"nobody signed this")

    [key] = cli("list", "--json").json["keys"]

    assert key == {"id": id_of(OLD), "role": "signs", "tasks": 1, "dead": 0}


def test_list_of_keys_in_the_environment_names_it(cli: Cli, file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add(1)
    monkeypatch.setenv("DEFERLIB_KEY", f"{NEW},{OLD},{OLD}")

    document = cli("list", "--json").json

    assert (document["source"], document["file"]) == ("DEFERLIB_KEY", None)
    assert [(key["id"], key["role"], key["tasks"]) for key in document["keys"]] == [
        (id_of(NEW), "signs", 0),
        (id_of(OLD), "verifies", 1),
    ]


def test_list_without_the_key_file_makes_none_and_says_what_is_gone(cli: Cli, file: KeyFile) -> None:
    add(1)
    file.path.unlink()

    done = cli("list")

    assert done.err.endswith(f"{file.path} is not there; bring it back\n")
    assert not file.path.exists()


def test_list_counts_exactly_in_slices(file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add(7)
    bury()
    add(5)
    monkeypatch.setattr(key_use, "_SLICE", 2)

    with config.runtime().store.read() as tx:
        assert key_use.used(tx) == {Key(OLD.encode()).id: (5, 7)}


def test_list_without_a_store_says_so(cli: Cli) -> None:
    done = cli("list")

    assert done.code == 2
    assert "there is no store yet" in done.err


# --- rotate: a file -------------------------------------------------------------------------------------------------


def test_first_rotate_adds_a_key_that_verifies_and_second_lets_it_sign(cli: Cli, file: KeyFile) -> None:
    first = cli("rotate")
    added = file.secrets
    second = cli("rotate")

    new = id_of(added[1])
    assert added[0] == OLD
    assert file.secrets == [added[1], OLD]
    assert f"key {new} was added; it verifies, and doesn't sign yet." in first.out
    assert first.out.endswith("deferlib keys rotate\n")
    assert f"key {new} signs from now on; key {id_of(OLD)} only verifies." in second.out
    assert second.out.endswith(f"deferlib keys retire {id_of(OLD)}\n")
    assert added[1] not in first.out + second.out


def test_rotate_as_json_says_which_step_was_done(cli: Cli, file: KeyFile) -> None:
    first = cli("rotate", "--json").json
    second = cli("rotate", "--json").json
    third = cli("rotate", "--json").json

    assert first == {"source": str(file.path), "file": str(file.path), "step": "added", "key": id_of(file.secrets[0])}
    assert second == {**first, "step": "signs"}
    assert (third["step"], third["key"]) == ("added", id_of(file.secrets[-1]))


def test_rotate_again_and_again_loses_no_key(cli: Cli, file: KeyFile) -> None:
    known = [OLD]
    for _ in range(6):
        cli("rotate")
        assert set(known) <= set(file.secrets)
        known = file.secrets

    assert len(known) == 4
    assert known[-1] == OLD


def test_comments_and_order_of_the_other_keys_stay(cli: Cli, file: KeyFile) -> None:
    file.write("# the shop's keys", f"{OLD} , {OTHER}", "", "# until spring", "a-third-key-0123456789")
    cli("rotate")
    added = file.path.read_text().splitlines()
    cli("rotate")
    signs = file.path.read_text().splitlines()

    new = added[-1]
    kept = ["# the shop's keys", OLD, OTHER, "# until spring", "a-third-key-0123456789"]
    assert added[:-2] == kept
    assert added[-2].startswith("# next key: ")
    assert signs == [new, *kept]


def test_comment_harms_no_reader_that_knows_no_comments(cli: Cli, file: KeyFile) -> None:
    """It takes it for one more key: long enough to be one, without a comma, and never the first."""
    cli("rotate")

    lines = file.path.read_text().splitlines()

    assert len(lines[1]) >= keys.MIN_BYTES
    assert "," not in lines[1]
    assert (lines[0], len(lines)) == (OLD, 3)


def test_rotated_file_is_0600_alone_in_its_folder_and_its_former_content_untouched_by_links(
    cli: Cli, file: KeyFile, project: Path
) -> None:
    backup = project / "backup"
    os.link(file.path, backup)
    mask = os.umask(0)
    try:
        cli("rotate")
    finally:
        os.umask(mask)

    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert backup.read_text() == f"{OLD}\n", "replaced whole, not written into"
    assert os.listdir(file.path.parent) == ["tasks.db.key"]


def test_rotate_through_a_link_keeps_the_link(cli: Cli, file: KeyFile, project: Path) -> None:
    real = file.path.rename(project / "real.key")
    file.path.symlink_to(real)

    cli("rotate")

    assert file.path.is_symlink()
    assert len(keys.split(real.read_text())) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_changes_nobody_elses_file_and_is_told_as_whom_to_do_it(cli: Cli, file: KeyFile) -> None:
    os.chown(file.path, 65534, 65534)
    whose = pwd.getpwuid(65534).pw_name

    done = cli("rotate")

    assert done.code == 2
    assert f"{file.path}: the signing keys belong to {whose}, not to root; run this process as {whose}" in done.err
    assert file.secrets == [OLD]


def test_rotate_syncs_the_file_before_it_is_there_and_its_name_afterwards(
    cli: Cli, file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, int]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), len(file.secrets)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    cli("rotate")

    assert synced == [(False, 1), (True, 2)]


def test_rotate_that_fails_leaves_the_file_and_no_draft(cli: Cli, file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    done = cli("rotate")

    assert done.code == 2
    assert done.err.endswith(f"{file.path}: it can't be replaced, and is as it was: No space left on device\n")
    assert file.secrets == [OLD]
    assert os.listdir(file.path.parent) == ["tasks.db.key"]


def test_draft_of_somebody_who_was_killed_is_in_nobodys_way(cli: Cli, file: KeyFile) -> None:
    file.path.with_name("tasks.db.key.new").write_text("half a k")

    assert cli("rotate").code == 0

    assert os.listdir(file.path.parent) == ["tasks.db.key"]
    assert len(file.secrets) == 2


def test_rotates_at_once_lose_no_key(file: KeyFile, project: Path) -> None:
    """Ten at once: five keys are added, and each of them is let to sign."""
    command = [sys.executable, "-m", "deferlib.cli", "keys", "rotate", "--json"]
    processes = [subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    said = [json.loads(process.communicate(timeout=60)[0]) for process in processes]

    steps = [each["step"] for each in said]
    assert sorted(steps) == ["added"] * 5 + ["signs"] * 5
    assert {id_of(secret) for secret in file.secrets} == {each["key"] for each in said} | {id_of(OLD)}
    assert len(file.secrets) == 6
    assert os.listdir(file.path.parent) == ["tasks.db.key"]


def test_rotate_waits_for_whoever_holds_the_file_and_takes_what_they_made_of_it(file: KeyFile, project: Path) -> None:
    command = [sys.executable, "-m", "deferlib.cli", "keys", "rotate"]
    with key_file.locked(str(file.path)) as held:
        process = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        held.replace(f"{OTHER}\n{OLD}\n", [OTHER.encode(), OLD.encode()])
    process.communicate(timeout=60)

    assert process.returncode == 0
    assert file.secrets[:2] == [OTHER, OLD]
    assert len(file.secrets) == 3


def test_file_whose_keys_would_become_comments_is_left_alone(cli: Cli, file: KeyFile) -> None:
    file.write(OLD, f" # {OTHER}")

    done = cli("rotate")

    assert done.code == 2
    assert "its keys can't be told from its comments; write one key a line" in done.err
    assert file.path.read_text() == f"{OLD}\n # {OTHER}\n"


def test_bytes_that_are_no_text_stay_what_they_are(cli: Cli, file: KeyFile) -> None:
    raw = b"\xff\xfe" * 10
    file.path.write_bytes(raw + b"\n")

    cli("rotate")

    assert keys.split(file.path.read_bytes().decode("utf-8", "surrogateescape"))[0] == raw


def test_rotate_without_a_file_is_refused_and_makes_none(cli: Cli, project: Path) -> None:
    done = cli("rotate")

    assert done.code == 1
    assert "tasks.db.key is not there. If it was, bring it back; else the first defer() makes it" in done.err
    assert not (project / ".deferlib").exists()


@pytest.mark.parametrize("verb", [("list",), ("rotate",), ("retire", "aa")])
@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (OLD, 0o644, "others can read the signing keys (mode 0644); run `chmod 600 "),
        ("", 0o600, "there is no signing key; `deferlib keys new` makes a good one"),
        ("canary-short", 0o600, "signing key 1 has 12 bytes, at least 16 are needed"),
    ],
)
def test_file_that_can_t_be_used_is_refused_with_the_remedy(
    cli: Cli, file: KeyFile, verb: tuple[str, ...], content: str, mode: int, said: str
) -> None:
    add(1)
    file.write(content)
    file.path.chmod(mode)

    done = cli(*verb)

    assert (done.code, done.out) == (2, "")
    assert f"{file.path}: {said}" in done.err
    assert file.path.read_text() == f"{content}\n"


def test_store_in_memory_has_no_keys_to_rotate(cli: Cli) -> None:
    done = cli("rotate", "--store", "sqlite:///:memory:")

    assert done.code == 2
    assert "a store in memory has keys of its own in every process" in done.err


# --- rotate: by hand ------------------------------------------------------------------------------------------------


def test_rotate_of_the_environment_prints_both_values_and_changes_nothing(
    raw_cli: Cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", OLD)

    done = raw_cli("rotate")

    first, then = re.findall(r"^DEFERLIB_KEY=(\S+)$", done.out, re.MULTILINE)
    new = first.split(",")[1]
    assert (done.code, done.err) == (0, "")
    assert (first, then) == (f"{OLD},{new}", f"{new},{OLD}")
    assert len(new) == 43
    assert done.out.count("Restart") == 2
    assert f"deferlib keys retire {id_of(OLD)}\n" in done.out
    assert os.listdir(project) == ["pyproject.toml"]


def test_printed_values_can_be_pasted_into_a_shell(raw_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = 'it\'s $HOME; `ls` "x" & *'
    monkeypatch.setenv("DEFERLIB_KEY", odd)
    [first, then] = re.findall(r"^DEFERLIB_KEY=.*$", raw_cli("rotate").out, re.MULTILINE)

    for line, place in ((first, 0), (then, 1)):
        done = subprocess.run(
            ["sh", "-c", f'{line}; printf %s "$DEFERLIB_KEY"'], capture_output=True, text=True, check=True
        )
        assert done.stdout.split(",")[place] == odd


def test_rotate_of_a_project_file_prints_lines_of_it(raw_cli: Cli, project: Path) -> None:
    (project / "pyproject.toml").write_text(f'[tool.deferlib]\nkey = "{OLD}"\n')

    done = raw_cli("rotate")

    [line] = re.findall(rf'^key = "{OLD},.*"$', done.out, re.MULTILINE)
    (project / "pyproject.toml").write_text(f"[tool.deferlib]\n{line}\n")
    assert "The keys come from pyproject.toml [tool.deferlib]." in done.out
    assert config.runtime().ring.signing.id.hex() == id_of(OLD)
    assert len(config.runtime().ring.ids()) == 2


def test_rotate_of_the_environment_as_json(raw_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", f"{NEW},{OLD}")

    document = raw_cli("rotate", "--json").json

    fresh = document["first"].split(",")[-1]
    assert document == {
        "source": "DEFERLIB_KEY",
        "file": None,
        "step": "by-hand",
        "key": id_of(fresh),
        "first": f"{NEW},{OLD},{fresh}",
        "then": f"{fresh},{NEW},{OLD}",
    }


def test_rotation_that_may_be_under_way_is_warned_of(raw_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", f"{NEW},{OLD}")

    assert "DEFERLIB_KEY has 2 keys already; if they are being replaced, finish that first" in raw_cli("rotate").err


def test_keys_that_are_no_text_are_not_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", "canary-\udcff-0123456789")

    done = cli("rotate")

    assert done.code == 2
    assert "can't be printed" in done.err


# --- retire: a file -------------------------------------------------------------------------------------------------


def test_key_that_nothing_needs_is_taken_out(cli: Cli, file: KeyFile) -> None:
    add(1, key=NEW)
    file.write(NEW, "# former", OLD)

    done = cli("retire", id_of(OLD))

    assert (done.code, done.err) == (0, "")
    assert done.out == f"{file.path}: key {id_of(OLD)} was taken out. What runs forgets it within a second.\n"
    assert file.path.read_text() == f"{NEW}\n# former\n"
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("length", [1, 5, 16])
def test_beginning_of_an_id_is_enough_in_any_case(cli: Cli, file: KeyFile, length: int) -> None:
    add(1, key=NEW)
    file.write(NEW, OLD)

    document = cli("retire", id_of(OLD)[:length].upper(), "--json").json

    assert document == {"source": str(file.path), "file": str(file.path), "retired": id_of(OLD), "places": None}
    assert file.secrets == [NEW]


@pytest.mark.parametrize(
    ("tasks", "letters", "said"),
    [
        (1, 0, "1 task signed with key {} would never run without it; wait until the tasks have run"),
        (0, 2, "2 dead letters signed with key {} would never run without it; retry or delete the dead letters"),
        (3, 1, "3 tasks and 1 dead letter signed with key {} would never run without it; wait until"),
    ],
)
def test_key_that_is_needed_is_not_retired(cli: Cli, file: KeyFile, tasks: int, letters: int, said: str) -> None:
    add(letters)
    bury()
    add(tasks)
    file.write(NEW, OLD)

    done = cli("retire", id_of(OLD))

    assert (done.code, done.out) == (1, "")
    assert said.format(id_of(OLD)) in done.err
    assert file.secrets == [NEW, OLD]


def test_key_of_a_payload_that_was_made_by_hand_is_not_retired(cli: Cli, file: KeyFile) -> None:
    taskqueue.add(url="/_ah/queue/deferred", payload=deferred.serialize(call))
    file.write(NEW, OLD)

    assert cli("retire", id_of(OLD)).code == 1


def test_key_that_signs_is_not_retired(cli: Cli, file: KeyFile) -> None:
    add(1)
    cli("rotate")
    file.age(60)

    done = cli("retire", id_of(OLD))

    assert done.code == 1
    assert f"key {id_of(OLD)} signs what is added; `deferlib keys rotate` lets the next key sign" in done.err


def test_only_key_is_not_retired(cli: Cli, file: KeyFile) -> None:
    add(1)
    file.write(OLD, OLD)

    done = cli("retire", id_of(OLD))

    assert done.code == 1
    assert f"key {id_of(OLD)} is the only one" in done.err
    assert file.secrets == [OLD, OLD]


@pytest.mark.parametrize(("age", "code"), [(0, 1), (11, 1), (13, 0), (-100, 1)])
def test_file_must_have_been_the_same_for_a_while(cli: Cli, file: KeyFile, age: float, code: int) -> None:
    add(1, key=NEW)
    file.write(NEW, OLD)
    file.age(age)

    done = cli("retire", id_of(OLD))

    assert done.code == code
    if age < 0:
        assert "was changed in the future, by this machine's clock" in done.err
    elif code:
        assert re.search(rf"was changed {age} s ago, and others may still sign with what it was; repeat in \d+ s", done.err)


def test_next_key_can_be_taken_back_with_its_mark(cli: Cli, file: KeyFile) -> None:
    add(1)
    before = file.path.read_text()
    id = cli("rotate", "--json").json["key"]
    file.age(60)

    assert cli("retire", id).code == 0

    assert file.path.read_text() == before
    assert cli("rotate", "--json").json["step"] == "added"


@pytest.mark.parametrize(("id", "said"), [("", "no key begins with ''"), ("zz", "no key begins with 'zz'")])
def test_unknown_key_is_refused_with_those_there_are(cli: Cli, file: KeyFile, id: str, said: str) -> None:
    add(1)
    file.write(NEW, OLD)

    done = cli("retire", id)

    assert done.code == 1
    assert said in done.err
    assert f"known are: {id_of(NEW)}, {id_of(OLD)}" in done.err


def test_beginning_of_two_ids_is_refused(cli: Cli, file: KeyFile) -> None:
    add(1)
    secrets = [f"canary-key-{number:010}" for number in range(17)]  # of 17 ids two begin with the same digit
    file.write(*secrets)
    first = [id_of(secret)[0] for secret in secrets]
    twice = next(digit for digit in first if first.count(digit) > 1)

    done = cli("retire", twice)

    assert done.code == 1
    assert f"{first.count(twice)} keys begin with {twice!r}" in done.err
    assert len(file.secrets) == 17


def test_retire_without_the_file_makes_none(cli: Cli, file: KeyFile) -> None:
    add(1)
    file.path.unlink()

    assert cli("retire", id_of(OLD)).code == 1
    assert not file.path.exists()


# --- retire: by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ring", "places", "said"),
    [
        ([NEW, OLD], [2], "it is the second of 2 keys there"),
        ([NEW, OTHER, OLD], [3], "it is the third of 3 keys there"),
        ([NEW, OLD, OTHER, OLD], [2, 4], "it is the second and the fourth of 4 keys there"),
    ],
)
def test_key_of_the_environment_is_named_by_its_place(
    cli: Cli, file: KeyFile, monkeypatch: pytest.MonkeyPatch, ring: list[str], places: list[int], said: str
) -> None:
    add(1, key=NEW)
    monkeypatch.setenv("DEFERLIB_KEY", ",".join(ring))

    shown, document = cli("retire", id_of(OLD)), cli("retire", id_of(OLD), "--json").json

    assert shown.code == 0
    assert said in shown.out
    assert document == {"source": "DEFERLIB_KEY", "file": None, "retired": id_of(OLD), "places": places}


def test_key_of_the_environment_that_is_needed_is_refused(cli: Cli, file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add(2)
    monkeypatch.setenv("DEFERLIB_KEY", f"{NEW},{OLD}")

    needed, signs = cli("retire", id_of(OLD)), cli("retire", id_of(NEW))

    assert (needed.code, signs.code) == (1, 1)
    assert f"2 tasks signed with key {id_of(OLD)} would never run without it" in needed.err
    assert f"key {id_of(NEW)} signs what is added; `deferlib keys rotate` adds one that will" in signs.err


# --- the file, alone ------------------------------------------------------------------------------------------------


def test_replace_refuses_a_text_that_holds_other_keys_than_expected(file: KeyFile) -> None:
    with key_file.locked(str(file.path)) as held, pytest.raises(KeyringError, match="can't be told from its comments"):
        held.replace(f"{NEW}\n", [NEW.encode(), OLD.encode()])

    assert file.secrets == [OLD]


def test_help_teaches_within_80_columns(cli: Cli) -> None:
    for verb in ("new", "list", "rotate", "retire"):
        done = cli(verb, "--help")
        assert "example" in done.out
        assert all(len(line) <= 80 for line in done.out.splitlines())
