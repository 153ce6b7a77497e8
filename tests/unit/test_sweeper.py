"""Dead groups are found as early as by a look every second, with few looks."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import cast

import pytest

from opensora_sp.server import shared_queue
from opensora_sp.server.shared_queue import SPREAD_SECONDS, SharedQueue, Sweeper

TICK = 0.25


class Clocked:
    """A database with groups that each have a job, on a clock that a test moves.

    dies: of each group, when; lease: of each.
    """

    def __init__(self, dies: dict[str, float], lease: dict[str, float]) -> None:
        self.dies, self.lease = dies, lease
        self.now, self.looks = 0.0, 0
        self.found: dict[str, float] = {}

    def give_out_again(self) -> tuple[list[tuple[str, str]], float]:
        """What SharedQueue says: jobs of groups whose lease is over, and when the next could be."""
        self.looks += 1
        # The last sign of life, on whole seconds.
        over = {
            name: float(int(min(self.now, self.dies[name]))) + self.lease[name]
            for name in self.dies
            if name not in self.found
        }
        given = [name for name, moment in over.items() if moment < self.now]
        self.found |= dict.fromkeys(given, self.now)
        left = [moment - self.now for name, moment in over.items() if name not in given]
        return [(f"job of {name}", name) for name in given], min(left, default=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_group_is_found_within_its_lease_and_the_spread(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    luck = random.Random(seed)
    names = [f"g{number}" for number in range(20)]
    database = Clocked(
        {name: luck.uniform(0, 600) for name in names[1:]} | {"g0": 1e9},
        {name: luck.choice((15.0, 15.0, 30.0)) for name in names},
    )
    monkeypatch.setattr(shared_queue, "time", SimpleNamespace(monotonic=lambda: database.now))
    sweeper = Sweeper(cast(SharedQueue, database))
    while database.now < 700:
        sweeper.sweep()
        database.now += TICK
    assert database.found.keys() == set(names[1:])
    late = [database.found[name] - database.dies[name] - database.lease[name] for name in names[1:]]
    assert max(late) <= SPREAD_SECONDS + TICK
    # Once a lease and for each that died; one every second would be 700.
    assert database.looks <= 700 / 14 + 2 * len(names)
