"""Engines that slow themselves down, as targets and people see it: real engines, and targets that fail and come back."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.system.processes import Site, wait_until
from tests.system.pushing import Target, Visit, add, configure, said, told

WINDOW = 0.05


def windows(visits: Sequence[Visit], number: int) -> list[int]:
    """Return how many requests came in each 50 ms from the first one on."""
    begun = visits[0].start
    places = [int((visit.start - begun) / WINDOW) for visit in visits]
    return [places.count(place) for place in range(number)]


def since(target: Target, at: float, queue: str | None = None) -> list[Visit]:
    return [visit for visit in target.visits(queue) if visit.start >= at]


def test_backlog_ramps_up_after_an_outage(site: Site) -> None:
    target = Target(site, "app")
    configure(
        site, "- name: default\n  retry_parameters:\n    max_backoff_seconds: 1\n",
        DEFERLIB_APP=target.url,
    )  # fmt: skip

    with site.engine():
        with target.serving():
            add(5, "/sleep/40")
            wait_until(lambda: len(target.visits()) >= 5, "the engine works")
        add(1_000, "/sleep/40")
        wait_until(lambda: said(site, "queues", "list")["troubled_targets"], "the outage is told")
        [last] = add(1, "/sleep/40")
        wait_until(lambda: f"target {target.url} can't be reached" in told(site, "tasks", "explain", last), "explain tells")
        target.forget()
        with target.serving():
            back = time.monotonic()
            wait_until(lambda: len(target.visits()) >= 1_001, "all run")
            ramp = windows(target.visits(), 12)
            wait_until(lambda: not said(site, "queues", "list")["troubled_targets"], "its end is told")

    print(f"requests in each 50 ms after the outage: {ramp}")
    assert target.visits()[0].start - back < 7, "it is tried every five seconds at least"
    assert ramp[0] <= 4, "one, and what its answer lets go"
    assert sum(ramp[:3]) <= 16
    assert max(ramp) <= 64, "32 at once, 40 ms each"


def test_overloaded_target_gets_little_and_all_of_it_is_told(site: Site) -> None:
    target = Target(site, "app")
    configure(
        site,
        "- name: default\n  retry_parameters:\n    max_backoff_seconds: 1\n- name: other\n",
        DEFERLIB_APP=target.url,
    )

    with target.serving(), site.engine():
        target.mode("/status/503")
        names = add(2_000, "/mode")
        wait_until(lambda: len(target.visits("default")) > 20, "the engine works")
        time.sleep(4)
        overloaded = time.monotonic()
        add(50, "/ok", queue="other")
        wait_until(lambda: len(target.visits("other")) == 50, "another queue isn't slowed", timeout=10)
        shown = said(site, "queues", "show", "default")
        lines = told(site, "queues", "list")
        fields = told(site, "queues", "show", "default")
        explained = said(site, "tasks", "explain", names[-1])
        trickle = len(since(target, overloaded, "default")) / (time.monotonic() - overloaded)
        target.mode("/ok")
        well = time.monotonic()
        wait_until(lambda: len({visit.task for visit in since(target, well, "default")}) == 2_000, "all run")
        burst = sum(visit.start < well + 0.5 for visit in since(target, well, "default"))
        wait_until(lambda: said(site, "queues", "show", "default")["slowed_since"] is None, "its end is told")

    assert trickle < 40, "of thousands a second"
    assert burst < 200, "it ramps up"
    assert shown["slowed_since"] is not None
    assert 0 < shown["rate_enforced"] < 100
    assert "slowed" in lines
    assert "its target is overloaded (503)" in fields
    assert any("503" in reason["reason"] for reason in explained["reasons"]) or explained["expected"] is not None


def test_retry_after_holds_the_queue_back_and_is_told(site: Site) -> None:
    target = Target(site, "app")
    configure(site, "- name: default\n", DEFERLIB_APP=target.url)

    with target.serving(), site.engine():
        target.mode("/status/503/4")
        names = add(200, "/mode")
        wait_until(lambda: len(target.visits()) >= 10, "the engine works")
        time.sleep(1)
        target.mode("/ok")
        came = target.visits()
        waiting = next(name for name in reversed(names) if name not in {visit.task for visit in came})
        reasons = [each["reason"] for each in said(site, "tasks", "explain", waiting)["reasons"]]
        wait_until(lambda: len({visit.task for visit in target.visits()[len(came) :]}) == 200, "all run")

    assert "queue default is asked to wait by its target (503, Retry-After)" in reasons
    assert target.visits()[len(came)].start - came[-1].start > 2.5
    first = {visit.task: visit.start for visit in reversed(came)}
    again = {visit.task: visit.start for visit in reversed(target.visits()[len(came) :])}
    assert all(again[name] - at > 3.9 for name, at in first.items())


def test_too_many_requests_hold_their_own_tasks_back_alone(site: Site) -> None:
    target = Target(site, "app")
    configure(site, "- name: default\n", DEFERLIB_APP=target.url)

    with target.serving(), site.engine():
        target.mode("/status/429/3")
        limited = set(add(50, "/mode"))
        wait_until(lambda: len(target.visits()) == 50, "all came")
        target.mode("/ok")
        begun = time.monotonic()
        add(200, "/ok")
        wait_until(lambda: len(target.visits()) == 250, "the others run", timeout=10)
        others = time.monotonic() - begun
        explained = said(site, "tasks", "explain", min(limited))
        wait_until(lambda: len(target.visits()) == 300, "and then they do")

    assert others < 2.5
    assert explained["reasons"][0]["reason"] == "backing off, after attempt 1 (HTTP 429)"
    again = [visit for visit in target.visits() if visit.task in limited][50:]
    assert len(again) == 50
    first = {visit.task: visit.start for visit in target.visits()[:50]}
    assert all(visit.start - first[visit.task] > 2.9 for visit in again)


def test_connections_that_break_shrink_what_a_target_gets_at_once(site: Site) -> None:
    """A target that dies with its requests is given fewer of them."""
    target = Target(site, "app")
    configure(site, "- name: default\n  retry_parameters:\n    max_backoff_seconds: 0.2\n", DEFERLIB_APP=target.url)
    add(300, "/sleep/300")

    with site.engine():
        with target.serving():
            wait_until(lambda: len(target.visits()) >= 32, "its slots are taken")
        wait_until(lambda: said(site, "queues", "list")["troubled_targets"], "it is told")
        target.forget()
        with target.serving():
            wait_until(lambda: len(target.visits()) > 40, "it works again")
            first = windows(target.visits(), 6)

    print(f"requests in each 50 ms after the crash: {first}")
    assert first[0] <= 4
    assert sum(first) <= 16
