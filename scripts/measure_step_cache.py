#!/usr/bin/env python3
"""What the first-block cache saves and what it costs, on a model: steps, seconds, PSNR.

    python scripts/measure_step_cache.py [--thresholds 0.05 0.1] [--num-frames 51] [--steps 30]

Generates the same videos without a cache and with one, on this process alone, and prints a Markdown
table: steps reused of all that were asked for, seconds of denoising, the process's CPU seconds for
all steps but the first, and the PSNR of the frames against the exact video's in dB. The exact run
is measured before and after the others: the difference is what the machine's own speed varies by.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opensora_sp.engine.step_cache.first_block import FirstBlockCache

from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.result import Result
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

PROMPTS = ("a red ball rolls to the left", "a blue square spins", "a green triangle moves up")


def psnr(frames: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB; infinite where they are equal."""
    error = float(np.mean((frames.astype(np.float64) - exact.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@dataclass(frozen=True)
class Made:
    """A video, and the CPU seconds of this process from the end of its first step to its last."""

    result: Result
    cpu_seconds: float


def generate(threshold: float | None, requests: Sequence[Request]) -> list[Made]:
    """Each request's video, with a first-block cache of this threshold or without one."""
    cache = None if threshold is None else FirstBlockCache(threshold=threshold)
    pipeline = Pipeline.load(session=alone(), dtype="fp32", runtime=Runtime(step_cache=cache))
    made = []
    for request in requests:
        ends: list[float] = []

        def step_ended(step: int, t: float, latents: object, ends: list[float] = ends) -> None:
            ends.append(time.process_time())

        result = pipeline.generate(request, callback_on_step_end=step_ended)
        made.append(Made(result, ends[-1] - ends[0]))
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="steps, seconds and PSNR of the first-block cache")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--num-frames", type=int, default=51)
    parser.add_argument("--height", type=int, default=144)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    requests = [
        Request(
            prompt=prompt,
            height=asked.height,
            width=asked.width,
            num_frames=asked.num_frames,
            steps=asked.steps,
        )
        for prompt in asked.prompts
    ]
    generate(None, [Request(prompt="x", height=32, width=48, num_frames=1, steps=1)])  # warm-up
    exact = generate(None, requests)
    print(
        "| threshold | steps reused | seconds | PSNR, dB |\n| --- | --- | --- | --- |", flush=True
    )
    print(row("exact", exact, exact), flush=True)
    for threshold in asked.thresholds:
        print(row(f"{threshold:g}", generate(threshold, requests), exact), flush=True)
    print(row("exact again", generate(None, requests), exact), flush=True)


def row(name: str, made: Sequence[Made], exact: Sequence[Made]) -> str:
    """A line of the table: sums and ranges over the videos."""
    reused = sum(len(clip) for each in made for clip in each.result.reused_steps)
    steps = sum(each.result.requests[0].steps for each in made)
    wall = sum(each.result.seconds["denoise"] for each in made)
    cpu = sum(each.cpu_seconds for each in made)
    ratios = []
    for each, other in zip(made, exact, strict=True):
        frames, reference = each.result.videos[0], other.result.videos[0]
        assert frames is not None
        assert reference is not None
        ratios.append(psnr(frames, reference))
    ranged = f"{min(ratios):.1f} to {max(ratios):.1f}" if min(ratios) < math.inf else "equal"
    return f"| {name} | {reused} of {steps} | {wall:.1f} | {cpu:.1f} | {ranged} |"


if __name__ == "__main__":
    main()
