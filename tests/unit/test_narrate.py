"""What is told of deliveries: lines on a terminal, records in a log; and the gate behind which a reload is no failure."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from deferlib import payload
from deferlib.cli import logs, narrate
from deferlib.cli.gate import Gate
from deferlib.cli.narrate import Narrator, Paper
from deferlib.core.model import (
    HOUR,
    MINUTE,
    SECOND,
    Action,
    Claim,
    Delivery,
    Kind,
    Micros,
    Outcome,
    Result,
    TaskRow,
)
from deferlib.engine.observer import LogObserver, describe, length
from deferlib.keys import Keyring
from deferlib.testing import VirtualClock
from tests.unit.engine_bench import Carrier

RING = Keyring([b"a key for the tests of the narrator"])
NOW: Micros = 1_900_000_000 * SECOND
BEGAN = NOW - MINUTE
COLUMN = 10 + 34 + 2  # where a line says what happened


def greet(*names: str) -> None:
    """What the tests defer; never run."""


def body(*names: str) -> bytes:
    return payload.seal(payload.dump_call(greet, names, {}), RING.signing, None)


def claimed(id: int = 1, name: str = "Ada", **changes: Any) -> Claim:
    claim = Claim(
        id=id, claims=id + 100, queue="default", name=None, eta=NOW, until=NOW + MINUTE, attempts=1, executions=0,
        failures=0, lost=0, first_try=NOW, status=0, reason="", method="POST", url="/_ah/queue/deferred", target="",
        headers="", namespace="", tag="", retry="", deadline=0, fail_fast=0, created=NOW, history="", body=body(name),
    )  # fmt: skip
    return claim._replace(**changes)


def row(id: int = 1, name: str = "Ada", **changes: Any) -> TaskRow:
    claim = claimed(id, name)._asdict()
    beside: dict[str, Any] = {"due": NOW, "expires": None, "died": None, "key_id": RING.signing.id}
    made = TaskRow(**{field: {**claim, **beside}[field] for field in TaskRow._fields})
    return made._replace(**changes)


def result(claim: Claim, kind: Kind = Kind.ANSWERED, micros: Micros = 12_000) -> Result:
    return Result(claim.id, claim.claims, kind, NOW - micros, NOW)


def outcome(claim: Claim, action: Action, reason: str = "", at: Micros = NOW + SECOND) -> Outcome:
    return Outcome(claim.id, claim.claims, claim.queue, action, at, reason=reason)


class Terminal(io.StringIO):
    """A terminal, as far as anybody can tell."""

    def isatty(self) -> bool:
        return True

    def read_on(self) -> str:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


class Stage:
    """A narrator, and the lines that it has written so far."""

    def __init__(self, read: Callable[[], str]) -> None:
        self.narrator = Narrator(Paper(), RING, BEGAN)
        self._read = read  # what was written since the last time
        self._text = ""

    @property
    def lines(self) -> list[str]:
        self._text += self._read()
        return self._text.split("\n")[:-1]

    @property
    def said(self) -> list[str]:
        """The lines without the time of day, their gaps made one."""
        return [re.sub(r" {2,}", " | ", line[10:]) for line in self.lines]

    def ran(self, claim: Claim) -> None:
        self.narrator.ended(NOW, claim, result(claim), outcome(claim, Action.DONE))

    def failed(self, claim: Claim, reason: str = "ValueError: no") -> None:
        self.narrator.ended(NOW, claim, result(claim), outcome(claim, Action.RETRY, reason))

    def died(self, claim: Claim) -> None:
        self.narrator.ended(NOW, claim, result(claim), outcome(claim, Action.DEAD, "limits: 3 failures"))

    def given_back(self, claim: Claim) -> None:
        back = outcome(claim, Action.RELEASE, "the engine is stopping")
        self.narrator.ended(NOW, claim, result(claim, Kind.UNSENT), back)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is told is told in one second, unless a test lets another one come."""
    second(monkeypatch, 1_000.0)


