"""What one queue or target may cost the others, by the targets' own logs: real engines, real targets, real kills."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from statistics import quantiles

from tests.system.processes import LEASE, Site, kill, wait_until
from tests.system.pushing import Target, add, added, at_once, configure, delays

SEED = 20_261_121
PROBES = 60
BOUND = 1.0  # seconds: above what a busy machine's stalls take, far below what waiting for the others would take
BUSY_MACHINE = 10  # times what it takes alone, where that is more


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1]


def warm(target: Target) -> None:
    """Return once the engine is at work."""
    add(1, "/ok", queue="quiet")
    wait_until(lambda: target.visits("quiet"), "the engine works")


def start_delay(target: Target) -> float:
    """Return the 99th percentile of how long a task of the quiet queue waits for its start."""
    times = added("quiet", PROBES, 0.02)
    wait_until(lambda: times.keys() <= {visit.task for visit in target.visits("quiet")}, "all came")
    return p99(delays(times, target.visits("quiet")))


def test_queue_with_fifty_thousand_due_tasks_delays_no_other(site: Site) -> None:
    target = Target(site, "app")
    configure(site, "- name: busy\n- name: quiet\n", DEFERLIB_APP=target.url)

    with target.serving(), site.engine():
        warm(target)
        alone = start_delay(target)
        add(50_000, "/ok", queue="busy")
        wait_until(lambda: target.visits("busy"), "the backlog is worked off")
        beside = start_delay(target)
        worked_off = len(target.visits("busy"))

    ratio = beside / alone
    print(f"start delay p99: {alone * 1e3:.1f} ms alone, {beside * 1e3:.1f} ms beside 50,000 tasks ({ratio:.1f} times)")
    assert worked_off < 50_000, "the backlog was there all the time"
    assert beside < max(BOUND, BUSY_MACHINE * alone)


def test_target_that_hangs_costs_its_own_slots_only(site: Site) -> None:
    fine, stuck = Target(site, "fine"), Target(site, "stuck")
    configure(
        site, "- name: quiet\n- name: stuck\n  target: stuck\n",
        DEFERLIB_APP=fine.url, DEFERLIB_TARGETS=f"stuck={stuck.url}", DEFERLIB_CONCURRENCY="8",
    )  # fmt: skip

    with fine.serving(), stuck.serving(), site.engine():
        warm(fine)
        alone = start_delay(fine)
        add(1_000, "/hang", queue="stuck")
        wait_until(lambda: len(stuck.visits()) == 8, "its slots are taken")
        beside = start_delay(fine)

    print(f"start delay p99: {alone * 1e3:.1f} ms alone, {beside * 1e3:.1f} ms beside a hanging target")
    assert len(stuck.visits()) == 8
    assert beside < max(BOUND, BUSY_MACHINE * alone)


def test_tasks_whose_own_target_hangs_dont_keep_the_others_of_their_queue(site: Site) -> None:
    fine, stuck = Target(site, "fine"), Target(site, "stuck")
    configure(
        site, "- name: mixed\n- name: quiet\n",
        DEFERLIB_APP=fine.url, DEFERLIB_TARGETS=f"stuck={stuck.url}", DEFERLIB_CONCURRENCY="8",
    )  # fmt: skip

    with fine.serving(), stuck.serving(), site.engine():
        warm(fine)
        alone = start_delay(fine)
        add(200, "/hang", queue="mixed", target="stuck")
        wait_until(lambda: len(stuck.visits()) == 8, "its slots are taken")
        add(50, "/ok", queue="mixed")
        wait_until(lambda: len(fine.visits("mixed")) == 50, "the others ran", timeout=20)
        beside = start_delay(fine)

    assert len(stuck.visits()) == 8
    assert beside < max(BOUND, BUSY_MACHINE * alone)


def test_no_more_run_at_once_than_may_while_two_engines_are_killed(site: Site) -> None:
    rng = random.Random(SEED)
    target = Target(site, "app")
    configure(site, "- name: narrow\n  max_concurrent_requests: 3\n", DEFERLIB_APP=target.url)
    add(2_000, "/sleep/60", queue="narrow")

    with target.serving():
        for _ in range(4):
            before = len(target.visits())
            with site.engine() as first, site.engine() as second:
                wait_until(lambda before=before: len(target.visits()) > before + 20, "tasks run again")
                time.sleep(rng.uniform(0, 0.5))
                kill(first if rng.random() < 0.5 else second)
                killed = time.monotonic()
                came = len(target.visits())
                wait_until(lambda came=came: len(target.visits()) > came + 3, "the other engine goes on")
                gap = target.visits()[came + 3].start - killed
                assert gap < 3 * LEASE, "a dead engine's slots come back with the end of its leases"

    # A killed engine's connections end a moment before its target notices.
    assert at_once(target.visits()) == 3


def test_rate_holds_while_engines_are_killed_and_restarted(site: Site) -> None:
    rate, bucket = 60, 10
    target = Target(site, "app")
    configure(site, f"- name: metered\n  rate: {rate}/s\n  bucket_size: {bucket}\n", DEFERLIB_APP=target.url)
    add(3_000, "/ok", queue="metered")

    with target.serving():
        for _ in range(3):
            before = len(target.visits())
            with ExitStack() as stack:
                engines = [stack.enter_context(site.engine()) for _ in range(2)]
                wait_until(lambda before=before: len(target.visits()) > before + 60, "tasks run again")
                for engine in engines:
                    kill(engine)
        begun = len(target.visits())
        with site.engine():
            wait_until(lambda: len(target.visits()) > begun + 4 * rate, "some seconds at the full rate")

    starts = [visit.start for visit in target.visits()]
    late = 0.25  # between the claim and the target's log, on a machine that does other things, too
    for first in range(len(starts)):
        for last in range(first + bucket, len(starts), 7):
            span = starts[last] - starts[first] + late
            assert last - first + 1 <= bucket + rate * span, f"{last - first + 1} within {span:.3f} s"
    assert (len(starts) - 1 - begun - rate) / (starts[-1] - starts[begun + rate]) > 0.8 * rate
