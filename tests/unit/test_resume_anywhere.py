"""A run that dies at any moment, or whose files are harmed at any byte, never goes on wrongly."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_sp.base.errors import UserError
from opensora_sp.engine.progress import Position
from opensora_sp.jobs.identity import identity_of, latents_identity
from opensora_sp.jobs.saved_latents import SavedStep, StateFiles
from opensora_sp.jobs.saved_progress import SavedProgress
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import EngineSettings, JobSettings, Request, Task

CLIPS, STEPS = 3, 3
SHAPE = (4, 10, 2, 2)
MASK = torch.tensor([0.0, 0.0, 0.5, *[1.0] * 7])


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the process that dies here, not the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def state_of(folder: Path, video: int = 0) -> StateFiles:
    """The state of one output of a request of three clips, of five steps each."""
    request = Request(
        prompt=f"p{video}", height=16, width=16, num_frames=34, loop=CLIPS, steps=STEPS
    )
    task = Task(request=request, output=folder / f"{video}.mp4")
    return StateFiles(
        task.output,
        latents_identity(identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"})),
    )


@functools.cache
def latents(video: int, clip: int, step: int) -> torch.Tensor:
    """What the sampler would have there; after the last step, the clip's final latents."""
    seed = (video * CLIPS + clip) * (STEPS + 1) + step
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def run(files: list[StateFiles], start: Position, every: int) -> None:
    """Make and save every step from `start` on, as `generate` does."""
    progress = SavedProgress(alone("cpu"), files, start, every=every)
    videos = range(len(files))

    def whole(clip: int, step: int) -> torch.Tensor:
        return torch.stack([latents(video, clip, step) for video in videos])

    for clip in range(CLIPS):
        if progress.is_finished(clip):
            found = progress.latents(clip)
            assert found is not None
            assert torch.equal(found, whole(clip, STEPS))
            continue
        begun = progress.resume_point(clip)
        if begun is not None:
            assert torch.equal(begun.z, whole(clip, begun.step))
            assert begun.mask is not None
            assert torch.equal(begun.mask, MASK.expand(len(files), -1))
        for step in range(begun.step + 1 if begun else 1, STEPS):
            gather = functools.partial(whole, clip, step)
            progress.watch(clip, step, MASK.expand(len(files), -1), gather)
        progress.finish(clip, whole(clip, STEPS), last=clip + 1 == CLIPS)


def held(files: StateFiles, video: int = 0) -> Position:
    """Where the files stand; all that they hold is what was saved there, bit for bit."""
    position = files.position()
    for clip in range(position.clip):
        assert torch.equal(files.load_clip(clip), latents(video, clip, STEPS))
    if position.step:
        step = files.load_step()
        assert torch.equal(step.z, latents(video, position.clip, position.step))
        assert step.mask is not None
        assert torch.equal(step.mask, MASK)
    return position


class Killed(BaseException):
    """The process is gone: nothing that it would still have done happens."""


