"""`deferlib engine` as a process: how it starts, what signals do, what it says when it can't start."""

from __future__ import annotations

import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import deferlib
from deferlib import config, taskqueue
from deferlib.cli import main
from deferlib.cli.engine import Signals
from deferlib.cli.load import Stopped, load_app
from deferlib.cli.logs import _Formatter
from deferlib.core.model import QueueConfig, QueueSource, TaskRow
from deferlib.errors import AppError

KEY = "canary-key-0123456789"
PASSWORD = "canary-password"
APP = """
import os, pathlib, time
import deferlib

HERE = pathlib.Path(__file__).parent

def note(name, seconds=0.0):
    (HERE / f"{name}.started").touch()
    time.sleep(seconds)
    (HERE / f"{name}.done").touch()

def fail(text):
    raise ValueError(text)

def app(environ, start_response):
    start_response("204 No Content", [])
    (HERE / "requests").open("a").write(environ["PATH_INFO"] + "\\n")
    return []
"""


class Site:
    """A project folder and the engines that run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        self.errors = folder / "stderr"

    @contextmanager
    def starting(self, *options: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """Start `deferlib engine`, and kill it at the end of the block if it still runs."""
        with self.errors.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "deferlib.cli", "engine", *options],
                cwd=self.folder, env={**self.environ, **environ}, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    @contextmanager
    def engine(self, *options: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """Start an engine and wait until it says that it works."""
        with self.starting(*options, **environ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("deferlib engine: "), self.said()
            process.line = line  # type: ignore[attr-defined]  # for the test of that line
            yield process

    def said(self) -> str:
        return self.errors.read_text()

    def exists(self, name: str) -> Callable[[], bool]:
        return lambda: (self.folder / name).exists()

    def find(self, name: str) -> list[TaskRow]:
        with config.runtime().store.read() as tx:
            return tx.find(None, [name])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in list(os.environ):
        if name.startswith("DEFERLIB_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "siteapp.py").write_text(APP)
    (tmp_path / "queue.yaml").write_text("queue:\n- name: default\n")
    former = config.install(None)
    yield Site(tmp_path)
    sys.modules.pop("siteapp", None)
    made = config.install(former)
    if made is not None:
        made.close()


Refused = Callable[..., str]


@pytest.fixture
def refused(site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Starts an engine that can't start, in this process, and returns the one line that it says."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
    handlers = {number: signal.getsignal(number) for number in numbers}
    level = logging.getLogger("deferlib").level

    def run(*options: str, **environ: str) -> str:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert main(["engine", *options]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("deferlib: error: ")
        assert err.count("\n") == 1, err
        return err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.getLogger("deferlib").setLevel(level)
    for name in ("outer", "inner"):
        sys.modules.pop(name, None)


def app() -> Any:
    import siteapp  # type: ignore[import-not-found]  # written by the fixture

    return siteapp


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM, within: float = 20.0) -> int:
    process.send_signal(number)
    return process.wait(timeout=within)


# --- working ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_delivers_what_was_deferred_before_and_since_and_ends_with_0(site: Site, number: int) -> None:
    deferlib.defer(app().note, "before")

    with site.engine("--app", "siteapp:app") as engine:
        wait_until(site.exists("before.done"), "the first call ran")
        deferlib.defer(app().note, "since")
        taskqueue.add(url="/hook")
        wait_until(site.exists("since.done"), "the second call ran")
        wait_until(site.exists("requests"), "the app was called")

        assert end(engine, number) == 0

    assert (site.folder / "requests").read_text() == "/hook\n"
    assert "Traceback" not in site.said()


def test_first_line_says_store_app_queues_and_pid(site: Site) -> None:
    (site.folder / "queue.yaml").write_text("queue:\n" + "".join(f"- name: q{n}\n" for n in range(12)))

    with site.engine("--app", "siteapp:app") as engine:
        line = engine.line  # type: ignore[attr-defined]  # set by Site.engine
        end(engine)

    assert line == (
        f"deferlib engine: store sqlite:///{site.folder}/.deferlib/tasks.db, app siteapp:app in this process, "
        f"queues default, q0, q1, q2, q3, q4, q5, q6, q7, q8 and 3 more, pid {engine.pid}\n"
    )


class Target(http.server.BaseHTTPRequestHandler):
    """Answers 200 to everything and remembers it."""

    seen: list[tuple[str, bool]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen.append((self.path, "X-Deferlib-Signature" in self.headers))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def target() -> Iterator[str]:
    Target.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Target) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("how", ["flag", "named"])
def test_without_an_app_it_pushes_over_http(site: Site, target: str, how: str) -> None:
    taskqueue.add("x", name="t", url="/hook", target="worker" if how == "named" else None)
    flags = ["--app-url", target] if how == "flag" else ["--target", f"worker={target}"]

    with site.engine(*flags) as engine:
        wait_until(lambda: bool(Target.seen), "the target was called")
        assert end(engine) == 0
        line = engine.line  # type: ignore[attr-defined]  # set by Site.engine

    assert Target.seen[0] == ("/hook", True)
    assert f"target {target}, queues" in line or "and worker, queues" in line


def test_flags_reach_the_engine(site: Site) -> None:
    for number in range(3):
        deferlib.defer(app().note, f"n{number}", 0.3)

    with site.engine(
        "--app", "siteapp:app", "--concurrency", "1", "--lease", "60", "--store", "sqlite:///.deferlib/tasks.db"
    ):
        wait_until(site.exists("n0.started"), "the first call started")

        assert not site.exists("n2.started")()


def test_app_that_configures_itself_is_followed_and_flags_come_first(site: Site) -> None:
    (site.folder / "own.py").write_text(
        "import deferlib\ndeferlib.configure(store='sqlite:///own.db', grace=3)\nfrom siteapp import app, note\n"
    )

    with site.engine("--app", "own:app") as engine:
        assert f"store sqlite:///{site.folder}/own.db," in engine.line  # type: ignore[attr-defined]  # set by Site.engine
        end(engine)
    assert "draining for up to 3 s" in site.said()
    with site.engine("--app", "own:app", "--store", "sqlite:///flag.db") as engine:
        assert f"store sqlite:///{site.folder}/flag.db," in engine.line  # type: ignore[attr-defined]  # set by Site.engine
        end(engine)
    assert (site.folder / "flag.db").exists()


def test_asgi_app_is_called_with_its_lifespan(site: Site) -> None:
    (site.folder / "asgiapp.py").write_text("""