def second(monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    monkeypatch.setattr("time.monotonic", lambda: at)


@pytest.fixture
def stage(capsys: pytest.CaptureFixture[str], still: None) -> Stage:
    return Stage(lambda: capsys.readouterr().out)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, still: None) -> Callable[..., Stage]:
    """Makes a narrator on a terminal of so many columns."""

    def make(columns: int = 100, **environ: str) -> Stage:
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"COLUMNS": str(columns), **environ}.items():
            monkeypatch.setenv(name, value)
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        return Stage(screen.read_on)

    return make


# --- lines ----------------------------------------------------------------------------------------------------------


def test_task_that_is_added_and_runs_is_told_in_two_lines(stage: Stage) -> None:
    stage.narrator.queued(row(), NOW)
    stage.ran(claimed())

    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in stage.lines)
    assert [line[10:COLUMN].rstrip() for line in stage.lines] == [f"{__name__}.greet('Ada')"] * 2
    assert stage.said == [f"{__name__}.greet('Ada') | queued", f"{__name__}.greet('Ada') | ran in 12 ms"]


def test_short_subjects_stand_in_a_column_of_their_own(stage: Stage) -> None:
    stage.narrator.queued(row(body=b"", method="GET", url="/x"), NOW)
    stage.ran(claimed(body=b"", method="GET", url="/x"))

    assert [line[10:COLUMN] for line in stage.lines] == ["GET /x".ljust(36)] * 2
    assert [line[COLUMN:] for line in stage.lines] == ["queued", "ran in 12 ms"]


@pytest.mark.parametrize(
    ("wait", "text"),
    [
        (-MINUTE, "queued"),
        (0, "queued"),
        (SECOND - 1, "queued"),
        (SECOND, "queued: runs in 1 s"),
        (61 * SECOND - 300, "queued: runs in 1 m 1 s"),
        (2 * HOUR, "queued: runs in 2 h 0 m"),
    ],
)
def test_task_that_waits_is_told_with_its_time(stage: Stage, wait: Micros, text: str) -> None:
    stage.narrator.queued(row(eta=NOW + wait), NOW)

    assert stage.said == [f"{__name__}.greet('Ada') | {text}"]


def test_task_of_another_queue_and_a_task_without_a_call_are_named_so(stage: Stage) -> None:
    stage.narrator.queued(row(1, queue="mail"), NOW)
    stage.narrator.queued(row(2, queue="mail", body=b"hand-made", url="/report"), NOW)
    stage.narrator.queued(row(3, body=b"", method="PULL", url=""), NOW)

    assert [line.split(" | ")[0] for line in stage.said] == [f"mail: {__name__}.greet('Ada')", "mail: POST /report", "PULL"]


def test_adders_late_word_does_not_come_after_the_end(stage: Stage) -> None:
    stage.ran(claimed())
    stage.narrator.queued(row(), NOW)

    assert [line.split(" | ")[1] for line in stage.said] == ["queued", "ran in 12 ms"]


def test_task_from_before_is_not_told_to_be_queued(stage: Stage) -> None:
    stage.ran(claimed(created=BEGAN))

    assert [line.split(" | ")[1] for line in stage.said] == ["ran in 12 ms"]


def test_nothing_is_told_to_be_queued_twice(stage: Stage) -> None:
    stage.narrator.queued(row(), NOW)
    stage.narrator.queued(row(), NOW)
    stage.failed(claimed())
    stage.narrator.queued(row(), NOW)
    stage.ran(claimed(attempts=2))

    assert [line.split(" | ")[1] for line in stage.said] == [
        "queued",
        "failed: ValueError: no; retry in 1 s",
        "ran in 12 ms (attempt 2)",
    ]


def test_what_is_known_of_tasks_is_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrate, "_KNOWN", 2)
    for id in (1, 2, 3):
        stage.narrator.queued(row(id), NOW)

    stage.narrator.queued(row(3), NOW)
    assert len(stage.lines) == 3, "the newest is known"

    stage.narrator.queued(row(1), NOW)
    assert len(stage.lines) == 4, "the oldest was forgotten"


