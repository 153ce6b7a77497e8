"""A saved state is believed as far as it can be one of its request, and no further."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora_sp.base.errors import UserError
from opensora_sp.engine.progress import Position
from opensora_sp.jobs import saved_latents as saved_state
from opensora_sp.jobs.identity import identity_of, latents_identity
from opensora_sp.jobs.saved_latents import SavedStep, StateFiles
from opensora_sp.parallel.agreement import checksum
from opensora_sp.request.request import EngineSettings, JobSettings, Request, Task
from opensora_sp.request.step_schedule import StepSchedule

SHAPE = (4, 15, 4, 6)


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    """Two clips of three, and ten steps of the third, of a request of 30 steps."""
    request = Request(prompt="p", height=32, width=48, loop=3)
    task = Task(request=request, output=tmp_path / "a.mp4")
    identity = latents_identity(identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"}))
    made = StateFiles(task.output, identity)
    for clip in range(2):
        made.save_clip(clip, torch.randn(SHAPE))
    made.save_step(Position(2, 10), SavedStep(torch.randn(SHAPE), torch.ones(15)))
    return made


def rewrite(path: Path, *, change: Callable[[dict[str, Any]], None], seal: bool = True) -> None:
    """Change a file's tensors (by name) and words (by name with @); seal: with a right checksum."""
    with safe_open(str(path), framework="pt") as file:
        about = dict(file.metadata())
    tensors = load_file(str(path))
    both: dict[str, Any] = {**tensors, **{f"@{key}": value for key, value in about.items()}}
    change(both)
    tensors = {key: value.contiguous() for key, value in both.items() if key[0] != "@"}
    about = {key[1:]: value for key, value in both.items() if key[0] == "@"}
    if seal:
        about["checksum"] = saved_state._checksum(about, tensors)
    save_file(tensors, str(path), metadata=about)


def test_a_whole_state_is_read(files: StateFiles) -> None:
    assert files.position() == Position(2, 10)
    assert files.load_step().z.shape == SHAPE


@pytest.mark.parametrize("key", ["@step", "@clip", "@refined", "@torch"])
def test_words_edited_by_hand_are_noticed(files: StateFiles, key: str) -> None:
    rewrite(files.step_path, change=lambda both: both.update({key: "29"}), seal=False)
    with pytest.raises(UserError, match="is damaged"):
        files.position()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"@step": "-1"}, "step '-1'"),
        ({"@step": "0"}, "step 0, but the request has 3 clips .* of 30 steps"),
        ({"@step": "30"}, "step 30, but"),
        ({"@step": "100000"}, "step 100000, but"),
        ({"@step": "9" * 5000}, "stands at clip '2', step '999"),
        ({"@step": "abc"}, "step 'abc'"),
        ({"@clip": "3"}, "clip 3, step 10, but"),
        ({"latents": torch.randn(4, 15, 4, 8)}, r"\[4, 15, 4, 8\]"),
        ({"latents": torch.randn(15, 4, 6)}, "but the request has"),
        ({"latents": torch.ones(SHAPE, dtype=torch.int64)}, "I64.*states are float32"),
        ({"latents": torch.full(SHAPE, torch.nan)}, "latents that are NaN or infinite"),
        ({"latents": torch.full(SHAPE, torch.inf)}, "latents that are NaN or infinite"),
        ({"mask": torch.ones(4)}, r"'mask': \[4\]"),
        ({"mask": torch.full((15,), 2.0)}, "not from 0 to 1"),
        ({"other": torch.ones(4)}, "'other'"),
        ({"@identity": "[]"}, "is damaged"),
        ({"@identity": "[" * 100000}, "is damaged"),
    ],
)
def test_what_cannot_be_of_the_request_is_refused(
    files: StateFiles, change: dict[str, Any], said: str
) -> None:
    rewrite(files.step_path, change=lambda both: both.update(change))
    with pytest.raises(UserError, match=said):
        files.position()


def test_a_clip_in_the_place_of_another_is_refused(files: StateFiles) -> None:
    files.clip_path(1).write_bytes(files.clip_path(0).read_bytes())
    with pytest.raises(UserError, match="says that it is of clip 0, but its name says 1"):
        files.position()


def test_states_of_the_version_before_are_read_and_held_against_the_request(
    files: StateFiles,
) -> None:
    def before(both: dict[str, Any]) -> None:
        both["@format"] = "opensora-sp latents 1"
        both["@checksum"] = checksum(both[key] for key in sorted(both) if key[0] != "@")

    paths = [files.step_path, files.clip_path(0), files.clip_path(1)]
    for path in paths:
        rewrite(path, change=before, seal=False)
    assert files.position() == Position(2, 10)
    rewrite(files.step_path, change=lambda both: both.update({"@step": "30"}), seal=False)
    with pytest.raises(UserError, match="step 30, but"):
        files.position()


def test_a_pipe_is_no_state(files: StateFiles) -> None:
    files.step_path.unlink()
    os.mkfifo(files.step_path)
    with pytest.raises(UserError, match="is not a regular file"):
        files.position()


@pytest.fixture
def filling(tmp_path: Path) -> StateFiles:
    """Ten steps of a clip whose step cache holds the velocities of the steps 4 and 7."""
    schedule = StepSchedule(name="own", steps=30, computed=(0, 4, 7, 12), fill="linear")
    request = Request(prompt="p", height=32, width=48, step_cache=schedule)
    task = Task(request=request, output=tmp_path / "a.mp4")
    identity = latents_identity(identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"}))
    made = StateFiles(task.output, identity)
    held = {4: torch.randn(SHAPE), 7: torch.randn(SHAPE)}
    made.save_step(Position(0, 10), SavedStep(torch.randn(SHAPE), None, held))
    return made


def test_the_velocities_of_a_step_cache_are_read_to_the_bit(filling: StateFiles) -> None:
    held = load_file(str(filling.step_path))["velocities"]
    found = filling.load_step().held
    assert list(found) == [4, 7]
    assert torch.equal(torch.stack(list(found.values())), held)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda both: both.pop("velocities"), "but the request has"),
        (lambda both: both.update({"@steps of the velocities": "4"}), "are of the steps '4'"),
        (lambda both: both.update({"@steps of the velocities": "7 4"}), "are of the steps '7 4'"),
        (lambda both: both.update({"@steps of the velocities": "4 10"}), "are of the steps '4 10'"),
        (lambda both: both.update({"@steps of the velocities": "4 x"}), "are of the steps '4 x'"),
        (lambda both: both.update(velocities=both["velocities"][:, :, 1:]), "but the request has"),
        (lambda both: both.update(velocities=both["velocities"] / 0), "NaN or infinite"),
    ],
)
def test_velocities_that_cannot_be_are_refused(
    filling: StateFiles, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    rewrite(filling.step_path, change=change)
    with pytest.raises(UserError, match=said):
        filling.load_step()


def test_a_state_of_before_step_caches_goes_on_without_one_only(filling: StateFiles) -> None:
    before = {k: v for k, v in filling.identity.items() if k != "step cache"}
    StateFiles(filling.output, before).save_step(
        Position(0, 10), SavedStep(torch.zeros(SHAPE), None)
    )
    assert StateFiles(filling.output, before | {"step cache": "off"}).position() == Position(0, 10)
    with pytest.raises(UserError, match=r"its step cache was 'off' and is 'linear, steps 0 4 7 12"):
        filling.position()
