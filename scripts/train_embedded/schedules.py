"""Step schedules of the embedded model anew: python -m scripts.train_embedded.schedules WORK

For when its transformer has changed: schedules are for the weights that they were calibrated on.
Calibrates every size class that the model is used in, writes step_cache.yaml beside its weights and
prints the table of docs/calibration.md. WORK keeps the curves, so that the same command goes on
where it was left, and `scripts/measure_schedules.py WORK` finds them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opensora_sp.benchmark.calibration.selection import LEVELS
from opensora_sp.request.step_choice import OWN_FILE
from opensora_sp.request.step_schedule import StepSchedule, read_schedules, write_schedules
from scripts.measure_schedules import LARGEST, STEPS, Size, calibrated
from scripts.train_embedded.export import TARGET

# One of each size class, videos and pictures; the longest first, as others run beside it.
SIZES: tuple[Size, ...] = (
    *LARGEST, (96, 144, 17), (64, 96, 17), (144, 144, 1), (64, 96, 1),
)  # fmt: skip


def table(curves: dict[Size, Path]) -> Iterator[str]:
    """A Markdown row for each size: each level's steps, PSNR, and the worst prompt's."""
    yield f"| size | {' | '.join(LEVELS)} |"
    yield "| " + " | ".join(["---"] * (1 + len(LEVELS))) + " |"
    for (height, width, frames), curve in sorted(curves.items(), key=lambda e: (e[0][2] == 1, e)):
        found = json.loads(curve.read_text(encoding="utf-8"))
        cells = [f"{height}×{width}, " + ("a picture" if frames == 1 else f"{frames} frames")]
        for level in LEVELS:
            one = found["schedules"].get(level)
            cells.append("none" if one is None else _cell(one, found["curve"]))
        yield f"| {' | '.join(cells)} |"


def _cell(one: dict[str, Any], curve: list[dict[str, Any]]) -> str:
    """Steps, how many times fewer, fill, mean and worst prompt of a schedule."""
    row = next(r for r in curve if r["steps"] == one["computed"] and r["fill"] == one["fill"])
    count = len(row["steps"])
    measured = f"{row['mean']:.1f} dB ({row['worst']:.1f})"
    return f"{count} {row['fill']}, {STEPS / count:.1f}×: {measured}"


def main() -> None:
    """Calibrate, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for what is made on the way")
    parser.add_argument("--jobs", type=int, default=1, help="sizes calibrated at a time")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(asked.jobs) as pool:
        made = list(pool.map(lambda size: calibrated(asked.work, size), SIZES))
    curves = dict(zip(SIZES, made, strict=True))
    found: list[StepSchedule] = []
    for curve in made:
        schedules = curve.with_suffix(".yaml")
        found += read_schedules(schedules) if schedules.exists() else ()
    found.sort(key=lambda one: (one.images, one.tokens))
    write_schedules(TARGET / "dit" / OWN_FILE, found)
    for line in table(curves):
        print(line)


if __name__ == "__main__":
    main()
