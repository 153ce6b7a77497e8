"""One request gives the same latents on every supported stack and every machine.

tests/data/latents.safetensors holds what this request gave when it was recorded, with the tiny
models of the conformance suite, from the prompt's words to the last step, in float32. To record it
anew after a change that is meant to change results: `python tests/conformance/test_stacks.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Checkpoints, Request

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "latents.safetensors"
SUITE = ROOT / "opensora_sp_conformance"
REQUEST = Request(prompt="A red ball, rolling!", height=32, width=48, num_frames=20, steps=4)


def pipeline() -> Pipeline:
    names = ("dit", "t5", "vae2d", "vae3d")
    checkpoints = Checkpoints(**{name: SUITE / name for name in names})
    return Pipeline.load(checkpoints, session=alone("cpu"), dtype="fp32")


def latents_from(noise: torch.Tensor) -> torch.Tensor:
    latents = pipeline().generate_to([REQUEST], [Collector()], noise=noise).latents[0]
    assert latents is not None
    return latents


def test_the_recorded_latents() -> None:
    """Within ten times what one ulp of the noise moves: other kernels round elsewhere, no more."""
    noise = draw_noise([REQUEST], 0)
    recorded = load_file(RECORDED)
    assert torch.equal(noise, recorded["noise"])  # drawn on the CPU: bit for bit
    ours = latents_from(noise)
    moved = latents_from(torch.nextafter(noise, torch.full_like(noise, torch.inf)))
    scale = float(recorded["latents"].abs().max())
    tolerance = 10 * float((moved - ours).abs().max()) / scale
    assert tolerance < 1e-4  # a chaotic request would prove nothing
    assert float((ours - recorded["latents"]).abs().max()) / scale <= tolerance


if __name__ == "__main__":
    start = draw_noise([REQUEST], 0)
    RECORDED.parent.mkdir(exist_ok=True)
    save_file({"noise": start, "latents": latents_from(start).contiguous()}, RECORDED)
