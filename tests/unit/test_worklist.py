"""What a run finds before it begins: finished, begun, of another request; and who does the rest."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.base.hashes import sampled_digest
from opensora_sp.base.processes import Process, this_node
from opensora_sp.engine.progress import Position
from opensora_sp.jobs import worklist
from opensora_sp.jobs.identity import difference, digest, identity_of, latents_identity
from opensora_sp.jobs.records import read_record, record_path, write_record
from opensora_sp.jobs.saved_latents import SavedStep, StateFiles
from opensora_sp.jobs.schedule import deal, regroup
from opensora_sp.jobs.worklist import look_up_work, renamed
from opensora_sp.request.request import EngineSettings, Job, JobSettings, Request, Task
from opensora_sp.request.step_schedule import StepSchedule

MODELS = {"dit": "d", "t5": "t", "vae2d": "v2", "vae3d": "v3"}


def task(folder: Path, index: int = 0, **more: Any) -> Task:
    request = Request(prompt=f"p{index}", prompt_index=index, height=32, width=48, **more)
    return Task(request=request, output=folder / f"sample_{index:04d}.mp4")


def job(folder: Path, *tasks: Task, **settings: Any) -> Job:
    """A run whose outputs were named by somebody, unless sample_name=None."""
    engine = {name: settings.pop(name) for name in ("dtype",) if name in settings}
    named = {"sample_name": "sample", **settings}
    return Job(
        engine=EngineSettings(**engine),
        settings=JobSettings(save_dir=folder, verbose=0, **named),
        tasks=tasks,
    )


def positions(work: Job) -> list[Position | None]:
    return [standing.position for standing in look_up_work(work, MODELS)]


def finish(one: Task, content: bytes = b"frames", **settings: Any) -> None:
    one.output.write_bytes(content)
    identity = identity_of(one, EngineSettings(), JobSettings(**settings), MODELS)
    write_record(one.output, identity, "done")


def begin(one: Task, clip: int, step: int) -> StateFiles:
    files = StateFiles(
        one.output, latents_identity(identity_of(one, EngineSettings(), JobSettings(), MODELS))
    )
    shape = (4, *one.request.latent_shape)
    for number in range(clip):
        files.save_clip(number, torch.randn(shape))
    if step:
        held = {} if one.request.step_cache == "off" else {step - 1: torch.randn(shape)}
        files.save_step(Position(clip, step), SavedStep(torch.randn(shape), None, held))
    return files


def test_finished_outputs_are_skipped_and_the_rest_waits(tmp_path: Path) -> None:
    done, new = task(tmp_path, 0), task(tmp_path, 1)
    finish(done)
    assert positions(job(tmp_path, done, new)) == [None, Position()]
    record = read_record(new.output)
    assert record is not None
    assert record.stage == "waiting"
    assert positions(job(tmp_path, done, new, overwrite=True)) == [Position(), Position()]


def test_an_output_that_another_run_makes_is_refused_until_that_run_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task(tmp_path, 0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        maker = Process(other.pid, started, this_node())
        with monkeypatch.context() as patch:
            patch.setattr(Process, "current", lambda: maker)
            assert positions(job(tmp_path, one)) == [Position()]
        before = record_path(one.output).read_bytes()
        for settings in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"is being made by process {other.pid} of this"):
                positions(job(tmp_path, one, **settings))
        assert record_path(one.output).read_bytes() == before
        assert look_up_work(job(tmp_path, one), MODELS, [maker])  # a rank of this very run
        other.communicate()
    assert positions(job(tmp_path, one)) == [Position()]


def test_two_runs_do_not_choose_a_name_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process holds the folder; this one looks only when it lets go."""
    holds = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True)"
    command = [sys.executable, "-c", f"{holds}; input()", str(tmp_path)]
    looked = threading.Event()
    monkeypatch.setattr(worklist, "_look_up", lambda *_: looked.set())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        waits = threading.Thread(target=look_up_work, args=(job(tmp_path, task(tmp_path, 0)), {}))
        waits.start()
        assert not looked.wait(0.3)
        other.communicate(b"")
        waits.join()
    assert looked.is_set()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, "its seed was 42 and is 7 now"),
        ({"steps": 9}, "its steps was 30 and is 9 now"),
        ({"save_fps": 8}, "its save_fps was 24 and is 8 now"),
    ],
)
def test_a_changed_request_is_refused_before_anything_is_touched(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    finish(task(tmp_path, 1))
    with pytest.raises(UserError, match=f"sample_0001.mp4 is there already, but {said}.*--overw"):
        look_up_work(job(tmp_path, task(tmp_path, 0), task(tmp_path, 1, **change)), MODELS)
    assert not record_path(task(tmp_path, 0).output).exists()
    assert task(tmp_path, 1).output.read_bytes() == b"frames"


def test_other_weights_and_settings_are_other_requests(tmp_path: Path) -> None:
    one = task(tmp_path)
    finish(one)
    with pytest.raises(UserError, match="its dit weights were others"):
        look_up_work(job(tmp_path, one), {**MODELS, "dit": "other"})
    with pytest.raises(UserError, match="its dtype was 'bf16' and is 'fp32' now"):
        look_up_work(job(tmp_path, one, dtype="fp32"), MODELS)
    # How it is computed is no part of what it shows.
    small = dataclasses.replace(one, request=dataclasses.replace(one.request, micro_batch_size=1))
    assert positions(job(tmp_path, small)) == [None]


def test_prompts_refined_by_another_model_are_other_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task(tmp_path)
    monkeypatch.setenv("OPENAI_MODEL", "small")
    finish(one, llm_refine=True)
    assert positions(job(tmp_path, one, llm_refine=True)) == [None]
    named = job(tmp_path, one, llm_refine=True, prompt_generator="small")
    assert positions(named) == [None]
    monkeypatch.setenv("OPENAI_MODEL", "large")
    assert positions(named) == [None]
    with pytest.raises(UserError, match="its refined by was 'small' and is 'large' now"):
        look_up_work(job(tmp_path, one, llm_refine=True), MODELS)


def test_a_file_that_was_changed_since_is_left_alone(tmp_path: Path) -> None:
    one = task(tmp_path)
    finish(one)
    one.output.touch()  # another time, the same content
    assert positions(job(tmp_path, one)) == [None]
    one.output.write_bytes(b"fraaes")
    with pytest.raises(UserError, match="was changed since it was made"):
        look_up_work(job(tmp_path, one), MODELS)
    one.output.unlink()
    assert positions(job(tmp_path, one)) == [Position()]


def test_a_file_of_which_nothing_is_known_is_never_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "opensora_sp")
    one = task(tmp_path)
    one.output.write_bytes(b"somebody's")
    assert positions(job(tmp_path, one, prompt_as_path=True, sample_name=None)) == [None]
    with pytest.raises(UserError, match="nothing is known of how it was made"):
        look_up_work(job(tmp_path, one), MODELS)
    (found,) = look_up_work(job(tmp_path, one, sample_name=None), MODELS)
    assert found.output == tmp_path / "sample_0000_2.mp4"
    assert positions(job(tmp_path, one, overwrite=True)) == [Position()]
    record_path(one.output).unlink()
    finish(one)
    changed = task(tmp_path, seed=7)
    assert positions(job(tmp_path, changed, prompt_as_path=True, sample_name=None)) == [None]
    assert "skipped, although its seed was 42 and is 7 now" in caplog.text


