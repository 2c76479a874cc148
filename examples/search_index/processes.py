"""The demo's processes: started for real, killed for real, and none left over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0  # seconds for a process to end or a command to answer

Environ = Mapping[str, str]


class Processes:
    """Starts Python processes, each the leader of a group of its own; the `with` block's end kills those that still run.

    >>> with Processes(folder, environ) as processes:  # doctest: +SKIP
    ...     engine = processes.start("engine", "deferlib.cli", "engine")
    """

    def __init__(self, folder: Path, environ: Environ) -> None:
        self._folder = folder
        self._environ = environ
        self._running: dict[subprocess.Popen[bytes], str] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with _held_back():  # another Ctrl-C must not leave half of them
            for process in list(self._running):
                self.kill(process)

    def start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `python -m module` in the folder; what it prints goes to the file `name.log` there."""
        with (self._folder / f"{name}.log").open("ab") as log, _held_back():
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that a Ctrl-C reaches the demo alone, which ends them in order
            )
            self._running[process] = name
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL a process and whatever it started: it gets no chance to tidy up. Return once it is gone."""
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)
        self._running.pop(process, None)

    def ended(self) -> str:
        """Say which process has ended by itself, and its last words; '' if all still run."""
        for process, name in self._running.items():
            if process.poll() is not None:
                lines = (self._folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
                return f"the {name} ended with exit code {process.returncode}: {lines[-1] if lines else 'not a word'}"
        return ""


@contextmanager
def _held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block: of a process half started nobody would know."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process the way Ctrl-C does: through every `with` block."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored


def environment(folder: Path, app_url: str, lease: float, calls: int, folders: list[Path]) -> dict[str, str]:
    """Return the environment of the demo's processes: this one's, with a store and an index of their own in *folder*."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
    return {
        **ours,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
        "TMPDIR": str(folder),  # deferlib's sockets, by which processes wake each other, go with the folder
        "DEFERLIB_STORE": f"sqlite:///{folder}/tasks.db",
        "DEFERLIB_APP": app_url,
        "DEFERLIB_LEASE": str(lease),
        "DEFERLIB_CONCURRENCY": str(calls),
        "SEARCH_INDEX": str(folder / "index.db"),
        "SEARCH_PATTERN": "*.py",
        "SEARCH_FOLDERS": os.pathsep.join(map(str, folders)),
    }


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
