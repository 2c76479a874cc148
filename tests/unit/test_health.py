"""Targets in trouble: closed, tried again, shrunk, and as before once they answer."""

from __future__ import annotations

from itertools import pairwise

import pytest

from deferlib.core.health import PAUSES, Ailment, Condition, Health
from deferlib.core.model import SECOND, Micros

NOW: Micros = 1_700_000_000_000_000
APP = "http://app"
OTHER = "http://other"
FULL = 32
CLOSING = [Ailment.REFUSING, Ailment.UNREACHABLE]
FIRST = {ailment: PAUSES[ailment][0] for ailment in CLOSING}


def trouble(health: Health, ailment: Ailment, *, now: Micros = NOW, times: int = 1, in_flight: int = 0) -> None:
    for _ in range(times):
        health.troubled(APP, now, now, ailment, "why", lambda base: in_flight)


def closed(ailment: Ailment, *, in_flight: int = 0) -> Health:
    health = Health(FULL)
    trouble(health, ailment, times=3, in_flight=in_flight)
    return health


def answer(health: Health, times: int, *, now: Micros = NOW) -> None:
    for _ in range(times):
        health.answered(APP, now)


def test_target_that_answers_has_all_its_room() -> None:
    health = Health(FULL)
    answer(health, 5)

    assert not health
    assert (health.room(APP, NOW, 40), health.until(APP), health.hold(APP, NOW), health.news()) == (40, 0, None, [])


@pytest.mark.parametrize("ailment", list(Ailment))
def test_a_few_troubles_between_answers_change_nothing(ailment: Ailment) -> None:
    health = Health(FULL)
    for _ in range(100):
        trouble(health, ailment)
        answer(health, 2)

    assert health.room(APP, NOW, FULL) == FULL
    assert health.news() == []
    assert not health


# --- closed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ailment", CLOSING)
def test_troubles_in_a_row_close_their_target_and_no_other(ailment: Ailment) -> None:
    health = closed(ailment)

    assert health.room(APP, NOW, FULL) == 0
    assert health.until(APP) == NOW + FIRST[ailment]
    assert health.room(OTHER, NOW, FULL) == FULL
    assert health.news() == [Condition(APP, NOW, ailment, "why", 1, NOW + FIRST[ailment])]
    assert health.news() == []
    decision = health.hold(APP, NOW)
    assert decision is not None
    assert (decision.reason, decision.until) == (f"target {APP} {ailment}: why", NOW + FIRST[ailment])


@pytest.mark.parametrize("ailment", CLOSING)
def test_one_delivery_at_a_time_is_tried_after_the_pause(ailment: Ailment) -> None:
    health = closed(ailment)
    later = NOW + FIRST[ailment]

    assert health.room(APP, later - 1, FULL) == 0
    assert health.room(APP, later, FULL) == 1
    assert health.room(APP, later, 0) == 0
    health.sent(APP, later)
    assert health.room(APP, later, FULL) == 0
    health.landed(APP)
    assert health.room(APP, later, FULL) == 1


@pytest.mark.parametrize("ailment", CLOSING)
def test_what_was_on_its_way_says_nothing_new(ailment: Ailment) -> None:
    health = closed(ailment, in_flight=2)
    later = NOW + FIRST[ailment]

    for _ in range(2):
        assert health.room(APP, later, FULL) == 0
        health.landed(APP)
        health.troubled(APP, later + 10, NOW - 10, ailment, "late", lambda base: 99)

    assert health.room(APP, later, FULL) == 1
    assert len(health.news()) == 1


@pytest.mark.parametrize(
    ("ailment", "seconds"),
    [
        (Ailment.REFUSING, [1, 2, 4, 8, 16, 30, 30, 30]),
        (Ailment.UNREACHABLE, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]),
    ],
)
def test_pause_doubles(ailment: Ailment, seconds: list[float]) -> None:
    health, now, pauses = closed(ailment), NOW, []
    for _ in seconds:
        pauses.append((health.until(APP) - now) / SECOND)
        now = health.until(APP)
        trouble(health, ailment, now=now)

    assert pauses == seconds
    assert {each.since for each in health.news()} == {NOW}


