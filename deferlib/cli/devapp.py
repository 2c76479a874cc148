"""The child of `deferlib dev`: serves the app on the parent's socket, until a file changes.

It says through a pipe how it is doing, one JSON document a line: `ready` with the settings that the app uses, `failed`,
`added` for each task, `reloading`. Through another pipe it learns that its parent has died, and then dies too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from deferlib import access, config, token
from deferlib.cli.load import AppBroken, Stopped, load_app
from deferlib.cli.logs import log_to_stderr
from deferlib.cli.narrate import Paper
from deferlib.errors import ConfigError, Error
from deferlib.settings import find_root, load_settings, mask

_LOOK_SECONDS = 0.5  # between two looks at the files
_ACK_SECONDS = 2.0
_LEFT_TO_THE_NEXT = 0.02  # seconds between two looks at connections that aren't accepted any more
_EXIT_SECONDS = 2.0  # for the app to end by itself
_STARTUP_FAILED = "the app's startup failed; its error is in the terminal"
RELOAD = 3  # the exit code of werkzeug's reloader


class Plan:
    """What the parent asks for."""

    def __init__(self, text: str) -> None:
        raw: dict[str, Any] = json.loads(text)
        self.app: str = raw["app"]
        self.given: dict[str, str] = raw["given"]
        self.flags: dict[str, str] = raw["flags"]
        self.ended: str = raw["ended"]  # how the last process ended while it imported the app; '' if it did not
        self.socket: int = raw["socket"]
        self.reports: int = raw["reports"]
        self.parent: int = raw["parent"]


class Serving(NamedTuple):
    """How an app is served."""

    serve: Callable[[], None]  # until the process ends
    leave: Callable[[], None]  # new connections to the next process
    stop: Callable[[], None]


class Reports:
    """The way to the parent."""

    def __init__(self, plan: Plan) -> None:
        self._descriptor = plan.reports
        self._lock = threading.Lock()
        self._heard = threading.Event()
        os.register_at_fork(after_in_child=self._forked)
        # Signals are the main thread's: Ctrl-C and the parent's SIGTERM come together, and on a busy machine the second of
        # two is given to another thread, if it takes any; then nothing interrupts what the main one waits in.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        threading.Thread(target=self._listen, args=(plan.parent,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _forked(self) -> None:
        """Let go: a process that the app has forked must not keep the parent waiting for the end of this one."""
        os.close(self._descriptor)
        self._descriptor = -1
        self._lock = threading.Lock()

    def send(self, **document: object) -> None:
        if self._descriptor < 0:
            return
        try:
            with self._lock:
                os.write(self._descriptor, (json.dumps(document) + "\n").encode())
        except OSError:  # the parent has died, and so do we
            os._exit(0)

    def reloading(self) -> None:
        """Announce the end, and wait until the parent knows: only then may connections break."""
        self._heard.clear()
        self.send(reloading=True)
        self._heard.wait(_ACK_SECONDS)

    def _listen(self, descriptor: int) -> None:
        while os.read(descriptor, 1):
            self._heard.set()
        os._exit(0)


class _Additions(logging.Handler):
    """Tells the parent of each task that is added here."""

    def __init__(self, reports: Reports) -> None:
        super().__init__(logging.DEBUG)
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        id = getattr(record, "task_id", None)
        if id is not None:
            self._reports.send(added=id)


def main(argument: str) -> None:
    """Serve until a file changes (exit code 3), SIGTERM, or the parent's death."""
    plan = Plan(argument)
    for descriptor in (plan.socket, plan.reports, plan.parent):
        os.set_inheritable(descriptor, False)
    _take_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the parent has blocked it
    os.environ["WERKZEUG_RUN_MAIN"] = "true"
    os.environ["FLASK_RUN_FROM_CLI"] = "true"  # Flask ignores an app.run() outside of `if __name__ == "__main__"`
    reports = Reports(plan)
    access.open_to_this_machine()
    _quiet_werkzeug()
    from werkzeug._reloader import ensure_echo_on, reloader_loops

    ensure_echo_on()
    # Not run_with_reloader: here the reloader looks at the files before the app is imported, so that no save is missed, and
    # the app is imported in the main thread, where it may set signal handlers.
    reloader = reloader_loops["stat"](_setting_files(plan), _not_the_users(), _LOOK_SECONDS)
    with reloader:
        serving = _prepared(plan, reports, reloader)
        _take_signals()  # again: the app may have put its own in their place
        threading.Thread(target=serving.serve, name="deferlib-app", daemon=True).start()
        try:
            reloader.run()
        except SystemExit as end:
            if end.code == RELOAD:
                serving.leave()
                reports.reloading()
            _end_within(_EXIT_SECONDS, RELOAD if end.code == RELOAD else 0)
            serving.stop()
            raise


def _take_signals() -> None:
    signal.signal(signal.SIGINT, lambda number, frame: None)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, _stopped)


