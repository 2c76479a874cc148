"""The lines before a target: each queue has its own, and they take turns."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from queue import SimpleQueue
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from deferlib.core.model import Delivery
from deferlib.engine.lines import Lines

SEED = 20_261_122


def delivery(queue: str, id: int) -> Delivery:
    claim: Any = SimpleNamespace(queue=queue, id=id)
    return cast(Delivery, SimpleNamespace(claim=claim))


def take(lines: Lines, count: int) -> list[str]:
    return [f"{taken.claim.queue}{taken.claim.id}" for taken in (lines.take() for _ in range(count))]


def test_each_queue_keeps_its_order_and_none_waits_for_another_ones_backlog() -> None:
    lines = Lines()
    for id in range(4):
        lines.put(delivery("a", id))
    assert take(lines, 1) == ["a0"]
    for queue in "bc":
        for id in range(2):
            lines.put(delivery(queue, id))

    taken = take(lines, 7)

    assert set(taken[:2]) == {"b0", "c0"}
    assert set(taken[2:5]) == {"a1", "b1", "c1"}
    assert taken[5:] == ["a2", "a3"]


def test_what_is_dropped_is_never_taken() -> None:
    lines = Lines()
    for id in range(6):
        lines.put(delivery("ab"[id % 2], id))

    lines.keep(lambda delivery: delivery.claim.id not in (0, 3))

    assert sorted(delivery.claim.id for delivery in lines) == [1, 2, 4, 5]
    assert sorted(take(lines, 4)) == ["a2", "a4", "b1", "b5"]


def test_thousands_of_queues_leave_no_lines_behind() -> None:
    """Tasks of 10,000 queues, few at a time: each take would go through the empty lines of all the others."""
    lines = Lines()
    for number in range(10_000):
        lines.put(delivery(f"q{number}", 1))
        if number >= 3:
            lines.take()

    assert len(lines._by_queue) <= 16
    assert len(list(lines)) == 3
    assert len(take(lines, 3)) == 3


def test_threads_take_each_delivery_once_and_in_order() -> None:
    rng, lines, tokens = Random(SEED), Lines(), SimpleQueue[bool]()
    taken: list[list[tuple[str, int]]] = [[] for _ in range(4)]

    def work(mine: list[tuple[str, int]]) -> None:
        while tokens.get():
            claim = lines.take().claim
            mine.append((claim.queue, claim.id))

    threads = [threading.Thread(target=work, args=[mine], daemon=True) for mine in taken]
    for thread in threads:
        thread.start()
    put: Counter[str] = Counter()
    for _ in range(40_000):
        queue = f"q{rng.randrange(60)}"  # more than are kept: lines are dropped all the time
        lines.put(delivery(queue, put[queue]))
        put[queue] += 1
        tokens.put(True)
    for _ in threads:
        tokens.put(False)
    for thread in threads:
        thread.join(30)

    found: dict[str, list[int]] = defaultdict(list)
    for mine in taken:
        for queue, id in mine:
            found[queue].append(id)
        seen: dict[str, int] = {}
        for queue, id in mine:
            assert id > seen.get(queue, -1), "one thread's are in order"
            seen[queue] = id
    assert {queue: sorted(ids) for queue, ids in found.items()} == {queue: list(range(n)) for queue, n in put.items()}
