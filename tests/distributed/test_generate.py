"""The main path on several ranks: the same video as on one, whatever is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Copies
from PIL import Image
from ranks import free_port, run_ranks

from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone, open_session
from opensora_sp.request.request import Request

ROOT = Path(__file__).resolve().parents[2]
PSNR_DB = 60.0


def requests(folder: Path) -> list[list[Request]]:
    """Batches that differ in what they exercise; sizes with odd latent sides among them."""
    small: dict[str, Any] = {"height": 72, "width": 56, "num_frames": 17, "steps": 3}
    picture = str(folder / "picture.png")
    return [
        [Request(prompt="a red ball", **small)],
        [Request(prompt="a cat", **{**small, "num_frames": 1, "cfg_scale": 1.0})],
        [
            Request(prompt="one", **{**small, "num_frames": 20}),
            Request(prompt="two longer words", prompt_index=1, **{**small, "num_frames": 20}),
        ],
        [Request(prompt="x", reference_path=picture, mask_strategy="0;0,0,0,2,1,0.5", **small)],
        [Request(prompt="|0|go|1|stop", loop=2, **{**small, "num_frames": 34, "steps": 2})],
    ]


def run_all(session: Any, folder: Path) -> list[tuple[list[torch.Tensor | None], list[Any]]]:
    pipeline = Pipeline.load(session=session, dtype="fp32")
    results = [pipeline.generate(batch) for batch in requests(folder)]
    return [(result.latents, result.videos) for result in results]


def on_ranks(rank: int, world: int, init_file: str, folder: Path) -> Any:
    with open_session("cpu") as session:
        return run_all(session, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("references")
    values = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(values).save(made / "picture.png")
    return made


@pytest.fixture(scope="module")
def single(folder: Path) -> Any:
    return run_all(alone("cpu"), folder)


@pytest.fixture(scope="module")
def tolerance(single: Any, folder: Path) -> float:
    """Ten times the response of a full run to a one-ulp change of its noise, relative."""
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    batch = requests(folder)[0]
    noise = draw_noise(batch, 0)
    nudged = torch.nextafter(noise, torch.full_like(noise, torch.inf))
    moved = pipeline.generate_to(batch, [Collector()], noise=nudged).latents[0]
    plain = single[0][0][0]
    assert moved is not None
    response = float((moved - plain).abs().max() / plain.abs().max())
    assert 0 < response < 1e-4
    return 10 * response


# Guidance groups alone, the sequence alone in uneven parts, and both.
@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_make_the_same_video(world: int, single: Any, tolerance: float, folder: Path) -> None:
    results = run_ranks(on_ranks, world, folder)
    for result in results[1:]:  # latents and frames are on the leading rank only
        assert all(x is None for latents, videos in result for x in (*latents, *videos))
    for (latents, videos), (one_latents, one_videos) in zip(results[0], single, strict=True):
        for got, want in zip(latents, one_latents, strict=True):
            assert float((got - want).abs().max() / want.abs().max()) <= tolerance
        for got, want in zip(videos, one_videos, strict=True):
            assert got.shape == want.shape
            assert psnr(got, want) >= PSNR_DB


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(np.inf) if error == 0 else float(10 * np.log10(255**2 / error))


def test_the_real_commands(tmp_path: Path) -> None:
    """One process and torchrun, from the command line to the frames of the file."""
    import av

    flags = ["--prompt", "a red ball", "--image-size", "64", "96", "--num-frames", "17"]
    # Lossless, because H.264 turns a difference of one grey level into many.
    flags += ["--num-sampling-steps", "2", "--dtype", "fp32", "--device", "cpu", "--lossless"]
    frames = []
    for name, run in (("one", forked), ("two", under_torchrun)):
        out = tmp_path / name
        code, stdout, stderr = run([*flags, "--save-dir", str(out)], tmp_path)
        assert code == 0, stderr
        assert stdout.strip() == str(out / "sample_0000.mp4")
        assert sorted(p.name for p in out.iterdir()) == [".opensora-sp", "sample_0000.mp4"]
        with av.open(str(out / "sample_0000.mp4")) as container:
            assert container.streams.video[0].average_rate == 24
            frames.append(
                np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            )
    assert frames[0].shape == (17, 64, 96, 3)
    assert psnr(frames[0], frames[1]) >= PSNR_DB


def forked(flags: list[str], folder: Path) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error of one process without a launcher."""
    out, err = folder / "stdout", folder / "stderr"
    (code,) = Copies(flags, [os.environ], out, err).finish()
    return code, out.read_text(), err.read_text()


def under_torchrun(flags: list[str], folder: Path) -> tuple[int | None, str, str]:
    """The same of two ranks that the real launcher starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "launch/infer.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr
