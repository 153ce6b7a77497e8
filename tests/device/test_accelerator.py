"""On a real accelerator: the same suite and the same video. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_sp.cli.infer import main as infer
from opensora_sp.cli.verify import main as verify
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.backend import is_available
from opensora_sp.parallel.backend_table import DEVICES
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request

ACCELERATORS = [device for device in DEVICES if device != "cpu" and is_available(device)]

pytestmark = pytest.mark.skipif(not ACCELERATORS, reason="no gcu or cuda device is visible")


@pytest.mark.parametrize("device", ACCELERATORS)
def test_conformance(device: str) -> None:
    assert verify(["--device", device]) == 0
    assert verify(["--device", device, "--dtype", "bf16"]) == 0


@pytest.mark.parametrize("device", ACCELERATORS)
def test_the_latents_are_the_cpus(device: str) -> None:
    request = Request(prompt="a red ball", height=72, width=56, num_frames=17, steps=3)
    ours, cpus = (
        Pipeline.load(session=alone(where), dtype="fp32").generate(request).latents[0]
        for where in (device, "cpu")
    )
    assert ours is not None
    assert cpus is not None
    assert float((ours.cpu() - cpus).abs().max() / cpus.abs().max()) < 1e-3


@pytest.mark.parametrize("device", ACCELERATORS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_command(device: str, dtype: str, tmp_path: Path) -> None:
    argv = ["--prompt", "a red ball", "--image-size", "64", "96", "--num-frames", "17"]
    argv += ["--num-sampling-steps", "2", "--device", device, "--dtype", dtype]
    assert infer([*argv, "--save-dir", str(tmp_path)]) == 0
    assert (tmp_path / "sample_0000.mp4").stat().st_size > 1000
