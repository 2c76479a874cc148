"""Targets that refuse this engine's requests: slowed, tried again, and as before once they accept one."""

from __future__ import annotations

from deferlib.core.model import SECOND, Decision
from deferlib.core.slowed import LONGEST_PAUSE, REFUSALS, Slowed, SlowedTargets

NOW = 1_700_000_000_000_000
APP = "http://app"
OTHER = "http://other"


def slowed(*, in_flight: int = 0) -> SlowedTargets:
    targets = SlowedTargets()
    for _ in range(REFUSALS):
        targets.refused(APP, NOW, "why", lambda base: in_flight)
    return targets


def test_target_that_accepts_has_all_its_room() -> None:
    targets = SlowedTargets()

    assert not targets
    assert targets.room(APP, NOW, 32) == 32
    assert targets.until(APP) == 0
    assert targets.news() == []


def test_few_refusals_slow_nothing_and_an_acceptance_between_them_counts() -> None:
    targets = SlowedTargets()
    for _ in range(10):
        for _ in range(REFUSALS - 1):
            targets.refused(APP, NOW, "why", lambda base: 0)
        assert targets.room(APP, NOW, 32) == 32
        targets.accepted(APP)

    assert targets.news() == []
    assert not targets


def test_refusals_in_a_row_slow_their_target_and_no_other() -> None:
    targets = slowed()

    assert targets.room(APP, NOW, 32) == 0
    assert targets.until(APP) == NOW + SECOND
    assert targets.room(OTHER, NOW, 32) == 32
    assert targets.news() == [Slowed(APP, NOW, Decision("why", NOW + SECOND))]
    assert targets.news() == []


def test_one_delivery_at_a_time_is_tried_after_the_pause() -> None:
    targets = slowed()
    later = NOW + SECOND

    assert targets.room(APP, later - 1, 32) == 0
    assert targets.room(APP, later, 32) == 1
    assert targets.room(APP, later, 0) == 0
    targets.sent(APP)
    assert targets.room(APP, later, 32) == 0
    targets.landed(APP)
    assert targets.room(APP, later, 32) == 1


def test_what_was_on_its_way_ends_before_one_is_tried() -> None:
    targets = slowed(in_flight=2)

    for _ in range(2):
        assert targets.room(APP, NOW + SECOND, 32) == 0
        targets.landed(APP)
        targets.refused(APP, NOW + 10, "late", lambda base: 99)

    assert targets.room(APP, NOW + SECOND, 32) == 1
    assert len(targets.news()) == 1


def test_pause_doubles_up_to_half_a_minute() -> None:
    targets, now, pauses = slowed(), NOW, []
    for _ in range(8):
        pauses.append(targets.until(APP) - now)
        now = targets.until(APP)
        targets.refused(APP, now, "why", lambda base: 0)

    assert [pause // SECOND for pause in pauses] == [1, 2, 4, 8, 16, 30, 30, 30]
    assert pauses[-1] == LONGEST_PAUSE
    assert {each.since for each in targets.news()} == {NOW}


def test_one_acceptance_lifts_it_all() -> None:
    targets = slowed()
    targets.news()

    targets.accepted(APP)

    assert targets.room(APP, NOW, 32) == 32
    assert targets.news() == [Slowed(APP, NOW, None)]
    targets.accepted(APP)
    assert targets.news() == []