def test_dead_letter_is_told_with_the_command_that_shows_it(stage: Stage) -> None:
    stage.died(claimed(created=BEGAN, name="Ada"))
    stage.narrator.ended(
        NOW, claimed(2, created=BEGAN)._replace(name="nightly"), None, outcome(claimed(2), Action.DEAD, "lost")
    )

    assert [line.split(" | ")[1] for line in stage.said] == [
        "is a dead letter now: limits: 3 failures · deferlib tasks show 1",
        "is a dead letter now: lost · deferlib tasks show nightly",
    ]


@pytest.mark.parametrize("tty", [False, True])
def test_hostile_text_can_do_nothing_to_whoever_reads_it(stage: Stage, terminal: Callable[..., Stage], tty: bool) -> None:
    if tty:
        stage = terminal(NO_COLOR="1")
    evil = "\x1b]0;owned\x07\r\n\x9b31m\u202e"

    stage.narrator.queued(row(1, evil, queue=evil), NOW)
    stage.narrator.queued(row(2, body=b"", url=f"/{evil}"), NOW)
    stage.failed(claimed(created=BEGAN), evil)

    assert all(line.isprintable() for line in stage.lines)
    assert len(stage.lines) == 3


# --- the flood ------------------------------------------------------------------------------------------------------


def test_flood_is_counted_and_summed_up_when_the_second_is_over(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for id in range(100):
        stage.narrator.queued(row(id), NOW)
    for id in range(1_500):
        stage.ran(claimed(id, created=BEGAN))
    assert len(stage.lines) == 40

    second(monkeypatch, 1_001.0)
    stage.narrator.queued(row(2_000), NOW)

    assert stage.said[40:] == ["… and more | 60 queued, 1,500 ran", f"{__name__}.greet('Ada') | queued"]


def test_flood_that_has_ended_is_summed_up_once_by_the_tick(stage: Stage) -> None:
    for id in range(43):
        stage.ran(claimed(id, created=BEGAN))

    stage.narrator.tick()
    stage.narrator.tick()

    assert len(stage.lines) == 41
    assert stage.said[40] == "… and more | 3 ran"


def test_flood_of_what_is_given_back_is_counted_as_that(stage: Stage) -> None:
    for id in range(45):
        stage.given_back(claimed(id, created=BEGAN))

    stage.narrator.tick()

    assert stage.said[39] == f"{__name__}.greet('Ada') | is given back: the engine is stopping"
    assert stage.said[40:] == ["… and more | 5 given back"]


def test_tick_tells_nothing_if_all_was_shown(stage: Stage) -> None:
    stage.ran(claimed())

    stage.narrator.tick()

    assert len(stage.lines) == 2


def test_next_second_has_room_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for id in range(40):
        stage.narrator.queued(row(id), NOW)

    second(monkeypatch, 1_001.5)
    for id in range(40, 80):
        stage.narrator.queued(row(id), NOW)

    assert len(stage.lines) == 80
    assert not any("and more" in line for line in stage.lines)


def test_failures_are_never_cut(stage: Stage) -> None:
    for id in range(100):
        stage.failed(claimed(id, created=BEGAN))
        stage.died(claimed(id, created=BEGAN))

    assert sum("failed: " in line for line in stage.lines) == 100
    assert sum("is a dead letter now" in line for line in stage.lines) == 100


# --- the terminal ---------------------------------------------------------------------------------------------------


def everything(stage: Stage) -> None:
    stage.narrator.queued(row(), NOW)
    stage.ran(claimed())
    stage.failed(claimed())
    stage.died(claimed())


def test_terminal_has_colours(terminal: Callable[..., Stage]) -> None:
    stage = terminal()

    everything(stage)

    assert [re.findall(r"\x1b\[(\d+)m", line) for line in stage.lines] == [
        ["2", "0"],
        ["32", "0"],
        ["33", "0"],
        ["31", "0"],
    ]


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_terminal_that_wants_no_colours_gets_none(terminal: Callable[..., Stage], environ: dict[str, str]) -> None:
    stage = terminal(**environ)

    everything(stage)

    assert len(stage.lines) == 4
    assert not any("\x1b" in line for line in stage.lines)


def test_empty_no_color_is_none(terminal: Callable[..., Stage]) -> None:
    stage = terminal(NO_COLOR="")

    everything(stage)

    assert all("\x1b" in line for line in stage.lines)


def test_file_has_no_colours(stage: Stage) -> None:
    everything(stage)

    assert not any("\x1b" in line for line in stage.lines)


@pytest.mark.parametrize(("columns", "width"), [(20, 34), (60, 34), (80, 44), (100, 64)])
def test_subject_is_cut_to_leave_room_on_a_terminal(terminal: Callable[..., Stage], columns: int, width: int) -> None:
    stage = terminal(columns, NO_COLOR="1")

    stage.narrator.queued(row(1, "x" * 100), NOW)

    [line] = stage.lines
    assert line.endswith("…  queued")
    assert len(line) == 10 + width + len("  queued")


def test_subject_is_whole_in_a_file(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")

    stage.narrator.queued(row(1, "x" * 55), NOW)

    assert stage.said == [f"{__name__}.greet('{'x' * 55}') | queued"]


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_output_that_nobody_reads_any_more_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, still: None, error: type[Exception]
) -> None:
    class Broken(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            Broken.writes += 1
            raise error("gone")

    monkeypatch.setattr(sys, "stdout", Broken())
    stage = Stage(str)

    everything(stage)

    assert Broken.writes == 4


def test_output_that_was_never_there_stops_nothing(monkeypatch: pytest.MonkeyPatch, still: None) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    narrator = Narrator(Paper(), RING, BEGAN)

    narrator.queued(row(), NOW)
    narrator.tick()

    assert sys.stdout is None


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0 ms"),
        (342, "0.34 ms"),
        (1_000, "1 ms"),
        (1_250, "1.2 ms"),
        (12_345, "12 ms"),
        (99_000, "99 ms"),
        (99_499, "99 ms"),
        (99_600, "0.0996 s"),
        (100_000, "0.1 s"),
        (342_000, "0.342 s"),
        (1_250_000, "1.25 s"),
        (12_345_678, "12.3 s"),
        (59_000_000, "59 s"),
        (60_000_000, "1 m 0 s"),
        (200_999_999, "3 m 20 s"),
        (3_599_000_000, "59 m 59 s"),
        (3_600_000_000, "1 h 0 m"),
        (7_500_000_000, "2 h 5 m"),
        (100 * HOUR, "100 h 0 m"),
    ],
)
def test_length_has_two_or_three_digits(micros: Micros, text: str) -> None:
    assert length(micros) == text


