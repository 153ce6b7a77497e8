"""scripts/simulate_groups.py: its arithmetic follows cases that are worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from scripts.simulate_groups import (
    COSTS,
    GROUPS,
    Assumed,
    Costs,
    carried,
    load,
    most_groups,
    read_costs,
    scaled,
    tables,
    wait_seconds,
    waiting_factor,
)

# Round figures, so that the sums below can be followed.
ROUND = Costs(
    put=1, claim=2, publish=3, beat=4, empty_claim=5, sweep=6, sweep_row=0.1, look=7,
    look_group=0.2, look_row=0.3, wake=0.5,
)  # fmt: skip
ONE = Assumed(cores=2, flush_ms=10, round_trip_ms=1, gateways=1)


def test_the_load_of_ten_groups_is_what_is_worked_out_by_hand() -> None:
    # 8 busy groups make 4 jobs/s, 2 are idle. One gateway looks 4 times a second.
    found = load(ROUND, ONE, busy=8, idle=2, rate=4)
    assert {name: round(1000 * cores, 6) for name, cores in found.items()} == {
        "jobs": 4 * (1 + 2 + 3 + 4),
        "signs of life": 10 * 4,
        "looks of gateways": 4 * (7 + 10 * 0.2) + 3 * 4 * 0.3,
        # By the gateway and each group as often as a lease of 15 s can nearly end: busy ones make
        # more jobs than that.
        "looks for dead groups": round((1 + 2 + 8) / 14.5 * (6 + 10 * 0.1), 6),
        "waking all groups": 4 * 10 * 0.5,
        # All but one for each put, at once or when they are idle, and idle ones once a second.
        "claims of nothing": (4 * 9 + 2) * 5,
    }
    listed = load(ROUND, replace(ONE, alone=False), busy=8, idle=2, rate=4)
    assert listed["waking all groups"] == 0
    assert listed["claims of nothing"] == pytest.approx(0.010)
    assert load(ROUND, ONE, busy=10, idle=0, rate=4)["claims of nothing"] == 0


def test_costs_that_are_doubled_double_the_load() -> None:
    once, twice = (load(costs, ONE, 80, 20, 5) for costs in (ROUND, scaled(ROUND, 2)))
    assert twice == pytest.approx({name: 2 * value for name, value in once.items()})
    for field in fields(Costs):  # and each of them counts
        more = load(replace(ROUND, **{field.name: 2 * getattr(ROUND, field.name)}), ONE, 80, 20, 5)
        assert sum(more.values()) > sum(once.values())


def test_costs_are_raised_by_what_groups_that_slept_used_more(tmp_path: Path) -> None:
    slept = [{"database_cores": used, "calculated_cores": 0.2} for used in (0.1, 0.5, 0.3)]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"costs_ms": asdict(ROUND), "groups_that_sleep": slept}))
    assert read_costs(path) == scaled(ROUND, 2.5)
    path.write_text(json.dumps({"costs_ms": asdict(ROUND), "groups_that_sleep": slept[:1]}))
    assert read_costs(path) == ROUND  # less is no reason to count on less
    path.write_text(json.dumps({"costs_in_a_row_ms": asdict(scaled(ROUND, 3))}))
    assert read_costs(path, in_a_row=True) == scaled(ROUND, 3)


def test_the_wait_is_that_of_a_queue_with_two_servers() -> None:
    # M/M/2 with a load of 1: a third has to wait, on average for one service of the other.
    assert waiting_factor(2, 1.0) == pytest.approx(1 + 1 / 3)
    assert waiting_factor(1, 0.5) == pytest.approx(2)  # M/M/1: 1 / (1 - load)
    assert waiting_factor(4, 4.0) == float("inf")
    # 11 ways there and back, 2 flushes, and the work of publish, sweep and claim.
    assert wait_seconds(ROUND, ONE, groups=10, used=0.0) == pytest.approx(0.011 + 0.020 + 0.012)


def test_what_groups_get_done_is_limited_by_the_database_where_it_is_full() -> None:
    assumed = replace(ONE, alone=False)
    free = carried(scaled(ROUND, 1e-6), assumed, 10, 0, 1.0)
    assert free.rate == pytest.approx(10 / (1 + 0.031), rel=1e-3)
    full = carried(ROUND, assumed, 300, 0, 1.0)
    assert full.rate < 300 / (1 + 0.043)
    assert full.cores <= 2
    # A cycle is a job and a wait: Little's law holds.
    assert full.rate * (1.0 + full.wait) == pytest.approx(300, rel=1e-6)
    # Signs of life alone are more than two cores can do.
    assert carried(ROUND, assumed, 1000, 0, 1000.0).rate == pytest.approx(0, abs=1e-6)


def test_a_database_is_full_from_the_number_on_that_is_named() -> None:
    for idle_share in (0.0, 0.5):
        groups = most_groups(ROUND, ONE, 10.0, idle_share)

        def cores(count: int, share: float = idle_share) -> float:
            idle = round(count * share)
            return sum(load(ROUND, ONE, count - idle, idle, (count - idle) / 10).values())

        assert cores(groups - 1) < 0.8 * 2 <= cores(groups)
    assert most_groups(ROUND, replace(ONE, cores=4), 10.0, 0.0) > most_groups(ROUND, ONE, 10.0, 0.0)


def test_the_measured_costs_give_a_row_for_each_case() -> None:
    costs = read_costs(COSTS)
    assert all(getattr(costs, field.name) > 0 for field in fields(Costs))
    text = tables(costs, Assumed())
    assert all(text.count(f"| {groups:,} | ") >= 4 * 2 for groups in GROUPS)
