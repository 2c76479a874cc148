"""`deferlib dev`: the app, reloaded when it changes, and the engine, in one command.

The app runs in a child process; the engine, the store and the listening socket live here and survive reloads. So no
request is refused while the app is away, and no task that waits is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from deferlib.cli.load import check_spec
from deferlib.cli.settings import FLAGS, add_flags, given
from deferlib.cli.show import count
from deferlib.errors import ConfigError
from deferlib.settings import Settings, load_settings

if TYPE_CHECKING:
    from deferlib.cli.devengine import DevEngine
    from deferlib.cli.settings import Commands

_GRACE = 5.0  # seconds for running calls at Ctrl-C, unless --grace says otherwise
_CHILD_SECONDS = 3.0  # for the app to end
_SHORT_LIFE = 2.0  # seconds: an app that dies sooner is started again after a rest
_REST = 1.0
_RELOAD = 3  # the child's exit code when a file has changed
_YELLOW, _RED, _CYAN = 33, 31, 36
_EPILOG = """\
The app runs in a child process, which starts again when one of its files
changes; a mistake in it is shown, and the next save tries again. The engine
pushes tasks to it over HTTP, as in production. Calls that a reload cuts off
run again at once. Each task's fate is told in a line:

  12:04:31  main.greet('Ada')        queued
  12:04:31  main.greet('Ada')        ran in 12 ms
  12:04:35  main.send_mail(7)        failed: ValueError: …; retry in 0.2 s

An app that isn't wrapped (`deferlib.wrap_wsgi_app`) gets the handler of
deferred calls here all the same. ASGI apps are served by uvicorn, where it is
installed. What is queued stays queued when the command ends.

Exit code: 0 after Ctrl-C, 1 if the app's process ended by itself while it
started, 2 if it could not be started at all.

example:
  deferlib dev main:app --port 8000
"""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "dev",
        help="serve an app and run its tasks while you work on it",
        description="Serve a WSGI or ASGI app, reload it when it changes, and run its tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "app", metavar="MODULE:APP", help="the app: a name in a module, or a function that makes it: main:make()"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=_port, default=8080, help="the port to listen at; 0 takes a free one (default: 8080)"
    )
    add_flags(
        parser,
        [name for name in FLAGS if name not in ("app", "port")],  # its own --port is the app's
        targets="the base URL of a named target that is served elsewhere; may be repeated",
        concurrency="requests at once (default: 32)",
        grace=f"how long running calls may go on after Ctrl-C (default: {_GRACE:g})",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve and deliver until Ctrl-C; return the exit code."""
    check_spec(arguments.app)
    flags = given(arguments)
    settings = load_settings(flags, flags=FLAGS)  # a mistake in them is told before anything starts
    with _listen(arguments.host, arguments.port) as listener:
        dev = Dev(arguments.app, listener, flags, settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, dev.signalled)
        return dev.run()


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno is None or error.errno <= 0:  # not the system's: the name can't be resolved
            raise ConfigError(f"--host {host}: is no address of this machine") from None
        why = os.strerror(error.errno)
        raise ConfigError(f"port {port} of {host}: {why.lower()}; take another with --port, 0 for any free one") from None