@pytest.mark.parametrize(
    ("action", "kind", "reason", "level", "text"),
    [
        (Action.DONE, Kind.ANSWERED, "", logging.DEBUG, "ran in 12 ms"),
        (Action.DONE, None, "", logging.DEBUG, "ran"),
        (Action.DEAD, Kind.ANSWERED, "permanent: no", logging.ERROR, "is a dead letter now: permanent: no"),
        (Action.DEAD, None, "lost: it died", logging.ERROR, "is a dead letter now: lost: it died"),
        (Action.RELEASE, Kind.UNSENT, "the engine is stopping", logging.INFO, "is given back: the engine is stopping"),
        (Action.RELEASE, None, "target 'x' is not configured", logging.INFO, "is given back: target 'x' is not configured"),
        (Action.RETRY, Kind.ANSWERED, "HTTP 500", logging.WARNING, "failed: HTTP 500; retry in 1 s"),
        (Action.RETRY, Kind.MALFORMED, "nonsense", logging.WARNING, "failed: nonsense; retry in 1 s"),
        (Action.RETRY, Kind.UNKNOWN, "reset", logging.WARNING, "failed: reset; retry in 1 s"),
        (Action.RETRY, Kind.TIMEOUT, "timeout", logging.WARNING, "took longer than its deadline: retry in 1 s"),
        (Action.RETRY, Kind.UNREACHABLE, "refused", logging.WARNING, "could not be delivered: refused; retry in 1 s"),
        (Action.RETRY, Kind.INTERRUPTED, "reset", logging.INFO, "was cut off by the reload: runs again at once"),
        (Action.RETRY, None, "no free slot", logging.WARNING, "was not started: no free slot; retry in 1 s"),
        (Action.RENEW, None, "", logging.INFO, f"renew at {NOW + SECOND}"),
    ],
)
def test_every_ending_has_its_words_and_its_level(
    action: Action, kind: Kind | None, reason: str, level: int, text: str
) -> None:
    claim = claimed()

    ending = describe(NOW, claim, None if kind is None else result(claim, kind), outcome(claim, action, reason))

    assert ending == (level, text)


