"""One prompt's bad file does not end a list: the others are made, and the bad one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import SMALL, infer, pixels, stages
from ranks import run_ranks

from opensora_sp.media.writer import VideoWriter

FRAMES = 17  # all of them are kept, so all are read


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[Path, Path]:
    """A list of good, bad, good, and its bad video: whole where it is looked at, cut behind."""
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, 32, 48, 3), dtype=np.uint8)
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    for path in (good, bad):
        with VideoWriter(path, fps=24, height=32, width=48, metadata={}) as writer:
            writer.write(noise)
    content = bytearray(bad.read_bytes())
    start = content.index(b"mdat") + len(content) // 2  # behind the first frames
    content[start : start + 20000] = bytes(len(content[start : start + 20000]))
    bad.write_bytes(content)
    lines = [
        f'{name} ball {{"reference_path": "{path}", "mask_strategy": "0,0,0,0,1"}}'
        for name, path in (("a red", good), ("a blue", bad), ("a green", good))
    ]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path, bad


def run(world: int, folder: Path, prompts: Path, *more: str) -> list[int]:
    argv = [*SMALL, "--prompt-path", str(prompts), "--save-dir", str(folder), "--sheet"]
    argv += [
        "--num-frames",
        "17",
        "--num-sampling-steps",
        "2",
        "--text-cache",
        "off",
        "--lossless",
        *more,
    ]
    return run_ranks(infer, world, argv)


@pytest.mark.parametrize(
    ("world", "more"),
    [(1, ()), (1, ("--batch-size", "3")), (2, ()), (2, ("--replicas", "2"))],
    ids=["alone", "one batch", "two ranks", "two replicas"],
)
def test_the_others_are_made(
    prompts: tuple[Path, Path], tmp_path: Path, world: int, more: tuple[str, ...]
) -> None:
    path, _ = prompts
    out = tmp_path / "out"
    assert run(world, out, path, *more) == [1] * world
    assert stages(out) == {"sample_0000.mp4": "done", "sample_0002.mp4": "done"}
    assert sorted(p.name for p in out.glob("s*.*")) == [
        "sample_0000.mp4",
        "sample_0002.mp4",
        "sheet.html",
    ]
    assert (out / "sheet.html").read_text(encoding="utf-8").count("sample_0001.mp4") == 0


def test_what_is_made_is_what_a_list_without_the_bad_one_makes(
    prompts: tuple[Path, Path], tmp_path: Path
) -> None:
    """And once the file is mended, the same command makes what was left out."""
    path, bad = prompts
    assert run(2, tmp_path / "mixed", path, "--batch-size", "3") == [1, 1]
    bad.write_bytes((bad.parent / "good.mp4").read_bytes())
    assert run(1, tmp_path / "whole", path) == [0]
    assert run(2, tmp_path / "mixed", path, "--batch-size", "3") == [0, 0]
    for name in ("sample_0000.mp4", "sample_0001.mp4", "sample_0002.mp4"):
        one, other = (pixels(tmp_path / each / name).astype(int) for each in ("mixed", "whole"))
        assert np.abs(one - other).max() <= 1