def names(work: Job) -> list[tuple[str, Position | None]]:
    """The name and the position that `look_up_work` gives each task."""
    standings = look_up_work(work, MODELS)
    found = renamed(work, standings).tasks
    return [(t.output.name, s.position) for t, s in zip(found, standings, strict=True)]


def test_another_request_gets_a_free_name_where_nobody_named_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second command in a folder: nothing is replaced, and each finds its own again."""
    first, second, third = (task(tmp_path, seed=seed) for seed in (1, 2, 3))

    def run(one: Task) -> tuple[str, Position | None]:
        (found,) = names(job(tmp_path, one, sample_name=None))
        return found

    assert run(first) == ("sample_0000.mp4", Position())
    finish(first)
    assert run(second) == ("sample_0000_2.mp4", Position())
    moved = dataclasses.replace(second, output=tmp_path / "sample_0000_2.mp4")
    begin(moved, 0, 4)
    assert run(second) == ("sample_0000_2.mp4", Position(0, 4))  # it goes on where it was
    assert run(third) == ("sample_0000_3.mp4", Position())  # a begun one is somebody's too
    finish(moved)
    assert run(second) == ("sample_0000_2.mp4", None)
    assert run(first) == ("sample_0000.mp4", None)
    # A gap does not lead a run away from its own output.
    first.output.unlink()
    record_path(first.output).unlink()
    assert run(second) == ("sample_0000_2.mp4", None)
    assert run(task(tmp_path, seed=4)) == ("sample_0000.mp4", Position())
    assert moved.output.read_bytes() == b"frames"


def test_a_folder_is_read_once_for_a_list_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    scandir = os.scandir

    def look(place: Path) -> Any:
        looked.append(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", look)
    work = job(tmp_path, *(task(tmp_path, index) for index in range(20)), sample_name=None)
    finish(work.tasks[3])
    finish(task(tmp_path, 5, seed=1))  # another request's
    found = names(work)
    assert [name for name, _ in found] == [
        f"sample_{index:04d}{'_2' if index == 5 else ''}.mp4" for index in range(20)
    ]
    assert [place for place, (_, position) in enumerate(found) if position is None] == [3]
    assert len(looked) == 2  # the folder, and its records


def test_an_output_of_another_step_cache_is_another_output(tmp_path: Path) -> None:
    """Finished or begun: neither is taken for that of other steps, under whatever name."""
    few = StepSchedule(name="fast", steps=30, computed=(0, 1, 9), fill="hold")
    others = [
        "off",
        dataclasses.replace(few, fill="linear"),
        dataclasses.replace(few, computed=(0, 9)),
    ]
    made, begun = task(tmp_path, step_cache=few), task(tmp_path, 1, step_cache=few)
    finish(made)
    begin(begun, 0, 4)
    for number, other in enumerate(others, start=2):
        asked = [task(tmp_path, index, step_cache=other) for index in (0, 1)]
        for one in asked:
            with pytest.raises(UserError, match=r"its step cache was .* and is"):
                look_up_work(job(tmp_path, one), MODELS)
        found = names(job(tmp_path, *asked, sample_name=None))
        assert found == [(f"sample_{index:04d}_{number}.mp4", Position()) for index in (0, 1)]
    same = dataclasses.replace(few, name="own", model="ab12", psnr=40.0)
    renamed_ones = [task(tmp_path, index, step_cache=same) for index in (0, 1)]
    assert positions(job(tmp_path, *renamed_ones)) == [None, Position(0, 4)]


def test_free_names_with_samples_lists_and_overwrite(tmp_path: Path) -> None:
    a, b = task(tmp_path, 0), task(tmp_path, 1)
    for one in (a, b):
        finish(one)
    # Of a list only what another request has is moved.
    changed = task(tmp_path, 1, seed=9)
    assert names(job(tmp_path, a, changed, sample_name=None)) == [
        ("sample_0000.mp4", None),
        ("sample_0001_2.mp4", Position()),
    ]
    # Asked for by --overwrite: the name itself, or the one that this request has.
    assert names(job(tmp_path, changed, sample_name=None, overwrite=True)) == [
        ("sample_0001_2.mp4", Position())
    ]
    other = task(tmp_path, 1, seed=10)
    assert names(job(tmp_path, other, sample_name=None, overwrite=True)) == [
        ("sample_0001.mp4", Position())
    ]
    # Samples have names of their own, and so have pictures.
    sample = dataclasses.replace(a, output=tmp_path / "sample_0000-1.mp4")
    assert names(job(tmp_path, sample, sample_name=None)) == [("sample_0000-1.mp4", Position())]
    image = dataclasses.replace(a, output=tmp_path / "sample_0000.png")
    assert names(job(tmp_path, image, sample_name=None)) == [("sample_0000.png", Position())]


def test_saved_latents_are_found_again_for_another_kind_of_file(tmp_path: Path) -> None:
    """--decode-only with a watermark: the same latents, under whichever name they are."""
    finish(task(tmp_path, seed=1))
    one = dataclasses.replace(task(tmp_path), output=tmp_path / "sample_0000_2.mp4")
    finish(one)
    begin(one, 1, 0)
    marked = job(
        tmp_path, task(tmp_path), sample_name=None, watermark=True, decode_only=True, overwrite=True
    )
    assert names(marked) == [("sample_0000_2.mp4", Position(1))]


def test_an_unreadable_record_is_none(tmp_path: Path) -> None:
    one = task(tmp_path)
    finish(one)
    good = json.loads(record_path(one.output).read_text())
    changed = {**good, "identity": {**good["identity"], "dtype": "fp32"}}
    listed = {**good, "identity": ["dtype"], "digest": digest(["dtype"])}  # type: ignore[arg-type]
    texts = ["", "{", "[]", *map(json.dumps, ({**good, "version": 9}, changed, listed))]
    for text in texts:
        record_path(one.output).write_text(text)
        assert read_record(one.output) is None


def test_a_state_may_be_used_for_another_kind_of_file(tmp_path: Path) -> None:
    begin(task(tmp_path), 1, 0)
    marked = task(tmp_path, save_fps=8)
    only = job(tmp_path, marked, watermark=True, decode_only=True, overwrite=True)
    assert positions(only) == [Position(1)]
    with pytest.raises(UserError, match="saved state of another request, its seed was 42"):
        look_up_work(job(tmp_path, task(tmp_path, seed=7)), MODELS)


def test_a_state_of_an_earlier_clip_is_not_taken_for_the_next(tmp_path: Path) -> None:
    """A kill between the two writes at the end of a clip leaves both."""
    one = task(tmp_path, loop=3)
    files = begin(one, 1, 20)
    kept = files.step_path.read_bytes()
    files.save_clip(1, torch.randn(4, *one.request.latent_shape))
    files.step_path.write_bytes(kept)
    assert positions(job(tmp_path, one)) == [Position(2)]
    files.clip_path(0).unlink()
    with pytest.raises(UserError, match="is of clip 1, but clip 0 is not there"):
        look_up_work(job(tmp_path, one), MODELS)


def test_overwrite_begins_again(tmp_path: Path) -> None:
    one = task(tmp_path, loop=2)
    files = begin(one, 1, 4)
    assert positions(job(tmp_path, one)) == [Position(1, 4)]
    assert positions(job(tmp_path, one, overwrite=True)) == [Position()]
    assert not files.exists()


def test_a_picture_is_known_by_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    one = task(tmp_path, reference_path=str(tmp_path / "a.png"), mask_strategy="0")
    before = identity_of(one, EngineSettings(), JobSettings(), MODELS)
    (tmp_path / "a.png").write_bytes(b"two")
    assert difference(before, identity_of(one, EngineSettings(), JobSettings(), MODELS)) is not None


def test_large_files_are_told_apart_by_their_samples(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = bytearray(6 << 20)
    path.write_bytes(content)
    before = sampled_digest([path])
    content[-1] = 1
    path.write_bytes(content)
    assert sampled_digest([path]) != before


def test_batches_are_parted_where_their_videos_stand_apart(tmp_path: Path) -> None:
    a, b, c, d = (task(tmp_path, i) for i in range(4))
    standing = {a: Position(0, 4), b: None, c: Position(0, 4), d: Position()}
    works = regroup([(a, b, c), (d,)], standing)
    assert [(work.tasks, work.start) for work in works] == [
        ((a, c), Position(0, 4)),
        ((d,), Position()),
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_lists_are_dealt_evenly_and_completely(replicas: int, tmp_path: Path) -> None:
    works = regroup(
        [(task(tmp_path, i),) for i in range(10)],
        {task(tmp_path, i): Position(0, 25 if i % 3 == 0 else 0) for i in range(10)},
    )
    lists = deal(works, replicas)
    dealt = [work for part in lists for work in part]
    assert sorted(w.tasks[0].output for w in dealt) == [w.tasks[0].output for w in works]
    loads = [sum(work.steps + 1 for work in part) for part in lists]
    assert max(loads) - min(loads) <= 31  # the largest piece: 30 steps and a decode
