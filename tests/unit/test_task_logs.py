"""Log records that say in which task they were logged."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import deferlib
from deferlib import context, task_logs, taskqueue, testing, wrap_wsgi_app
from deferlib.contrib.asgi import wrap_asgi_app

LINE = "%(task_name)s/%(task_queue)s/%(task_attempt)d %(message)s"

log = logging.getLogger("app.of.the.test")


class Lines(logging.Handler):
    """Keeps what an app's handler would write, as its formatter makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter(LINE))

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))  # what it raises comes through


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The app's handler, at the root, with the factory of a fresh process."""
    former, known = logging.getLogRecordFactory(), task_logs._known
    logging.setLogRecordFactory(logging.LogRecord)
    task_logs._known = None
    handler = Lines()
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    headers = logging.getLogger("deferlib.handler.headers")
    headers.setLevel(logging.WARNING)
    yield handler
    root.removeHandler(handler)
    headers.setLevel(logging.NOTSET)
    root.setLevel(level)
    logging.setLogRecordFactory(former)
    task_logs._known = known


def say(text: str) -> None:
    log.info(text)


def fail(text: str) -> None:
    log.info(text)
    raise ValueError(text)


def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    say("from the view")
    start_response("204 No Content", [])
    return []


def test_records_of_a_deferred_call_have_its_name_queue_and_attempt(lines: Lines) -> None:
    with testing.engine() as engine:
        deferlib.defer(say, "hello", _name="greeting")
        engine.run_until_idle()

    assert lines.lines == ["greeting/default/1 hello"]


def test_the_line_that_tells_of_a_failure_has_them_too_and_each_attempt_its_number(lines: Lines) -> None:
    with testing.engine() as engine:
        deferlib.defer(fail, "no", _name="hopeless")
        engine.run_until_idle()
        engine.advance(0.15)

    said = [line.split(" ")[0] for line in lines.lines if line.startswith("hopeless")]
    handler = [r for r in lines.records if r.name == "deferlib.handler"]
    assert said.count("hopeless/default/1") >= 2
    assert said.count("hopeless/default/2") >= 2
    assert [(r.__dict__["task_name"], r.__dict__["task_attempt"]) for r in handler] == [("hopeless", 1), ("hopeless", 2)]


def test_records_of_a_wsgi_view_have_them(lines: Lines) -> None:
    with testing.engine(wrap_wsgi_app(view)) as engine:
        taskqueue.add(url="/tasks/x", name="x")
        engine.run_until_idle()

    assert lines.lines == ["x/default/1 from the view"]


def test_records_of_an_asgi_view_have_them(lines: Lines) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            say("from the view")
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    with testing.engine(wrap_asgi_app(app)) as engine:
        taskqueue.add(url="/tasks/x", name="x")
        engine.run_until_idle()

    assert lines.lines == ["x/default/1 from the view"]


def test_the_very_first_line_of_a_process_is_a_tasks_too(lines: Lines) -> None:
    logging.getLogger("deferlib.handler.headers").setLevel(logging.INFO)

    with testing.engine() as engine:
        deferlib.defer(say, "hello", _name="x")
        engine.run_until_idle()

    assert [line.partition(" ")[0] for line in lines.lines] == ["x/default/1"] * 2


def test_outside_of_tasks_the_same_format_shows_nothing_of_them(lines: Lines) -> None:
    with testing.engine() as engine:
        deferlib.defer(say, "inside", _name="x")
        engine.run_until_idle()
        say("outside")

    assert lines.lines == ["x/default/1 inside", "//0 outside"]


def test_after_install_the_format_works_before_any_task_has_run(lines: Lines) -> None:
    with pytest.raises(ValueError, match="task_name"):
        say("too early")

    task_logs.install()
    say("ready")

    assert lines.lines == ["//0 ready"]


def test_installing_again_wraps_nothing_twice(lines: Lines) -> None:
    task_logs.install()
    first = logging.getLogRecordFactory()
    task_logs.install()

    assert logging.getLogRecordFactory() is first


def test_a_factory_that_was_there_before_is_kept(lines: Lines) -> None:
    class Record(logging.LogRecord):
        pass

    logging.setLogRecordFactory(Record)
    task_logs.install()
    say("hello")

    assert type(lines.records[0]) is Record
    assert lines.lines == ["//0 hello"]


def test_a_factory_that_replaces_ours_is_wrapped_when_the_next_task_runs(lines: Lines) -> None:
    class Record(logging.LogRecord):
        pass

    task_logs.install()
    logging.setLogRecordFactory(Record)
    with testing.engine() as engine:
        deferlib.defer(say, "hello", _name="x")
        engine.run_until_idle()

    assert type(lines.records[0]) is Record
    assert lines.lines == ["x/default/1 hello"]


def test_a_factory_that_calls_ours_is_left_alone(lines: Lines) -> None:
    task_logs.install()
    ours = logging.getLogRecordFactory()

    def theirs(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = ours(*args, **kwargs)
        record.request_id = 7
        return record

    logging.setLogRecordFactory(theirs)
    task_logs.install()

    assert logging.getLogRecordFactory() is theirs


def test_a_factory_that_refuses_what_is_no_real_record_is_wrapped_all_the_same(lines: Lines) -> None:
    def picky(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        if not name.startswith("app."):
            raise LookupError(name)
        return logging.LogRecord(name, *args, **kwargs)

    logging.setLogRecordFactory(picky)
    task_logs.install()
    say("hello")

    assert lines.lines == ["//0 hello"]


def test_an_app_that_gives_records_these_names_by_itself_has_its_way(lines: Lines) -> None:
    def own() -> None:
        log.info("hello", extra={"task_name": "mine", "order": 7})

    with testing.engine() as engine:
        deferlib.defer(own, _name="x")
        engine.run_until_idle()

    assert lines.lines == ["mine/default/1 hello"]
    assert lines.records[0].__dict__["order"] == 7


@pytest.mark.parametrize("style", ["{task_name}:{task_attempt} {message}", "${task_name}:${task_attempt} ${message}"])
def test_every_style_of_format_has_them(lines: Lines, style: str) -> None:
    lines.setFormatter(logging.Formatter(style, style="{" if style[0] == "{" else "$"))
    task_logs.install()
    say("hello")

    assert lines.lines == [":0 hello"]


def test_a_record_that_is_copied_or_sent_away_keeps_them(lines: Lines) -> None:
    with testing.engine() as engine:
        deferlib.defer(say, "hello", _name="x")
        engine.run_until_idle()
    [record] = lines.records

    sent = pickle.dumps(record)

    assert copy.copy(record).__dict__["task_name"] == "x"
    assert pickle.loads(sent).task_name == "x"
    assert b"deferlib.task_logs" not in sent  # what arrives elsewhere needs no deferlib there


def test_records_of_code_that_isnt_the_tasks_any_more_have_none(lines: Lines) -> None:
    task_logs.install()
    token = context.running.set(None)
    say("outside")
    context.running.reset(token)

    assert lines.lines == ["//0 outside"]


def test_importing_deferlib_leaves_logging_alone() -> None:
    code = "import logging, deferlib; assert logging.getLogRecordFactory() is logging.LogRecord"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
