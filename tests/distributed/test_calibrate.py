"""opensora-sp calibrate: the same on two ranks as on one, and it goes on where it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import run_ranks

from opensora_sp.benchmark.calibration import run
from opensora_sp.benchmark.calibration.full_runs import FullRuns
from opensora_sp.benchmark.calibration.trajectory import Trajectory
from opensora_sp.cli.main import main
from opensora_sp.engine.weight_digests import model_digests
from opensora_sp.request.step_schedule import read_schedules

FLAGS = ["--image-size", "32", "48", "--num-frames", "9", "--num-sampling-steps", "5"]
FLAGS += ["--dtype", "fp32", "--device", "cpu", "--verbose", "0", "--keep-state"]


def calibrate(folder: Path, *more: str) -> int:
    """Run the command line in this process; the schedules are FOLDER/s.yaml."""
    return main(["calibrate", *FLAGS, "--out", str(folder / "s.yaml"), *more])


def on_ranks(rank: int, world_size: int, init_file: str, folder: Path, more: list[str]) -> int:
    """A rank of it."""
    return calibrate(folder, *more)


def found(folder: Path) -> tuple[Any, list[Any], list[Any]]:
    """Schedules without their decibels, decibels by list, and inner products by prompt."""
    runs = next(folder.glob("s.yaml.runs-*"))
    compared = json.loads((runs / "compared.json").read_text(encoding="utf-8"))
    schedules = read_schedules(folder / "s.yaml")
    grams = [np.load(path) for path in sorted(runs.glob("gram-*.npy"))]
    assert not list(runs.glob("latents-*"))
    kept = [(one.name, one.computed, one.fill, one.tokens) for one in schedules]
    return kept, sorted(compared.items()), grams


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A picture to start from."""
    path = tmp_path_factory.mktemp("picture") / "start.png"
    Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 30).convert("RGB").save(path)
    return str(path)


def test_two_ranks_find_what_one_finds_and_a_killed_run_goes_on(
    tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a picture, so that kept frames are in it: they move by nothing."""
    more = ["--full-runs", "1", "--image", picture]
    alone, two, killed = tmp_path / "alone", tmp_path / "two", tmp_path / "killed"
    assert calibrate(alone, *more) == 0
    assert run_ranks(on_ranks, 2, two, more) == [0, 0]
    one, other = found(alone), found(two)
    assert one[0] == other[0]
    for (name, values), (name_two, values_two) in zip(one[1], other[1], strict=True):
        assert name == name_two
        np.testing.assert_allclose(values, values_two, atol=0.2)  # frames are rounded to 8 bits
    np.testing.assert_allclose(one[2], other[2], rtol=1e-4)

    watch = Trajectory.watch

    def watch_and_die(self: Trajectory, clip: int, step: int, *rest: Any) -> None:
        watch(self, clip, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trajectory, "watch", watch_and_die)
    with pytest.raises(KeyboardInterrupt):
        calibrate(killed, *more)
    assert not (killed / "s.yaml").exists()
    resumed = []

    def watch_and_note(self: Trajectory, clip: int, step: int, *rest: Any) -> None:
        resumed.append(step)
        watch(self, clip, step, *rest)

    monkeypatch.setattr(Trajectory, "watch", watch_and_note)
    assert calibrate(killed, *more) == 0
    assert resumed == [4]
    again = found(killed)
    assert again[:2] == one[:2]
    np.testing.assert_array_equal(again[2], one[2])  # bit-equal on one mesh

    # What is there is not made again: only what was measured is read.
    monkeypatch.setattr(FullRuns, "make", None)
    assert calibrate(killed, *more) == 0
    assert found(killed)[:2] == one[:2]

    # Nor is it taken for what another VAE made, or what was made from another picture.
    there = []

    def stop(_pipeline: Any, _requests: Any, folder: Path) -> None:
        there.append(folder.exists())
        raise KeyboardInterrupt

    def start() -> None:
        with pytest.raises(KeyboardInterrupt):
            calibrate(killed, *more)

    monkeypatch.setattr(run, "FullRuns", stop)
    start()
    with monkeypatch.context() as patched:
        patched.setattr(
            run, "model_digests", lambda given: model_digests(given) | {"vae3d": "another"}
        )
        start()
    Image.new("RGB", (48, 32)).save(picture)
    start()
    assert there == [True, False, False]