def test_later_attempt_is_counted_and_a_time_that_has_passed_is_now() -> None:
    claim = claimed(attempts=3)

    ran = describe(NOW, claim, result(claim), outcome(claim, Action.DONE))
    late = describe(NOW, claim, result(claim), outcome(claim, Action.RETRY, "no", NOW - SECOND))

    assert ran.text == "ran in 12 ms (attempt 3)"
    assert late.text == "failed: no; retry in 0 ms"


# --- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "deferlib.engine"):
        yield caplog


@pytest.mark.parametrize(
    ("action", "level", "text"),
    [
        (Action.DONE, "DEBUG", "task nightly of queue mail ran in 12 ms (attempt 2)"),
        (Action.RETRY, "WARNING", "task nightly of queue mail failed: HTTP 500; retry in 1 s"),
        (Action.DEAD, "ERROR", "task nightly of queue mail is a dead letter now: HTTP 500"),
        (Action.RELEASE, "INFO", "task nightly of queue mail is given back: HTTP 500"),
    ],
)
def test_ending_is_logged_at_its_level_with_its_keys_and_no_arguments(
    engine_log: pytest.LogCaptureFixture, action: Action, level: str, text: str
) -> None:
    claim = claimed(1, "canary-argument", queue="mail", attempts=2)._replace(name="nightly")

    LogObserver().ended(NOW, claim, result(claim), outcome(claim, action, "HTTP 500"))

    [record] = engine_log.records
    keys = {key: getattr(record, key) for key in ("task", "queue", "attempt")}
    assert (record.name, record.levelname, record.getMessage()) == ("deferlib.engine", level, text)
    assert keys == {"task": "nightly", "queue": "mail", "attempt": 2}
    assert "canary" not in str(vars(record))


def test_success_is_not_logged_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    claim = claimed()

    with caplog.at_level(logging.INFO, "deferlib.engine"):
        LogObserver().ended(NOW, claim, result(claim), outcome(claim, Action.DONE))
        LogObserver().ended(NOW, claim, result(claim), outcome(claim, Action.RETRY, "no"))

    assert [record.levelname for record in caplog.records] == ["WARNING"]


@contextmanager
def logging_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """Log as a fresh process does, without handlers; the root logger, and what comes on stderr."""
    root, ours = logging.getLogger(), logging.getLogger("deferlib")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers[:] = []
    errors = io.StringIO()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", errors)
            yield root, errors
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def test_log_goes_to_stderr_a_line_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_afresh(monkeypatch) as (_, errors):
        logs.log_to_stderr("warning")
        logging.getLogger("deferlib.engine").warning("task %s failed", "\x1b[31m\nforged")
        logging.getLogger("deferlib.engine").info("task 7 ran")
        logging.getLogger("app").warning("the app's own")

    assert [line.split(" ", 2)[2] for line in errors.getvalue().splitlines()] == [
        r"WARNING deferlib.engine: task \x1b[31m\nforged failed",
        "WARNING app: the app's own",
    ]


def test_error_in_the_log_keeps_its_lines_and_can_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_afresh(monkeypatch) as (_, errors):
        logs.log_to_stderr("error")
        try:
            raise ValueError("\x1b[31m")
        except ValueError:
            logging.getLogger("deferlib.engine").exception("a turn failed")

    lines = errors.getvalue().splitlines()
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == r"ValueError: \x1b[31m"


