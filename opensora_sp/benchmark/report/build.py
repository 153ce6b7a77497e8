"""The sections of a benchmark's report, computed from the records of the ranks.

Frames per second, FLOP/s, fraction of peak and efficiency are computed here. `performance_info` has
the vendor's keys. `schema.json` beside this file describes every key.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from opensora_sp.benchmark.report.stats import imbalance, spread, stage_summary, step_summary
from opensora_sp.planner.plan import Plan

Run = Mapping[str, Any]
# Stages of the leading rank that the vendor's "infer time" leaves out. Only reports of older
# versions have the stage "convert"; decoding includes it now.
_LOADING = ("load", "compile")
_SAVING = ("convert", "write")
# The planner's stages by the names that they have in a run.
_PLANNED = {
    "text": "encode text",
    "references": "encode references",
    "denoise": "denoise",
    "decode": "decode",
}


def run_record(
    kind: str, number: int, ranks: Sequence[Mapping[str, Any]], *, frames: int, videos: int
) -> dict[str, Any]:
    """One run, from the records of its ranks in order. The seconds of rank 0 are the run's.

    kind: "warmup" or "measured". frames, videos: how many rank 0 got from the decoder.
    """
    lead = ranks[0]
    stages = lead["stages"]
    loading = sum(stages.get(name, 0.0) for name in _LOADING)
    saving = sum(stages.get(name, 0.0) for name in _SAVING)
    return {
        "kind": kind,
        "number": number,
        "seconds": lead["seconds"],
        "load_seconds": loading,
        "infer_seconds": lead["seconds"] - loading - saving,
        "save_seconds": saving,
        "unaccounted_seconds": lead["seconds"] - sum(stages.values()),
        "frames": frames,
        "videos": videos,
        "ranks": list(ranks),
    }


def measured(runs: Sequence[Run]) -> list[Run]:
    """The measured runs, without warm-up."""
    return [run for run in runs if run["kind"] == "measured"]


def performance_info(
    runs: Sequence[Run], *, load_seconds: float | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The vendor's object, with its keys in its order. Figures are None before a run has finished.

    QPS is the frames of a run over its average infer time, in frames per second. facts: the keys
    that are settings.
    """
    counted = measured(runs)
    infer = prompt = save = qps = None
    if counted:
        infer = statistics.fmean(run["infer_seconds"] for run in counted)
        videos = counted[0]["videos"]
        prompt = infer / videos
        save = statistics.fmean(run["save_seconds"] for run in counted) / videos
        qps = counted[0]["frames"] / infer
    return {
        "QPS": qps,
        "model_load_time": load_seconds,
        **facts,
        "Avg infer time": infer,
        "Avg single prompt infer time": prompt,
        "Avg single video save time": save,
    }


