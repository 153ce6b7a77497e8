"""Dead groups are found when their lease is over, with few looks, whenever they came."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import cast

import pytest

from opensora_sp.server import sweeper as sweeping
from opensora_sp.server.shared_queue import LEASE_SECONDS, SharedQueue
from opensora_sp.server.sweeper import SPREAD_SECONDS, Sweeper

TICK = 0.25


class Clocked:
    """A database with groups that each have a job, on a clock that a test moves.

    comes, dies: of each group, when; lease: of each.
    """

    def __init__(
        self, comes: dict[str, float], dies: dict[str, float], lease: dict[str, float]
    ) -> None:
        self.comes, self.dies, self.lease = comes, dies, lease
        self.now, self.looks = 0.0, 0
        self.found: dict[str, float] = {}

    def give_out_again(self) -> tuple[list[tuple[str, str]], float]:
        """What SharedQueue says: jobs of groups whose lease is over, and when the next could be."""
        self.looks += 1
        # The last sign of life: one every second since it came.
        over = {
            name: came + int(min(self.now, self.dies[name]) - came) + self.lease[name]
            for name, came in self.comes.items()
            if name not in self.found and came <= self.now
        }
        given = [name for name, moment in over.items() if moment < self.now]
        self.found |= dict.fromkeys(given, self.now)
        left = [moment - self.now for name, moment in over.items() if name not in given]
        return [(f"job of {name}", name) for name in given], min(left, default=0.0)


@pytest.mark.parametrize("shortest", [5.0, LEASE_SECONDS])
@pytest.mark.parametrize("seed", range(5))
def test_a_dead_group_is_found_when_its_lease_is_over_also_one_that_comes_later(
    seed: int, shortest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    luck = random.Random(seed)
    names = [f"g{number}" for number in range(1, 20)]
    comes = {name: luck.uniform(0, 300) for name in names}
    lease = {name: luck.choice((shortest, LEASE_SECONDS, 30.0)) for name in names}
    # Some die before a look has seen them.
    dies = {name: comes[name] + luck.choice((0.5, luck.uniform(0, 300))) for name in names}
    # The longest lease that may be asked for, of one that lives on.
    database = Clocked(comes | {"g0": 0.0}, dies | {"g0": 1e9}, lease | {"g0": 3600.0})
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: database.now))
    sweeper = Sweeper(cast(SharedQueue, database))
    while database.now < 700:
        sweeper.sweep()
        database.now += TICK
    assert database.found.keys() == set(names)
    for name in names:
        late = database.found[name] - dies[name] - lease[name]
        assert late <= max(0.0, LEASE_SECONDS - lease[name]) + SPREAD_SECONDS + TICK
    # Once a lease and for each that died; one every second would be 700.
    assert database.looks <= 700 / (shortest - 1) + 2 * len(names)
