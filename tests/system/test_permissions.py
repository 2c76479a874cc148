"""Nobody else on the machine can read or write what the library makes, whatever the umask."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.processes import TIMEOUT, Site, free_port, wait_until
from tests.system.serving import SERVERS, Web

OPEN = [sys.executable, "-c", "import os, sys; os.umask(0); os.execvp(sys.argv[1], sys.argv[1:])"]
CLI = [sys.executable, "-m", "deferlib.cli"]
COMMANDS = (
    ["config"],
    ["tasks", "list"],
    ["tasks", "list", "--json"],
    ["queues", "list"],
    ["queues", "pause", "patient"],
    ["queues", "resume", "patient"],
    ["doctor"],
)


@pytest.fixture
def open_site(tmp_path: Path) -> Site:
    """A site whose store is in a folder that the library makes, and whose sockets are in the site's own."""
    site = Site(tmp_path)
    tmp_path.chmod(0o755)
    site.environ["DEFERLIB_STORE"] = f"sqlite:///{tmp_path}/made/below/tasks.db"
    site.environ["XDG_RUNTIME_DIR"] = str(tmp_path / "run")
    (tmp_path / "run").mkdir(mode=0o700)
    return site


@contextmanager
def opened(site: Site, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with site.process([*OPEN, *command]) as process:
        yield process


def run(site: Site, command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*OPEN, *command], cwd=site.folder, env={**site.environ, **environ}, capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip


def modes(folder: Path) -> dict[str, str]:
    """Return the mode of everything below *folder*, and of itself."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        try:
            status = path.lstat()
        except FileNotFoundError:  # SQLite's own come and go
            continue
        found[f"{stat.filemode(status.st_mode)[0]} {path.name}"] = f"{stat.S_IMODE(status.st_mode):04o}"
    return found


def too_open(site: Site) -> dict[str, str]:
    found = {**modes(site.folder / "made"), **modes(site.folder / "run")}
    return {name: mode for name, mode in found.items() if mode != ("0700" if name.startswith("d") else "0600")}


def test_everything_that_is_made_is_the_owners_alone(open_site: Site) -> None:
    web = Web(open_site, SERVERS["gunicorn-gthread"], free_port())
    seen: set[str] = set()

    with opened(open_site, web.server.command(int(web.url.rpartition(":")[2]))) as server:
        wait_until(lambda: server.poll() is not None or _answers(web), "the app serves")
        open_site.environ["DEFERLIB_APP"] = web.url
        with opened(open_site, [*CLI, "engine"]):
            wait_until(lambda: sum(open_site.finished().values()) >= 10, "calls ran")
            for command in COMMANDS:
                done = run(open_site, [*CLI, *command])
                assert "Traceback" not in done.stderr
                assert not too_open(open_site)
            seen |= set(modes(open_site.folder / "made")) | set(modes(open_site.folder / "run"))

    assert not too_open(open_site)
    assert {"d made", "d below", "- tasks.db", "- tasks.db-wal", "- tasks.db-shm", "- tasks.db.key"} <= seen
    assert any(name.startswith("s ") for name in seen), "there was a socket"
    assert any("engine" in name for name in seen), "there was a lock"


def _answers(web: Web) -> bool:
    import requests

    try:
        web.defer(0, 10)
    except requests.RequestException:
        return False
    return True


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o620, 0o601, 0o644, 0o444])
def test_key_file_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    site = Site(tmp_path)
    key = tmp_path / "tasks.db.key"
    key.write_text("canary-key-0123456789\n")
    key.chmod(mode)

    done = run(site, [sys.executable, "-c", "import deferlib, systemapp; deferlib.defer(systemapp.note, 1)"])

    assert done.returncode != 0
    assert f"chmod 600 {key}" in done.stderr
    assert "canary" not in done.stderr
    assert stat.S_IMODE(os.stat(key).st_mode) == mode


def test_new_key_file_is_never_open_for_a_moment(tmp_path: Path) -> None:
    """Also its draft, under another name, is the owner's alone from its first moment: no chmod comes after."""
    site = Site(tmp_path)
    code = (
        "import os, deferlib, systemapp\n"
        "made, opened = [], os.open\n"
        "def watched(path, flags, mode=0o777, **rest):\n"
        "    number = opened(path, flags, mode, **rest)\n"
        "    if flags & os.O_CREAT and 'key' in str(path):\n"
        "        made.append(oct(os.fstat(number).st_mode & 0o777))\n"
        "    return number\n"
        "os.open = watched\n"
        "deferlib.defer(systemapp.note, 1)\n"
        "print(*made)\n"
    )

    done = run(site, [sys.executable, "-c", code])

    assert set(done.stdout.split()) == {"0o600"}, done.stderr
