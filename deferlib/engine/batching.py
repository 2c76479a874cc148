"""Which calls go together in one request, and how many: those whose like have been quick, for two milliseconds' worth.

They run one after the other, and those behind a slow one wait for it. So only what has been quick without exception lately
goes with others, and what has failed, or was cut off, runs by itself the next time: if it takes its worker with it, it
takes no others.
"""

from __future__ import annotations

from deferlib.core.model import SECOND, Claim, Micros
from deferlib.deferred import DEFAULT_URL
from deferlib.engine.dispatch import has_default_namespace
from deferlib.payload import is_envelope, label_bytes

MOST = 32  # calls in one request
LONGEST: Micros = 2_000  # what they may take together, as far as is known
SHORT: Micros = 500  # what a batch may always take, however little waits: a POST costs 100 to 200 µs by itself
SHARES = 8  # parts of what waits that can run at once: one request never takes more than one
BYTES = 64 * 1024  # of bodies, headers and names in one request
BODY = 8 * 1024  # of one body: a longer one costs more than its POST
QUICK: Micros = 10_000  # what the slowest call has taken lately
ENOUGH = 4  # calls until that is known
REFUSED: Micros = 60 * SECOND  # how long a target gets none that has refused one

_LABELS = 1024  # callables that are remembered
_HEADERS = 1024  # characters of a task's own headers


class Batching:
    """What is known of one target's calls."""

    __slots__ = ("_calls", "_most", "_off_until", "_takes")

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._takes = False  # whether the target has said so
        self._off_until: Micros = 0
        self._calls: dict[bytes, _Pace] = {}  # by what they call

    def learn(self, now: Micros, claim: Claim, took: Micros) -> None:
        """Take how long a call ran, as a handler says that takes batches."""
        if self._most == 1 or now < self._off_until or not _is_call(claim):
            return
        self._takes = True
        label = label_bytes(claim.body)
        pace = self._calls.get(label)
        if pace is None:
            if len(self._calls) >= _LABELS:
                self._calls.clear()
            pace = self._calls[label] = _Pace()
        pace.learn(took)

    def refused(self, now: Micros) -> None:
        """The target doesn't take batches, though it has said so: it may be two programs behind one address."""
        self._takes = False
        self._off_until = now + REFUSED

    def expected(self, claim: Claim) -> float | None:
        """Return how many microseconds *claim* will take as far as is known; None if it has to go by itself."""
        if not self._takes or not _may_go_with_others(claim):
            return None
        pace = self._calls.get(label_bytes(claim.body))
        return pace.mean if pace is not None and pace.known >= ENOUGH and pace.worst <= QUICK else None

    def size(self, waiting: int, expected: float) -> int:
        """Return how many calls go in one request, when so many wait behind the first, which takes as *expected*."""
        return min(self._most, max(-(-waiting // SHARES), int(SHORT / max(expected, 1.0))))


class _Pace:
    """How long the calls of one callable take."""

    __slots__ = ("known", "mean", "worst")

    def __init__(self) -> None:
        self.known = 0
        self.mean = 0.0
        self.worst = 0.0  # forgotten slowly: 30 s are 10 ms after 250 quick ones

    def learn(self, took: Micros) -> None:
        self.known += 1
        self.mean += (took - self.mean) / min(self.known, 16)
        self.worst = max(float(took), self.worst * (31 / 32))


def _is_call(claim: Claim) -> bool:
    return claim.url == DEFAULT_URL and is_envelope(claim.body)


def _may_go_with_others(claim: Claim) -> bool:
    """Tell whether nothing about a claim needs a request of its own: a first attempt of a small call, without specials."""
    return (
        claim.attempts == 1
        and claim.url == DEFAULT_URL
        and claim.method == "POST"
        and not claim.status  # of an attempt in a former life
        and not claim.fail_fast
        and len(claim.body) <= BODY
        and len(claim.headers) <= _HEADERS
        and is_envelope(claim.body)
        and not has_default_namespace(claim.headers)
    )
