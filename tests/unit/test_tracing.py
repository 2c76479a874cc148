"""Traces across the queue: what of a trace travels with a task, and what becomes of it where the task runs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import werkzeug.serving

import deferlib
from deferlib import config, taskqueue, testing, tracing, wrap_wsgi_app
from deferlib.contrib.asgi import wrap_asgi_app
from deferlib.core.model import SECOND
from deferlib.engine.build import build

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
STATE = "vendor=1"


@pytest.fixture(scope="session")
def exporter() -> Any:
    """The spans of this process, as its one provider exports them."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


class Otel:
    """OpenTelemetry, as an app uses it."""

    def __init__(self, exporter: Any) -> None:
        from opentelemetry import trace

        self.trace = trace
        self.tracer = trace.get_tracer("the app")
        self._exporter = exporter

    def span(self, name: str = "request") -> Any:
        return self.tracer.start_as_current_span(name)

    @property
    def runs(self) -> list[Any]:
        """The spans of attempts, in the order in which they ended."""
        return [span for span in self._exporter.get_finished_spans() if span.name == "deferlib.run"]


@pytest.fixture
def otel(exporter: Any) -> Iterator[Otel]:
    exporter.clear()
    yield Otel(exporter)
    exporter.clear()


@pytest.fixture
def no_otel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose app hasn't imported OpenTelemetry."""
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)


seen: list[Any] = []  # by what ran


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


def current() -> str:
    """Return trace and span that are current here."""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}/{context.span_id:016x}"


def note() -> None:
    seen.append(current())


async def anote() -> None:
    seen.append(current())


def fail() -> None:
    raise ValueError("no")


def defer_another() -> None:
    deferlib.defer(note_headers, _name="another")


def note_headers() -> None:
    seen.append(tracing.current())


def not_now() -> None:
    raise deferlib.SingularTaskFailure


def hopeless() -> None:
    raise deferlib.PermanentTaskFailure("never")


def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    seen.append(current())
    start_response("500 No" if environ["QUERY_STRING"] else "204 No Content", [])
    return []


