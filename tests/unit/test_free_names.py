"""Outputs whose names nobody chose find their own file or state again, and replace nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_sp.errors import UserError
from opensora_sp.free_names import place_outputs, refuse_known_clashes
from opensora_sp.identity import identity_of, latents_identity
from opensora_sp.manifest import write_record
from opensora_sp.request import Job, Request, RunSettings, Task
from opensora_sp.saved_state import Position, StateFiles

MODELS = {"dit": "d", "t5": "t", "vae2d": "v2", "vae3d": "v3"}


def task(folder: Path, prompt: str, index: int = 0, sample: str = "") -> Task:
    request = Request(prompt=prompt, prompt_index=index, height=32, width=48)
    return Task(request=request, output=folder / f"sample_{index:04d}{sample}.mp4")


def job(folder: Path, *tasks: Task, **settings: Any) -> Job:
    return Job(settings=RunSettings(save_dir=folder, **settings), tasks=tasks)


def names(work: Job, models: dict[str, str] = MODELS) -> list[str]:
    return [placed.output.name for placed in place_outputs(work, models).tasks]


def finish(one: Task, name: str, **settings: Any) -> None:
    output = one.output.with_name(name)
    output.write_bytes(name.encode())
    write_record(output, identity_of(one, RunSettings(**settings), MODELS), "done")


def state(one: Task, name: str) -> StateFiles:
    identity = latents_identity(identity_of(one, RunSettings(), MODELS))
    return StateFiles(one.output.with_name(name), identity)


def test_each_request_finds_its_own_and_another_gets_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (task(tmp_path, prompt) for prompt in "abc")
    assert names(job(tmp_path, a)) == ["sample_0000.mp4"]
    finish(a, "sample_0000.mp4")
    assert names(job(tmp_path, b)) == ["sample_0000_2.mp4"]
    assert "sample_0000.mp4 belongs to another request: this one's is" in capsys.readouterr().err
    finish(b, "sample_0000_2.mp4")
    assert names(job(tmp_path, a)) == ["sample_0000.mp4"]
    assert names(job(tmp_path, b)) == ["sample_0000_2.mp4"]
    assert names(job(tmp_path, c)) == ["sample_0000_3.mp4"]
    assert names(job(tmp_path, a, watermark=True)) == ["sample_0000_3.mp4"]
    assert names(job(tmp_path, a), {**MODELS, "dit": "other"}) == ["sample_0000_3.mp4"]
    # What was asked for by name stays: the clash is refused later.
    assert names(job(tmp_path, b, sample_name="sample")) == ["sample_0000.mp4"]
    assert names(job(tmp_path, b, prompt_as_path=True)) == ["sample_0000.mp4"]


def test_only_what_is_taken_moves_in_a_list_with_samples(tmp_path: Path) -> None:
    first, second = task(tmp_path, "a", 0, "-1"), task(tmp_path, "b", 1, "-1")
    finish(task(tmp_path, "x", 1, "-1"), "sample_0001-1.mp4")
    assert names(job(tmp_path, first, second)) == ["sample_0000-1.mp4", "sample_0001-1_2.mp4"]


def test_unknown_changed_and_odd_files_are_left_alone(tmp_path: Path) -> None:
    a = task(tmp_path, "a")
    (tmp_path / "sample_0000.mp4").write_bytes(b"somebody's")
    (tmp_path / "sample_0000_2.mp4").mkdir()
    (tmp_path / "sample_0000_3.mp4").symlink_to("nowhere")
    finish(a, "sample_0000_4.mp4")
    (tmp_path / "sample_0000_4.mp4").write_bytes(b"changed since it was made")
    assert names(job(tmp_path, a)) == ["sample_0000_5.mp4"]
    # A finished output that was taken away leaves its name to anybody.
    (tmp_path / "sample_0000_4.mp4").unlink()
    assert names(job(tmp_path, task(tmp_path, "b"))) == ["sample_0000_4.mp4"]


def test_what_was_begun_is_found_and_keeps_its_name(tmp_path: Path) -> None:
    a, b = task(tmp_path, "a"), task(tmp_path, "b")
    finish(a, "sample_0000.mp4")
    write_record(tmp_path / "sample_0000_2.mp4", identity_of(b, RunSettings(), MODELS), "waiting")
    assert names(job(tmp_path, b, resume=True)) == ["sample_0000_2.mp4"]
    assert names(job(tmp_path, task(tmp_path, "c"))) == ["sample_0000_3.mp4"]
    # A state without its record is enough.
    c = state(task(tmp_path, "c"), "sample_0000_3.mp4")
    c.save_step(Position(0, 4), torch.randn(4, 15, 4, 6), None)
    assert names(job(tmp_path, task(tmp_path, "c"))) == ["sample_0000_3.mp4"]
    assert names(job(tmp_path, task(tmp_path, "d"))) == ["sample_0000_4.mp4"]


def test_decode_only_and_overwrite_go_where_the_request_is(tmp_path: Path) -> None:
    a, b = task(tmp_path, "a"), task(tmp_path, "b")
    finish(a, "sample_0000.mp4")
    finish(b, "sample_0000_2.mp4")
    state(b, "sample_0000_2.mp4").save_clip(0, torch.randn(4, 15, 4, 6))
    again = {"decode_only": True, "overwrite": True, "watermark": True}
    assert names(job(tmp_path, b, **again)) == ["sample_0000_2.mp4"]
    assert names(job(tmp_path, b, overwrite=True)) == ["sample_0000_2.mp4"]
    assert names(job(tmp_path, task(tmp_path, "c"), overwrite=True)) == ["sample_0000.mp4"]


def test_a_clash_of_asked_names_is_known_before_the_models_are(tmp_path: Path) -> None:
    a, b = task(tmp_path, "a"), task(tmp_path, "b")
    finish(a, "sample_0000.mp4", sample_name="sample")
    with pytest.raises(UserError, match="is there already, but its prompt was 'a' and is 'b' now"):
        refuse_known_clashes(job(tmp_path, b, sample_name="sample"))
    refuse_known_clashes(job(tmp_path, a, sample_name="sample"))
    refuse_known_clashes(job(tmp_path, b))
    refuse_known_clashes(job(tmp_path, b, sample_name="sample", overwrite=True))