def summary(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Figures over the measured runs; None where none has finished."""
    counted = measured(runs)
    if not counted:
        return None
    ranks = [
        statistics.median(run["ranks"][rank]["seconds"] for run in counted)
        for rank in range(len(counted[0]["ranks"]))
    ]
    # Waiting is idle time, before whichever stage.
    busy = [
        statistics.median(_busy(run["ranks"][rank]) for run in counted)
        for rank in range(len(ranks))
    ]
    return {
        "seconds": spread([run["seconds"] for run in counted]),
        "frames_per_second": counted[0]["frames"]
        / statistics.median(run["seconds"] for run in counted),
        "stages": stage_summary(counted),
        "steps": step_summary(counted),
        "busy_seconds": busy,
        "busy_imbalance": imbalance(busy),
        "ledger": ledger_summary(counted),
        "memory": memory_summary(counted),
    }


def _busy(rank: Mapping[str, Any]) -> float:
    return float(sum(s for name, s in rank["stages"].items() if name != "wait"))


def ledger_summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Calls, bytes and seconds of each collective in the last run, rank by rank."""
    kinds = sorted({kind for rank in runs[-1]["ranks"] for kind in rank["ledger"]})
    empty = {"calls": 0, "bytes_sent": 0, "bytes_between": 0, "seconds": 0.0}
    return {
        kind: {
            name: [{**empty, **rank["ledger"].get(kind, {})}[name] for rank in runs[-1]["ranks"]]
            for name in empty
        }
        for kind in kinds
    }


def memory_summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The highest peaks (bytes) of each rank over the runs; None where they were not counted."""
    peaks = []
    for rank in range(len(runs[0]["ranks"])):
        memories = [run["ranks"][rank]["memory"] for run in runs]
        row: dict[str, Any] = {"rank": rank}
        for name in ("peak_device_bytes", "peak_host_bytes"):
            known = [memory[name] for memory in memories if memory[name] is not None]
            row[name] = max(known) if known else None
        peaks.append(row)
    return peaks


def planned_memory(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """Planned bytes of each stage, beside the most that a rank's device held in it."""
    counted = measured(runs) or runs
    ranks = [rank["memory"]["stage_device_bytes"] or {} for run in counted for rank in run["ranks"]]
    stages = []
    for stage in plan.stages:
        name = _PLANNED[stage.name]
        found = max((peaks[name] for peaks in ranks if name in peaks), default=None)
        stages.append(
            {
                "stage": name,
                "predicted_bytes": stage.total,
                "measured_bytes": found,
                "measured_over_predicted": None if found is None else found / stage.total,
            }
        )
    return {"memory_mode": plan.mode.name, "stages": stages, "predicted_host_bytes": plan.host}


def first_and_warm(runs: Sequence[Run]) -> dict[str, Any]:
    """The first run beside the later measured ones; "warm" is None where there is no later one.

    A warm-up run has fewer steps, so its first step can be compared and its denoising cannot.
    """
    if not runs:
        return {"first": None, "warm": None}
    later = [run for run in measured(runs) if run is not runs[0]]
    warm = None
    if later:
        names = later[0]["ranks"][0]["stages"]
        warm = {
            "runs": len(later),
            "seconds": statistics.median(run["seconds"] for run in later),
            "step_seconds": _median([_steps(run) for run in later]),
            "stages": {
                name: statistics.median(run["ranks"][0]["stages"].get(name, 0.0) for run in later)
                for name in names
            },
        }
    first = runs[0]
    steps = _steps(first)
    return {
        "first": {
            "kind": first["kind"],
            "seconds": first["seconds"],
            "step_seconds": steps[0] if steps else None,
            "stages": first["ranks"][0]["stages"],
        },
        "warm": warm,
    }


def _steps(run: Run) -> list[float]:
    return [i["seconds"] for i in run["ranks"][0]["intervals"] if "step" in i]


def _median(groups: Sequence[Sequence[float]]) -> float | None:
    values = [value for group in groups for value in group]
    return statistics.median(values) if values else None


def flops_section(
    runs: Sequence[Run],
    work: Mapping[str, Any] | None,
    peak: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """FLOPs, FLOP/s and the fraction of peak; None where no run has finished.

    work: FLOPs of one run, {"denoise": per rank, "decode": …, "text": …}; None where unknown.
    peak: {"per_rank": FLOP/s of each rank, "source": …} or None.
    """
    counted = measured(runs)
    if not counted or work is None:
        return None
    denoise = stage_summary(counted)["denoise"]["over_runs"]["median"]
    seconds = statistics.median(run["seconds"] for run in counted)
    total = sum(work["denoise"]) + (work["decode"] or 0.0) + (work["text"] or 0.0)
    achieved = {"denoise": sum(work["denoise"]) / denoise, "run": total / seconds}
    fraction = None
    if peak is not None:
        fraction = {name: value / sum(peak["per_rank"]) for name, value in achieved.items()}
    return {
        **work,
        "total": total,
        "achieved_per_second": achieved,
        "peak": None if peak is None else dict(peak),
        "fraction_of_peak": fraction,
    }


def efficiency(
    runs: Sequence[Run], baseline: Mapping[str, Any] | None, name: str | None
) -> dict[str, Any] | None:
    """Speedup and efficiency against a report of one rank; None without one or a finished run."""
    counted = measured(runs)
    if baseline is None or not counted:
        return None
    ranks = len(counted[0]["ranks"])
    own = {
        "run": statistics.median(run["seconds"] for run in counted),
        "denoise": stage_summary(counted)["denoise"]["over_runs"]["median"],
    }
    theirs = {
        "run": baseline["summary"]["seconds"]["median"],
        "denoise": baseline["summary"]["stages"]["denoise"]["over_runs"]["median"],
    }
    speedup = {key: theirs[key] / own[key] for key in own}
    return {
        "baseline": name,
        "baseline_seconds": theirs,
        "speedup": speedup,
        "efficiency": {key: value / ranks for key, value in speedup.items()},
    }