def _stopped(number: int, frame: object) -> None:
    raise Stopped


def _end_within(seconds: float, code: int) -> None:
    """End the process even if one of its threads, or something else that exits wait for, does not."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _prepared(plan: Plan, reports: Reports, reloader: Any) -> Serving:
    """Import the app; return how it is served. An app that fails is served as a page that says so."""
    if plan.ended:
        return _wsgi(plan, _apology(plan.ended), lambda: None)
    try:
        app = _loaded(plan)
        settings = _in_use()
    except Error as error:
        cause = error.__cause__
        trace = _trace(cause) if isinstance(error, AppBroken) and cause is not None else ""
        reports.send(failed=str(error), trace=trace, fatal=not isinstance(error, AppBroken))
        return _wsgi(plan, _apology(trace or str(error)), lambda: None)
    reloader.extra_files.clear()  # they are looked at only while a mistake may be in them
    log_to_stderr("info", lines=True)
    client = logging.getLogger("deferlib.client")
    client.addHandler(_Additions(reports))
    client.setLevel(logging.DEBUG)
    for name in ("deferlib.client", "deferlib.handler", "werkzeug"):  # the app's dictConfig may have silenced them
        logging.getLogger(name).disabled = False
    client.propagate = False

    wrapped = _is_wrapped(app)

    def ready() -> None:
        reports.send(ready=settings, wrapped=wrapped)

    from deferlib.contrib.asgi import is_asgi

    if is_asgi(app):
        return _asgi(plan, app, ready, reports)
    from deferlib.server.wsgi import wrap_wsgi_app

    return _wsgi(plan, wrap_wsgi_app(app), ready)


def _is_wrapped(app: Any) -> bool:
    """Tell whether *app* has the handler by itself, as far as its attributes show: a server in production adds none."""
    from deferlib.contrib.asgi import Middleware as AsgiMiddleware
    from deferlib.server.wsgi import Middleware

    for _ in range(8):  # what is wrapped around it, and what it is wrapped around
        if isinstance(app, Middleware | AsgiMiddleware):
            return True
        if any(getattr(each, "cls", None) is AsgiMiddleware for each in getattr(app, "user_middleware", ())):
            return True
        app = getattr(app, "wsgi_app", None) or getattr(app, "app", None) or getattr(app, "application", None)
    return False


def _setting_files(plan: Plan) -> list[str]:
    """Return the files beside the code where a mistake may be."""
    root = find_root(Path.cwd())
    return [str(root / name) for name in ("pyproject.toml", plan.given.get("queues") or "queue.yaml")]


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("DEFERLIB_")}


def _loaded(plan: Plan) -> Any:
    before = _variables()
    runtime = config.Runtime(settings=load_settings(plan.given, flags=plan.flags))
    config.install(runtime)  # before the app is imported, so that it finds the store that the flags name
    app = load_app(plan.app)
    current = config.runtime()
    if current is not runtime:
        current.prefer(runtime.settings, plan.given.keys())
    elif _variables() != before and not runtime.opened:  # the app has loaded its .env
        config.install(config.Runtime(settings=load_settings(plan.given, flags=plan.flags)))
    return app


def _in_use() -> dict[str, Any]:
    """Return the settings that the app works with, for the engine to work with the same."""
    runtime = config.runtime()
    path = runtime.store_path
    if path is None:
        raise ConfigError(
            "`deferlib dev` runs the engine in another process than the app, and a store in memory can't be shared; "
            "use a file (sqlite:///PATH), or deferlib.running(app) in a script"
        )
    _ = runtime.store, runtime.ring  # now, where an error of theirs is told
    settings = {name: setting.value for name, setting in runtime.settings.all.items() if setting.value is not None}
    as_text = settings.keys() & {"limits", "targets", "allow_urls"}  # JSON has no values like theirs
    settings |= {name: str(settings[name]) for name in as_text}
    queues = None if runtime.given_queues is None else [queue.to_json() for queue in runtime.given_queues]
    status = os.stat(path)  # which file: one that was removed and made anew needs a new engine
    return {
        "settings": {**settings, "store": f"sqlite:///{path}"},
        "queues": queues,
        "key_file": runtime.key_file(),
        "file": [status.st_dev, status.st_ino],
    }


# --- serving --------------------------------------------------------------------------------------------------------


def _wsgi(plan: Plan, app: Any, ready: Callable[[], None]) -> Serving:
    from werkzeug.serving import WSGIRequestHandler, make_server

    paper = Paper()

    class Requests(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            if not self.headers.get("X-Deferlib-Signature"):  # the engine tells of its own
                paper.line(f"{self.command} {self.path}", str(getattr(code, "value", code)))

    with socket.socket(fileno=os.dup(plan.socket)) as bound:
        host, port = bound.getsockname()[:2]
    server = make_server(host, port, app, threaded=True, request_handler=Requests, fd=plan.socket)

    leaving = threading.Event()
    accept = server.get_request

    def get_request() -> Any:
        if leaving.is_set():
            time.sleep(_LEFT_TO_THE_NEXT)
            raise OSError("the next process takes it")  # which socketserver ignores
        return accept()

    server.get_request = get_request  # type: ignore[method-assign]

    def serve() -> None:
        ready()
        server.serve_forever()

    return Serving(serve, leaving.set, lambda: None)  # calls in threads are cut off by the exit


def _asgi(plan: Plan, app: Any, ready: Callable[[], None], reports: Reports) -> Serving:
    try:
        import uvicorn
    except ImportError:
        reports.send(failed="an ASGI app is served by uvicorn: `pip install uvicorn`", trace="", fatal=True)
        return _wsgi(plan, _apology("uvicorn is not installed"), lambda: None)
    from deferlib.contrib.asgi import wrap_asgi_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            with suppress(SystemExit):  # so it ends if the app's lifespan fails
                await super().startup(sockets)
            if self.started:
                ready()
            else:
                self.should_exit = True
                reports.send(failed=_STARTUP_FAILED, trace="", fatal=False)

    settings = uvicorn.Config(wrap_asgi_app(app), log_level="info", log_config=None, timeout_graceful_shutdown=1)
    errors = logging.getLogger("uvicorn.error")
    errors.setLevel(logging.WARNING)
    errors.addFilter(_not_of_the_end)
    access = logging.getLogger("uvicorn.access")
    access.propagate = False
    access.addHandler(_Access(Paper()))
    server = Server(settings)
    ended = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[socket.socket(fileno=os.dup(plan.socket))])
        finally:
            ended.set()
        if not server.started:
            _wsgi(plan, _apology(_STARTUP_FAILED), lambda: None).serve()

    def stop() -> None:
        server.should_exit = True
        ended.wait(3)

    return Serving(serve, lambda: None, stop)  # what it accepts until then it answers


def _not_of_the_end(record: logging.LogRecord) -> bool:
    """Tell whether *record* is worth showing: what the end of the server cuts off is told by the engine."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "CancelledError" and not str(record.msg).startswith("Cancel %s running task")


