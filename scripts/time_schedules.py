#!/usr/bin/env python3
"""Whether denoising gets faster by as much as steps are left out: wall time against steps.

    python scripts/time_schedules.py [--sizes 64x96x17 96x144x17] [--rounds 10] [--to FILE.json]

The embedded model in float32 on this machine's CPU, one rank. A round denoises one video with all
steps, with near-lossless and with fast, one after the other, so that what else the machine does
meets all three. The time is that of the stage "denoise". For each size and level: the median over
the rounds of full time / own time, which should be steps / computed steps. The ratio of this
process's CPU seconds is there too, for a machine that others use. Ends with 1 where the ratio of
times is off by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.machine import describe_machine
from opensora_sp.engine.denoising import denoise
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import ResumePoint
from opensora_sp.parallel.session import alone
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Request
from opensora_sp.request.step_cache import LEVELS, OFF
from opensora_sp.request.step_choice import planned_schedule

ALLOWED = 0.05  # of the ratio of the steps
SIZES = ("64x96x17", "96x144x17")


def main() -> int:
    """Measure, print a table, write JSON where that is asked for; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="HxWxF", help="height, width, frames"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each size (default 10)")
    parser.add_argument("--to", type=Path, help="a JSON with every round")
    asked = parser.parse_args()
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    rows = [row for size in asked.sizes for row in measure(pipeline, size, asked.rounds)]
    for line in table(rows):
        print(line)
    if asked.to is not None:
        content = {
            "command": " ".join(["python scripts/time_schedules.py", *sys.argv[1:]]),
            "machine": describe_machine(pipeline.session.device, asked.to.parent),
            "rows": rows,
        }
        with atomic_output(asked.to) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"\n{asked.to}")
    return 0 if all(abs(row["off_by"]) <= ALLOWED for row in rows) else 1


def measure(pipeline: Pipeline, size: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each level."""
    height, width, frames = map(int, size.split("x"))
    plain = Request(prompt="a red ball rolls to the left", height=height, width=width)
    plain = replace(plain, num_frames=frames)
    requests = {OFF: plain}
    for level in LEVELS:
        asked = replace(plain, step_cache=level)
        found = planned_schedule(asked, embedded_checkpoints().dit)
        assert found is not None
        requests[level] = replace(plain, step_cache=found)
    models = pipeline.models
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    cpu: dict[str, list[float]] = {name: [] for name in requests}
    with torch.no_grad(), models.arithmetic():
        text = pipeline.text.broadcast([caption(plain, 0)], models.max_length(plain))
        noise = draw_noise([plain], 0)
        for turn in range(rounds + 1):
            for name, request in requests.items():
                before, began = models.clock.seconds.get("denoise", 0.0), time.process_time()
                denoise(models, [request], 0, text, ResumePoint(0, noise, None))
                if turn:  # the first round warms up
                    seconds[name].append(models.clock.seconds["denoise"] - before)
                    cpu[name].append(time.process_time() - began)
    return [row(size, level, requests[level], seconds, cpu) for level in LEVELS]


def row(
    size: str,
    level: str,
    request: Request,
    seconds: Mapping[str, Sequence[float]],
    cpu: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What was found of a level, as JSON holds it. seconds, cpu: of each round, by level."""
    schedule = request.step_cache
    assert not isinstance(schedule, str)
    ratios = [full / own for full, own in zip(seconds[OFF], seconds[level], strict=True)]
    steps = request.steps / len(schedule.computed)
    return {
        "size": size,
        "level": level,
        "computed": len(schedule.computed),
        "steps": request.steps,
        "steps_ratio": round(steps, 4),
        "time_ratio": round(median(ratios), 4),
        "cpu_ratio": round(sum(cpu[OFF]) / sum(cpu[level]), 4),
        "off_by": round(median(ratios) / steps - 1, 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "seconds_full": [round(value, 4) for value in seconds[OFF]],
        "seconds": [round(value, 4) for value in seconds[level]],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| size | level | computed | by steps | by time | off by | by CPU |"]
    lines.append("|" + " --- |" * 7)
    for one in rows:
        lines.append(
            f"| {one['size']} | {one['level']} | {one['computed']} of {one['steps']} | "
            f"{one['steps_ratio']:.2f}× | {one['time_ratio']:.2f}× | {one['off_by']:+.1%} | "
            f"{one['cpu_ratio']:.2f}× |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
