"""Settings: where they come from, what they may be, and the runtime made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deferlib
from deferlib import config, keys, owners
from deferlib.config import Runtime
from deferlib.core.model import QueueConfig, QueueSource
from deferlib.errors import ConfigError, Error, InvalidQueueError, KeyringError
from deferlib.settings import DEFAULT_APP, SETTINGS, load_settings, mask

KEY = "canary-key-0123456789"
PASSWORD = "canary-password"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project as the working directory, without settings, and no runtime before and after."""
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    former = config.install(None)
    yield folder
    made = config.install(former)
    if made is not None:
        made.close()


def write_pyproject(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(f"[tool.deferlib]\n{text}\n")


# --- precedence -------------------------------------------------------------------------------------------------------


def test_argument_beats_environment_beats_pyproject_beats_default(project: Path) -> None:
    names = ("lease", "grace", "concurrency", "app")
    write_pyproject(project, "lease = 1\ngrace = 1\nconcurrency = 1")
    environ = {"DEFERLIB_LEASE": "2", "DEFERLIB_GRACE": "2"}

    settings = load_settings({"lease": 3}, environ)

    assert [settings[name] for name in names] == [3.0, 2.0, 1, DEFAULT_APP]
    assert [settings.all[name].source for name in names] == [
        "argument", "DEFERLIB_GRACE", "pyproject.toml [tool.deferlib]", "default"
    ]  # fmt: skip


def test_flag_is_named_as_the_source() -> None:
    assert load_settings({"app": "http://a"}, {}, flags={"app": "--app-url"}).all["app"].source == "--app-url"


def test_none_and_an_empty_variable_are_not_given() -> None:
    settings = load_settings({"lease": None}, {"DEFERLIB_LEASE": "", "DEFERLIB_STORE": ""})

    assert settings.all["lease"].source == settings.all["store"].source == "default"


def test_environment_is_read_when_asked_not_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_LEASE", "7")

    assert load_settings()["lease"] == 7.0


def test_every_default_is_allowed() -> None:
    for name, kind in SETTINGS.items():
        assert kind.default is None or kind.parse(kind.default) == kind.default, name


# --- what is allowed --------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Any]] = [
    ("store", "mysql://h/db"), ("store", "tasks.db"), ("store", "sqlite:tasks.db"), ("store", 5), ("store", True),
    ("store", "sqlite:///a\0b"), ("store", ["sqlite:///a"]),
    ("key", 5), ("key", b"0123456789abcdef"), ("key", ["0123456789abcdef"]),
    ("queues", 5), ("queues", True), ("queues", {}), ("queues", ""),
    ("concurrency", 0), ("concurrency", -1), ("concurrency", "x"), ("concurrency", 1.5), ("concurrency", True),
    ("concurrency", "1.0"), ("concurrency", 10_001), ("concurrency", [1]), ("concurrency", "9" * 5000),
    ("app", "127.0.0.1:8080"), ("app", "ftp://h"), ("app", "http://"), ("app", "http://:80"), ("app", "http://h:99999"),
    ("app", "http://h:0"), ("app", "http://h:x"), ("app", "http://u:p@h"), ("app", "http://h/?q"), ("app", "http://h/#f"),
    ("app", "http://h /"), ("app", "http://h/\x1b[31m"), ("app", "http://[::1"), ("app", 5), ("app", "http://h\n"),
    ("targets", "worker"), ("targets", "worker=h"), ("targets", "Worker=http://h"), ("targets", "=http://h"),
    ("targets", "a=http://h,a=http://i"), ("targets", ["a=http://h"]), ("targets", {"a": 5}), ("targets", {5: "http://h"}),
    ("targets", {"a": {"b": "http://h"}}), ("targets", 5), ("targets", {"": "http://h"}),
    ("prefix", "tasks"), ("prefix", "/tasks/"), ("prefix", "/"), ("prefix", "/a?b"), ("prefix", 5),
    ("lease", 0), ("lease", "0"), ("lease", -1), ("lease", "nan"), ("lease", "inf"), ("lease", 86_401), ("lease", "30s"),
    ("lease", True), ("lease", [30]), ("lease", 10**400), ("lease", object()),
    ("grace", -0.1), ("grace", "x"), ("grace", float("nan")),
    ("port", 0), ("port", 65_536), ("port", "http"), ("port", 80.5), ("port", ":9100"), ("port", "h:"), ("port", "h:0"),
    ("port", "h:65536"), ("port", "::1:9100"), ("port", "[::1]"), ("port", "http://h:9100"), ("port", "a b:1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_names_setting_source_and_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({name: value}, {})

    message = str(caught.value)
    assert message.startswith(f"setting {name!r} from argument: ")
    assert message.endswith(f" is not {SETTINGS[name].allowed}")
    assert "\n" not in message
    assert "\x1b" not in message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in BAD if isinstance(value, str) and value])
