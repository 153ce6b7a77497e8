"""Flags that people bring from other programs: the right one, or why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opensora_sp.cli.infer import main
from opensora_sp.request.flags.foreign import FOREIGN, explain
from opensora_sp.request.flags.table import all_flags

OURS = {flag.name for flag in all_flags()}


def test_every_flag_that_is_named_exists() -> None:
    for entry in FOREIGN:
        named = {*entry.use, *re.findall(r"--[a-z][a-z0-9-]+", entry.why)}
        named -= {"--nproc_per_node", "--nproc", "--no-python"}  # of torchrun
        assert named <= OURS, entry.names
        assert entry.use or entry.why


def test_no_flag_is_there_twice_or_is_one_of_ours() -> None:
    names = [name for entry in FOREIGN for name in entry.names]
    assert sorted(names) == sorted(set(names))
    assert not {f"--{name}" for name in names} & OURS
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps", "30"], "'--steps' is not a flag; here it is --num-sampling-steps"),
        (["--num_inference_steps=30"], "here it is --num-sampling-steps"),
        (["--height", "480", "--width", "832"], "--image-size 480 832"),
        (["--size", "832*480"], "here it is --image-size"),
        (["--guidance-scale", "7"], "here it is --cfg-scale"),
        (["--negative_prompt", "bad"], "not supported: Open-Sora 1.2"),
        (["--lora", "x"], "not supported: adapters"),
        (["--compile"], "here it is --enable-compile"),
        (["--video-length", "49"], "here it is --num-frames"),
        (["--frames", "49"], "here it is --num-frames"),
        (["--ulysses-degree", "4"], "here it is --sequence-parallel"),
        (["--ring_degree", "2"], "here it is --sequence-parallel"),
        (["--use-cfg-parallel"], "here it is --guidance-parallel"),
        (["--tp-size", "2"], "not supported: the weights are not split"),
        (["--sp-size", "2"], "here it is --sequence-parallel"),
        (["--enable-model-cpu-offload"], "here it is --memory"),
        (["--output", "x.mp4"], "here it is --save-dir and --sample-name"),
        (["-o", "x.mp4"], "here it is --save-dir"),
        (["--ckpt", "x"], "--ckpt-path-dit"),
        (["--teacache-thresh", "0.1"], "here it is --step-cache"),
        (["--port", "8000"], "opensora-sp serve"),
        (["--multi_resolution", "STDiT2"], "not supported: size, length and frame rate"),
        (["--no-watermark"], "did you mean --watermark"),
        (["configs/sample.py"], "configurations are YAML, given by --config"),
        (["--promt", "x"], "did you mean --prompt?"),
    ],
)
def test_one_line_says_what_to_write(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_keys_of_a_config_are_explained_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("num_inference_steps: 3\n", encoding="utf-8")
    assert main(["--config", str(config), "--prompt", "x"]) == 2
    assert "'num_inference_steps' is not a key; here it is --num-sampling-steps" in (
        capsys.readouterr().err
    )
    assert explain("cfg_scael") is None
