"""Long lists on replicas: every output there, as one rank makes it, and nothing made twice."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
from command import SMALL, infer, pixels, run, stages, t5_loads
from ranks import run_ranks

from opensora_sp.media import VideoWriter

PROMPTS = [f"ball number {i}" for i in range(7)]
NAMES = [f"sample_{i:04d}.png" for i in range(7)]
LIST = ["--prompt", *PROMPTS, "--num-frames", "image", "--num-sampling-steps", "2"]
LIST += ["--text-cache", "off"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert run(1, folder, *LIST)
    return folder


def differ(folder: Path, other: Path) -> list[str]:
    """Outputs that differ by more than rounding: one grey level."""
    found = []
    for name in NAMES:
        a, b = (pixels(each / name).astype(int) for each in (folder, other))
        if a.shape != b.shape or np.abs(a - b).max() > 1:
            found.append(name)
    return found


def test_replicas_make_what_one_rank_makes(one_rank: Path, tmp_path: Path) -> None:
    """Replicas of one rank each; the next test has replicas of two."""
    assert run(4, tmp_path, *LIST, "--replicas", "4")
    assert stages(tmp_path) == dict.fromkeys(NAMES, "done")
    assert differ(tmp_path, one_rank) == []
    assert t5_loads(tmp_path) == 1


def test_a_killed_list_is_finished_without_doing_anything_twice(
    one_rank: Path, tmp_path: Path
) -> None:
    fault = "rank=2 point=between-outputs way=kill after=1"
    assert not run(4, tmp_path, *LIST, "--replicas", "2", fault=fault)
    made = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")}
    done = {name for name, stage in stages(tmp_path).items() if stage == "done"}
    assert 2 <= len(done) < len(NAMES)
    assert run(4, tmp_path, *LIST, "--replicas", "2")
    assert stages(tmp_path) == dict.fromkeys(NAMES, "done")
    assert differ(tmp_path, one_rank) == []
    assert {name for name in done if (tmp_path / name).stat().st_mtime_ns != made[name]} == set()
    assert t5_loads(tmp_path) == 2
    # Nothing is left to do, so nothing is loaded.
    assert run(4, tmp_path, *LIST, "--replicas", "2")
    assert t5_loads(tmp_path) == 2


def heard(rank: int, world: int, init_file: str, argv: list[str]) -> tuple[int, str]:
    """The exit code of `infer` on one rank, and what it said on its error stream."""
    with redirect_stderr(io.StringIO()) as said:
        code = infer(rank, world, init_file, argv)
    return code, said.getvalue()


def broken_in_the_middle(folder: Path) -> tuple[str, str]:
    """A whole video, and one whose first pictures can be read and whose later ones cannot."""
    whole, broken = folder / "whole.mp4", folder / "broken.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    with VideoWriter(whole, fps=24, height=32, width=48, metadata={}) as writer:
        writer.write(frames)
    content = bytearray(whole.read_bytes())
    start = content.find(b"mdat")
    end = start - 4 + int.from_bytes(content[start - 4 : start], "big")
    half = (start + end) // 2
    content[half:end] = bytes(end - half)
    broken.write_bytes(content)
    return str(whole), str(broken)


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, []),
        (1, ["--batch-size", "3"]),
        (2, ["--batch-size", "2", "--sheet"]),
        (2, ["--replicas", "2"]),
    ],
)
def test_a_broken_reference_costs_its_own_prompt_alone(
    world: int, more: list[str], tmp_path: Path
) -> None:
    whole, broken = broken_in_the_middle(tmp_path)
    folder = tmp_path / "out"
    argv = [*SMALL, "--num-sampling-steps", "1", "--num-frames", "17", "--save-dir", str(folder)]
    argv += ["--prompt", "a", "b", "c", "--mask-strategy", "0", "0", "0", "--reference-path"]
    argv += [whole, broken, whole, "--text-cache", "off", *more]
    outcomes = run_ranks(heard, world, argv)
    assert [code for code, _ in outcomes] == [2] * world
    assert stages(folder) == {"sample_0000.mp4": "done", "sample_0002.mp4": "done"}
    assert not (folder / "sample_0001.mp4").exists()
    lines = [line for _, said in outcomes for line in said.splitlines()]
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1
    assert "sample_0001.mp4 (prompt 1) is not made" in errors[0]
    assert "broken.mp4" in errors[0]
    # Mended, it takes the name that it was to have.
    argv[argv.index(broken)] = whole
    assert run_ranks(infer, world, argv) == [0] * world
    assert stages(folder) == {f"sample_{i:04d}.mp4": "done" for i in range(3)}


def test_another_request_on_two_ranks_gets_another_name(tmp_path: Path) -> None:
    flags = ["--num-frames", "image", "--num-sampling-steps", "1", "--text-cache", "off"]
    for prompt in ("a cat", "a dog", "a cat", "a dog"):
        assert run(2, tmp_path, *flags, "--num-sample", "2", "--prompt", prompt)
    made = {"sample_0000-0.png", "sample_0000-1.png", "sample_0000-0_2.png", "sample_0000-1_2.png"}
    assert stages(tmp_path) == dict.fromkeys(made, "done")
    assert t5_loads(tmp_path) == 2
