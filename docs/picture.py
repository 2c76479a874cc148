"""Draw docs/terminal.svg: a real session of `deferlib dev` with the README's app, in a terminal of its own.

    python docs/picture.py

The tracebacks of the failing call are left out, as they would fill the picture.
"""

from __future__ import annotations

import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from fcntl import ioctl
from pathlib import Path

import requests
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS = 100
PORT = 8080
_PLACE = re.compile(r"  (app|store|key|queues) ")
_TRACE = re.compile(r"^(Traceback|  |\S+Error: |\d{4}-\d\d-\d\d )")


class Session:
    """A terminal with `deferlib dev` in it."""

    def __init__(self, folder: Path) -> None:
        self.text = ""
        self._screen, terminal = pty.openpty()
        ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deferlib.cli", "dev", "app:app"],
            cwd=folder,
            env={**clean, "TERM": "xterm-256color"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._screen, 4096):
                self.text += data.decode()
        except OSError:  # the other end is closed
            return

    def sees(self, pattern: str, count: int = 1) -> None:
        """Wait until *pattern* has been printed *count* times."""
        until = time.monotonic() + 30
        while len(re.findall(pattern, self.text)) < count:
            if time.monotonic() > until:
                raise SystemExit(f"{pattern!r} never came:\n{self.text}")
            time.sleep(0.02)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)


def played(folder: Path) -> str:
    """Play the README's story in *folder*; return what the terminal showed."""
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n(# app\.py\n.*?)```", readme, re.DOTALL)
    assert match is not None
    app = folder / "app.py"
    app.write_text(match[1])
    session = Session(folder)
    try:
        session.sees("queues")
        requests.get(f"http://127.0.0.1:{PORT}/greet/Ada", timeout=10)
        session.sees("ran in")
        app.write_text(match[1].replace('print(f"Hello, {name}!")', 'raise ValueError("lost my voice")'))
        session.sees("reloaded in")
        requests.get(f"http://127.0.0.1:{PORT}/greet/Grace", timeout=10)
        session.sees("failed:", 4)
        app.write_text(match[1])
        session.sees("ran in", 2)
    finally:
        session.close()
    return session.text


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shown = played(Path(folder)).replace(os.path.realpath(folder), "/home/ada/hello")
    lines = [line for line in shown.replace("\r", "").split("\n") if _PLACE.match(line) or not _TRACE.match(line)]
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ deferlib dev app:app", style="bold"))
    for line in lines:
        console.print(Text.from_ansi(line.rstrip()))
    picture = console.export_svg(title="deferlib dev", theme=MONOKAI, unique_id="terminal")
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)  # nothing is fetched from anywhere
    (HERE / "terminal.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