@contextmanager
def killed_at(moment: int, how: str) -> Iterator[Callable[[], int]]:
    """Kill the process at its moment-th change of the disk; yields how many there were.

    how: before the change, after it, or in the middle of it where it can be half done.
    """
    done = 0

    def mortal(change: Callable[..., Any], path_at: int | None = None) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done > moment or (done == moment and how == "before"):
                raise Killed
            result = change(*arguments, **named)
            if done == moment:
                if path_at is not None and how == "in the middle":
                    path = Path(arguments[path_at])
                    os.truncate(path, path.stat().st_size // 2)
                raise Killed
            return result

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", mortal(safetensors.torch.save_file, 1))
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        yield lambda: done


def positions(every: int) -> list[Position]:
    """Where a run is saved, in order."""
    saved = [Position()]
    for clip in range(CLIPS):
        saved += [Position(clip, s) for s in range(1, STEPS) if every and s % every == 0]
        saved.append(Position(clip + 1))
    return saved


HOWS = ("before", "in the middle", "after")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("every", "videos"), [(1, 1), (2, 2), (0, 1)])
def test_a_run_killed_at_any_moment_goes_on_from_the_last_save_or_the_one_before(
    every: int, videos: int, how: str, tmp_path: Path
) -> None:
    with killed_at(10**6, how) as changes:
        run([state_of(tmp_path / "whole", v) for v in range(videos)], Position(), every)
    moments = changes()
    assert moments > CLIPS * videos
    wanted = positions(every)
    seen: list[Position] = []
    for moment in range(1, moments + 1):
        files = [state_of(tmp_path / f"{moment}", video) for video in range(videos)]
        with pytest.raises(Killed), killed_at(moment, how):
            run(files, Position(), every)
        found = [held(one, video) for video, one in enumerate(files)]
        # Of several videos the first ones may be a save ahead, never more.
        places = [wanted.index(position) for position in found]
        assert places == sorted(places, reverse=True)
        assert places[0] - places[-1] <= 1
        seen.append(found[0])
        run(files[:1], found[0], every)
        assert held(files[0]) == Position(CLIPS)
    assert seen == sorted(seen)
    assert set(seen) >= set(wanted[:-1]), "every save was met"


@pytest.mark.parametrize("how", HOWS)
def test_a_removal_cut_short_leaves_a_whole_state(how: str, tmp_path: Path) -> None:
    for moment in range(1, CLIPS + 1):
        files = state_of(tmp_path / f"{moment}")
        for clip in range(CLIPS - 1):
            files.save_clip(clip, latents(0, clip, STEPS))
        files.save_step(Position(CLIPS - 1, 2), SavedStep(latents(0, CLIPS - 1, 2), MASK))
        with pytest.raises(Killed), killed_at(moment, how):
            files.remove()
        found = held(files)
        left = CLIPS - moment + (how == "before")
        assert found == (Position(CLIPS - 1, 2) if left == CLIPS else Position(left))


@functools.cache
def saved_run() -> dict[str, bytes]:
    """The files of a run that has two clips and two steps of the third, by name."""
    with tempfile.TemporaryDirectory() as name:
        files = state_of(Path(name))
        for clip in range(CLIPS - 1):
            files.save_clip(clip, latents(0, clip, STEPS))
        files.save_step(Position(CLIPS - 1, 2), SavedStep(latents(0, CLIPS - 1, 2), MASK))
        return {path.name: path.read_bytes() for path in files.folder.iterdir()}


@given(data=st.data())
def test_files_harmed_at_any_byte_are_one_refusal_or_an_earlier_state(data: st.DataObject) -> None:
    """Cut, changed, lengthened, lost, or one in the place of another."""
    content = dict(saved_run())
    name = data.draw(st.sampled_from(sorted(content)))
    whole = content[name]
    harm = data.draw(st.sampled_from(["cut", "change", "add", "lose", "swap"]))
    if harm == "cut":
        content[name] = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif harm == "change":
        at = data.draw(st.integers(0, len(whole) - 1))
        value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[at]))
        content[name] = whole[:at] + bytes([value]) + whole[at + 1 :]
    elif harm == "add":
        content[name] = whole + data.draw(st.binary(min_size=1, max_size=9))
    elif harm == "lose":
        del content[name]
    else:
        other = data.draw(st.sampled_from(sorted(set(content) - {name})))
        content[name] = content[other]
    folder = Path(tempfile.mkdtemp())
    try:
        files = state_of(folder)
        files.folder.mkdir()
        for each, harmed in content.items():
            (files.folder / each).write_bytes(harmed)
        found, refusal = None, ""
        try:
            found = held(files)
        except UserError as error:
            refusal = str(error)
        if found is None:
            assert "\n" not in refusal
            assert str(files.folder) in refusal
        else:
            assert harm == "lose", "only what is not there can be gone on without"
            assert found == Position(CLIPS - 1), "the step is lost, the clips before it are not"
        assert {path.name: path.read_bytes() for path in files.folder.iterdir()} == content
    finally:
        shutil.rmtree(folder)