@pytest.mark.parametrize("ailment", CLOSING)
def test_target_ramps_up_once_it_answers(ailment: Ailment) -> None:
    health = closed(ailment)
    health.news()
    rounds = []
    while health:
        answer(health, room := health.room(APP, NOW + SECOND, FULL), now=NOW + SECOND)
        rounds.append(room)

    assert rounds[:4] == [1, 2, 4, 8], "it doubles with each round"
    assert all(later - sooner <= 2 for sooner, later in pairwise(rounds[5:])), "then it feels its way"
    assert health.room(APP, NOW, FULL) == FULL
    assert [each.ailment for each in health.news()][-1] is None


# --- shrunk -----------------------------------------------------------------------------------------------------------


def test_target_that_loses_deliveries_gets_half_as_many() -> None:
    health = Health(FULL)
    trouble(health, Ailment.FAILING, times=3, in_flight=20)

    assert health.until(APP) == 0
    assert health.room(APP, NOW, FULL) == 0, "16 at once, 20 on their way"
    decision = health.hold(APP, NOW)
    assert decision is not None
    assert decision.reason == f"target {APP} loses deliveries, or lets them time out, and is at 20/16 deliveries"
    for _ in range(10):
        health.landed(APP)
    assert health.room(APP, NOW, FULL) == 6
    for moment in range(1, 9):
        trouble(health, Ailment.FAILING, now=NOW + moment, times=3)
    assert health.room(APP, NOW + 9, FULL) == 0
    for _ in range(10):
        health.landed(APP)
    assert health.room(APP, NOW + 9, FULL) == 1, "never less than one"


def test_deliveries_that_fail_together_shrink_it_once() -> None:
    health = Health(FULL)
    for number in range(30):
        health.troubled(APP, NOW + number, NOW - SECOND, Ailment.FAILING, "why", lambda base: 0)

    assert health.room(APP, NOW + 99, FULL) == FULL // 2


def test_shrunk_target_grows_back_slowly() -> None:
    health = Health(FULL)
    trouble(health, Ailment.FAILING, times=3)

    answer(health, 16)
    assert health.room(APP, NOW, FULL) in (16, 17)
    answer(health, 1_000)
    assert not health


def test_news_of_a_shrunk_target_come_once_a_second() -> None:
    health = Health(FULL)
    for moment in range(0, 3 * SECOND, SECOND // 10):
        trouble(health, Ailment.FAILING, now=NOW + moment, times=3)

    assert len(health.news()) == 3


# --- with time ----------------------------------------------------------------------------------------------------------


def test_delivery_that_takes_long_shows_that_its_target_can_be_reached() -> None:
    """Else all others would wait for the end of the one that was tried."""
    health = closed(Ailment.UNREACHABLE)
    tried = NOW + SECOND
    health.sent(APP, tried)

    rooms = [health.room(APP, tried + seconds * SECOND, FULL) for seconds in (1, 5, 7, 8, 9, 15)]

    assert rooms == [0, 0, 1, 3, 7, FULL - 1]


def test_target_of_long_deliveries_is_back_soon_after_an_outage() -> None:
    health, now, running = closed(Ailment.UNREACHABLE), NOW + SECOND, 0
    health.sent(APP, now)
    health.landed(APP)
    health.answered(APP, now)
    for second in range(8):
        for _ in range(health.room(APP, now + second * SECOND, FULL)):
            health.sent(APP, now + second * SECOND)
            running += 1

    assert running == FULL


def test_target_whose_deliveries_hang_grows_by_answers_only() -> None:
    health = Health(FULL)
    trouble(health, Ailment.FAILING, times=3)
    for _ in range(16):
        health.sent(APP, NOW)

    assert health.room(APP, NOW + 3600 * SECOND, FULL) == 0


def test_target_that_nothing_is_sent_to_is_forgotten() -> None:
    health = closed(Ailment.REFUSING)
    health.forget(NOW + 20 * SECOND)
    assert health
    health.sent(APP, NOW + 20 * SECOND)
    health.forget(NOW + 3600 * SECOND)
    assert health, "something is on its way"
    health.landed(APP)
    health.forget(NOW + 3600 * SECOND)
    assert not health
