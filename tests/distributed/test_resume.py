"""A run that was killed, stopped or could not decode goes on from what it had, to the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from command import SMALL, infer, run, saved, stages, t5_loads
from ranks import run_ranks

from opensora_sp.engine.model_set import ModelSet
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.sampling import sample
from opensora_sp.jobs.identity import digest
from opensora_sp.jobs.records import FOLDER, read_record
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request
from opensora_sp.request.step_times import timesteps

NAME = "sample_0000.mp4"
FLAGS = ["--prompt", "|0|a cat|1|a dog", "--num-frames", "34", "--loop", "2", "--keep-state"]
FLAGS += ["--num-sampling-steps", "5", "--save-every", "2", "--text-cache", "off"]
FLAGS += ["--image-size", "72", "56"]  # odd latent sides; ranks round differently


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The clips of the run on two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(2, folder, *FLAGS)
    return saved(folder)


@pytest.fixture(scope="module")
def tolerance() -> float:
    """Ten times the response of a full run to a one-ulp change of its noise, relative."""
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    request = Request(prompt="a cat", height=72, width=56, num_frames=34, steps=5)
    noise = draw_noise([request], 0)
    nudged = torch.nextafter(noise, torch.full_like(noise, torch.inf))
    a, b = (
        pipeline.generate_to([request], [Collector()], noise=z).latents[0] for z in (noise, nudged)
    )
    assert a is not None
    assert b is not None
    return 10 * float((a - b).abs().max() / a.abs().max())


def test_a_killed_run_goes_on_to_the_same_bits(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for rank, clip, step in ((1, 0, 3), (0, 1, 4)):
        assert not run(2, tmp_path, *FLAGS, trouble=(rank, clip, step, signal.SIGKILL))
        assert stages(tmp_path) == {NAME: "denoising"}
        assert not (tmp_path / NAME).exists()
    assert f"{NAME}.clip0000.safetensors/latents" in saved(tmp_path)
    assert run(2, tmp_path, *FLAGS, "--resume")
    assert stages(tmp_path) == {NAME: "done"}
    found = saved(tmp_path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_another_number_of_ranks_goes_on_within_rounding(
    whole: dict[str, torch.Tensor], tolerance: float, tmp_path: Path
) -> None:
    assert not run(2, tmp_path, *FLAGS, trouble=(1, 0, 4, signal.SIGKILL))
    assert run(3, tmp_path, *FLAGS)
    found = saved(tmp_path)
    assert found.keys() == whole.keys()
    for name, want in whole.items():
        assert float((found[name] - want).abs().max() / want.abs().max()) <= tolerance


def test_ranks_that_are_stopped_save_the_step_they_are_at(tmp_path: Path) -> None:
    flags = [*FLAGS, "--save-every", "0"]
    assert not run(3, tmp_path, *flags, trouble=(2, 0, 3, signal.SIGTERM))
    assert list(saved(tmp_path)) == [f"{NAME}.step.safetensors/latents"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_decode_only_finishes_a_run_whose_encoder_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opensora_sp.cli.infer import main

    flags = ["--prompt", "a cat", "--num-frames", "17", "--num-sampling-steps", "2"]
    flags += ["--text-cache", "off"]
    assert main([*SMALL, *flags, "--decode-only", "--save-dir", str(tmp_path)]) == 2
    assert "has not been denoised to its end" in capsys.readouterr().err
    assert not run(1, tmp_path, *flags, fault="rank=0 point=encode-to-file way=exception")
    assert stages(tmp_path) == {NAME: "latents saved"}
    assert not (tmp_path / NAME).exists()
    monkeypatch.setattr(ModelSet, "transformer", property(lambda _: pytest.fail("denoises again")))
    assert main([*SMALL, *flags, "--decode-only", "--save-dir", str(tmp_path)]) == 0
    assert stages(tmp_path) == {NAME: "done"}
    assert (tmp_path / NAME).exists()
    assert t5_loads(tmp_path) == 1
    assert saved(tmp_path) == {}  # the state has done its work


def test_a_label_is_in_the_file_of_each_way_to_make_it(tmp_path: Path) -> None:
    def labelled(producer: str, *more: str) -> dict[str, str]:
        flags = ["--prompt", "a cat", "--image-size", "32", "64", "--num-frames", "34", "--loop"]
        flags += ["2", "--num-sampling-steps", "2", "--keep-state", "--label", "cn"]
        assert run(1, tmp_path, *flags, "--label-producer", producer, *more)
        with av.open(str(tmp_path / NAME)) as file:
            found: dict[str, str] = json.loads(file.metadata["AIGC"])
        record = read_record(tmp_path / NAME)
        assert record is not None
        assert found["ProduceID"] == digest(record.identity)
        assert found["ContentProducer"] == producer
        return found

    first = labelled("X")
    assert labelled("Y", "--decode-only", "--overwrite")["ProduceID"] != first["ProduceID"]


def test_a_state_that_does_not_fit_is_one_line_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opensora_sp.cli.infer import main

    named = ("--sample-name", "sample")  # or another request would get a name that is free

    def refused(*flags: str) -> str:
        assert main([*SMALL, *FLAGS, *named, *flags, "--save-dir", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    assert not run(1, tmp_path, *FLAGS, *named, trouble=(0, 1, 3, signal.SIGKILL))
    files = {p.name: p.read_bytes() for p in (tmp_path / FOLDER).iterdir()}
    assert "another request, its seed was 42 and is 7 now" in refused("--seed", "7", "--resume")
    step = tmp_path / FOLDER / f"{NAME}.step.safetensors"
    for broken in (
        files[step.name][:-1],
        files[step.name][:40],
        b"",
        files[step.name][:-4] + b"\0\0\0\0",
    ):
        step.write_bytes(broken)
        assert f"{step} is damaged" in refused()
        assert step.read_bytes() == broken
    step.write_bytes(files[step.name])
    assert {p.name: p.read_bytes() for p in (tmp_path / FOLDER).iterdir()} == files


@pytest.mark.parametrize("first_step", [0, 1, 3, 6])
def test_sampling_goes_on_from_any_step(first_step: int) -> None:
    """Frames that are kept, edited and generated, against the run that was not cut."""
    times = timesteps(7, height=64, width=64, frames=17)
    mask = torch.tensor([[1.0, 0.0, 0.5, 0.9, 1.0], [1.0, 0.7, 0.2, 0.0, 1.0]])
    start = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))

    def noise_at(step: int) -> torch.Tensor:
        return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(step + 1))

    def velocity(z: torch.Tensor, t: float, generate: Any) -> torch.Tensor:
        return torch.tanh(z + t / 1000) + generate[..., None]

    seen = [start]
    whole = sample(start, times, velocity, mask, noise_at, lambda _, z: seen.append(z))
    rest = sample(seen[first_step], times, velocity, mask, noise_at, first_step=first_step)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize(
    ("world", "point", "after", "size"),
    [
        (2, "encode-to-file", 2, ["72", "56"]),
        (2, "decode", 1, ["64", "96"]),
        (1, "encode-to-file", 1, ["240", "424"]),
    ],
)
def test_a_run_that_dies_while_writing_is_made_again_to_the_same_file(
    world: int, point: str, after: int, size: list[str], tmp_path: Path
) -> None:
    flags = ["--prompt", "a red ball", "--num-frames", "51", "--num-sampling-steps", "1"]
    flags += ["--image-size", *size]
    assert run(world, tmp_path / "whole", *flags)
    assert not run(
        world, tmp_path / "died", *flags, fault=f"rank=0 point={point} way=kill after={after}"
    )
    assert not (tmp_path / "died" / NAME).exists()
    assert stages(tmp_path / "died") == {NAME: "latents saved"}
    assert fewer_cores(world, tmp_path / "died", *flags)
    wrote = [(tmp_path / folder / NAME).read_bytes() for folder in ("whole", "died")]
    assert wrote[0] == wrote[1]
    assert not list(tmp_path.rglob("*.tmp"))


def fewer_cores(world: int, folder: Path, *argv: str) -> bool:
    """`run` on one core, whose encoder must not write another file for it."""
    codes = run_ranks(on_one_core, world, [*SMALL, *argv, "--save-dir", str(folder)])
    return codes == [0] * world


def on_one_core(rank: int, world: int, init_file: str, argv: list[str]) -> int:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    return infer(rank, world, init_file, argv)