def test_bad_value_in_the_environment_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^setting '{name}' from DEFERLIB_{name.upper()}: "):
        load_settings({}, {f"DEFERLIB_{name.upper()}": value})


@pytest.mark.parametrize("line", ["lease = true", 'lease = "x"', "lease = [1]", "lease = 1979-05-27", "lease = {a = 1}"])
def test_bad_value_in_pyproject_names_it(project: Path, line: str) -> None:
    write_pyproject(project, line)

    with pytest.raises(
        ConfigError, match=r"^setting 'lease' from pyproject.toml \[tool.deferlib\]: .* is not seconds from"
    ):
        load_settings({}, {})


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("concurrency", "8", 8), ("concurrency", 8, 8), ("lease", "0.5", 0.5), ("grace", 0, 0.0), ("port", "8000", 8000),
        ("port", "0.0.0.0:9100", "0.0.0.0:9100"), ("port", "[::1]:09100", "[::1]:9100"),
        ("app", "http://h/", "http://h"), ("app", "https://h:8443/base/", "https://h:8443/base"),
        ("app", "http://[::1]:8080", "http://[::1]:8080"), ("prefix", "/tasks", "/tasks"), ("prefix", "", ""),
        ("store", "sqlite:///:memory:", "sqlite:///:memory:"), ("queues", Path("q.yaml"), "q.yaml"),
        ("targets", "", {}), ("targets", "a=http://h, v2.b=http://i/ ,", {"a": "http://h", "v2.b": "http://i"}),
        ("targets", {"a": "http://h/"}, {"a": "http://h"}),
    ],
)  # fmt: skip
def test_good_values(name: str, value: object, parsed: object) -> None:
    assert load_settings({name: value}, {})[name] == parsed


def test_targets_may_be_a_toml_table(project: Path) -> None:
    write_pyproject(project, "lease = 5\n[tool.deferlib.targets]\nworker = 'http://w:1'\n'v2.worker' = 'http://v2:1'")

    assert load_settings({}, {})["targets"] == {"worker": "http://w:1", "v2.worker": "http://v2:1"}


@given(
    st.sampled_from(sorted(SETTINGS)),
    st.one_of(st.text(), st.integers(), st.floats(), st.dictionaries(st.text(), st.text())),
)
def test_any_value_gives_settings_or_a_config_error(name: str, value: object) -> None:
    try:
        found = load_settings({name: value}, {})
    except ConfigError:
        return

    assert found.all[name].source == "argument"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.deferlib]\nlaese = 5", "unknown setting 'laese'; known are store, key, queues"),
        ("[tool.deferlib]\n[tool.deferlib.x]", "unknown setting 'x'"),
        ("[tool]\ndeferlib = 5", r"\[tool.deferlib\] is a table"),
        ("tool = 5", r"\[tool.deferlib\] is a table"),
        ("[[tool]]\na = 1", r"\[tool.deferlib\] is a table"),
        ("tool = [", "is not TOML: "),
    ],
)
def test_mistake_in_pyproject_names_the_file(project: Path, text: str, message: str) -> None:
    (project / "pyproject.toml").write_text(text)

    with pytest.raises(ConfigError, match=f"^{project}/pyproject.toml: .*{message}"):
        load_settings({}, {})


def test_pyproject_that_is_no_utf_8_is_a_config_error(project: Path) -> None:
    (project / "pyproject.toml").write_bytes(b"\xff")

    with pytest.raises(ConfigError, match=f"^{project}/pyproject.toml: is not TOML: "):
        load_settings({}, {})


def test_pyproject_without_a_table_of_ours_is_fine(project: Path) -> None:
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n[tool.other]\na = 1")

    assert load_settings({}, {}).root == project


# --- the root ---------------------------------------------------------------------------------------------------------


