"""What an engine counts, and what Prometheus reads of it."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import deferlib
from deferlib import config
from deferlib.core.model import SECOND, Action, Claim, Kind, Micros, Outcome, QueueConfig, QueueSource, Result
from deferlib.core.rules import Rules
from deferlib.core.scheduler import Scheduler
from deferlib.engine import metrics as module
from deferlib.engine.engine import Engine
from deferlib.engine.metrics import Exposition, Histogram, Metrics, QueueNumbers, target_names
from deferlib.errors import ConfigError, StoreUnavailableError
from deferlib.targets import Targets
from deferlib.testing import InlineTransport, VirtualClock

DOCS = Path(__file__).parent.parent.parent / "docs/reference/metrics.md"
NOW: Micros = 1_763_737_200 * SECOND


class Told:
    """The observer behind the metrics."""

    def __init__(self) -> None:
        self.endings: list[Outcome] = []

    def ended(self, now: Micros, claim: Claim, result: Result | None, outcome: Outcome) -> None:
        self.endings.append(outcome)


class Ticks:
    """A monotonic clock that is set."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


class Site:
    """A runtime with a store on disk, and an engine that is observed, turn by turn."""

    def __init__(self, folder: Path) -> None:
        self.clock = VirtualClock()
        queues = [{"name": "default"}, {"name": "mail", "rate": 0}, {"name": "pulled", "mode": "pull"}]
        self.runtime = config.configure(
            store=f"sqlite:///{folder}/tasks.db", queues=queues, clock=self.clock, targets="worker=http://w:1"
        )
        self.store = self.runtime.store
        configs = self.runtime.queues()
        self.store.run(lambda tx: tx.put_queues(configs, QueueSource.FILE))
        self.told, self.ticks = Told(), Ticks()
        self.metrics = Metrics(self.told, self.ticks)
        self.numbers = QueueNumbers(self.runtime, self.ticks)
        self.exposition = Exposition(self.metrics, self.numbers, target_names(self.runtime))
        self.transport = InlineTransport(deferlib.handler, self.clock)
        scheduler = Scheduler(Rules(node="n", in_process=True, target=Targets().get), Random(0))
        self.engine = Engine(
            self.store, self.transport, scheduler, self.clock,
            node="n", lease=30 * SECOND, observer=self.metrics, monitor=self.metrics,
        )  # fmt: skip
        self.exposition.engine = self.engine

    def turns(self, count: int = 12) -> None:
        for _ in range(count):
            with self.metrics:
                self.engine.turn()
            self.transport.wait(0)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.engine.wake()
        self.turns()

    def read(self) -> dict[str, float]:
        """Return what a scrape reads, as `name{label="value"}` and its number; the last second's numbers aren't kept."""
        self.ticks.at += 1.0
        return parsed(self.exposition.text().decode())


def parsed(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    former = config.install(None)
    site = Site(tmp_path)
    yield site
    site.numbers.close()
    site.runtime.close()
    config.install(former)


def nothing() -> None:
    pass


def fail() -> None:
    raise ValueError("canary-argument")


def hopeless() -> None:
    raise deferlib.PermanentTaskFailure


def claim_of(queue: str = "default", eta: Micros = NOW) -> Claim:
    return Claim(
        1, 1, queue, "canary-name", eta, eta + 30 * SECOND, 1, 0, 0, 0, eta, 0, "", "POST", "/canary", "", "", "", "", "",
        0, 0, eta, "", b"canary-body",
    )  # fmt: skip


def ended(kind: Kind, started: Micros, ended: Micros) -> Result:
    return Result(1, 1, kind, started, ended)


def done(queue: str = "default") -> Outcome:
    return Outcome(1, 1, queue, Action.DONE, NOW)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "bucket"), [(0, 0), (100, 0), (101, 1), (1000, 1), (1001, 2), (2000, 2), (2001, 3), (10**12, 3)]
)
def test_a_span_is_counted_in_the_first_bucket_that_it_doesnt_exceed(span: Micros, bucket: int) -> None:
    histogram = Histogram((0.0001, 0.001, 0.002))
    histogram.add(span)

    assert histogram.counts == [int(number == bucket) for number in range(4)]
    assert histogram.total == span
    assert [count for _, count in histogram.buckets()] == [float(number >= bucket) for number in range(4)]
    assert [label for label, _ in histogram.buckets()] == ["0.0001", "0.001", "0.002", "+Inf"]


