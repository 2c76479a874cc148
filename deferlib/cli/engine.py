"""`deferlib engine`: an engine until a signal ends it."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from deferlib import config
from deferlib.cli.load import Stopped, load_app
from deferlib.cli.logs import log_to_stderr
from deferlib.cli.settings import FLAGS, add_flags, given, settings_of, unknown_hint, unknown_variables
from deferlib.cli.show import safe
from deferlib.core.model import SECOND, Micros
from deferlib.errors import StoreError

if TYPE_CHECKING:
    from deferlib.cli.reload import QueueFileWatch
    from deferlib.cli.settings import Commands
    from deferlib.engine.engine import Engine
    from deferlib.engine.operator import OperatorPort

log = logging.getLogger("deferlib.engine")

_LEVELS = ("debug", "info", "warning", "error")
_NOT_CLEAN = 1
_EPILOG = """\
The first SIGTERM or SIGINT (Ctrl-C) drains: nothing more is started, what runs
has --grace seconds to finish, what hasn't started is given back. The second
one ends at once. Either way no task is lost: what was cut off runs again, and
several engines may run at once.
SIGHUP applies queue.yaml again, which happens by itself when it changes.

Exit code: 0 after a clean drain, 1 if calls still ran, 2 if the engine could
not start.

examples:
  deferlib engine --app main:app              call the app in this process
  deferlib engine --app-url http://web:8000   push to where it is served
"""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "engine",
        help="deliver tasks until SIGTERM",
        description="Deliver tasks: call the app in this process, or push to where it is served.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--app", metavar="MODULE:APP", help="a WSGI or ASGI app to import and call in this process")
    parser.add_argument("--log-level", choices=_LEVELS, type=str.lower, default="info", help="(default: info)")
    add_flags(parser, FLAGS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start an engine, work until a signal, drain; return the exit code."""
    from deferlib.engine.inprocess import served

    signals = Signals()
    signals.install()
    runtime = config.Runtime(settings=settings_of(arguments))
    config.install(runtime)  # before the app is imported, so that it finds the store that the flags name
    app = None if arguments.app is None else load_app(arguments.app)
    runtime = _in_use(runtime, arguments)
    signals.install()  # again: the app may have put its own in their place
    log_to_stderr(arguments.log_level)
    with ExitStack() as stack:
        stack.callback(runtime.close)
        port = _open_port(runtime, stack)
        engine = _build(runtime, None if app is None else served(app, stack), port)
        stack.callback(engine.close)
        watch = _watch(runtime, engine, stack)
        signals.serve(engine, round(runtime.settings["grace"] * SECOND), watch)
        for name in unknown_variables():
            log.warning("%s", unknown_hint(name))
        _announce(runtime, arguments.app, port)
        gc.collect()
        gc.freeze()  # what is there now stays: to look at it again took 5 ms, and more with a large app, every few seconds
        try:
            engine.run()
        except StoreError as error:  # the last thing that a drain does is to write
            log.error("the store failed while the engine stopped; no task is lost: %s", error)
        signals.finished()
        if not engine.idle:
            _leave()
    return 0


def _in_use(runtime: config.Runtime, arguments: argparse.Namespace) -> config.Runtime:
    """Return the runtime that the app uses: ours, or the one it made with `configure`, to which the flags apply too."""
    current = config.runtime()
    if current is not runtime:
        current.prefer(runtime.settings, given(arguments).keys())
    return current


def _open_port(runtime: config.Runtime, stack: ExitStack) -> OperatorPort | None:
    """Open the operator port if there is to be one; it is closed after the engine."""
    if runtime.settings["port"] is None:
        return None
    from deferlib.engine.observer import LogObserver
    from deferlib.engine.operator import OperatorPort

    port = OperatorPort(runtime, LogObserver())
    stack.callback(port.close)
    return port