def test_app_that_has_set_up_its_log_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_afresh(monkeypatch) as (root, errors):
        own = logging.StreamHandler(io.StringIO())
        root.addHandler(own)
        root.setLevel(logging.CRITICAL)

        logs.log_to_stderr("info")
        logging.getLogger("deferlib.engine").info("task 7 ran")

        assert root.handlers == [own]
        assert root.level == logging.CRITICAL
    assert own.stream.getvalue() == "task 7 ran\n"
    assert errors.getvalue() == ""


# --- the gate -------------------------------------------------------------------------------------------------------

APP, OTHER = "http://127.0.0.1:8080", "http://worker"


@pytest.fixture
def carrier() -> Carrier:
    return Carrier(VirtualClock())


@pytest.fixture
def gate(carrier: Carrier) -> Gate:
    return Gate(carrier, APP)


def deliver(gate: Gate, id: int, base: str = APP) -> Delivery:
    delivery = Delivery(claimed(id), base, MINUTE)
    gate.send(delivery)
    return delivery


def kinds(results: Sequence[Result]) -> dict[int, Kind]:
    return {each.id: each.kind for each in results}


def test_gate_has_room_only_while_it_is_open(gate: Gate, carrier: Carrier) -> None:
    at_first = gate.room(APP)
    gate.open()
    opened = gate.room(APP)
    gate.shut(reloading=True)

    assert (at_first, opened, gate.room(APP)) == (0, carrier.slots, 0)


@pytest.mark.parametrize("reloading", [False, True])
def test_shut_gate_is_no_matter_to_other_targets(gate: Gate, carrier: Carrier, reloading: bool) -> None:
    gate.shut(reloading=reloading)

    assert gate.room(OTHER) == carrier.slots


def test_gate_that_opens_wakes_the_engine(gate: Gate, carrier: Carrier) -> None:
    gate.open()

    assert carrier.wakes == 1


def test_calls_that_a_reload_cuts_off_are_interrupted_and_others_end_as_they_do(gate: Gate, carrier: Carrier) -> None:
    gate.open()
    cut, failed, late, foreign = deliver(gate, 1), deliver(gate, 2), deliver(gate, 3), deliver(gate, 4, OTHER)
    done, dead = deliver(gate, 5), deliver(gate, 6)

    gate.shut(reloading=True)
    carrier.answer(cut, kind=Kind.UNKNOWN)
    carrier.answer(failed, 500)
    carrier.answer(late, kind=Kind.TIMEOUT)
    carrier.answer(foreign, kind=Kind.UNKNOWN)
    carrier.answer(done, 200)
    carrier.answer(dead, 200, outcome="permanent")

    ended = kinds(gate.results())
    assert {id for id, kind in ended.items() if kind is Kind.INTERRUPTED} == {1, 2, 3}
    assert (ended[4], ended[5], ended[6]) == (Kind.UNKNOWN, Kind.ANSWERED, Kind.ANSWERED)


@pytest.mark.parametrize("moment", ["open", "gone", "reopened"])
def test_calls_that_break_without_a_reload_are_not_interrupted(gate: Gate, carrier: Carrier, moment: str) -> None:
    gate.open()
    delivery = deliver(gate, 1)

    if moment == "gone":
        gate.shut(reloading=False)
    if moment == "reopened":
        gate.shut(reloading=True)
        gate.open()
    carrier.answer(delivery, kind=Kind.UNKNOWN)

    assert kinds(gate.results()) == {1: Kind.UNKNOWN}


def test_gate_passes_on_what_it_does_not_decide(gate: Gate, carrier: Carrier) -> None:
    first, second = deliver(gate, 1), deliver(gate, 2)

    gate.cancel(*first.claim[:2])
    withdrawn = gate.withdraw()
    gate.wait(carrier.clock.now() + SECOND)
    gate.wake()
    gate.close()

    assert carrier.cancelled == [first.claim[:2]]
    assert kinds(withdrawn) == {second.claim.id: Kind.UNSENT}
    assert carrier.wakes == 1
