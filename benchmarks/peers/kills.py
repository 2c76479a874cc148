"""The kill test: workers are killed while they work, started again, and then everybody waits.

What then hasn't run is gone for good if the queue doesn't know it any more, and stuck if it does.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.peers import servers
from benchmarks.peers.arena import Arena, Stores, arena
from benchmarks.peers.contenders import Contender
from benchmarks.peers.environment import Peers

KILLS = 5


class Toll(NamedTuple):
    """What five kills cost one contender."""

    contender: Contender
    tasks: int
    gone: int = 0
    stuck: int = 0
    twice: int = 0  # tasks that started more than once
    seconds: float = 0.0  # from the last kill until all had run, or until nobody waited any longer
    note: str = ""


def kill_test(
    contender: Contender, peers: Peers, stores: Stores, tasks: int, patience: float, say: Callable[[str], None]
) -> Toll:
    """Kill a worker five times during *tasks*; wait up to *patience* seconds for more to run after the last that did."""
    if contender.package and contender.package not in peers.versions:
        return Toll(contender, tasks, note="not installed")
    tasks = min(tasks, contender.tasks * 5)  # RQ's default worker makes 130 a second
    try:
        with arena(contender, peers, stores) as it:
            toll = _suffer(it, tasks, patience)
    except servers.NoServerError as error:
        return Toll(contender, tasks, note=str(error))
    except Exception as error:  # a peer that breaks breaks only its own row
        return Toll(contender, tasks, note=f"{type(error).__name__}: {error}")
    say(
        f"{contender.title:60}, {toll.gone} gone, {toll.stuck} stuck, {toll.twice} started twice, of {toll.tasks:,} tasks; "
        f"{toll.seconds:.0f} s after the last kill"
    )
    return toll


def _suffer(it: Arena, tasks: int, patience: float) -> Toll:
    it.producer.call("work", 0, tasks)
    it.start()
    chance = random.Random(5)
    for number in range(KILLS):
        share = (number + 0.5 + chance.uniform(-0.2, 0.2)) / (KILLS + 1)
        _wait_done(it, round(tasks * share), patience)
        it.kill(number % len(it.contender.workers))
    killed = time.monotonic()
    ran = _wait_done(it, tasks, patience)
    seconds = time.monotonic() - killed
    missing = tasks - ran
    stuck = min(missing, int(it.producer.call("left")[0])) if missing else 0
    starts = Counter(line.split()[1] for line in it.notes() if line.startswith("start"))
    twice = sum(count > 1 for count in starts.values())
    return Toll(it.contender, tasks, gone=missing - stuck, stuck=stuck, twice=twice, seconds=seconds)


def _wait_done(it: Arena, count: int, patience: float) -> int:
    """Wait until *count* different tasks have ended, or none more within *patience* seconds; return how many have."""
    done = _done(it)
    until = time.monotonic() + patience
    while done < count and time.monotonic() < until:
        time.sleep(0.05)
        now = _done(it)
        if now > done:
            done, until = now, time.monotonic() + patience
    return done


def _done(it: Arena) -> int:
    return len({line for line in it.notes() if line.startswith("end")})
