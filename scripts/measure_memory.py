#!/usr/bin/env python3
"""Measured peaks of the three memory modes beside the planned ones, on an accelerator.

    python scripts/make_random_checkpoints.py DIR --t5-layers 24
    python scripts/measure_memory.py DIR [--resolution 720p] [--num-frames 16s] [--steps 1]
    torchrun --nproc_per_node N scripts/measure_memory.py DIR …

Random weights are as large as real ones. Prints a Markdown table: per mode and stage the most
bytes that the allocator of the busiest rank handed out, what the planner had said, and the ratio.
On a CPU nobody counts, and there is nothing to measure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from opensora_sp.benchmark.memory_meter import MemoryMeter
from opensora_sp.engine.denoising import denoise
from opensora_sp.engine.generate import decode
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import ResumePoint
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import Options, make_plan
from opensora_sp.planner.requests import sizes_of
from opensora_sp.request import sizes
from opensora_sp.request.memory_modes import MEMORY_MODES, MemoryMode
from opensora_sp.request.request import Checkpoints, Request
from opensora_sp.request.runtime import Runtime


def measure(session: Session, where: Checkpoints, request: Request, mode: MemoryMode) -> list[int]:
    """Peaks of text, denoising and decoding on this rank, in that order."""
    runtime = Runtime.of(mode, chunks=session.backend.chunks)
    pipeline = Pipeline.load(where, session=session, runtime=runtime)
    peaks, meter = [], MemoryMeter(session.device)

    def note() -> None:
        peaks.append(meter.peak_device_bytes() or 0)
        meter.reset()

    with torch.no_grad(), pipeline.models.arithmetic():
        meter.reset()
        text = pipeline.text.broadcast([request.prompt], pipeline.models.max_length(request))
        pipeline.text.release_encoder()
        note()
        start = ResumePoint(0, draw_noise([request], 0), None)
        latents = denoise(pipeline.models, [request], 0, text, start)
        note()
        for _ in decode(pipeline.models, [request], latents):
            pass
        note()
    return peaks


def main() -> None:
    """Measure every mode and print the table on rank 0."""
    parser = argparse.ArgumentParser(description="measured and planned peaks of the memory modes")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--resolution", default="720p")
    parser.add_argument("--num-frames", default="16s")
    parser.add_argument("--steps", type=int, default=1)
    asked = parser.parse_args()
    height, width = sizes.resolve_size(asked.resolution, "9:16")
    frames = sizes.resolve_frames(asked.num_frames)
    request = Request(
        prompt="waves", height=height, width=width, num_frames=frames, steps=asked.steps
    )
    names = ("dit", "t5", "vae2d", "vae3d")
    where = Checkpoints(**{name: asked.directory / name for name in names})
    shape = Shape(height=height, width=width, num_frames=frames, steps=asked.steps)
    with open_session() as session:
        if session.device.type == "cpu":
            sys.exit(f"{session.device.type} devices do not count what tensors take: no measuring")
        options = Options(chunks=session.backend.chunks)
        if session.leads:
            print("| mode | stage | measured GB | planned GB | planned / measured |")
            print("| --- | --- | --- | --- | --- |")
        for mode in MEMORY_MODES.values():
            plan = make_plan(shape, session.world_size, mode, sizes_of(where), options)
            planned = {stage.name: stage.total for stage in plan.stages}
            everyone = session.control.all_gather_object(measure(session, where, request, mode))
            for i, stage in enumerate(("text", "denoise", "decode")):
                most = max(peaks[i] for peaks in everyone)
                if session.leads:
                    print(
                        f"| {mode} | {stage} | {most / 1e9:.2f} | {planned[stage] / 1e9:.2f} "
                        f"| {planned[stage] / most:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
