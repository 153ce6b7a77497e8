#!/usr/bin/env python3
"""Whether it is a video's size or its step times that decide how many steps can be left out.

    python scripts/measure_step_times.py [--to docs/benchmarks/step-cache-step-times.json]

The times of a run's steps depend on its size: the larger the video, the more of them lie near the
noise (Open-Sora 1.2's timestep transform). So a size and its times change together from one
calibration to the next. Here the embedded model makes held-out prompts of several sizes, each with
its own times and with those of the other sizes. For each pair: full runs, the path search, and
PSNR of the best lists of a few numbers of computed steps against the full runs of that pair.
With --general, at 64x96 and 17 frames, the step times of published sizes too, and beside the best
lists the general patterns (request/general_pattern.py) that a model without schedules gets.
Writes one JSON and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.machine import describe_machine
from opensora_sp.benchmark.calibration.full_runs import FullRuns
from opensora_sp.benchmark.calibration.selection import Candidates, candidates_of
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request
from opensora_sp.request.step_cache import LEVELS
from opensora_sp.request.step_choice import general_pattern
from opensora_sp.request.step_schedule import StepSchedule
from opensora_sp.request.step_times import timesteps
from scripts.measure_schedules import LARGEST, SIZES, STEPS, Case, Listed, Size, asked_of

COUNTS = (15, 10, 8)
# 240p and 2 s, 720p and 4 s, 720p and 16 s.
PUBLISHED: tuple[Size, ...] = ((240, 426, 51), (720, 1280, 102), (720, 1280, 408))
# From the path search and the times of the steps: schedules, by how the table names them.
Lists = Callable[[Candidates, Sequence[float]], dict[str, StepSchedule]]
# Where the program reads a request's times in a run and its calibration.
READERS = ("engine.denoising", "request.computed_steps", "benchmark.calibration.full_runs")


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, help="where the JSON goes")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--general", action="store_true", help="the general patterns")
    asked = parser.parse_args()
    pipeline = Pipeline.load(session=alone(), dtype="fp32")
    pairs = [(size, of) for size in SIZES for of in (*SIZES, *LARGEST)]
    lists: Lists = best_lists
    if asked.general:
        pairs = [(SIZES[0], of) for of in (*SIZES, *LARGEST, *PUBLISHED)]
        lists = general_lists
    rows = []
    for size, of in pairs:
        rows.append(measured(pipeline, size, of, asked.prompts, lists))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    content = {
        "command": "python scripts/measure_step_times.py " + " ".join(sys.argv[1:]),
        "machine": describe_machine(pipeline.session.device, (asked.to or Path("-")).parent),
        "steps": STEPS,
        "rows": rows,
    }
    if asked.to:
        with atomic_output(asked.to) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def best_lists(found: Candidates, _times: Sequence[float]) -> dict[str, StepSchedule]:
    """The best list of each of COUNTS, by how it is named in the table."""
    lists = {}
    for count in COUNTS:
        # Few steps extrapolated have a far worse worst prompt than held, predicted alike.
        one = next(c for c in found[count] if count >= STEPS // 2 or c.fill == "hold")
        lists[str(count)] = Listed(one.computed, one.fill).schedule(images=False)
    return lists


def general_lists(found: Candidates, times: Sequence[float]) -> dict[str, StepSchedule]:
    """The general pattern of each level, and the best list of as many steps with its fill."""
    lists = {}
    for level in LEVELS:
        pattern = general_pattern(level, times)
        count = len(pattern.computed)
        one = next(c for c in found[count] if c.fill == pattern.fill)
        lists[f"{level}, {count}"] = pattern
        lists[f"best {count}"] = Listed(one.computed, one.fill).schedule(images=False)
    return lists


def measured(
    pipeline: Pipeline, size: Size, of: Size, prompts: int, lists: Lists
) -> dict[str, Any]:
    """Decibels of lists of computed steps at a size, its steps at the times of another one's."""
    times, found = times_at(of), {}
    with ExitStack() as stack:
        stack.enter_context(steps_at(times))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _, requests = asked_of(Case("text", size, prompts), folder)
        runs = FullRuns(pipeline, requests, folder)
        for number in range(prompts):
            runs.make(number)
        for name, one in lists(candidates_of(runs.grams(), times), times).items():
            values = runs.compare(one)
            found[name] = {
                "computed": list(one.computed),
                "fill": one.fill,
                "mean": round(fmean(values), 2),
                "worst": round(min(values), 2),
                "psnr": [round(value, 2) for value in values],
            }
    return {"size": list(size), "times_of": list(of), "middle": times[STEPS // 2], "lists": found}


def times_at(size: Size) -> list[float]:
    """The times of the steps of a size."""
    height, width, frames = size
    return timesteps(STEPS, height=height, width=width, frames=frames)


@contextmanager
def steps_at(times: Sequence[float]) -> Iterator[None]:
    """Runs have their steps at these times, whatever their size."""

    def times_of(_request: Request) -> list[float]:
        return list(times)

    with ExitStack() as stack:
        for module in READERS:
            stack.enter_context(patch(f"opensora_sp.{module}.times_of", times_of))
        yield


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row for each size and times."""
    yield f"| size | step times of | half of the steps above | {' | '.join(rows[0]['lists'])} |"
    yield "| " + " | ".join(["---"] * (3 + len(rows[0]["lists"]))) + " |"
    yield from map(line, rows)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [named(row["size"]), named(row["times_of"]), f"t = {row['middle']:.0f}"]
    cells += [f"{one['mean']:.1f} ({one['worst']:.1f})" for one in row["lists"].values()]
    return f"| {' | '.join(cells)} |"


def named(size: Sequence[int]) -> str:
    """For tables."""
    return f"{size[0]}×{size[1]}, {size[2]} frames"


if __name__ == "__main__":
    main()