def test_endings_are_counted_by_queue_and_outcome(site: Site) -> None:
    for call in (nothing, nothing, fail, hopeless):
        deferlib.defer(call)
    site.advance(0)
    site.metrics.lost(claim_of())
    found = site.read()

    counts = {name: found[f'deferlib_attempts_total{{outcome="{name}",queue="default"}}'] for name in OUTCOMES}
    assert counts == {"done": 2, "retried": 1, "dead": 1, "released": 0, "lost": 1}
    assert len(site.told.endings) == 4


OUTCOMES = ("done", "retried", "dead", "released", "lost")


def test_a_task_that_is_given_back_is_counted_as_released(site: Site) -> None:
    outcome = Outcome(1, 1, "default", Action.RELEASE, NOW)
    site.metrics.ended(NOW, claim_of(), ended(Kind.UNSENT, NOW, NOW), outcome)

    assert site.read()['deferlib_attempts_total{outcome="released",queue="default"}'] == 1
    assert site.told.endings == [outcome]


def test_delay_is_from_due_to_start_and_run_from_start_to_end() -> None:
    metrics = Metrics(Told())
    metrics.ended(NOW, claim_of(eta=NOW), ended(Kind.ANSWERED, NOW + 3_000, NOW + 2 * SECOND + 3_000), done())

    queue = metrics.queues["default"]
    assert queue.delays.total == 3_000
    assert queue.runs.total == 2 * SECOND


@pytest.mark.parametrize("kind", Kind)
def test_what_never_reached_its_target_has_neither_delay_nor_run(kind: Kind) -> None:
    metrics = Metrics(Told())
    metrics.ended(NOW, claim_of(), ended(kind, NOW, NOW), done())
    metrics.ended(NOW, claim_of(), None, done())

    reached = int(kind not in (Kind.UNSENT, Kind.UNREACHABLE))
    assert sum(metrics.queues["default"].delays.counts) == sum(metrics.queues["default"].runs.counts) == reached


def test_a_clock_that_goes_back_makes_no_negative_times() -> None:
    metrics = Metrics(Told())
    metrics.ended(NOW, claim_of(eta=NOW), ended(Kind.ANSWERED, NOW - 5, NOW - 9), done())

    assert metrics.queues["default"].delays.total == metrics.queues["default"].runs.total == 0


def test_turns_are_timed_and_failed_ones_counted_by_what_failed(site: Site) -> None:
    for error in (None, StoreUnavailableError("gone"), KeyError("bug")):
        try:
            with site.metrics:
                site.ticks.at += 0.02
                if error is not None:
                    raise error
        except (StoreUnavailableError, KeyError):
            pass
        assert site.metrics.failed == {None: "", StoreUnavailableError: "store", KeyError: "other"}[error and type(error)]

    found = site.read()
    assert found["deferlib_turn_seconds_count"] == 3
    assert found["deferlib_turn_seconds_sum"] == pytest.approx(0.06)
    assert found['deferlib_turn_seconds_bucket{le="0.01"}'] == 0
    assert found['deferlib_turn_seconds_bucket{le="0.025"}'] == 3
    assert found['deferlib_turn_failures_total{kind="store"}'] == 1
    assert found['deferlib_turn_failures_total{kind="other"}'] == 1