class _Child:
    """A process that serves the app, and what it reports. Each report is put into *events*, its end last."""

    def __init__(self, plan: dict[str, Any], listener: socket.socket, events: SimpleQueue[Any], shut: Any) -> None:
        reports, their_reports = os.pipe()
        their_life, self._life = os.pipe()
        mine = (listener.fileno(), their_reports, their_life)
        plan = {**plan, "socket": mine[0], "reports": mine[1], "parent": mine[2]}
        self._events = events
        self._shut = shut
        self.ready = False
        self.leaving = False  # it has announced a reload
        self._reports = os.fdopen(reports, encoding="utf-8")
        # Ctrl-C reaches the child too: it waits there until the child has said what it means to it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deferlib.cli.devapp", json.dumps(plan)],
                pass_fds=mine,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(their_reports)
        os.close(their_life)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._reports:
                report = json.loads(line)
                if "reloading" in report:  # here and now: the child waits for it before it breaks its connections
                    self.leaving = True
                    self._shut()
                    os.write(self._life, b".")
                self._events.put((self, report))

    def _wait(self) -> None:
        code = self.process.wait()
        self._reader.join(1)  # a process that the app has forked may keep the pipe open
        self._events.put((self, {"ended": code}))

    def end(self) -> None:
        """End the process, by force if need be."""
        self.process.terminate()
        try:
            self.process.wait(_CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Give the pipes back."""
        with suppress(OSError):
            os.close(self._life)


class Dev:
    """The parent: starts the child again and again, and keeps one engine for all of them."""

    def __init__(self, app: str, listener: socket.socket, flags: dict[str, str], settings: Settings) -> None:
        from deferlib.cli.narrate import Paper

        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._url = f"http://{shown}:{port}"
        self._push_url = self._url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        self._app = app
        self._listener = listener
        self._flags = flags
        grace = settings.all["grace"]
        self._grace = _GRACE if grace.source == "default" else grace.value
        self._plan = {"app": app, "given": flags, "flags": FLAGS, "ended": ""}
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._paper = Paper()
        self._child: _Child | None = None
        self._delivery: DevEngine | None = None
        self._engine_failed = False
        self._began = time.monotonic()
        self._stops = 0

    def signalled(self, number: int, frame: object) -> None:
        """Take Ctrl-C or SIGTERM: the first ends cleanly, the second at once."""
        self._stops += 1
        if self._stops > 1:
            if self._child is not None:
                self._child.process.kill()
            os._exit(128 + number)
        self._events.put((None, {"stop": number}))

    def run(self) -> int:
        try:
            self._start()
            import deferlib.cli.devengine  # noqa: F401  # 0.1 s, while the child imports the app

            while True:
                try:
                    child, report = self._events.get(timeout=1)
                except Empty:
                    if self._delivery is not None:
                        self._delivery.narrator.tick()
                    continue
                code = self._handle(child, report)
                if code is not None:
                    return code
        finally:
            self._stop()

    def _start(self, ended: str = "") -> None:
        self._began = time.monotonic()
        self._child = _Child({**self._plan, "ended": ended}, self._listener, self._events, self._shut)

    def _shut(self, *, reloading: bool = True) -> None:
        if self._delivery is not None:
            self._delivery.gate.shut(reloading=reloading)

    def _handle(self, child: _Child | None, report: dict[str, Any]) -> int | None:
        """Act on a report; return the exit code if it is the end."""
        match report:
            case {"stop": _}:
                return 0
            case {"engine": error}:  # its store was removed just as it started, say
                self._engine_failed = True
                self._shut(reloading=False)
                self._paper.line("engine", f"ended: {error}; save a file to try again", _RED)
            case {"added": id} if self._delivery is not None:
                self._delivery.added(id)
            case {"ready": settings, "wrapped": wrapped}:
                assert child is not None
                child.ready = True
                self._ready(child, settings, wrapped)
            case {"failed": text}:
                return self._failed(text, report)
            case {"ended": code}:
                assert child is not None
                child.close()
                return self._ended(child, code)
        return None

    def _ready(self, child: _Child, report: dict[str, Any], wrapped: bool) -> None:
        """The app is served: let the engine deliver to it, a new one if it uses other settings than before."""
        from deferlib.cli.devengine import DevEngine

        if self._delivery is not None and (self._engine_failed or self._delivery.report != report):
            self._engine_failed = False
            self._paper.line("settings", "changed: a new engine starts", _CYAN)
            self._delivery.stop(0)
            self._delivery = None
        if self._delivery is None:
            self._delivery = DevEngine(report, self._push_url, self._paper, self._events)
            self._greet(report, wrapped)
        else:
            self._paper.line(self._app, f"reloaded in {time.monotonic() - self._began:.1f} s", _CYAN)
        self._delivery.gate.open()
        if child.leaving:  # saved again meanwhile: its word of that was heard before this one
            self._shut()

    def _greet(self, report: dict[str, Any], wrapped: bool) -> None:
        from deferlib import __version__

        delivery = self._delivery
        assert delivery is not None
        paper = self._paper
        key = report["key_file"] or "from the settings"
        paper.write(f"{paper.bold('deferlib')} {__version__}: the app and its engine, until Ctrl-C")
        paper.write(f"  app     {paper.bold(self._url)}   {self._app}, reloaded when a file changes")
        paper.write(f"  store   {delivery.runtime.settings['store'].removeprefix('sqlite:///')}")
        paper.write(f"  key     {key}")
        paper.write(f"  queues  {', '.join(queue.name for queue in delivery.runtime.queues())}")
        notes = delivery.notes
        if not wrapped:
            notes = [
                f"{self._app} isn't wrapped: it is here, but not by a server in production (deferlib.wrap_wsgi_app)",
                *notes,
            ]
        for note in notes:
            paper.write(paper.coloured(f"  note    {note}", _YELLOW))

    def _failed(self, text: str, report: dict[str, Any]) -> int | None:
        """The app could not be served: at first that may be the command's mistake, later the next save's to mend."""
        if report["fatal"] and self._delivery is None:
            from deferlib.cli import fail

            fail(text)
            return 2
        if report["trace"]:
            self._paper.write(report["trace"])
            text = "can't be imported"
        self._paper.line(self._app, f"{text}; save a file to try again", _RED)
        return None

    def _ended(self, child: _Child, code: int) -> int | None:
        if code == _RELOAD and child.leaving:
            self._start()
            return None
        how = f"was killed by {_signal(-code)}" if code < 0 else f"ended with exit code {code}"
        if not child.ready:
            how = f"the process of {self._app} {how} while it started"
            if self._delivery is None:
                from deferlib.cli import fail

                fail(how)
                return 1
            self._paper.line(self._app, f"{how}; save a file to try again", _RED)
            self._start(how)
            return None
        self._shut(reloading=False)
        if time.monotonic() - self._began < _SHORT_LIFE:
            time.sleep(_REST)
        self._paper.line(self._app, f"{how}: it is started again", _RED)
        self._start()
        return None

    def _stop(self) -> None:
        if self._delivery is not None:
            if self._delivery.running:
                running = count(self._delivery.running, "running call")
                self._paper.line("stopping", f"{running}: up to {self._grace:g} s to finish; Ctrl-C again ends at once")
            self._delivery.stop(self._grace)
        if self._child is not None:
            self._child.end()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
