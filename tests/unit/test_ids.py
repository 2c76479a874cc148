"""Ids grow within a process, whatever the clock does, and no two processes make the same."""

from __future__ import annotations

import subprocess
import sys
import threading

from hypothesis import given
from hypothesis import strategies as st

from deferlib.core.model import Micros
from deferlib.ids import IdMaker

NOW: Micros = 1_763_700_000_000_000


@given(st.lists(st.integers(min_value=-(2**63), max_value=2**63), max_size=50))
def test_ids_grow_and_fit_whatever_the_clock_says(times: list[Micros]) -> None:
    maker = IdMaker()

    made = [maker.next(now) for now in times]

    assert made == sorted(set(made))
    assert all(0 <= id < 2**63 for id in made)


def test_clock_that_goes_back_makes_no_id_smaller() -> None:
    maker = IdMaker()

    made = [maker.next(NOW), maker.next(NOW - 3_600_000_000), maker.next(NOW - 1)]

    assert made == sorted(set(made))


def test_id_tells_its_time() -> None:
    assert IdMaker().next(NOW) >> 21 == NOW // 1000


def test_millisecond_has_room_for_a_million() -> None:
    maker = IdMaker()

    made = [maker.next(NOW) for _ in range(10_000)]

    assert made[-1] - made[0] == 9_999
    assert made[-1] >> 21 == NOW // 1000


def test_threads_never_get_the_same_id() -> None:
    maker, made, start = IdMaker(), list[int](), threading.Barrier(8)

    def work() -> None:
        start.wait()
        made.extend([maker.next(NOW) for _ in range(2_000)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(made)) == 16_000


def test_nonce_is_64_bits_with_a_sign() -> None:
    maker = IdMaker()

    made = [maker.nonce() for _ in range(1_000)]

    assert len(set(made)) == 1_000
    assert all(-(2**63) <= nonce < 2**63 for nonce in made)
    assert min(made) < 0 < max(made)


FORKS = """
import os, sys
from deferlib.ids import ids
ids.next(0), ids.nonce()
reader, writer = os.pipe()
for _ in range(200):
    pid = os.fork()
    if not pid:
        os.write(writer, b"".join(b"%d %d\\n" % (ids.next(0), ids.nonce()) for _ in range(5)))
        os._exit(0)
    os.waitpid(pid, 0)
    sys.stdout.write(os.read(reader, 65536).decode())
"""


def test_forked_children_make_ids_and_nonces_of_their_own() -> None:
    made = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True).stdout.split()
    ids, nonces = made[::2], made[1::2]

    assert len(set(nonces)) == 1_000
    # All in one millisecond, which no 200 processes share: five in a row from each of 200 of a million places.
    assert len(set(ids)) > 980