def test_an_engine_that_runs_tells_of_its_turns_and_of_what_fails_them(site: Site) -> None:
    broken = threading.Event()

    def step(name: str) -> None:
        if name == "commit" and not broken.is_set():
            broken.set()
            raise StoreUnavailableError("the disk is gone")

    site.engine._step = step
    deferlib.defer(nothing)
    thread = threading.Thread(target=site.engine.run)
    thread.start()
    seen = threading.Event()
    for _ in range(500):
        if site.told.endings or seen.wait(0.02):
            break
    site.engine.stop(5 * SECOND)
    thread.join()

    assert site.metrics.failures == {"store": 1, "other": 0}
    assert site.metrics.thread is thread
    assert [outcome.action for outcome in site.told.endings] == [Action.DONE]
    assert site.engine.stopping


def test_a_lease_that_is_lost_to_another_engine_is_counted_and_fenced(site: Site) -> None:
    held: list[Any] = []
    site.transport.send = held.append  # type: ignore[method-assign]  # it runs for ever
    deferlib.defer(nothing, _name="x")
    site.turns()
    assert site.engine.in_flight_by_base == {"": 1}
    site.store.run(lambda tx: tx.take_over(site.clock.now(), site.clock.now() + 60 * SECOND))
    site.store.run(lambda tx: tx.delete(site.clock.now(), "default", ["x"]))
    site.advance(15)

    found = site.read()
    assert len(held) == 1
    assert found['deferlib_attempts_total{outcome="lost",queue="default"}'] == 1
    assert found["deferlib_fenced_settles_total"] == 1
    assert site.engine.in_flight_by_base == {}


# --- what is read -----------------------------------------------------------------------------------------------------


def test_gauges_say_what_the_store_says(site: Site) -> None:
    deferlib.defer(hopeless)
    site.advance(0)
    deferlib.defer(nothing, _queue="mail")
    deferlib.defer(nothing, _queue="mail", _countdown=3600)
    site.store.run(lambda tx: tx.pause(["default"], True))
    site.advance(90)
    found = site.read()

    assert found['deferlib_queue_tasks{queue="mail"}'] == 2
    assert found['deferlib_queue_oldest_due_seconds{queue="mail"}'] == 90
    assert found['deferlib_queue_oldest_due_seconds{queue="default"}'] == 0
    assert found['deferlib_queue_dead_letters{queue="default"}'] == 1
    assert [found[f'deferlib_queue_paused{{queue="{name}"}}'] for name in ("default", "mail", "pulled")] == [1, 1, 0]
    assert [found[f'deferlib_queue_disabled{{queue="{name}"}}'] for name in ("default", "mail", "pulled")] == [0, 0, 0]
    assert found["deferlib_store_up"] == 1


def test_what_is_only_scheduled_is_not_overdue(site: Site) -> None:
    deferlib.defer(nothing, _countdown=60)

    assert site.read()['deferlib_queue_oldest_due_seconds{queue="default"}'] == 0


def test_in_flight_is_told_by_target_and_by_queue(site: Site) -> None:
    site.transport.send = lambda delivery: None  # type: ignore[method-assign]  # they run for ever
    for _ in range(3):
        deferlib.defer(nothing)
    site.turns()
    found = site.read()

    assert found['deferlib_in_flight{target="default"}'] == 3
    assert found['deferlib_in_flight{target="worker"}'] == 0
    assert found['deferlib_queue_in_flight{queue="default"}'] == 3


def test_targets_that_nobody_configured_by_name_are_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = {"http://w:1": 2, "http://any.example.com": 3, "https://hooks.example.com": 4, "http://127.0.0.1:8080": 5}
    monkeypatch.setattr(Engine, "in_flight_by_base", property(lambda engine: bases))
    found = {name: value for name, value in site.read().items() if name.startswith("deferlib_in_flight")}

    assert found == {
        'deferlib_in_flight{target="worker"}': 2,
        'deferlib_in_flight{target="other"}': 7,
        'deferlib_in_flight{target="default"}': 5,
    }


def test_counters_of_a_push_queue_begin_at_zero_before_anything_ran(site: Site) -> None:
    found = site.read()

    assert found['deferlib_attempts_total{outcome="done",queue="mail"}'] == 0
    assert found['deferlib_run_seconds_count{queue="mail"}'] == 0
    assert 'deferlib_attempts_total{outcome="done",queue="pulled"}' not in found