async def asgi_view(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        seen.append(current())
        await send({"type": "http.response.start", "status": 500 if scope["query_string"] else 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def of(span: Any) -> str:
    context = span.get_span_context()
    return f"{context.trace_id:032x}/{context.span_id:016x}"


def headers_of(task: taskqueue.Task) -> dict[str, Any]:
    return {name.lower(): value for name, value in task.headers.items() if name.lower().startswith("trace")}


# --- what travels -----------------------------------------------------------------------------------------------------


def test_a_task_made_in_a_span_carries_its_context(otel: Otel) -> None:
    with testing.engine(), otel.span() as span:
        task = taskqueue.Task(url="/x")
        call = deferlib.defer(note)

    context = span.get_span_context()
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert headers_of(task) == headers_of(call) == {"traceparent": parent}


def test_what_is_kept_in_the_store_has_it_among_the_users_headers(otel: Otel) -> None:
    with testing.engine(), otel.span():
        task = deferlib.defer(note, _name="x")
        with config.runtime().store.read() as tx:
            [row] = tx.find(None, ["x"])

    assert dict(json.loads(row.headers))["traceparent"] == task.headers["traceparent"]


def test_a_tracestate_goes_along(otel: Otel) -> None:
    trace = otel.trace
    came = trace.SpanContext(
        int(TRACE, 16), int(SPAN, 16), True, trace.TraceFlags(1), trace.TraceState.from_header([STATE])
    )
    with testing.engine(), trace.use_span(trace.NonRecordingSpan(came)):
        task = taskqueue.Task(url="/x")

    assert headers_of(task) == {"traceparent": PARENT, "tracestate": STATE}


def test_outside_of_any_span_nothing_is_added(otel: Otel) -> None:
    with testing.engine():
        assert headers_of(taskqueue.Task(url="/x")) == {}
        assert headers_of(deferlib.defer(note)) == {}


def test_a_users_own_traceparent_stays(otel: Otel) -> None:
    with testing.engine(), otel.span():
        task = taskqueue.Task(url="/x", headers={"Traceparent": PARENT, "tracestate": "own=1"})

    assert headers_of(task) == {"traceparent": PARENT, "tracestate": "own=1"}


def test_pull_tasks_and_other_peoples_hosts_get_none(otel: Otel) -> None:
    with testing.engine(), otel.span():
        config.configure(store="sqlite:///:memory:", allow_urls="hooks.example.com")
        pull = taskqueue.Task(b"x", method="PULL")
        abroad = taskqueue.Task(url="https://hooks.example.com/x")

    assert headers_of(pull) == headers_of(abroad) == {}


def test_a_task_that_would_become_too_large_goes_without(otel: Otel) -> None:
    with testing.engine(), otel.span():
        room = 102_400 - taskqueue.Task(b"", url="/x").size
        full = taskqueue.Task(b"x" * (room + 70), url="/x")  # traceparent, its value and 4 take 70
        fits = taskqueue.Task(b"x" * room, url="/x")

    assert headers_of(full) == {}
    assert full.size == fits.size == 102_400
    assert set(headers_of(fits)) == {"traceparent"}


def test_import_of_deferlib_imports_no_opentelemetry() -> None:
    code = "import sys, deferlib; deferlib.taskqueue.Task(url='/x'); assert not any('telemetry' in n for n in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- without OpenTelemetry --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_otel")
@pytest.mark.parametrize("wrap", ["call", "wsgi", "asgi"])
def test_without_opentelemetry_a_task_hands_on_what_it_came_with(wrap: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        defer_another()
        start_response("204 No Content", [])
        return []

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            defer_another()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    headers = {"traceparent": PARENT, "tracestate": STATE}
    with testing.engine({"call": None, "wsgi": app, "asgi": wrap_asgi_app(asgi_app)}[wrap]) as engine:
        if wrap == "call":
            deferlib.defer(defer_another, _headers=headers)
        else:
            taskqueue.add(url="/x", headers=headers)
        attempts = engine.run_until_idle(raise_errors=True)

        assert headers_of(taskqueue.Task(url="/x")) == {}  # and it ends with the task

    assert [attempt.ok for attempt in attempts] == [True, True]
    assert seen == [tracing.Carried(PARENT, STATE)]


@pytest.mark.usefixtures("no_otel")
@pytest.mark.parametrize(
    "parent",
    [
        "", "x", PARENT + "0", PARENT.upper(), f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"{PARENT}, {PARENT}", f"00-{TRACE}-{SPAN}", f"{PARENT}\n",
    ],
)  # fmt: skip
def test_what_is_no_trace_context_is_not_handed_on(parent: str) -> None:
    tracing.receive(parent, STATE)
    try:
        assert tracing.current() is None
    finally:
        tracing.receive(None, None)


@pytest.mark.usefixtures("no_otel")
@pytest.mark.parametrize("state", ["", "x" * 513, "a=\x01", "a=é", None])
def test_a_state_that_is_none_is_left_out(state: str | None) -> None:
    tracing.receive(PARENT, state)
    try:
        assert tracing.current() == tracing.Carried(PARENT, "")
    finally:
        tracing.receive(None, None)


# --- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [note, anote])
@pytest.mark.parametrize("app", ["wsgi", "asgi"])
def test_a_call_runs_in_a_span_that_is_a_child_of_whoever_deferred_it(otel: Otel, fn: Any, app: str) -> None:
    with testing.engine(view if app == "wsgi" else wrap_asgi_app(asgi_view)) as engine:
        with otel.span() as span:
            deferlib.defer(fn, _name="x")
        engine.run_until_idle(raise_errors=True)

    [run] = otel.runs
    assert seen == [of(run)]
    assert run.parent.span_id == span.get_span_context().span_id
    assert run.get_span_context().trace_id == span.get_span_context().trace_id
    assert run.kind is otel.trace.SpanKind.CONSUMER
    assert dict(run.attributes) == {
        "messaging.system": "deferlib",
        "messaging.operation.name": "run",
        "messaging.operation.type": "process",
        "messaging.destination.name": "default",
        "messaging.message.id": "x",
        "deferlib.task.attempt": 1,
        "code.function.name": run.attributes["code.function.name"],
    }
    assert run.attributes["code.function.name"].endswith(fn.__name__)
    assert run.status.is_unset


@pytest.mark.parametrize("app", [view, wrap_asgi_app(asgi_view)])
@pytest.mark.parametrize("url", ["/x", ""])
def test_a_view_runs_in_such_a_span_too(otel: Otel, app: Any, url: str) -> None:
    with testing.engine(app) as engine:
        with otel.span() as span:
            taskqueue.add(url=url)
        engine.run_until_idle()

    [run] = otel.runs
    assert seen == [of(run)]
    assert run.parent.span_id == span.get_span_context().span_id
    assert run.status.is_unset


@pytest.mark.parametrize("app", [view, wrap_asgi_app(asgi_view)])
def test_a_view_that_answers_with_an_error_has_failed(otel: Otel, app: Any) -> None:
    with testing.engine(app) as engine:
        taskqueue.add(url="/x?fail", method="GET")
        engine.run_until_idle()

    [run] = otel.runs
    assert run.status.status_code is otel.trace.StatusCode.ERROR
    assert run.status.description == "HTTP 500"


@pytest.mark.parametrize("app", ["wsgi", "asgi"])
def test_a_view_that_raises_has_its_exception_recorded(otel: Otel, app: str) -> None:
    def broken(environ: Any, start_response: Any) -> list[bytes]:
        raise LookupError("gone")

    async def asgi_broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raise LookupError("gone")

    with testing.engine(broken if app == "wsgi" else wrap_asgi_app(asgi_broken)) as engine:
        taskqueue.add(url="/x")
        engine.run_until_idle()

    [run] = otel.runs
    assert run.attributes["error.type"] == "LookupError"
    assert [event.attributes["exception.message"] for event in run.events] == ["gone"]


def test_a_failed_call_has_its_exception_recorded_and_each_attempt_its_number(otel: Otel) -> None:
    with testing.engine() as engine:
        deferlib.defer(fail)
        engine.run_until_idle()
        engine.advance(0.15)

    assert [run.attributes["deferlib.task.attempt"] for run in otel.runs] == [1, 2]
    for run in otel.runs:
        assert run.status.status_code is otel.trace.StatusCode.ERROR
        assert run.attributes["error.type"] == "ValueError"
        assert [event.attributes["exception.type"] for event in run.events] == ["ValueError"]


def test_a_call_that_is_given_up_has_failed_and_one_that_asks_to_be_run_again_has_not(otel: Otel) -> None:
    with testing.engine() as engine:
        deferlib.defer(hopeless)
        engine.run_until_idle()
        deferlib.defer(not_now)
        engine.run_until_idle()

    assert [run.status.is_unset for run in otel.runs] == [False, True]


def test_a_call_at_its_queues_url_is_one_attempt_and_one_span(otel: Otel) -> None:
    def nothing_here(environ: Any, start_response: Any) -> list[bytes]:
        start_response("404 Not Found", [])
        return []

    async def asgi_nothing_here(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    for app in (nothing_here, wrap_asgi_app(asgi_nothing_here)):
        with testing.engine(app) as engine:
            deferlib.defer(note, _url=None)
            engine.run_until_idle(raise_errors=True)

    assert [of(run) for run in otel.runs] == seen
    assert [run.status.is_unset for run in otel.runs] == [True, True]


def test_what_a_call_defers_is_a_child_of_its_run(otel: Otel) -> None:
    with testing.engine() as engine:
        deferlib.defer(defer_another)
        engine.run_until_idle(raise_errors=True)

    first, second = otel.runs
    assert second.parent.span_id == first.get_span_context().span_id
    assert first.parent is None


def test_afterwards_no_span_is_current(otel: Otel) -> None:
    with testing.engine() as engine:
        deferlib.defer(note)
        deferlib.defer(fail)
        engine.run_until_idle()

    assert current() == f"{0:032x}/{0:016x}"
    assert tracing._running.get() is None


def test_a_servers_own_span_comes_between_and_one_of_another_trace_is_linked(otel: Otel) -> None:
    """The server's instrumentation has begun a span before our middleware is called."""
    middleware = wrap_wsgi_app(view)
    spans: list[Any] = []

    def instrumented(environ: Any, start_response: Any) -> Any:
        with otel.span("server") as span:
            spans.append(span)
            return middleware(environ, start_response)

    with testing.engine() as engine:
        engine._transport._app = instrumented  # type: ignore[attr-defined]  # around the middleware, where a server is
        with otel.span() as request:
            taskqueue.add(url="/x")
        engine.run_until_idle(raise_errors=True)

    [run] = otel.runs
    assert run.parent.span_id == spans[0].get_span_context().span_id
    assert [link.context.span_id for link in run.links] == [request.get_span_context().span_id]


def test_a_failing_processor_fails_no_task(otel: Otel, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from opentelemetry.sdk.trace import SpanProcessor

    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("the processor is broken")

    monkeypatch.setattr(tracing, "_told", False)
    provider: Any = otel.trace.get_tracer_provider()
    processors = provider._active_span_processor
    monkeypatch.setattr(processors, "_span_processors", (Broken(),))
    with testing.engine() as engine:
        deferlib.defer(note)
        deferlib.defer(note)
        attempts = engine.run_until_idle(raise_errors=True)

    assert len(attempts) == len(seen) == 2
    assert [record.message for record in caplog.records if "OpenTelemetry failed" in record.message] == [
        "a task isn't traced, because OpenTelemetry failed: RuntimeError('the processor is broken')"
    ]


# --- pushed over HTTP -------------------------------------------------------------------------------------------------


def test_a_pushed_call_and_a_pushed_view_run_in_the_trace(otel: Otel, tmp_path: Path) -> None:
    server = werkzeug.serving.make_server("127.0.0.1", 0, wrap_wsgi_app(view), threaded=True, request_handler=Quiet)
    serving = threading.Thread(target=server.serve_forever, args=(0.02,))
    serving.start()
    former = config.install(None)
    try:
        runtime = config.configure(store=f"sqlite:///{tmp_path}/t.db", app=f"http://127.0.0.1:{server.port}")
        with otel.span() as span:
            deferlib.defer(note)
            taskqueue.add(url="/x")
        engine = build(runtime)
        thread = threading.Thread(target=engine.run)
        thread.start()
        until = threading.Event()
        for _ in range(1000):
            if len(otel.runs) == 2 or until.wait(0.02):
                break
        engine.stop(10 * SECOND)
        thread.join()
        engine.close()
        runtime.close()
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
        config.install(former)

    assert sorted(seen) == sorted(map(of, otel.runs))
    assert [run.parent.span_id for run in otel.runs] == [span.get_span_context().span_id] * 2


class Quiet(werkzeug.serving.WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        return
