"""Index a thousand files and more, kill the engine on the way, and count what was lost: `make demo`.

An app (waitress) and an engine (`deferlib engine`) run as real processes in a temporary folder. The demo defers a call for
each file by POST to the app, kills the engine with SIGKILL while calls are in flight, starts another one, and checks at
the end that every file is in the index exactly once.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests

from examples.search_index import index, screen
from examples.search_index.app import RETRIES
from examples.search_index.facts import CommandLine, Facts, gather
from examples.search_index.processes import Processes, end_on_signals, environment, free_port

FILES = 3_000
LEASE = 3.0  # seconds: deferlib's default is 30, and nobody wants to watch that
CALLS = 8  # that the engine has the app run at once
KILL_AT = 0.35  # of the files
FEWEST = 50  # files: an engine would be done with less before anybody could kill it
STALLED = 60.0  # seconds without progress
BROKEN = b"# This file is not UTF-8: \xff\xfe.\n"

HELP = """\
What you see: an app and an engine, two processes; one deferred call a file; the
engine killed in the middle, with SIGKILL; another engine that finishes
everything. No file is lost. Some calls run twice, those that the killed engine
had taken: deferlib runs a call at least once, so the app stores a file by its
path, and twice is the same as once. One file isn't UTF-8: its call fails, is
tried again, and ends as a dead letter that says why.

examples:
  python -m examples.search_index.demo --keep
  python -m examples.search_index.demo --folder ~/src --query "def main"