import pathlib
HERE = pathlib.Path(__file__).parent
async def note():
    (HERE / "awaited").touch()
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        (HERE / "shut").touch()
        await send({"type": "lifespan.shutdown.complete"})
        return
    (HERE / "requests").write_text(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})
""")
    import asgiapp  # type: ignore[import-not-found]  # written above

    deferlib.defer(asgiapp.note)
    taskqueue.add(url="/hook")

    with site.engine("--app", "asgiapp:app") as engine:
        wait_until(site.exists("awaited"), "the coroutine function ran")
        wait_until(site.exists("requests"), "the app was called")
        assert end(engine) == 0
    sys.modules.pop("asgiapp")

    assert site.exists("shut")()


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_closed_output_stops_nothing(site: Site, closed: str) -> None:
    deferlib.defer(app().fail, "x", _name="failing")
    deferlib.defer(app().note, "ran", _countdown=0.3)
    redirect = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    command = f"exec {sys.executable} -m deferlib.cli engine --app siteapp:app {redirect}"

    process = subprocess.Popen(["bash", "-c", command], cwd=site.folder, env=site.environ, stdout=subprocess.DEVNULL)
    try:
        wait_until(site.exists("ran.done"), "the call ran")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_closed_standard_descriptors_are_not_given_to_files() -> None:
    """Else whatever prints an error would print it into a database."""
    code = (
        "import os, sys; from deferlib.cli import main; main(['config']); sys.exit(os.open(os.devnull, os.O_RDONLY) <= 2)"
    )
    command = ["bash", "-c", f'exec {sys.executable} -c "{code}" <&- >&- 2>&-']

    assert subprocess.run(command, timeout=60).returncode == 0


def test_broken_pipes_stop_nothing(site: Site) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "deferlib.cli", "engine", "--app", "siteapp:app", "--log-level", "debug"],
        cwd=site.folder, env=site.environ, stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    try:
        deferlib.defer(app().fail, "x")
        deferlib.defer(app().note, "ran", _countdown=0.3)
        wait_until(site.exists("ran.done"), "the call ran")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


# --- signals ----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_a_running_call_finish_and_starts_nothing_more(site: Site) -> None:
    deferlib.defer(app().note, "running", 0.7, _name="running")

    with site.engine("--app", "siteapp:app", "--concurrency", "1") as engine:
        wait_until(site.exists("running.started"), "the call started")
        engine.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining for up to 25 s; a second signal ends at once" in site.said(), "it drains")
        deferlib.defer(app().note, "late", _name="late")

        assert engine.wait(timeout=20) == 0

    assert site.exists("running.done")()
    assert not site.exists("late.started")()
    assert [row.state(config.runtime().clock.now()) for row in site.find("running")] == ["tombstone"]
    assert [row.attempts for row in site.find("late")] == [0]


def test_second_signal_ends_at_once_and_the_task_is_kept(site: Site) -> None:
    deferlib.defer(app().note, "long", 60, _name="long")

    with site.engine("--app", "siteapp:app", "--grace", "60") as engine:
        wait_until(site.exists("long.started"), "the call started")
        engine.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in site.said(), "it drains")
        started = time.monotonic()

        assert end(engine, signal.SIGINT) == 1
        assert time.monotonic() - started < 5

    (row,) = site.find("long")
    assert row.attempts == 1
    assert row.died is None
    assert not site.exists("long.done")()


def test_calls_that_outlast_the_grace_are_kept_and_code_1_says_so(site: Site) -> None:
    deferlib.defer(app().note, "long", 60, _name="long")

    with site.engine("--app", "siteapp:app", "--grace", "0.2") as engine:
        wait_until(site.exists("long.started"), "the call started")

        assert end(engine) == 1

    assert [row.attempts for row in site.find("long")] == [1]


def test_sigterm_ends_the_start_too(site: Site) -> None:
    (site.folder / "slow.py").write_text("open('importing', 'w'); import time; time.sleep(60)")

    with site.starting("--app", "slow:app") as engine:
        wait_until(site.exists("importing"), "the app is being imported")

        assert end(engine, within=10) == 0

    assert site.said() == ""


def test_signal_that_the_app_swallows_while_it_is_imported_counts(site: Site) -> None:
    (site.folder / "greedy.py").write_text(
        "import time\nopen('importing', 'w')\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
        "from siteapp import app\n"
    )

    with site.starting("--app", "greedy:app") as engine:
        wait_until(site.exists("importing"), "the app is being imported")

        assert end(engine, within=20) == 0


def test_second_signal_ends_a_start_that_swallows_the_first(site: Site) -> None:
    (site.folder / "greedy.py").write_text(
        "import time\ntry:\n    open('importing', 'w')\n    time.sleep(60)\nexcept BaseException:\n"
        "    open('swallowed', 'w')\n    time.sleep(60)\n"
    )

    with site.starting("--app", "greedy:app") as engine:
        wait_until(site.exists("importing"), "the app is being imported")
        engine.send_signal(signal.SIGTERM)
        wait_until(site.exists("swallowed"), "the app has swallowed the signal")

        assert end(engine, within=10) == 128 + signal.SIGTERM


def test_handlers_of_the_app_do_not_replace_ours(site: Site) -> None:
    (site.folder / "own.py").write_text(
        "import signal\nfor s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
        "from siteapp import app\n"
    )

    with site.engine("--app", "own:app") as engine:
        assert end(engine) == 0


class FakeEngine:
    """Records what it is told; while it is told, *during* happens."""

    idle = True

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.graces: list[int] = []
        self._during = during

    def stop(self, grace: int) -> None:
        self.graces.append(grace)
        during, self._during = self._during, lambda: None
        during()


def test_signal_inside_the_handling_of_another_waits_for_it() -> None:
    """`Engine.stop` takes a lock: entered again on the same thread, it would wait for itself."""
    signals = Signals()
    depth: list[int] = []
    engine = FakeEngine(lambda: (signals._stop(signal.SIGINT, None), depth.append(len(engine.graces)))[0])
    signals.serve(engine, 25, None)  # type: ignore[arg-type]  # as much of an engine as is needed

    signals._stop(signal.SIGTERM, None)

    assert depth == [1], "the inner signal returned before the engine was told of it"
    assert engine.graces == [25, 0]


def test_signal_before_the_engine_is_there_is_told_to_it_later() -> None:
    signals = Signals()
    with pytest.raises(Stopped):
        signals._stop(signal.SIGTERM, None)
    engine = FakeEngine()

    signals.serve(engine, 25, None)  # type: ignore[arg-type]  # as much of an engine as is needed

    assert engine.graces == [25]


def test_interrupted_command_is_no_traceback(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    from deferlib.cli import settings

    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(settings, "show_config", interrupt)

    assert main(["config"]) == 128 + signal.SIGINT


# --- queue.yaml while it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hup", [False, True])
def test_changed_queue_yaml_is_applied_and_a_broken_one_is_not(site: Site, hup: bool) -> None:
    path = site.folder / "queue.yaml"

    def rates() -> dict[str, float | None]:
        with config.runtime().store.read() as tx:
            return {row.name: row.config.rate for row in tx.queues()}

    with site.engine("--app", "siteapp:app") as engine:
        path.write_text("queue: [\n")
        wait_until(lambda: "the queues stay as they are" in site.said(), "the mistake is logged")
        path.write_text("queue:\n- name: default\n  rate: 5/s\n- name: fresh\n")
        if hup:
            engine.send_signal(signal.SIGHUP)
        wait_until(lambda: rates() == {"default": 5.0, "fresh": None}, "the file is applied")

        assert end(engine) == 0


# --- what keeps it from starting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--app", "nowhere:app"], "there is no module 'nowhere' in "),
        (["--app", "siteapp:nothing"], "siteapp has no 'nothing'"),
        (["--app", "siteapp:HERE"], "siteapp:HERE: is a PosixPath, not a WSGI or ASGI app"),
        (["--grace", "x"], "setting 'grace' from --grace: 'x' is not seconds from 0 to 86400"),
        (["--queues", "no.yaml"], "no.yaml is not a file"),
        (["--store", "sqlite:///siteapp.py/tasks.db"], "siteapp.py/tasks.db"),
        (["--store", "sqlite:///siteapp.py"], "siteapp.py"),
        (["--store", "postgresql://h/db"], "isn't available in this version"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(refused: Refused, options: list[str], message: str) -> None:
    assert message in refused(*options)


def test_start_that_fails_ends_the_process_with_2_and_one_line(site: Site) -> None:
    with site.starting("--app", "nowhere:app") as engine:
        assert engine.wait(timeout=20) == 2

    assert site.said().startswith("deferlib: error: there is no module 'nowhere' in ")
    assert site.said().count("\n") == 1


def test_broken_queue_yaml_keeps_it_from_starting_and_makes_no_store(site: Site, refused: Refused) -> None:
    (site.folder / "queue.yaml").write_text("queue:\n- name: a\n  rate: 5\n")

    assert "queue 'a': rate 5: a number and a unit are needed" in refused("--app", "siteapp:app")
    assert not site.exists(".deferlib")()


def test_readable_key_file_keeps_it_from_starting(site: Site, refused: Refused) -> None:
    deferlib.defer(app().note, "x")
    (site.folder / ".deferlib" / "tasks.db.key").chmod(0o644)

    for options in ([], ["--app", "siteapp:app"]):
        assert "run `chmod 600 " in refused(*options)


def test_error_in_the_app_shows_type_message_and_place(site: Site, refused: Refused) -> None:
    (site.folder / "inner.py").write_text("def go():\n    import json\n    json.loads('{')\n")
    (site.folder / "outer.py").write_text("import inner\n\ninner.go()\n")

    line = refused("--app", "outer:app")

    assert "outer can't be imported: JSONDecodeError: Expecting property name" in line
    assert f"({site.folder}/inner.py:3)" in line


def test_failpoint_is_installed_only_if_asked_for(site: Site, refused: Refused) -> None:
    deferlib.defer(app().note, "x")

    assert "STEP:N:ACTION is needed" in refused("--app", "siteapp:app", DEFERLIB_FAILPOINT="nonsense")
    with site.starting("--app", "siteapp:app", DEFERLIB_FAILPOINT="commit:1:kill") as engine:
        assert engine.wait(timeout=20) == -signal.SIGKILL


# --- loading the app --------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the module `loaded`, found from the working directory only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "loaded", raising=False)

    def write(text: str) -> Path:
        path = tmp_path / "loaded.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("loaded:app", "app"), ("loaded:space.inner", "inner"), ("loaded:make()", "made"), ("loaded:space.make()", "made")],
)
def test_app_is_found(module: Callable[[str], Path], spec: str, expected: str) -> None:
    module(
        "class App:\n    def __init__(self, name): self.name = name\n    def __call__(self, e, s): return []\n"
        "app = App('app')\ndef make(): return App('made')\nclass space:\n    inner = App('inner')\n"
        "    make = staticmethod(lambda: App('made'))\n"
    )

    assert load_app(spec).name == expected
    sys.modules.pop("loaded")


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("loaded", "", r"'loaded' is not MODULE:APP, like loaded:app"),
        ("loaded.py", "", r"is not MODULE:APP, like (loaded|main):app"),
        ("./src/loaded.py", "", r"is not MODULE:APP, like src.loaded:app"),
        ("loaded:", "", r"is not MODULE:APP, like (loaded|main):app"),
        (":app", "", r"is not MODULE:APP, like (loaded|main):app"),
        ("loaded:a b", "", r"is not MODULE:APP, like (loaded|main):app"),
        ("loaded:make(1)", "", r"is not MODULE:APP, like (loaded|main):app"),
        ("nowhere.inner:app", "", r"there is no module 'nowhere' in /"),
        ("loaded.inner:app", "", r"there is no module 'loaded.inner'|loaded.inner can't be imported"),
        ("loaded:ap", "app = print", r"loaded:ap: loaded has no 'ap'; did you mean 'app'\?"),
        ("loaded:app", "app = 5", r"is an int, not a WSGI or ASGI app"),
        ("loaded:app", "app = None", r"is a NoneType, not a WSGI or ASGI app"),
        ("loaded:make()", "def make(): return 5", r"returned an int, not a WSGI or ASGI app"),
        ("loaded:make()", "def make(): 1/0", r"make\(\) failed: ZeroDivisionError: division by zero \(.*/loaded.py:1\)"),
        ("loaded:app", "import nowhere", r"loaded can't be imported: ModuleNotFoundError: .*'nowhere' \(.*/loaded.py:1\)"),
        ("loaded:app", "\n\nx = = 1", r"loaded can't be imported: SyntaxError: .*\(.*/loaded.py:3\)"),
        ("loaded:app", "x = '\0'", r"loaded can't be imported: (SyntaxError|ValueError): "),
        ("loaded:app", "import sys\nsys.exit('bye')", r"loaded can't be imported: SystemExit: bye \(.*/loaded.py:2\)"),
        ("loaded:app", "from json import nothing", r"ImportError: cannot import name 'nothing' .*\(.*/loaded.py:1\)"),
        (
            "loaded:app",
            "class E(BaseException): pass\nclass F(E, Exception): pass\nraise F('x')",
            r"F: x \(.*/loaded.py:3\)",
        ),
    ],
)
def test_app_that_is_not_found_is_an_app_error(module: Callable[[str], Path], spec: str, text: str, message: str) -> None:
    module(text)

    with pytest.raises(AppError, match=message):
        load_app(spec)


# --- what it logs -----------------------------------------------------------------------------------------------------


def test_no_secret_is_logged_even_at_debug(site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFERLIB_KEY", KEY)
    secrets = ["canary"]
    deferlib.defer(app().fail, "boom", _name="failing", _headers={"Authorization": "canary-header"})
    deferlib.defer(app().note, "canary-file")
    taskqueue.add("canary-body", url="/hook", headers={"Cookie": "canary-cookie"})
    ring = config.runtime().ring.signing
    secrets += [ring.payload.hex(), ring.dispatch.hex()]

    with site.engine("--app", "siteapp:app", "--log-level", "debug", DEFERLIB_KEY=KEY) as engine:
        wait_until(site.exists("requests"), "the app was called")
        wait_until(lambda: "ValueError: boom" in site.said(), "the failure is logged")
        wait_until(site.exists("canary-file.done"), "the call ran")
        line = engine.line  # type: ignore[attr-defined]  # set by Site.engine
        end(engine)
    said = site.said() + line
    said += refused("--store", f"postgresql://u:{PASSWORD}@h/db", "--log-level", "debug", DEFERLIB_KEY=KEY)
    said += refused("--app-url", f"http://u:{PASSWORD}@h", "--log-level", "debug", DEFERLIB_KEY=KEY)
    said += refused("--app", "siteapp:app", DEFERLIB_KEY="canary")

    assert not [secret for secret in secrets if secret in said]


def test_no_secret_is_logged_over_http(site: Site, target: str) -> None:
    deferlib.defer(app().note, "canary-argument", _headers={"Authorization": "canary-header"})
    taskqueue.add("canary-body", url="/hook", target="gone")
    ring = config.runtime().ring.signing

    with site.engine("--app-url", target, "--target", "gone=http://127.0.0.1:9", "--log-level", "debug") as engine:
        wait_until(lambda: bool(Target.seen), "the target was called")
        end(engine)

    assert not [s for s in ("canary", ring.payload.hex(), ring.dispatch.hex()) if s in site.said()]


def test_log_line_of_a_hostile_text_is_one_line() -> None:
    record = logging.LogRecord("deferlib.engine", logging.ERROR, __file__, 1, "x %s", ("\x1b[31m\nforged\r",), None)

    assert _Formatter("%(message)s").format(record) == r"x \x1b[31m\nforged\r"


def test_log_of_the_app_is_shown_unless_it_has_set_up_its_own(site: Site) -> None:
    text = "import logging\n{}\nfrom siteapp import app\ndef go(): logging.getLogger('own').info('hello from own')\n"
    (site.folder / "plain.py").write_text(text.format(""))
    (site.folder / "setup.py").write_text(text.format("logging.basicConfig(format='OWN %(message)s', level='INFO')"))
    import plain  # type: ignore[import-not-found]  # written above

    deferlib.defer(plain.go)
    with site.engine("--app", "plain:app") as engine:
        wait_until(lambda: "INFO own: hello from own" in site.said(), "the app's log is shown")
        end(engine)
    deferlib.defer(plain.go)
    with site.engine("--app", "setup:app") as engine:
        wait_until(lambda: "OWN hello from own" in site.said(), "the app's log is shown its way")
        end(engine)
    sys.modules.pop("plain")

    assert site.said().count("hello from own") == 1


def test_what_a_command_paused_stays_paused_for_the_engine(site: Site) -> None:
    runtime = config.runtime()
    runtime.store.run(lambda tx: tx.put_queues([QueueConfig(name="default")], QueueSource.LIBRARY))
    runtime.store.run(lambda tx: tx.pause(["default"], True))
    deferlib.defer(app().note, "held")

    with site.engine("--app", "siteapp:app") as engine:
        done = subprocess.run(
            [sys.executable, "-m", "deferlib.cli", "tasks", "list", "--json"],
            cwd=site.folder, env=site.environ, capture_output=True, timeout=60,
        )  # fmt: skip
        assert [task["queue_paused"] for task in json.loads(done.stdout)["tasks"]] == [True]
        assert not site.exists("held.started")()
        resume = [sys.executable, "-m", "deferlib.cli", "queues", "resume", "default"]
        subprocess.run(resume, cwd=site.folder, env=site.environ, check=True, capture_output=True, timeout=60)
        wait_until(site.exists("held.done"), "the call ran")
        assert end(engine) == 0
