"""Two services, one store, one engine: pause a queue, stop a service, change queue.yaml, and count what was done.

`python -m examples.services.demo`, from the root of a checkout with Flask and waitress. Everything runs as real processes
in a temporary folder, and the commands are those that anybody would type.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from examples.search_index.processes import PATIENCE, PROJECT, Processes, end_on_signals, free_port
from examples.services import photos

EXAMPLE = Path(__file__).parent
WIDTH = 77  # of what commands print, which is indented below
NOTICED = 1.5  # seconds until an engine has seen that a queue is paused: it looks each second
SLOWEST_APPLY = 2.0  # seconds until a changed queue.yaml is in force; about 0.3 on an idle machine
# What is done for each photo: by which service, and why there.
STEPS = {
    "thumbnail": ("worker", "the target of its queue"),
    "publish": ("worker", "no target, added by the worker"),
    "labels": ("worker", "its own target"),
    "backup": ("worker", "no target, deferred by the worker"),
    "activity": ("web", "no target, added by web"),
    "mail": ("web", "no target, deferred by web"),
}

_http = build_opener(ProxyHandler({}))  # no proxy between these two


class DemoError(Exception):
    """The demo can't go on; the text says why."""


def main() -> int:
    """Run the demo in a temporary folder; return the exit code: 0 if all held, 1 if anything didn't, 130 after Ctrl-C."""
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    folder = Path(tempfile.mkdtemp(prefix="deferlib-services-")).resolve()
    wrong: list[str] = []
    try:
        wrong = run(folder)
    except KeyboardInterrupt:
        print("\ninterrupted; every process that the demo started is gone")
        return 130
    except BrokenPipeError:  # whoever read our output, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoError, OSError, subprocess.SubprocessError) as error:
        wrong = [str(error)]
    finally:
        if wrong:
            print("\n".join(f"demo failed: {text}" for text in wrong))
            print(f"logs and store: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


def run(folder: Path) -> list[str]:
    """Do everything, step by step; return what didn't hold."""
    for name in ("photos.py", "web.py", "worker.py", "queue.yaml"):
        shutil.copy(EXAMPLE / name, folder)
    os.environ["PHOTOS"] = str(folder / "photos.db")  # the demo looks into the services' record
    ports = {name: free_port() for name in ("web", "worker")}
    environ = environment(folder, ports)
    with Processes(folder, environ) as processes:
        demo = Demo(folder, environ, processes, ports)
        demo.start()
        demo.pause_a_queue()
        demo.stop_a_service()
        demo.change_the_file()
        return demo.conclude()


def environment(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """Return the environment that both services, the engine and the commands share."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DEFERLIB_")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    return {
        **ours,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder),  # deferlib's sockets, by which processes wake each other, go with the folder
        "COLUMNS": str(WIDTH),
        "DEFERLIB_TARGETS": ",".join(f"{name}={url}" for name, url in urls.items()),
        "DEFERLIB_APP": urls["web"],  # where tasks go that know no better
    }


class Demo:
    """The steps. Each prints what it did, and raises `DemoError` if that isn't possible."""

    def __init__(self, folder: Path, environ: dict[str, str], processes: Processes, ports: dict[str, int]) -> None:
        self._folder = folder
        self._environ = environ
        self._processes = processes
        self._ports = ports
        self._photos = 0
        self._worker: subprocess.Popen[bytes] | None = None

    # --- the steps --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start two services and an engine, and have the first photos worked on."""
        print("deferlib: two services, their targets and their queues\n")
        self._serve("web")
        self._worker = self._serve("worker")
        engine = self._processes.start("engine", "deferlib.cli", "engine")
        print(f"engine {engine.pid} started: it pushes to both")
        self._add(12)
        self._wait("all of that is done", self._all_done)
        print("\nEach task is where it belongs. What chose its service:\n")
        self._table()

    def pause_a_queue(self) -> None:
        self._title("Pause a queue: its tasks wait, all others run")
        self._command("queues", "pause", "thumbnails")
        time.sleep(NOTICED)
        self._add(10)
        others = [
            step for step in STEPS if step not in ("thumbnail", "publish")
        ]  # a thumbnail is published once it is made
        self._wait("the other queues' tasks are done", lambda: self._done(*others) and self._live() == 10)
        self._command("queues", "list")
        self._command("queues", "resume", "thumbnails")
        self._wait("the thumbnails are done as well", self._all_done)
        print(f"  -> all {self._photos} photos are done")

    def stop_a_service(self) -> None:
        self._title("Stop a service: its tasks wait, with a reason, the other's run")
        assert self._worker is not None
        self._worker.send_signal(signal.SIGTERM)
        self._worker.wait(PATIENCE)
        self._processes.kill(self._worker)  # it has ended: this one knows now, too
        print(f"worker {self._worker.pid} stopped (SIGTERM)")
        self._add(10)
        self._wait("web's tasks are done", lambda: self._done("activity", "mail"))
        self._wait("the worker's have been tried", lambda: sum(bool(task["reason"]) for task in self._tasks()) == 20)
        self._command("tasks", "list", "--limit", "4")
        label = next(task["name"] for task in self._tasks() if task["queue"] == "default")
        self._command("tasks", "show", label, only=("state", "next run", "request", "target", "attempts"))
        print("  -> web did its tasks, also those of the same queue; the worker's 20 wait")
        self._worker = self._serve("worker")
        self._wait("all is done", self._all_done)
        print(f"  -> all {self._photos} photos are done; that it was away counts as no failure of theirs")

    def change_the_file(self) -> None:
        self._title("Change queue.yaml: the engine applies it, with no restart")
        self._add(60)
        file = self._folder / "queue.yaml"
        before, after = "rate: 10/s", "rate: 500/s"
        waiting = self._photos - self._count()["thumbnail"]
        (self._folder / "new.yaml").write_text(file.read_text().replace(before, after))
        began = time.monotonic()
        os.replace(self._folder / "new.yaml", file)
        self._wait("the file is applied", lambda: "queue.yaml is applied" in self._log("engine"))
        seconds = time.monotonic() - began
        print(f"  {before} -> {after}: applied after {seconds:.1f} s, with {waiting} thumbnails to do")
        if seconds > SLOWEST_APPLY:
            raise DemoError(f"it took {seconds:.1f} s until queue.yaml was applied")
        self._wait("all is done", self._all_done)
        print(f"  -> all done {time.monotonic() - began:.1f} s after the change; at 10 a second: {waiting / 10:.0f} s")

    def conclude(self) -> list[str]:
        """Print the counts; return what is wrong with them."""
        self._title("The end: nothing lost, nothing twice")
        self._table()
        found = photos.done()
        counted = Counter((each.step, each.photo) for each in found)
        wanted = {(step, f"photo-{number}") for step in STEPS for number in range(self._photos)}
        facts = {
            "photos": self._photos,
            "tasks": len(wanted),
            "done": len(counted.keys() & wanted),
            "lost": len(wanted - counted.keys()),
            "done twice": sum(number > 1 for number in counted.values()),
            "by the wrong service": sum(STEPS[each.step][0] != each.service for each in found),
            "still waiting": self._live(),
            "dead letters": len(self._tasks("dead")),
        }
        print()
        for name, number in facts.items():
            print(f"  {name:22}{number:5}")
        wrong = [f"{name}: {facts[name]}" for name in list(facts)[3:] if facts[name]]
        return wrong if facts["done"] == facts["tasks"] else [*wrong, f"{facts['done']} of {facts['tasks']} are done"]

    # --- what they are made of ---------------------------------------------------------------------------------------

    def _serve(self, name: str) -> subprocess.Popen[bytes]:
        listen = f"127.0.0.1:{self._ports[name]}"
        process = self._processes.start(name, "waitress", f"--listen={listen}", "--threads=8", f"{name}:app")
        self._wait(f"{name} answers", lambda: self._answers(name))
        print(f"{name} {process.pid} started at http://{listen}")
        return process

    def _answers(self, name: str) -> bool:
        try:
            _http.open(f"http://127.0.0.1:{self._ports[name]}/static/", timeout=PATIENCE)
        except HTTPError:  # there is nothing, but that is an answer
            return True
        except URLError:
            return False
        return True

    def _add(self, count: int) -> None:
        """Upload photos to web, by a request as a browser makes it."""
        names = " ".join(f"photo-{self._photos + number}" for number in range(count))
        url = f"http://127.0.0.1:{self._ports['web']}/photos"
        with _http.open(Request(url, urlencode({"names": names}).encode()), timeout=PATIENCE) as answer:
            if answer.status != 202:
                raise DemoError(f"POST /photos was answered with HTTP {answer.status}")
        self._photos += count
        print(f"POST /photos, {count} of them: {count * 4} tasks are on disk")

    def _count(self) -> Counter[str]:
        return Counter(step for step, _ in {(each.step, each.photo) for each in photos.done()})

    def _done(self, *steps: str) -> bool:
        found = self._count()
        return all(found[step] == self._photos for step in steps)

    def _all_done(self) -> bool:
        return self._done(*STEPS) and not self._live()

    def _live(self) -> int:
        queues = json.loads(self._run("queues", "list", "--json"))["queues"]
        return sum(int(queue["tasks"]) for queue in queues)

    def _tasks(self, state: str = "live") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._run("tasks", "list", "--state", state, "--json"))["tasks"]
        return found

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "deferlib.cli", *arguments],
            cwd=self._folder, env=self._environ, capture_output=True, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        if done.returncode:
            raise DemoError(f"`deferlib {' '.join(arguments)}`: {done.stderr.strip()}")
        return done.stdout

    def _command(self, *arguments: str, only: tuple[str, ...] = ()) -> None:
        """Run a command and print what it prints, or those of its lines that begin with *only*."""
        print(f"$ deferlib {' '.join(arguments)}")
        for line in self._run(*arguments).splitlines():
            if not only or line.startswith(only):
                hanging = " " * (len(line) - len(re.sub(r"^[a-z ]+? {2,}", "", line)))
                print(textwrap.fill(line, WIDTH + 2, initial_indent="  ", subsequent_indent=f"  {hanging}"))

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        since = time.monotonic()
        while not condition():
            ended = self._processes.ended()
            if ended:
                raise DemoError(ended)
            if time.monotonic() - since > PATIENCE:
                raise DemoError(f"in vain: {what}")
            time.sleep(0.02)

    def _title(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}")

    def _table(self) -> None:
        """Print who did what."""
        found = Counter((each.step, each.service) for each in photos.done())
        for step, (service, why) in STEPS.items():
            print(f"  {step:12}{why:36}{service:8}{found[step, service]:5}")


if __name__ == "__main__":
    sys.exit(main())