Exit code: 0 if all of that held, 1 if anything didn't, 130 after Ctrl-C.
"""


class DemoError(Exception):
    """The demo can't go on; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo in a temporary folder; return the exit code."""
    arguments = _parser().parse_args(argv)
    index.require_fts5()
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what is in files may be more than a terminal can show
    folder = Path(tempfile.mkdtemp(prefix="deferlib-demo-")).resolve()
    keep = arguments.keep
    try:
        wrong = run(folder, arguments)
        for text in wrong:
            print(f"demo failed: {text}")
        keep = keep or bool(wrong)
        return 1 if wrong else 0
    except KeyboardInterrupt:
        print("\ninterrupted; every process that the demo started is gone")
        return 130
    except BrokenPipeError:  # whoever read our output, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoError, OSError, RuntimeError, requests.RequestException, subprocess.SubprocessError) as error:
        print(f"\ndemo failed: {error}")
        keep = True
        return 1
    finally:
        if keep:
            print(f"logs, store and index: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.search_index.demo",
        description="Indexes files by deferred calls, kills the engine on the way, and counts what was lost.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=int, default=FILES, metavar="N", help=f"at most so many files (default: {FILES})")
    parser.add_argument(
        "--folder",
        type=lambda text: Path(text).expanduser().resolve(),
        action="append",
        metavar="PATH",
        help="index the .py files in there; may be repeated (default: Python's own library and packages)",
    )
    parser.add_argument("--query", default="event loop", help='what to look for at the end (default: "event loop")')
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder: logs, store, index")
    return parser


def run(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Do everything, step by step; return what didn't hold of what deferlib promises."""
    sources = arguments.folder or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    broken = folder / "broken"
    broken.mkdir()
    (broken / "broken.py").write_bytes(BROKEN)
    url = f"http://127.0.0.1:{free_port()}"
    environ = environment(folder, url, LEASE, CALLS, [broken, *sources])
    os.environ["SEARCH_INDEX"] = environ["SEARCH_INDEX"]  # the demo looks into the app's index
    command_line = CommandLine(folder, environ)
    show = screen.Screen()
    show.lines(["deferlib: a full-text index of source code, one deferred call a file", ""])
    with Processes(folder, environ) as processes:
        demo = Demo(processes, command_line, show, url)
        demo.start_app()
        demo.defer(broken, sources, arguments.files)
        began = time.monotonic()
        engine = demo.start_engine()
        demo.index_until(KILL_AT)
        in_flight = demo.kill(engine)
        demo.start_engine()
        demo.index_until(1.0)
        demo.wait_for(demo.nothing_left)
        seconds = time.monotonic() - began
        show.step("nothing is left to do")
        found = gather(command_line, in_flight)
    return conclude(show, found, seconds, arguments.query)


def conclude(show: screen.Screen, found: Facts, seconds: float, query: str) -> list[str]:
    """Print the facts; return what is wrong with them."""
    show.lines(screen.summary(found, seconds))
    show.lines(screen.hits(query))
    for letter in found.dead:
        show.lines(screen.dead_letter(letter, found.file_of(letter)))
    show.lines([""])
    return found.wrong()


class Demo:
    """The steps. Each prints what it did, and raises `DemoError` if that isn't possible."""

    def __init__(self, processes: Processes, command_line: CommandLine, show: screen.Screen, url: str) -> None:
        self._processes = processes
        self._command_line = command_line
        self._show = show
        self._url = url
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy between these two

    def start_app(self) -> None:
        """Serve the app, with a few threads more than calls, so that its pages don't wait for them."""
        listen = f"--listen={self._url.removeprefix('http://')}"
        app = self._processes.start("app", "waitress", listen, f"--threads={CALLS + 4}", "examples.search_index.app:app")
        self.wait_for(self._app_answers)
        self._show.step(f"app {app.pid} started at {self._url}")

    def defer(self, broken: Path, sources: Sequence[Path], most: int) -> None:
        """Let the app defer a call for the broken file and for each file of *sources*, up to *most*."""
        began = time.monotonic()
        deferred = 0
        for folder in (broken, *sources):
            form = {"folder": str(folder), "limit": str(most + 1 - deferred)}
            answer = self._http.post(f"{self._url}/index", form, timeout=STALLED, allow_redirects=False)
            if answer.status_code != 303:
                raise DemoError(f"POST /index for {folder} was answered with HTTP {answer.status_code}")
            deferred = index.progress(RETRIES).deferred
        if deferred < FEWEST:
            raise DemoError(f"{deferred} files are too few: at least {FEWEST} are needed")
        seconds = time.monotonic() - began
        self._show.step(f"{deferred:,} files deferred in {seconds:.1f} s: each call is on disk, and no engine runs yet")

    def start_engine(self) -> subprocess.Popen[bytes]:
        engine = self._processes.start("engine", "deferlib.cli", "engine")
        self._show.step(f"engine {engine.pid} started")
        return engine

    def kill(self, engine: subprocess.Popen[bytes]) -> set[str]:
        """Kill the engine; return the tasks that it had taken. Nobody else can take those before their lease ends."""
        self._processes.kill(engine)
        in_flight = {task["name"] for task in self._command_line.tasks("leased")}
        self._show.step(
            f"engine {engine.pid} killed (SIGKILL) with {len(in_flight)} calls in flight; its lease on them runs out "
            f"within {LEASE:g} s (30 s is the default), then they run again"
        )
        return in_flight

    def index_until(self, share: float) -> None:
        """Draw the bar until this *share* of the files is indexed or dead, or until there is nothing left to run."""
        seen, since = -1, time.monotonic()
        while True:
            progress = index.progress(RETRIES)
            done = progress.indexed + progress.dead
            self._show.bar(done, progress.deferred)
            if done >= share * progress.deferred:
                return
            if done > seen:
                seen, since = done, time.monotonic()
            elif time.monotonic() - since > 2 * LEASE and self.nothing_left():
                return  # though files are missing: whoever counts them will say so
            self._check(since)
            time.sleep(0.01)

    def nothing_left(self) -> bool:
        """Tell whether deferlib has no live task."""
        return not self._command_line.tasks("live")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        since = time.monotonic()
        while not condition():
            self._check(since)
            time.sleep(0.02)

    def _app_answers(self) -> bool:
        try:
            return self._http.get(f"{self._url}/progress", timeout=STALLED).ok
        except requests.ConnectionError:
            return False

    def _check(self, since: float) -> None:
        """Raise if a process has ended, or if nothing has happened *since* long ago."""
        ended = self._processes.ended()
        if ended:
            raise DemoError(ended)
        if time.monotonic() - since > STALLED:
            raise DemoError(f"nothing has happened for {STALLED:g} s")


if __name__ == "__main__":
    sys.exit(main())
