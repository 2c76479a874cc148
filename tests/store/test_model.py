"""Hypothesis against every store: random histories must look like those of a dict (`model.py`), step by step.

Long runs: `DEFERLIB_MODEL_STEPS=100000 pytest tests/store/test_model.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from deferlib.core.model import (
    DAY,
    MINUTE,
    SECOND,
    Action,
    AddResult,
    Claim,
    ClaimSpec,
    DeleteResult,
    NewTask,
    Outcome,
    Page,
    QueueConfig,
    QueueSource,
    TaskRow,
    TaskState,
)
from deferlib.store import Tx
from tests.store.model import Entry, Model, Seen, claimed, seen
from tests.store.stores import FACTORIES, NOW, Factory, spec, task

# The parts are few and small on purpose, so that they meet. Hypothesis makes a failing history short; what a step does
# follows from its seed alone. (Rules and arguments drawn by Hypothesis hardly ever meet: of 2,000 such steps, 10 settled
# something; of these, hundreds do.)
CONFIGS = [QueueConfig(name="a", tombstone=MINUTE), QueueConfig(name="b", tombstone=DAY)]
QUEUES = ["a", "a", "a", "b"]
IDS = range(1, 13)
NAMES = ["x", "y", "3"]  # the last one could be an id's
FOR_PEOPLE = ["x", "y", *map(str, IDS)]
PASSED = [1, SECOND, 30 * SECOND, 30 * SECOND, 30 * SECOND, MINUTE, 2 * DAY, -1, -SECOND]  # clocks go back, too
OFFSETS = [-MINUTE, -1, 0, 0, 0, 0, 1, SECOND, MINUTE]
SEEDS = st.integers(0, 2**32)

STEPS_PER_CASE = 50
STEPS = int(os.environ.get("DEFERLIB_MODEL_STEPS", "2000"))


class StoreMachine(RuleBasedStateMachine):
    """Does the same to a store and to the model."""

    factory: Factory
    steps = 0
    saw: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="deferlib-model-"))
        self.store = self.factory(self.folder)
        self.model = Model(CONFIGS)
        self.now = NOW
        self.case = 0  # steps so far
        # Every one ever made, because settles of old ones must be refused. By fence: where ids are few and time stands
        # still, a task added again under an old id may get an old fence; then its newest claim is meant.
        self.claims: dict[tuple[int, int], Claim] = {}

    @initialize(seed=SEEDS)
    def open(self, seed: int) -> None:
        self.store.migrate()
        self.store.run(lambda tx: tx.put_queues(CONFIGS, QueueSource.FILE))
        self.step(seed)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    # --- steps ------------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS)
    def step(self, seed: int) -> None:
        self.case += 1
        rng = Random(f"{seed} {self.case}")  # Hypothesis likes to repeat itself
        people = [self._delete, self._purge, self._reschedule, self._reschedule, self._sweep, self._fail]
        work = rng.choice(
            [self._turn, self._turn, self._turn, self._add, self._pass_time, rng.choice(people), rng.choice(people)]
        )
        note(f"# {work.__name__} at NOW + {(self.now - NOW) / SECOND} s")
        work(rng)

    def _pass_time(self, rng: Random) -> None:
        self.now += rng.choice(PASSED)

    def _add(self, rng: Random) -> None:
        tasks = [self._task(rng, id) for id in rng.sample(IDS, rng.randint(1, 5))]
        results = self.store.run(lambda tx: tx.add(self.now, tasks))

        assert results == self.model.add(self.now, tasks)
        self.saw.update(results)

    def _task(self, rng: Random, id: int) -> NewTask:
        return task(
            id,
            nonce=rng.choice([id, id, id, -id]),
            queue=rng.choice([*QUEUES, *QUEUES, "no-queue"]),
            name=rng.choice([None, None, *NAMES]),
            eta=self.now + rng.choice(OFFSETS),
            body=b"x" * rng.choice([0, 1, 10, 100]),
            tag=rng.choice(["", "t"]),
            mode=rng.choice(["push"] * 12 + ["pull"]),
            fail_fast=rng.choice([0, 0, 1]),
            key_id=rng.choice([b"", b"key1", b"key2"]),
        )

    def _turn(self, rng: Random) -> None:
        """Settle and claim in one transaction, as the engine does."""
        outcomes = [self._outcome(rng) for _ in range(rng.randint(0, 4))] if self.claims else []
        specs = [self._spec(rng) for _ in range(rng.randint(0, 2))]
        with self.store.begin(durable=bool(outcomes)) as tx:
            settled = tx.settle(self.now, outcomes)
            claims = tx.claim(self.now, specs)

        assert settled == self.model.settle(self.now, outcomes)
        expected = [entry for each in specs for entry in self.model.claim(self.now, each)]
        assert [(each.until, *claimed(each)) for each in claims] == [(each.due, *claimed(each)) for each in expected]
        self.claims |= {(each.id, each.claims): each for each in claims}
        for outcome, held in zip(outcomes, settled, strict=True):
            self.saw[f"{outcome.action}{', named' if outcome.named else ''}{'' if held else ', refused'}"] += 1
        self.saw["lost"] += sum(each.lost > 0 for each in claims)
        self.saw["claimed fast"] += sum(each.queue in {spec.queue for spec in specs if spec.fail_fast} for each in claims)

    def _spec(self, rng: Random) -> ClaimSpec:
        limit, budget = rng.choice([5, 5, 3, 1, 0]), rng.choice([10_000, 10_000, 110, 11, 1, 0])
        lease, interval = rng.choice([30 * SECOND, SECOND, 1, 2 * DAY]), rng.choice([0, SECOND])
        fields = rng.choice([{}, {}, {}, {"tag": "t"}, {"fail_fast": True}])
        return spec(rng.choice(QUEUES), limit, now=self.now, bytes=budget, lease=lease, interval=interval, **fields)

    def _outcome(self, rng: Random) -> Outcome:
        current = [fence for fence in self.claims if self.model.holds(*fence)]
        claim = self.claims[rng.choice(current if current and rng.random() < 0.8 else list(self.claims))]
        action = rng.choice(list(Action))
        ahead = {Action.RENEW: 30 * SECOND, Action.DONE: MINUTE, Action.DEAD: MINUTE}
        at = self.now + (ahead[action] if action in ahead else rng.choice(OFFSETS))
        charged, executed, status = rng.randint(0, 1), rng.randint(0, 1), rng.choice([0, 500])
        named = claim.name is not None
        return Outcome(claim.id, claim.claims, claim.queue, action, at, named, charged, executed, status, str(action))

    def _somebody(self, rng: Random) -> tuple[str, str]:
        """Return a queue and a name, mostly of a task that there is."""
        entries = [*self.model.tasks.values(), *self.model.dead.values()]
        if not entries or rng.random() < 0.2:
            return rng.choice(QUEUES), rng.choice(FOR_PEOPLE)
        task = rng.choice(entries).task
        return task.queue, rng.choice([task.name or str(task.id), str(task.id)])

    def _delete(self, rng: Random) -> None:
        queue, name = self._somebody(rng)
        names = [name, *rng.choices(FOR_PEOPLE, k=rng.randint(0, 2))]
        deleted = self.store.run(lambda tx: tx.delete(self.now, queue, names))

        assert deleted == self.model.delete(self.now, queue, names)
        self.saw.update(f"delete, {result}" for result in deleted)

    def _purge(self, rng: Random) -> None:
        queue, limit = rng.choice(QUEUES), rng.randint(0, 3)

        assert self.store.run(lambda tx: tx.purge(self.now, queue, limit)) == self.model.purge(self.now, queue, limit)

    def _reschedule(self, rng: Random) -> None:
        (queue, name), eta = self._somebody(rng), self.now + rng.choice(OFFSETS)
        letters = len(self.model.dead)
        moved = self.store.run(lambda tx: tx.reschedule(self.now, queue, [name], eta))

        assert moved == self.model.reschedule(self.now, queue, name, eta)
        self.saw["reschedule"] += moved
        self.saw["replay"] += letters - len(self.model.dead)

    def _sweep(self, rng: Random) -> None:
        limit = rng.randint(1, 3)
        while swept := self.store.run(lambda tx: tx.sweep(self.now, limit)):
            assert swept <= limit
        self.model.sweep(self.now)

    def _fail(self, rng: Random) -> None:
        def work(tx: Tx) -> None:
            tx.claim(self.now, [spec("a", now=self.now), spec("b", now=self.now)])
            tx.purge(self.now, "a", 10)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            self.store.run(work)

    # --- after each step --------------------------------------------------------------------------------------------

    @invariant()
    def looks_the_same(self) -> None:
        type(self).steps += 1
        queues = [config.name for config in CONFIGS]
        with self.store.read() as tx:
            live = {queue: _page(tx, queue, TaskState.LIVE) for queue in queues}
            letters = {queue: _page(tx, queue, TaskState.DEAD) for queue in queues}
            stats = tx.stats(self.now, queues)
            due = tx.next_due(queues)
            fast_due = tx.next_due(queues, fail_fast=True)
            slices = [(state, after, 1 + self.case % 5) for state in TaskState for after in (-1, 6)]
            signed = [tx.signed(after, limit, state) for state, after, limit in slices]
            tats = {row.name: row.tat for row in tx.queues()}
            some = FOR_PEOPLE[self.case % 4 :: 4]
            found = {queue: [[_whole(row) for row in tx.find(queue, [name])] for name in some] for queue in queues}

        model = self.model
        assert live == {queue: [seen(entry) for entry in model.live(queue)] for queue in queues}
        assert letters == {queue: [seen(entry) for entry in model.letters(queue)] for queue in queues}
        assert [(each.queue, each.tasks, each.dead) for each in stats] == [
            (queue, len(model.live(queue)), len(model.letters(queue))) for queue in queues
        ]
        assert due == {queue: entries[0].due for queue in queues if (entries := model.live(queue))}
        assert fast_due == {queue: entries[0].due for queue in queues if (entries := model.fast(queue))}
        assert [each.oldest_due for each in stats] == [due.get(queue) for queue in queues]
        assert tats == model.tat
        assert signed == [model.signed(after, limit, state) for state, after, limit in slices]
        shown = {queue: [[_whole(entry) for entry in model.shown(queue, name)] for name in some] for queue in queues}
        assert found == shown


def _whole(task: TaskRow | Entry) -> tuple[Seen, int | None]:
    """Return what is compared of a task that may be a tombstone: those have no body any more."""
    tombstone = task.due is None and task.died is None
    return seen(task)[:3] if tombstone else seen(task), task.expires


def _page(tx: Tx, queue: str, state: TaskState) -> list[Seen]:
    return [seen(row) for row in tx.tasks(queue, Page(state=state))]


@pytest.mark.parametrize("name", list(FACTORIES))
def test_store_is_like_the_model(name: str) -> None:
    saw: Counter[str] = Counter()
    machine = type("StoreMachine", (StoreMachine,), {"factory": staticmethod(FACTORIES[name]), "saw": saw})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, STEPS // STEPS_PER_CASE),
            stateful_step_count=STEPS_PER_CASE,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )

    print(f"{name}: {machine.steps} steps, {dict(sorted(saw.items()))}")
    assert machine.steps > STEPS // 4, "too few steps to mean anything"
    fates = [f"{action}{named}{refused}" for action in Action for named in ("", ", named") for refused in ("", ", refused")]
    others = [*AddResult, *(f"delete, {result}" for result in DeleteResult), "lost", "claimed fast", "reschedule", "replay"]
    assert sum(saw[fate] for fate in fates if "refused" not in fate) > STEPS // 20, "too few settles to mean anything"
    if STEPS >= 20_000:  # in a short run chance may leave one out
        assert not {each for each in [*fates, *others] if saw[each] < STEPS // 2000}, "too few of these to mean anything"