def test_metrics_of_the_process_and_of_the_app_are_there_too(site: Site) -> None:
    counter = prometheus_client.Counter("shop_orders", "Orders.")
    try:
        counter.inc(5)
        found = site.read()
    finally:
        prometheus_client.REGISTRY.unregister(counter)

    assert found["process_resident_memory_bytes"] > 1e6
    assert found["shop_orders_total"] == 5


def test_a_broken_collector_of_the_app_hides_nothing_of_the_engine(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def describe(self) -> list[Any]:
            return []

        def collect(self) -> list[Any]:
            raise RuntimeError("no")

    broken: Any = Broken()
    prometheus_client.REGISTRY.register(broken)
    try:
        found = [site.read(), site.read()]
    finally:
        prometheus_client.REGISTRY.unregister(broken)

    assert all(each["deferlib_store_up"] == 1 for each in found)
    assert [record.levelname for record in caplog.records if "collectors failed" in record.message] == ["ERROR"]


def test_the_store_is_read_once_a_second_at_most(site: Site) -> None:
    first = site.numbers.read()
    site.ticks.at += 0.9
    again = site.numbers.read()
    site.ticks.at += 0.1
    later = site.numbers.read()

    assert again is first
    assert later is not first


def test_the_store_is_read_while_a_turn_holds_its_connections(site: Site) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def turn() -> None:
        with site.store.begin(), _Held(site.store._reader.lock):  # type: ignore[attr-defined]  # SQLite's
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=turn)
    thread.start()
    inside.wait(10)
    try:
        numbers = site.numbers.read()  # would wait for the engine's connection
        assert thread.is_alive(), "it waited until the turn gave up"
    finally:
        go_on.set()
        thread.join()

    assert numbers is not None
    assert {row.name for row, _ in numbers.queues} == {"default", "mail", "pulled"}


class _Held:
    """A lock of the store, held as a transaction holds it."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._turn = self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release(self._turn)


def test_a_store_that_is_gone_is_told_and_the_rest_is_there(site: Site, tmp_path: Path) -> None:
    deferlib.defer(nothing)
    site.advance(0)
    site.read()
    (tmp_path / "tasks.db").rename(tmp_path / "elsewhere.db")
    found = site.read()

    assert found["deferlib_store_up"] == 0
    assert found['deferlib_attempts_total{outcome="done",queue="default"}'] == 1
    assert not [name for name in found if name.startswith("deferlib_queue_")]


def test_nothing_of_a_task_but_its_queue_is_told(site: Site) -> None:
    deferlib.defer(fail, _name="canary-name")
    site.advance(0)
    text = site.exposition.text().decode()

    own = [line for line in text.splitlines() if line.startswith("deferlib_")]
    assert "canary" not in text
    assert set(re.findall(r'[{,](\w+)="', "\n".join(own))) == {"queue", "outcome", "kind", "target", "le"}


def test_without_prometheus_client_the_error_says_what_to_install(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(ConfigError, match=r"pip install 'deferlib\[metrics\]'"):
        Exposition(site.metrics, site.numbers, {})


def test_a_store_in_memory_is_read_through_its_own_connection() -> None:
    former = config.install(None)
    try:
        runtime = config.configure(store="sqlite:///:memory:", queues=[QueueConfig(name="default")])
        numbers = QueueNumbers(runtime).read()
        runtime.close()
    finally:
        config.install(former)

    assert numbers is not None
    assert [row.name for row, _ in numbers.queues] == ["default"]


def test_every_metric_is_in_the_reference(site: Site) -> None:
    families = list(site.exposition.collect())
    page = DOCS.read_text(encoding="utf-8")

    assert len(families) == 14
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {key for sample in family.samples for key in sample.labels} - {"le"}
        assert f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in sorted(labels)) or 'none'} |" in page


def test_buckets_rise() -> None:
    for bounds in (module.DELAYS, module.RUNS, module.TURNS):
        assert list(bounds) == sorted(set(bounds))
