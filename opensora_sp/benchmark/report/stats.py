"""Statistics over runs and over ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# "convert" is in reports of older versions only.
STAGE_ORDER = (
    "load",
    "encode text",
    "read references",
    "encode references",
    "hand out",
    "draw noise",
    "agree",
    "compile",
    "denoise",
    "decode",
    "convert",
    "write",
    "wait",
)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 90th percentile (nearest rank) and maximum of at least one value."""
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p90": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "max": ordered[-1],
    }


def imbalance(values: Sequence[float]) -> float:
    """The slowest rank's value over the mean of all ranks. 1 is perfect balance."""
    mean = statistics.fmean(values)
    return max(values) / mean if mean > 0 else 1.0


def stage_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every stage of the runs, in the order of the work."""
    found = {name for run in runs for rank in run["ranks"] for name in rank["stages"]}
    known = [name for name in STAGE_ORDER if name in found]
    return known + sorted(found - set(known))


def stage_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each stage: its slowest rank over the runs, the ranks' medians, and the imbalance."""
    return {
        name: _over(
            [{r["rank"]: r["stages"][name] for r in run["ranks"] if name in r["stages"]}]
            for run in runs
        )
        for name in stage_names(runs)
    }


def step_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The same for denoising steps and their parts; None without steps."""
    pieces: dict[str, list[list[dict[int, float]]]] = {}
    for run in runs:
        parts: dict[str, dict[int, list[float]]] = {}
        for rank in run["ranks"]:
            for step in rank["intervals"]:
                if "step" in step:
                    waited = step["exchange"] + step["velocity"]
                    for name, seconds in (
                        ("step", step["seconds"]),
                        ("compute", max(0.0, step["seconds"] - waited)),
                        ("exchange", step["exchange"]),
                        ("velocity", step["velocity"]),
                    ):
                        parts.setdefault(name, {}).setdefault(rank["rank"], []).append(seconds)
        for name, ranks in parts.items():
            count = min(len(steps) for steps in ranks.values())
            pieces.setdefault(name, []).append(
                [{rank: steps[i] for rank, steps in ranks.items()} for i in range(count)]
            )
    return {name: _over(runs_of) for name, runs_of in pieces.items()} or None


def _over(groups: Any) -> dict[str, Any]:
    """groups: for each run, a list of {rank: seconds} of what the ranks did at the same time."""
    moments = [moment for group in groups for moment in group if moment]
    ranks = sorted({rank for moment in moments for rank in moment})
    medians = [statistics.median([m[rank] for m in moments if rank in m]) for rank in ranks]
    return {
        "over_runs": spread([max(moment.values()) for moment in moments]),
        "over_ranks": spread(medians),
        "ranks": ranks,
        "rank_medians": medians,
        "imbalance": imbalance(medians),
    }
