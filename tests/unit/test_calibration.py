"""Calibration of step schedules: the path search, the lists that are tried, files, refusals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opensora_sp.benchmark.calibration import trajectory
from opensora_sp.benchmark.calibration.result import (
    rows_of,
    schedule_of,
    size_class,
    table,
    write_merged,
)
from opensora_sp.benchmark.calibration.search import best_paths
from opensora_sp.benchmark.calibration.selection import Candidate, Curve, Level, candidates_of
from opensora_sp.cli.main import main
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request
from opensora_sp.request.step_schedule import FILLS, read_schedules

TIMES = [1000.0, 960.0, 900.0, 800.0, 640.0, 500.0, 310.0, 90.0]


def velocities(seed: int, steps: int = len(TIMES)) -> NDArray[np.float64]:
    """Velocities [steps, 40] that change more slowly from step to step than they are long."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=40) + np.cumsum(rng.normal(size=(steps, 40)) * 0.3, axis=0)


def moved_wrongly(v: NDArray[np.float64], computed: Sequence[int], reads: int) -> float:
    """The cost of a list by its definition: each step's velocity against a fitted polynomial."""
    ends = [*TIMES[1:], 0.0]
    total = 0.0
    for place, last in enumerate(computed):
        following = [*computed[place + 1 :], len(TIMES)][0]
        known = list(computed[max(0, place + 1 - reads) : place + 1])
        at = np.array([TIMES[k] for k in known]) / 1000
        wrong = np.zeros(v.shape[1])
        for step in range(last + 1, following):
            polynomial = np.polyfit(at, v[known], len(known) - 1)
            powers = (TIMES[step] / 1000) ** np.arange(len(known) - 1, -1, -1)
            wrong += (TIMES[step] - ends[step]) * (v[step] - powers @ polynomial)
        total += float((wrong**2).sum())
    return total


@pytest.mark.parametrize("fill", FILLS)
def test_the_search_finds_what_trying_every_list_finds(fill: str) -> None:
    v, reads, steps = velocities(1), FILLS.index(fill) + 1, len(TIMES)
    found = best_paths(v @ v.T, TIMES, fill)
    assert sorted(found) == list(range(1, steps + 1))
    for count, path in found.items():
        every = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
        cost, computed = min((moved_wrongly(v, one, reads), one) for one in every)
        assert path.computed == computed
        assert path.cost == pytest.approx(cost, rel=1e-9, abs=1e-6)


def test_inner_products_are_those_of_the_velocities_however_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    v = velocities(2)
    lengths = -np.diff(np.array([*TIMES, 0.0]))
    states = np.concatenate([np.ones((1, 40)), 1 + np.cumsum(v * lengths[:, None], axis=0)])
    files = list(states.astype(np.float32))
    whole = trajectory.gram_of(files, TIMES)
    np.testing.assert_allclose(whole, v @ v.T, rtol=1e-5)
    monkeypatch.setattr(trajectory, "_AT_ONCE", 7)  # 40 values are no multiple of it
    np.testing.assert_allclose(trajectory.gram_of(files, TIMES), whole, rtol=1e-12)


def test_kept_frames_move_by_nothing_and_a_gap_ends_what_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(5)
    noise, v = torch.randn(1, 4, 2, 3, 3), torch.randn(3, 1, 4, 2, 3, 3) / 1000
    times, mask = [1000.0, 700.0, 300.0], torch.tensor([[0.0, 1.0]])
    v[:, :, :, 0] = 0.0
    z = noise.clone()
    z[:, :, 0] = 0.5  # a reference's frame is in its place before the first step
    session = alone()
    run = trajectory.Trajectory(session, tmp_path, 3, noise.shape)
    for step, length in enumerate((300.0, 400.0, 300.0)):
        z = z + length * v[step]
        if step == 2:
            run.finish(0, z, last=True)
        else:
            run.watch(0, step + 1, mask, lambda z=z: z)  # type: ignore[misc]
    flat = v[:, :, :, 1].reshape(3, -1).double().numpy()
    expected = flat @ flat.T / flat.shape[1]
    np.testing.assert_allclose(run.inner_products(noise, times), expected, rtol=1e-3, atol=1e-10)
    whole = trajectory.Trajectory(session, tmp_path, 3, noise.shape)
    assert whole.is_finished(0)
    assert torch.equal(whole.latents(0), z)  # type: ignore[arg-type]
    run.path(2).unlink()
    point = trajectory.Trajectory(session, tmp_path, 3, noise.shape).resume_point(0)
    assert point is not None
    assert point.step == 1
    assert torch.equal(point.mask, mask)  # type: ignore[arg-type]
    run.remove()
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_costs_most_does_not_choose_alone() -> None:
    one, other = velocities(3), velocities(4)
    grams = [one @ one.T, other @ other.T]
    louder = [grams[0], grams[1] * 1e4]
    for count, found in candidates_of(grams, TIMES).items():
        again = candidates_of(louder, TIMES)[count]
        assert {c.computed for c in again} == {c.computed for c in found}


