"""Children: Python programs in processes of their own, for what one process can't show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

_PROLOGUE = """
import os, signal, sys, threading, time
import apsw
from deferlib import errors
from deferlib.core.model import *
from deferlib.store.sqlite import SqliteStore
from tests.store.stores import *
def say(*words):
    print(*words, flush=True)
def hear():
    return sys.stdin.readline().strip()
"""


def _command(code: str, args: Sequence[object], under: Sequence[str]) -> list[str]:
    return [*under, sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PROLOGUE + code, *map(str, args)]


def run(code: str, *args: object, under: Sequence[str] = ()) -> list[str]:
    """Run *code* to its end, which must be a good one; return the lines it said."""
    done = subprocess.run(_command(code, args, under), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


class Child:
    """A running program to talk to, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def tell(self, line: object = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def end(self) -> int:
        """Let it see the end of what it hears, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(20)


@contextmanager
def child(code: str, *args: object) -> Iterator[Child]:
    """Start *code*, and end it with the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(_command(code, args, ()), cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


def need(works: bool, what: str) -> None:
    """Skip the test where the machine lacks *what*, unless skipping is forbidden (`.ci/run`)."""
    if not works:
        if os.environ.get("DEFERLIB_TESTS_NO_SKIP"):
            pytest.fail(f"needs {what}")
        pytest.skip(f"needs {what}")


def mounts() -> list[str]:
    """Return what to run a command under so that it may mount; skip where that isn't possible."""
    under = ["unshare", "--user", "--map-root-user", "--mount"]
    need(_succeeds([*under, "mount", "-t", "tmpfs", "none", "/mnt"]), "mounts in a user namespace (unshare -Urm)")
    return under


def strace(*options: str) -> list[str]:
    """Return what to run a command under so that its system calls fail or are counted."""
    need(_succeeds(["strace", "-o", "/dev/null", "true"]), "strace, with ptrace allowed")
    return ["strace", "-f", *options]


def _succeeds(command: Sequence[str]) -> bool:
    return (
        shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
