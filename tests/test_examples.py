"""Every example runs as its page says: served by a real server, with a real engine that pushes to it."""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from deferlib import cli, config, keys
from deferlib.errors import KeyringError
from deferlib.settings import load_settings
from tests.system.processes import TIMEOUT, free_port, kill, listens, wait_until

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PRODUCTION = EXAMPLES / "production"
HOW_TO = ROOT / "docs" / "how-to"
PAGES = {
    "flask_app": HOW_TO / "flask.md",
    "wsgi_app": HOW_TO / "wsgi.md",
    "django_app": HOW_TO / "django.md",
    "fastapi_app": HOW_TO / "fastapi.md",
}
PRODUCTION_PAGE = HOW_TO / "production.md"
SERVERS = {
    "flask_app": "waitress --listen=127.0.0.1:{port} {module}:app",
    "wsgi_app": "waitress --listen=127.0.0.1:{port} {module}:app",
    "django_app": "gunicorn --bind=127.0.0.1:{port} {module}:application",
    "fastapi_app": "uvicorn --port={port} {module}:app",
}
_BIN = "/srv/shop/.venv/bin/"


# --- the frameworks -------------------------------------------------------------------------------------------------


@contextmanager
def module(command: str, folder: Path, log: Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m COMMAND` in *folder* while the block lasts."""
    arguments = [sys.executable, "-m", *command.split()]
    with log.open("wb") as file:
        process = subprocess.Popen(
            arguments, cwd=folder, env={**os.environ, **environ}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        kill(process)


def test_every_example_is_run_and_shown() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"}
    listed = (EXAMPLES / "README.md").read_text()

    assert examples == set(SERVERS) == set(PAGES)
    for example, page in PAGES.items():
        assert f"```{{literalinclude}} ../../examples/{example}.py" in page.read_text()
        assert f"({example}.py)" in listed


@pytest.mark.parametrize("place", ["at the root", "in its folder"])
@pytest.mark.parametrize("example", SERVERS)
def test_example_runs_its_deferred_call(example: str, place: str, tmp_path: Path) -> None:
    folder, name = (ROOT, f"examples.{example}") if place == "at the root" else (EXAMPLES, example)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path / "server.log"
    environ = {
        "DEFERLIB_STORE": f"sqlite:///{tmp_path}/tasks.db",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "XDG_RUNTIME_DIR": str(tmp_path),
    }

    with (
        module(SERVERS[example].format(port=port, module=name), folder, log, **environ) as server,
        module(f"deferlib.cli engine --app-url {url}", folder, tmp_path / "engine.log", **environ),
    ):
        wait_until(lambda: listens(port) or server.poll() is not None, "the server listens")
        answer = requests.get(f"{url}/greet/Ada", timeout=TIMEOUT)
        wait_until(lambda: "Hello, Ada!" in log.read_text(), "the server ran the deferred call", 30)

    assert answer.status_code == 202, log.read_text()
    assert "Later." in answer.text


def test_tests_on_the_pages_pass(tmp_path: Path) -> None:
    for page in PAGES.values():
        _, _, section = page.read_text().partition("\n## Test it\n")
        [code] = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        (tmp_path / f"test_{page.stem}.py").write_text(code)

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip

    assert f"{len(PAGES)} passed" in ran.stdout, ran.stdout + ran.stderr


# --- production -----------------------------------------------------------------------------------------------------


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case
    parser.read(PRODUCTION / name)
    return parser


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((PRODUCTION / "compose.yaml").read_text())
    return document


def image_command() -> list[str]:
    [line] = re.findall(r"^CMD (.+)$", (PRODUCTION / "Containerfile").read_text(), re.MULTILINE)
    command: list[str] = json.loads(line)
    return command


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every command that the examples and their pages tell to run, with the place where it stands."""
    for name in ("app.service", "deferlib-engine.service"):
        yield name, shlex.split(unit(name)["Service"]["ExecStart"].removeprefix(_BIN))
    yield "Containerfile", image_command()
    for name, service in compose()["services"].items():
        yield f"compose.yaml: {name}", service.get("command") or image_command()
    for page in (*PAGES.values(), PRODUCTION_PAGE):
        for block in re.findall(r"^```shell\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield from ((page.name, shlex.split(line, comments=True)) for line in block.splitlines())
    for line in re.findall(r"`(deferlib .+?)`", (EXAMPLES / "README.md").read_text()):
        if len(line.split()) > 2:
            yield "README.md", shlex.split(line)


def parse(command: Sequence[str]) -> argparse.Namespace | None:
    """Parse a command with the parser of its program; None if it is a program that we have no parser of."""
    program, *arguments = command
    if program == "deferlib":
        return cli._parser().parse_args(arguments)
    if program == "gunicorn":
        from gunicorn.config import Config  # type: ignore[import-untyped]

        parsed: argparse.Namespace = Config().parser().parse_args(arguments)
        return parsed
    return None


def test_every_command_is_one_that_its_program_takes() -> None:
    parsed = []
    for place, command in commands():
        try:
            arguments = parse(command)
        except SystemExit:
            pytest.fail(f"{place}: {shlex.join(command)}")
        if arguments is not None:
            parsed.append((place, command[0]))

    assert {program for _, program in parsed} == {"deferlib", "gunicorn"}
    for page in PAGES.values():
        assert (page.name, "deferlib") in parsed


def test_units_leave_more_time_than_a_graceful_stop_takes() -> None:
    app, engine = unit("app.service")["Service"], unit("deferlib-engine.service")["Service"]

    for service in (app, engine):
        assert (service["Restart"], service["KillSignal"], service["StateDirectory"]) == ("always", "SIGTERM", "shop")
    grace = parse(shlex.split(engine["ExecStart"].removeprefix(_BIN)))
    assert grace is not None
    assert float(engine["TimeoutStopSec"]) > float(grace.setting_grace)
    graceful = parse(shlex.split(app["ExecStart"].removeprefix(_BIN)))
    assert graceful is not None
    assert float(app["TimeoutStopSec"]) > float(graceful.graceful_timeout or 30)


def test_app_and_engine_have_the_same_settings_and_user_and_see_one_store() -> None:
    app, engine = unit("app.service"), unit("deferlib-engine.service")
    for name in ("User", "EnvironmentFile", "StateDirectory", "PrivateTmp", "WorkingDirectory"):
        assert app["Service"][name] == engine["Service"][name], name
    assert engine["Unit"]["JoinsNamespaceOf"] == "app.service"

    services = compose()["services"]
    for name in ("image", "build", "environment", "volumes"):
        assert services["app"][name] == services["engine"][name], name
    assert services["engine"]["volumes"] == ["tasks:/data"]
    containerfile = (PRODUCTION / "Containerfile").read_text()
    [store] = re.findall(r"DEFERLIB_STORE=(\S+)", containerfile)
    assert config.sqlite_path(store, ROOT) == "/data/tasks.db"
    assert "VOLUME /data" in containerfile


def test_containers_get_more_time_to_stop_than_the_engine_takes() -> None:
    engine = compose()["services"]["engine"]
    arguments = parse(engine["command"])

    assert arguments is not None
    assert float(engine["stop_grace_period"].removesuffix("s")) > float(arguments.setting_grace)


def test_environment_file_names_a_store_and_no_key_that_could_stay() -> None:
    lines = [line for line in (PRODUCTION / "deferlib.env").read_text().splitlines() if not line.startswith("#")]
    environ = dict(line.split("=", 1) for line in lines)

    settings = load_settings(environ=environ)

    assert config.sqlite_path(settings["store"], ROOT) == "/var/lib/shop/tasks.db"
    with pytest.raises(KeyringError):
        keys.parse(settings["key"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    names = ["app.service", "deferlib-engine.service"]
    scripts = sysconfig.get_path("scripts")
    for name in names:
        text = (PRODUCTION / name).read_text()
        (tmp_path / name).write_text(text.replace(_BIN, f"{scripts}/"))  # systemd wants the programs to be there

    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip

    assert (checked.returncode, checked.stderr) == (0, "")


def test_production_page_shows_every_file_of_its_folder() -> None:
    page = PRODUCTION_PAGE.read_text()

    for path in PRODUCTION.iterdir():
        assert f"../../examples/production/{path.name}\n" in page, path