class _Access(logging.Handler):
    """Shows uvicorn's requests as ours."""

    def __init__(self, paper: Paper) -> None:
        super().__init__()
        self._paper = paper

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 5:
            _client, method, path, _version, status = record.args
            if not str(path).startswith("/_ah/queue/"):
                self._paper.line(f"{method} {path}", str(status))


def _apology(text: str) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
    """Return an app that says that the app can't be served, and what is wrong to nobody but the developer."""
    masked = "\n".join(mask(line) for line in text.split("\n"))  # each alone: from an URL to a decorator's @ is no password
    shown, hidden = (
        f"The app can't be served; it is tried again when a file changes.\n\n{detail}\n".encode("utf-8", "replace")
        for detail in (masked, "What is wrong is told in the terminal of `deferlib dev`.")
    )

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def header(name: str) -> str:
            return str(environ.get(f"HTTP_{name.upper().replace('-', '_')}", ""))

        body = shown if access.is_at_this_machine(environ.get("REMOTE_ADDR") or "", header) else hidden
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
        headers.append((token.OUTCOME, "untrusted"))  # an engine that comes here all the same charges no task for it
        start_response("500 Internal Server Error", headers)
        return [body]

    return app


# --- reloading ------------------------------------------------------------------------------------------------------


def _trace(error: BaseException) -> str:
    """Return the traceback of *error* from where the user's code begins."""
    hidden = ("importlib", "deferlib/cli/load.py", "<frozen ")
    frames = traceback.TracebackException.from_exception(error)
    kept = [frame for frame in frames.stack if not any(part in frame.filename for part in hidden)]
    frames.stack = traceback.StackSummary.from_list(kept)
    return "".join(frames.format()).rstrip()


def _not_the_users() -> list[str]:
    """Return patterns of files on sys.path that aren't the user's: a checkout of ours, installed editable."""
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    installed = not os.path.exists(os.path.join(checkout, "pyproject.toml"))
    return [] if installed or f"{os.getcwd()}/".startswith(f"{checkout}/") else [f"{checkout}/*"]


def _quiet_werkzeug() -> None:
    """Show what the reloader says as a line of ours."""
    paper = Paper()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().lstrip(" *")
            if text.startswith("Detected change in"):
                paper.line(os.path.relpath(text.split("'")[1]), "changed: reloading", 36)
            else:
                paper.line("server", text)

    werkzeug = logging.getLogger("werkzeug")
    werkzeug.addHandler(Lines())
    werkzeug.propagate = False
    werkzeug.setLevel(logging.INFO)


if __name__ == "__main__":
    main(sys.argv[1])
