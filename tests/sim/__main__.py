"""Replay a seed of the simulation (`python -m tests.sim SEED`), or try new ones (`python -m tests.sim FIRST LAST`)."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter

from tests.sim.world import World


def main(arguments: list[str]) -> None:
    peace = "peace" in arguments
    seeds = [int(argument) for argument in arguments if argument != "peace"]
    if len(seeds) == 1:
        world = World(seeds[0], peace=peace)
        try:
            world.live()
        finally:
            print("\n".join(world.log))
        return
    logging.disable()
    begun, total, events = time.monotonic(), Counter[str](), 0
    for seed in range(seeds[0], seeds[1] + 1):
        world = World(seed, peace=peace)
        world.live()
        total += world.oracle.sometimes
        events += next(world.order)
    print(f"{len(range(seeds[0], seeds[1] + 1))} seeds, {events} events in {time.monotonic() - begun:.1f} s")
    print(", ".join(f"{what}: {number}" for what, number in sorted(total.items())))


if __name__ == "__main__":
    main(sys.argv[1:])
