"""Long lists on replicas: every output there, as one rank makes it, and nothing made twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import pixels, run, stages, t5_loads

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
