#!/usr/bin/env python3
"""Count peak bytes of every memory mode at a published size, without the arithmetic.

    python scripts/trace_memory.py [--resolution 720p] [--num-frames 16s] [--ranks 1 2 4 8]

Prints a Markdown table: peak GB of the first rank's device while T5 encodes a caption, the
transformer makes one guided velocity, and a chunk of frames is decoded. Three of the 28 pairs of
blocks are traced; the weights and the text keys and values of the others are added, for pairs are
alike and come one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opensora_sp.base import geometry
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.parallel.mesh import plan_mesh
from opensora_sp.planner.models import ModelSizes
from opensora_sp.request import sizes
from opensora_sp.request.memory_modes import MEMORY_MODES
from opensora_sp.request.runtime import Runtime
from opensora_sp.verification.traced_stages import traced_decoding, traced_denoising, traced_text

PAIRS = 3


def denoising(latent: Sequence[int], ranks: int, runtime: Runtime) -> int:
    """Bytes of the whole transformer's velocity, from a trace of its first pairs."""
    mesh, models = plan_mesh(ranks, guided=True), ModelSizes()
    size = (latent[1], latent[2])
    traced = traced_denoising(latent[0], size, mesh, runtime, config=STDiT3Config(depth=PAIRS))
    left = models.depth - PAIRS
    halves = 2 // mesh.guidance
    text = left * 2 * models.tokens * 2 * models.channels * 2 * halves
    weights = 0 if runtime.offload.layers else left * models.pair_weights * 2
    return traced.total + text + weights


def main() -> None:
    """Trace and print."""
    parser = argparse.ArgumentParser(description="peak bytes by memory mode, counted")
    parser.add_argument("--resolution", default="720p")
    parser.add_argument("--num-frames", default="16s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    asked = parser.parse_args()
    height, width = sizes.resolve_size(asked.resolution, "9:16")
    frames = sizes.resolve_frames(asked.num_frames)
    latent = geometry.latent_shape(frames, height, width)

    print("| mode | T5 | " + " | ".join(f"transformer, N = {n}" for n in asked.ranks), end="")
    print(" | decode |\n| --- | --- |" + " --- |" * len(asked.ranks) + " --- |")
    for mode in MEMORY_MODES.values():
        runtime = Runtime.of(mode)
        text = traced_text(offload_layers=runtime.offload.layers).total
        steps = [denoising(latent, ranks, runtime) for ranks in asked.ranks]
        group = min(runtime.group(4), frames)
        decoded = traced_decoding((latent[1], latent[2]), group, frames=min(17, frames)).total
        cells = " | ".join(f"{value / 1e9:.2f}" for value in (text, *steps, decoded))
        print(f"| {mode} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