def _build(runtime: config.Runtime, app: Any, port: OperatorPort | None) -> Engine:
    from deferlib.engine.build import build
    from deferlib.engine.observer import LogObserver

    step: Callable[[str], None] | None = None
    if os.environ.get("DEFERLIB_FAILPOINT"):
        from deferlib.testing import failpoints

        step = failpoints.from_environ()
    _ = runtime.store, runtime.ring  # now: without keys every call would fail, and be charged for it
    if port is None:
        return build(runtime, app, observer=LogObserver(), step=step)
    engine = build(runtime, app, observer=port.metrics, monitor=port.metrics, step=step)
    port.tell(engine)
    return engine


def _watch(runtime: config.Runtime, engine: Engine, stack: ExitStack) -> QueueFileWatch | None:
    from deferlib.cli.reload import QueueFileWatch

    if runtime.given_queues is not None:  # the app has its queues in its code
        return None
    watch = QueueFileWatch(runtime, engine.reread)
    watch.start()
    stack.callback(watch.stop)
    return watch


def _announce(runtime: config.Runtime, app: str | None, port: OperatorPort | None) -> None:
    """Print what the engine works on, in one line; whoever started it may have closed the pipe."""
    from deferlib.cli.store import listed

    settings = runtime.settings
    path = config.sqlite_path(settings["store"], settings.root)
    store = f"sqlite:///{path}" if path is not None else settings.all["store"].shown
    if runtime.given_store is not None:
        store = "given by the app"
    what = f"app {app} in this process" if app is not None else f"target {settings['app']}"
    if app is None and runtime.targets:
        what += f" and {listed(sorted([*runtime.targets.names, *filter(None, [runtime.targets.template])]))}"
    queues = listed([queue.name for queue in runtime.queues()], 10)
    if port is not None:
        host, number = port.address
        what += f", health and metrics at http://{f'[{host}]' if ':' in host else host}:{number}"
    with suppress(OSError, ValueError, AttributeError):  # closed, or not there at all
        print(safe(f"deferlib engine: store {store}, {what}, queues {queues}, pid {os.getpid()}"), flush=True)


def _leave() -> NoReturn:
    """End the process although calls still run: in threads that can't be ended, and perhaps more threads of theirs."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(_NOT_CLEAN)


class Signals:
    """What SIGTERM, SIGINT and SIGHUP do: end the start, drain the engine, end it at once.

    Python runs a handler between two instructions of the main thread, even inside another handler; so nothing here waits
    for a lock that what it interrupts may hold.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._grace: Micros = 0
        self._watch: QueueFileWatch | None = None
        self._count = 0
        self._told = 0
        self._telling = False
        self._finished = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def serve(self, engine: Engine, grace: Micros, watch: QueueFileWatch | None) -> None:
        """From now on signals drain *engine*; one that came before and was swallowed by the app counts."""
        self._grace, self._watch, self._engine = grace, watch, engine
        self._tell()

    def finished(self) -> None:
        """The engine has ended: another signal ends the process, should anything keep it."""
        self._finished = True

    def _stop(self, number: int, frame: object) -> None:
        self._count += 1
        if self._finished or self._count > 2:
            os._exit(0 if self._finished and self._engine is not None and self._engine.idle else 128 + number)
        if self._engine is None:
            if self._count > 1:  # something swallowed the first one
                os._exit(128 + number)
            raise Stopped
        self._tell()

    def _tell(self) -> None:
        """Pass on to the engine what it hasn't been told. A handler inside a handler leaves that to the outer one."""
        if self._telling or self._engine is None:
            return
        self._telling = True
        try:
            while self._told < self._count:
                self._told += 1
                first = self._told == 1
                self._engine.stop(self._grace if first else 0)
                text = f"draining for up to {self._grace / SECOND:g} s; a second signal ends at once" if first else "ending"
                with suppress(OSError):
                    os.write(2, f"deferlib engine: {text}\n".encode())  # not by way of a buffer: it may be in use below us
        finally:
            self._telling = False

    def _reload(self, number: int, frame: object) -> None:
        if self._watch is not None:
            self._watch.asked = True
