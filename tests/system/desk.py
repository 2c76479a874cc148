"""A folder where somebody works with `deferlib dev`: real processes, and files that are saved while they run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from tests.system.processes import free_port, kill, wait_until


class Desk:
    """A folder with *app* in its *module*, where somebody works with `deferlib dev`."""

    def __init__(self, folder: Path, app: str, module: str = "deskapp") -> None:
        self.folder = folder
        self.name = f"{module}:app"
        self.module = folder / f"{module}.py"
        self.module.write_text(app)
        self.port = free_port()
        self._out = folder / "out"
        self._saves = 0

    @contextmanager
    def dev(self, *options: str, app: str = "", **environ: str) -> Iterator[subprocess.Popen[bytes]]:
        """`deferlib dev`, killed at the end of the block if it still runs."""
        command = [sys.executable, "-m", "deferlib.cli", "dev", app or self.name, "--port", str(self.port), *options]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        with self._out.open("ab") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env={**clean, **environ}, stdout=out, stderr=out, start_new_session=True
            )
            try:
                yield process
            finally:
                kill(process)

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def sees(self, pattern: str, count: int = 1) -> None:
        """Wait until *pattern* has been printed *count* times."""
        try:
            wait_until(lambda: len(re.findall(pattern, self.out)) >= count, pattern, timeout=30)
        except AssertionError:
            raise AssertionError(f"{pattern!r} was not printed {count} times:\n{self.out}") from None

    def get(self, path: str) -> str:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=30).text

    def save(self, old: str, new: str) -> None:
        """Save the module with *old* replaced."""
        text = self.module.read_text()
        assert old in text, f"nothing to replace: {old!r}"
        self.write(text.replace(old, new))

    def write(self, text: str) -> None:
        """Save the module as *text*, at a time of its own."""
        self.module.write_text(text)
        self._saves += 1
        stamp = time.time() + self._saves
        os.utime(self.module, (stamp, stamp))


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
