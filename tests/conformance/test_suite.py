"""The conformance suite through the verifier: as a person runs it, alone and under ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from opensora_sp.cli.verify import main
from opensora_sp.parallel.session import open_session
from opensora_sp.request.runtime import Runtime
from opensora_sp.verification.conformance import run_suite
from opensora_sp.verification.suite import Check

PLAIN, FOLDED = Runtime(step_kernels="plain"), Runtime(step_kernels="folded")


@pytest.mark.parametrize("kernels", ["plain", "folded"])
def test_everything_holds_on_one_rank(kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--step-kernels", kernels]) == 0
    out = capsys.readouterr().out
    for case in ("dit/odd ", "dit_bf16/bf16a", "sampler/odd_i2v ", "vae3d/ragged20.decode"):
        assert case in out
    for part in ("t5/0.ids", "media/video0", "manifest/t5", "prompts/caption_cleaning"):
        assert part in out
    assert ", 0 failed, 0 skipped" in out


def sharded_checks(
    rank: int, world: int, init_file: str, suite: Path, runtime: Runtime
) -> list[Check]:
    with open_session("cpu") as session:
        return list(run_suite(suite, session, torch.float32, runtime))


@pytest.fixture
def transformer_suite(suite_dir: Path, tmp_path: Path) -> Path:
    """The transformer and sampler parts alone."""
    for part in ("dit", "sampler"):
        shutil.copytree(suite_dir / part, tmp_path / "suite" / part)
    return tmp_path / "suite"


# Guidance groups alone, the sequence alone in uneven parts, and both. Every number of ranks is in
# tests/distributed/test_denoiser.py.
@pytest.mark.parametrize(
    ("world", "runtime"), [(2, PLAIN), (3, PLAIN), (8, PLAIN), (2, FOLDED), (3, FOLDED)]
)
def test_transformer_and_sampler_hold_on_ranks(
    world: int, runtime: Runtime, transformer_suite: Path
) -> None:
    results = run_ranks(sharded_checks, world, transformer_suite, runtime)
    assert results[1:] == [[]] * (world - 1)
    ran = [check for check in results[0] if check.error is not None]
    assert {check.part for check in ran} == {"dit", "dit_bf16", "sampler"}
    assert [check for check in ran if not check.ok] == []


@pytest.mark.parametrize(
    ("file", "tensor", "case"),
    [
        ("dit/cases.safetensors", "odd.out", "dit/odd"),
        ("sampler/cases.safetensors", "i2v.out", "sampler/i2v"),
        ("vae3d/cases.safetensors", "image.decoded", "vae3d/image.decode"),
        ("media/cases.safetensors", "image0.out", "media/image0"),
    ],
)
def test_one_changed_expectation_fails_by_name(
    file: str,
    tensor: str,
    case: str,
    suite_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = file.split("/")[0]
    needed = {"sampler": ("sampler", "dit"), "vae3d": ("vae3d", "vae2d")}.get(part, (part,))
    for folder in needed:
        shutil.copytree(suite_dir / folder, tmp_path / folder)
    tensors = load_file(tmp_path / file)
    tensors[tensor].view(-1)[3] += 0.05
    save_file(tensors, tmp_path / file)
    assert main(["--reference", str(tmp_path), "--device", "cpu"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1
    assert failed[0].startswith(case)


def test_a_partial_suite_names_what_it_lacks(
    suite_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.json").write_text('{"align_to": [[7, 5, 15, 5], [8, 5, 15, 9]]}')
    assert main(["--reference", str(tmp_path), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "prompts/align_to" in out
    assert "'[8, 5, 15, 9]'" in out
    assert "skipped: dit/cases.safetensors is not in this suite" in out
    assert "skipped: not in this suite" in out


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_no_suite_is_a_mistake_in_the_request(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--reference", str(tmp_path / name), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --reference ")
    assert error.count("\n") == 1
