"""What people really hand in: the right result, or one clear line before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_sp.base.errors import UserError
from opensora_sp.cli.infer import main
from opensora_sp.engine.clips import ConditioningFrames
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media.writer import VideoWriter
from opensora_sp.parallel.session import alone
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Request


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def portrait(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    Image.fromarray(noise(30, 60, 3)).save(path, exif=exif)


def video(frames: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with VideoWriter(path, fps=24, height=33, width=47, metadata={}) as writer:
            writer.write(noise(frames, 33, 47, 3))

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "exif-portrait.jpg": portrait,
    "one-pixel.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "palette.png": lambda path: Image.fromarray(noise(9, 9, 3)).quantize(7).save(path),
    "alpha.png": lambda path: Image.fromarray(noise(20, 30, 4)).save(path),
    "grey16.png": lambda path: Image.fromarray(noise(9, 8).astype(np.uint16) * 257).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(noise(9, 9, 4), "CMYK").save(path),
    "4k.jpg": lambda path: Image.fromarray(noise(2160, 3840, 3)).save(path, quality=30),
    "animated.gif": lambda path: Image.fromarray(noise(20, 30)).save(
        path, save_all=True, append_images=[Image.fromarray(noise(20, 30) // 2)] * 4
    ),
    "short.mp4": video(3),
    "long.mp4": video(90),
    "na me é 猫.png": lambda path: Image.fromarray(noise(8, 8, 3)).save(path),
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(session=alone("cpu"), dtype="fp32")


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("strategy", ["0", "0,0,-5,0,5", "0,0,0,-1,30,0.3"])
def test_any_picture_or_video_is_a_reference(
    name: str, strategy: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    MAKERS[name](tmp_path / name)
    request = Request(
        prompt="x", height=32, width=48, num_frames=17, steps=1, align=1,
        reference_path=str(tmp_path / name), mask_strategy=strategy,
    )  # fmt: skip
    if strategy.startswith("0,0,-5") and name != "long.mp4":
        with pytest.raises(UserError, match="ref_start -5 lies before the first"):
            ConditioningFrames(pipeline.models, [request])
        return
    with torch.no_grad():
        kept = ConditioningFrames(pipeline.models, [request])
    reference = kept.references[0][0]
    assert reference.shape[2:] == (4, 6)
    assert bool(torch.isfinite(reference).all())
    z, mask = kept.start(0, torch.zeros(1, 4, 5, 4, 6))
    assert mask is not None
    placed = (mask[0] < 1).nonzero().flatten().tolist()
    count = {"0": 1, "0,0,-5,0,5": 5, "0,0,0,-1,30,0.3": 1}[strategy]
    assert placed == (list(range(count)) if "-1" not in strategy else [4])
    assert bool((z[0][:, mask[0] == 1] == 0).all())


def test_a_start_before_the_reference_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["one-pixel.png"](tmp_path / "one.png")
    argv = ["--prompt", "x", "--reference-path", str(tmp_path / "one.png"), "--device", "cpu"]
    argv += ["--mask-strategy", "0,0,-5,0,5", "--image-size", "32", "48", "--num-frames", "17"]
    assert main([*argv, "--save-dir", str(tmp_path / "out"), "--verbose", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mask strategy: ref_start -5 lies before the first of 1")
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_awkward_prompts_generate(pipeline: Pipeline) -> None:
    small = {"height": 32, "width": 32, "num_frames": 1, "steps": 1}
    prompts = ["", "猫が走る", "🙂" * 50, "word " * 1000, "x" * 5000, "a\nb\tc", "|0|only", "100%"]
    for index, prompt in enumerate(prompts):
        request = Request(prompt=prompt, prompt_index=index, **small)  # type: ignore[arg-type]
        latents = pipeline.generate(request).latents[0]
        assert latents is not None
        assert bool(torch.isfinite(latents).all()), (prompt[:20], caption(request, 0)[:20])


@pytest.mark.slow
def test_the_whole_command_with_json_in_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["alpha.png"](tmp_path / "a.png")
    conditions = json.dumps({"reference_path": str(tmp_path / "a.png"), "mask_strategy": "0"})
    argv = ["--prompt", "a boat" + conditions, "--image-size", "32", "48", "--num-frames", "17"]
    argv += ["--num-sampling-steps", "1", "--device", "cpu", "--dtype", "fp32", "--verbose", "0"]
    assert main([*argv, "--save-dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "sample_0000.mp4")