class Runs:
    """Whole runs as they might come out: decibels by number of computed steps and fill."""

    def __init__(self, off: float, better: str = "", worst: float = 1.0) -> None:
        self.off, self.better, self.worst = off, better, worst
        self.asked: list[Candidate] = []

    def __call__(self, one: Candidate) -> Sequence[float]:
        """Two prompts, the second worse."""
        self.asked.append(one)
        bonus = 5.0 if one.fill == self.better else 0.0
        mean = 20 + 2.0 * one.count + self.off + bonus
        return [mean + self.worst, mean - self.worst]


def curve(runs: Runs, steps: int = 30) -> Curve:
    """Candidates whose predictions miss by 40 dB; held velocities are predicted best."""
    several = {
        count: [
            Candidate((0, *range(steps - count + 1, steps)), fill, -20 + 1.5 * count - place)
            for place, fill in enumerate(FILLS)
        ]
        for count in range(1, steps)
    }
    return Curve(several, runs)


@pytest.mark.parametrize("level", [34.0, 52.0, 70.0])
@pytest.mark.parametrize("off", [0.0, 7.0, -9.0])
def test_the_fewest_steps_that_hold_a_level_are_found_by_few_whole_runs(
    level: float, off: float
) -> None:
    runs = Runs(off)
    found = curve(runs).fewest(Level(level, level - 6))
    fewest = max(2, int(np.ceil((level - 20 - off) / 2)))
    assert (None if found is None else found.count) == (fewest if fewest < 30 else None)
    # Trying every number of steps from below would take as many runs as there are steps.
    assert len(runs.asked) <= 12
    assert len(runs.asked) == len(set(runs.asked))


def test_another_fill_is_taken_where_it_needs_fewer_steps() -> None:
    found = curve(Runs(0.0, better="linear")).fewest(Level(52.0, 46.0))
    assert found is not None
    assert (found.fill, found.count) == ("linear", 14)


def test_a_level_does_not_hold_where_one_prompt_is_far_below() -> None:
    level = Level(52.0, 46.0)
    assert curve(Runs(0.0, worst=6.0)).fewest(level) == curve(Runs(0.0)).fewest(level)
    found = curve(Runs(0.0, worst=10.0)).fewest(level)
    assert found is not None
    assert found.count == 18  # 4 dB more in the mean bring the worst prompt up to 46
    assert curve(Runs(-90.0)).fewest(level) is None


def test_a_file_keeps_the_schedules_of_other_sizes(tmp_path: Path) -> None:
    path, lists = tmp_path / "s.yaml", Candidate((0, 1, 3), "hold", 50.0)
    small = Request(prompt="x", height=64, width=96, num_frames=17, steps=5)
    large = Request(prompt="x", height=144, width=144, num_frames=17, steps=5)
    a, b = (schedule_of("fast", lists, size, "m", [44.0, 46.0]) for size in (small, large))
    assert (a.psnr, a.prompts, a.tokens) == (45.0, 2, (64, 256))
    assert b.tokens == size_class(5 * 81) == (256, 1024)
    write_merged(path, [b], b)
    write_merged(path, [a], a)
    assert read_schedules(path) == (a, b)
    again = schedule_of("near-lossless", lists, small, "m", [53.0])
    write_merged(path, [again], again)
    assert read_schedules(path) == (again, b)
    measured = Curve({3: [lists], 2: []}, lambda one: [44.0, 46.0])
    measured.run(lists)
    rows = rows_of(measured, 5)
    assert table(rows, {"fast": a, "draft": a}).count("fast, draft |") == 1
    write_merged(path, [], again)  # no list reached a level this time
    assert read_schedules(path) == (b,)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--out FILE is needed"),
        (["--out", "s.txt"], "a name that ends in .yaml is needed"),
        (["--out", "old.yaml"], "--out 'old.yaml'"),
        (["--out", "folder.yaml"], "is a directory"),
        (["--out", "locked/s.yaml"], "--out 'locked'"),
        (["--out", "s.yaml", "--num-sampling-steps", "2"], "--num-sampling-steps 2"),
        (["--out", "s.yaml", "--loop", "2", "--num-frames", "34"], "--loop 2 belongs to generate"),
        (["--out", "s.yaml", "--num-sample", "2"], "--num-sample 2 belongs to generate"),
        (["--out", "s.yaml", "--step-cache", "fast"], "--step-cache 'fast' belongs to generate"),
        (["--out", "s.yaml", "--sheet"], "--sheet belongs to generate"),
        (["--out", "s.yaml", "--edit", "cat.png"], "an edit ratio of 0.5"),
        (["--out", "s.yaml", "--full-runs", "0"], "--full-runs '0'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_line(
    more: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("prompt: a cat\n", encoding="utf-8")
    Path("folder.yaml").mkdir()
    Path("locked").write_text("no folder", encoding="utf-8")
    from PIL import Image

    Image.new("RGB", (48, 32)).save("cat.png")
    size = ["--image-size", "32", "48", "--num-frames", "17"]
    assert main(["calibrate", *size, *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert sorted(os.listdir()) == ["cat.png", "folder.yaml", "locked", "old.yaml"]