def test_pyproject_of_another_user_sets_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in any folder above, /tmp say, where everybody can put one."""
    path = project.parent / "pyproject.toml"
    path.write_text("[tool.deferlib]\nstore = 'postgresql://evil.example/theirs'\n")
    give_away(path, monkeypatch)

    with pytest.raises(ConfigError) as caught:
        load_settings(environ={})

    text = str(caught.value)
    assert text.startswith(f"{path}: [tool.deferlib] is {owners.name(path.stat().st_uid)}'s, to whom the file belongs, ")
    assert f"`chown {owners.myself()} {path}`" in text


def test_pyproject_of_another_user_that_sets_nothing_of_ours_is_fine(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project / "pyproject.toml"
    path.write_text("[tool.other]\na = 1\n[tool.deferlib]\n")
    give_away(path, monkeypatch)

    assert load_settings(environ={})["lease"] == 30


def test_pyproject_of_root_is_taken(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pyproject(project, "lease = 7")
    me = os.geteuid()
    monkeypatch.setattr(owners, "_ROOT", me)
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)

    assert load_settings(environ={})["lease"] == 7


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file somebody else's: give it away, or else become somebody else."""
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        stranger = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: stranger)


@pytest.mark.parametrize("marker", ["queue.yaml", "pyproject.toml"])
def test_root_is_the_nearest_folder_with_a_marker(project: Path, monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    (project.parent / "pyproject.toml").write_text("")
    (project / marker).write_text("")
    inner = project / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)

    assert load_settings({}, {}).root == project


def test_root_is_the_working_directory_without_a_marker(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "queue.yaml").mkdir()  # a folder of that name is none
    inner = project / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)

    assert load_settings({}, {}).root == inner


def test_working_directory_that_is_gone_is_a_config_error(project: Path) -> None:
    project.rmdir()

    with pytest.raises(ConfigError, match=r"working directory can't be read: .*; change to one that exists"):
        load_settings({}, {})


@pytest.mark.parametrize(
    ("dsn", "path"),
    [
        ("sqlite:///x/tasks.db", "{root}/x/tasks.db"),
        ("sqlite:///../tasks.db", "{parent}/tasks.db"),
        ("sqlite:////var/lib/none/tasks.db", "/var/lib/none/tasks.db"),
        ("sqlite:///:memory:", None),
        ("postgresql://h/db", None),
    ],
)
def test_relative_sqlite_path_is_under_the_root(project: Path, dsn: str, path: str | None) -> None:
    expected = None if path is None else path.format(root=project, parent=project.parent)

    assert config.sqlite_path(dsn, project) == expected


def test_every_folder_of_the_project_finds_the_same_store_and_key(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "pyproject.toml").write_text("")
    (project / "inner").mkdir()
    first = Runtime(settings=load_settings({}, {}))
    monkeypatch.chdir(project / "inner")
    second = Runtime(settings=load_settings({}, {}))

    assert first.key_file() == second.key_file() == f"{project}/.deferlib/tasks.db.key"
    assert first.ring.ids() == second.ring.ids()
    first.store.run(lambda tx: tx.put_queues([QueueConfig(name="seen")], QueueSource.COMMAND))
    with second.store.read() as tx:
        assert {row.name for row in tx.queues()} == {"default", "seen"}
    first.close()
    second.close()


@pytest.mark.parametrize("dsn", ["sqlite:///", "postgresql://h/db", "mysql://h"])
def test_connect_refuses_with_the_remedy(dsn: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///PATH"):
        config.connect(dsn)


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://user:{PASSWORD}@host/db",
        f"postgresql://user:{PASSWORD}@rest@host/db",
        f"postgresql://user:with/{PASSWORD}@host/db",
        f"postgresql://user:with {PASSWORD}@host/db",
        f"postgresql://user:with:{PASSWORD}@host/db",
        f"postgresql://:{PASSWORD}@host/db",
        f"postgres://user:{PASSWORD}@host:5432/db?sslmode=require",
        f"postgresql://host/db?user=u&password={PASSWORD}",
        f"postgresql://host/db?sslpassword={PASSWORD}&x=1",
        f"postgresql://host/db?PASSWORD='{PASSWORD} {PASSWORD}'",
    ],
)
def test_passwords_are_masked(dsn: str) -> None:
    settings = load_settings({"store": dsn, "key": KEY}, {})
    shown = f"{settings} {settings.all} {settings.shown()} {Runtime(settings=settings)} {settings.all['store']}"

    assert PASSWORD not in shown
    assert KEY not in shown
    assert "***" in settings.all["store"].shown
    assert "host" in settings.all["store"].shown
    assert settings["store"] == dsn


def test_user_without_a_password_is_shown() -> None:
    assert mask("postgresql://user@host/db") == "postgresql://user@host/db"
    assert mask("http://token@host") == "http://***@host"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", f"mysql://user:{PASSWORD}@host/db"),
        ("store", f"user:{PASSWORD}@host/db"),
        ("app", f"user:{PASSWORD}@host"),
        ("app", f"http://user:{PASSWORD}@host"),
        ("app", f"http://{PASSWORD}@host"),
        ("targets", f"a=http://user:{PASSWORD}@host,b=http://u:{PASSWORD}@i"),
        ("targets", {"a": f"http://user:{PASSWORD}@host"}),
        ("key", [PASSWORD]),
        ("key", PASSWORD.encode()),
    ],
)
def test_secret_in_a_bad_value_is_masked_in_the_error(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({name: value}, {})

    assert PASSWORD not in str(caught.value)
    assert caught.value.__suppress_context__


def test_dsn_in_place_of_a_file_is_masked_in_the_error(project: Path) -> None:
    runtime = Runtime(settings=load_settings({"queues": f"postgresql://user:{PASSWORD}@db/x"}, {}))

    with pytest.raises(ConfigError, match="is not a file") as caught:
        runtime.queue_file()
    assert PASSWORD not in str(caught.value)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_key_is_made_once_beside_the_database(project: Path) -> None:
    runtime = Runtime(settings=load_settings({}, {}))

    ids = runtime.ring.ids()

    path = project / ".deferlib" / "tasks.db.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert Runtime(settings=load_settings({}, {})).ring.ids() == ids


def test_key_file_is_found_through_a_symbolic_link(project: Path) -> None:
    (project / "real").mkdir()
    (project / "link").symlink_to(project / "real")
    first = Runtime(settings=load_settings({"store": "sqlite:///real/t.db"}, {}))
    second = Runtime(settings=load_settings({"store": "sqlite:///link/t.db"}, {}))

    assert first.ring.ids() == second.ring.ids()


def test_key_that_tasks_were_signed_with_is_never_replaced_by_a_new_one(project: Path) -> None:
    deferlib.defer(print, "signed")
    path = project / ".deferlib" / "tasks.db.key"
    secret = path.read_text()
    path.unlink()

    for _ in range(2):
        runtime = config.Runtime(settings=config.load_settings())
        with pytest.raises(KeyringError, match=r"is gone, and tasks in the store were signed.*deferlib keys new > "):
            _ = runtime.ring
        assert not path.exists()
        runtime.close()

    path.write_text(secret)
    path.chmod(0o600)
    runtime = config.Runtime(settings=config.load_settings())
    assert runtime.ring.ids() == keys.parse(secret).ids()
    runtime.store.run(lambda tx: tx.purge(0, "default", 10))
    path.unlink()
    again = config.Runtime(settings=config.load_settings())
    assert again.ring.ids() != keys.parse(secret).ids(), "of an empty store nothing is lost"
    again.close()
    runtime.close()


def test_group_readable_key_file_is_refused(project: Path) -> None:
    runtime = Runtime(settings=load_settings({}, {}))
    path = project / ".deferlib" / "tasks.db.key"
    path.parent.mkdir()
    path.write_text(KEY)
    path.chmod(0o640)

    with pytest.raises(KeyringError, match=r"mode 0640\); run `chmod 600"):
        _ = runtime.ring


@pytest.mark.parametrize("key", ["short", f"{KEY},short", " , "])
def test_bad_key_setting_names_its_source_and_shows_nothing(key: str) -> None:
    runtime = Runtime(settings=load_settings({}, {"DEFERLIB_KEY": key}))

    with pytest.raises(KeyringError, match=r"^setting 'key' from DEFERLIB_KEY: ") as caught:
        _ = runtime.ring

    assert KEY not in str(caught.value)


def test_key_setting_wins_over_the_file_and_makes_none(project: Path) -> None:
    runtime = Runtime(settings=load_settings({}, {"DEFERLIB_KEY": KEY}))

    assert runtime.ring.ids() == keys.parse(KEY).ids()
    assert runtime.key_file() is None
    assert not (project / ".deferlib").exists()


def test_postgresql_needs_a_key_and_says_how() -> None:
    runtime = Runtime(settings=load_settings({"store": f"postgresql://u:{PASSWORD}@h/db"}, {}))

    with pytest.raises(KeyringError, match=r"needs DEFERLIB_KEY.*`deferlib keys new`") as caught:
        _ = runtime.ring

    assert PASSWORD not in str(caught.value)


def test_memory_has_a_key_of_its_own_process() -> None:
    one, two = (Runtime(settings=load_settings({"store": "sqlite:///:memory:"}, {})) for _ in range(2))

    assert one.ring.ids() == one.ring.ids() != two.ring.ids()


def test_given_store_on_a_file_uses_the_key_beside_it(project: Path) -> None:
    store = config.connect("sqlite:///x.db")

    runtime = deferlib.configure(store=store)

    assert runtime.key_file() == f"{project}/x.db.key"
    assert runtime.ring.ids() == Runtime(settings=load_settings({"store": "sqlite:///x.db"}, {})).ring.ids()


def test_two_processes_that_make_store_and_key_at_once_agree(project: Path) -> None:
    code = (
        "import sys; from deferlib import config; sys.stdin.read(1); r = config.runtime();"
        "r.store; print(r.ring.signing.id.hex())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)
    ]
    shown = {process.communicate(b"x", timeout=60)[0] for process in processes}

    assert len(shown) == 1
    assert {process.returncode for process in processes} == {0}
    assert sorted(path.name for path in (project / ".deferlib").glob("*.new-*")) == []


# --- queues -----------------------------------------------------------------------------------------------------------


def names(runtime: Runtime) -> list[str]:
    return [queue.name for queue in runtime.queues()]


def test_without_a_file_there_is_default_without_limits() -> None:
    assert Runtime(settings=load_settings({}, {})).queues() == [QueueConfig(name="default")]


def test_default_is_always_there_and_never_doubled(project: Path) -> None:
    runtime = Runtime(settings=load_settings({}, {}))
    (project / "queue.yaml").write_text("queue:\n- name: mail\n")
    assert names(runtime) == ["default", "mail"]

    (project / "queue.yaml").write_text("queue:\n- name: mail\n- name: default\n  rate: 1/s\n")
    assert names(runtime) == ["mail", "default"]


@pytest.mark.parametrize("absolute", [False, True])
def test_queue_file_is_relative_to_the_root(project: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    (project / "pyproject.toml").write_text("")
    (project / "conf").mkdir()
    (project / "conf" / "q.yaml").write_text("queue:\n- name: mail\n")
    monkeypatch.chdir(project / "conf")
    name = f"{project}/conf/q.yaml" if absolute else "conf/q.yaml"

    assert names(Runtime(settings=load_settings({"queues": name}, {}))) == ["default", "mail"]


def test_named_queue_file_that_is_missing_is_an_error_that_names_the_source(project: Path) -> None:
    runtime = Runtime(settings=load_settings({}, {"DEFERLIB_QUEUES": "none.yaml"}))

    with pytest.raises(ConfigError, match=f"^setting 'queues' from DEFERLIB_QUEUES: {project}/none.yaml is not a file"):
        runtime.queues()


def test_store_has_the_configured_queues_and_keeps_the_others(project: Path) -> None:
    (project / "queue.yaml").write_text("queue:\n- name: mail\n")
    Runtime(settings=load_settings({}, {})).store.close()
    (project / "queue.yaml").write_text("queue:\n- name: news\n- name: mail\n  rate: 1/s\n")
    runtime = Runtime(settings=load_settings({}, {}))

    with runtime.store.read() as tx:
        rows = {row.name: row for row in tx.queues()}

    assert set(rows) == {"default", "mail", "news"}
    assert rows["mail"].config.rate is None, "the library only adds what is missing; the engine applies the rest"
    runtime.close()


def test_mistake_in_queue_yaml_leaves_no_new_store_behind(project: Path) -> None:
    (project / "queue.yaml").write_text("queue: 5")

    with pytest.raises(InvalidQueueError):
        _ = Runtime(settings=load_settings({}, {})).store

    assert not (project / ".deferlib").exists()


# --- the process's runtime --------------------------------------------------------------------------------------------


def test_runtime_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = load_settings
    monkeypatch.setattr(config, "load_settings", lambda: made.append(1) or real())
    found: list[Runtime] = []
    threads = [threading.Thread(target=lambda: found.append(config.runtime())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({id(each) for each in found}) == 1
    assert len(made) == 1


def test_configure_takes_precedence_and_the_rest_comes_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_LEASE", "5")
    monkeypatch.setenv("DEFERLIB_GRACE", "5")

    runtime = deferlib.configure(store="sqlite:///:memory:", key=KEY, app="http://h:1", lease=7)

    assert config.runtime() is runtime
    assert (runtime.settings["lease"], runtime.settings["grace"], runtime.settings["app"]) == (7.0, 5.0, "http://h:1")
    assert runtime.ring.ids() == keys.parse(KEY).ids()


def test_configure_takes_queues_as_mappings_and_configs() -> None:
    runtime = deferlib.configure(
        store="sqlite:///:memory:", queues=[{"name": "mail", "rate": "5/s"}, QueueConfig(name="news")]
    )

    assert runtime.queues() == [QueueConfig(name="default"), QueueConfig(name="mail", rate=5.0), QueueConfig(name="news")]
    with runtime.store.read() as tx:
        assert {row.name for row in tx.queues()} == {"default", "mail", "news"}


@pytest.mark.parametrize("kind", [str, Path])
def test_configure_takes_queues_as_a_path(project: Path, kind: type) -> None:
    (project / "q.yaml").write_text("queue:\n- name: mail\n")

    assert names(deferlib.configure(queues=kind("q.yaml"))) == ["default", "mail"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"store": 5}, {"store": object()}, {"key": b"0123456789abcdef"}, {"queues": 5}, {"queues": {"name": "a"}},
        {"queues": [5]}, {"queues": [{"name": "a"}, {"name": "a"}]}, {"app": 5}, {"lease": "x"}, {"leese": 5},
        {"targets": [1]}, {"queues": [None]}, {"queues": b"q.yaml"},
    ],
)  # fmt: skip
def test_configure_with_a_wrong_type_is_an_error_of_ours_and_changes_nothing(arguments: dict[str, Any]) -> None:
    before = config.runtime()

    with pytest.raises((ConfigError, InvalidQueueError)):
        deferlib.configure(**arguments)

    assert config.runtime() is before


def test_configure_closes_what_the_former_runtime_opened_and_leaves_what_it_was_given() -> None:
    given_store = config.connect("sqlite:///:memory:")
    deferlib.configure(store=given_store, queues=[{"name": "kept"}])
    with config.runtime().store.read() as tx:
        assert len(tx.queues()) == 2

    again = deferlib.configure(store=given_store)

    with again.store.read() as tx:
        assert {row.name for row in tx.queues()} == {"default", "kept"}, "closing :memory: would have emptied it"


def test_closed_runtime_opens_again(project: Path) -> None:
    runtime = deferlib.configure()
    runtime.store.run(lambda tx: tx.put_queues([QueueConfig(name="seen")], QueueSource.COMMAND))
    runtime.close()

    with runtime.store.read() as tx:
        assert {row.name for row in tx.queues()} == {"default", "seen"}


def test_flags_are_preferred_to_what_configure_said(project: Path) -> None:
    runtime = deferlib.configure(store="sqlite:///app.db", queues=[{"name": "app"}], lease=5, grace=6)
    _ = runtime.store, runtime.ring

    runtime.prefer(load_settings({"store": "sqlite:///flag.db", "lease": 9}, {}), ["store", "lease"])

    assert (runtime.settings["lease"], runtime.settings["grace"]) == (9.0, 6.0)
    assert runtime.key_file() == f"{project}/flag.db.key"
    assert names(runtime) == ["default", "app"]
    with runtime.store.read() as tx:
        assert {row.name for row in tx.queues()} == {"default", "app"}
    assert (project / "flag.db").exists()


def test_child_of_a_fork_does_not_wait_for_a_lock_that_another_thread_held() -> None:
    code = """
import os
from deferlib import config
runtime = config.configure(store="sqlite:///:memory:")
with runtime._lock, config._runtime_lock:
    child = os.fork()
    if child == 0:
        free = runtime._lock.acquire(timeout=5) and config._runtime_lock.acquire(timeout=5)
        os._exit(0 if free else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_config_errors_are_errors_of_the_tree() -> None:
    assert issubclass(ConfigError, Error)


def test_broken_queue_yaml_keeps_nobody_from_adding_to_a_store_that_is_there(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "queue.yaml").write_text("queue:\n- name: mail\n")
    config.runtime().apply_queues()
    config.install(None)
    (project / "queue.yaml").write_text("queue:\n- name: mail\n  rate: 5\n")

    deferlib.defer(print, _queue="mail")

    assert "queue.yaml:3:9: queue 'mail': rate 5: a number and a unit" in caplog.text
    with config.runtime().store.read() as tx:
        assert tx.stats(0, ["mail"])[0].tasks == 1


def test_broken_queue_yaml_makes_no_store(project: Path) -> None:
    (project / "queue.yaml").write_text("queue:\n- name: mail\n  rate: 5\n")

    with pytest.raises(InvalidQueueError, match="3:9"):
        deferlib.defer(print)
    assert not (project / ".deferlib").exists()
