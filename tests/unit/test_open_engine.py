"""Models that are opened once and used often: as if each time were the only one."""

from __future__ import annotations

import gc
import inspect
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import log_on_screen
from opensora_sp.engine import text
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.jobs import open as open_module
from opensora_sp.jobs.memory_mode import choose_warm
from opensora_sp.jobs.open import open_engine
from opensora_sp.jobs.run import run_job
from opensora_sp.models.text_encoder import TextEncoder
from opensora_sp.parallel.session import alone
from opensora_sp.planner.peaks import Shape
from opensora_sp.request.request import Job, Request
from opensora_sp.request.settings import build_job, parse_command_line, resolve

SMALL = ["--image-size", "32", "48", "--device", "cpu", "--dtype", "fp32", "--verbose", "0"]
SMALL += ["--text-cache", "off"]
IMAGE = ["--num-frames", "image", "--num-sampling-steps", "1"]
REQUEST = Request(prompt="a red ball", height=32, width=32, num_frames=1, steps=1)


def job_of(folder: Path, *argv: str) -> Job:
    return build_job(resolve(parse_command_line([*SMALL, *argv, "--save-dir", str(folder)])))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# They differ in prompts, size, length, guidance and what is done with the frames.
JOBS = [
    ["--prompt", "a red ball", "a cat", "--num-frames", "17", "--num-sampling-steps", "2"],
    ["--prompt", "a dog", *IMAGE, "--image-size", "64", "40", "--cfg-scale", "1"],
    ["--prompt", "a cat", "--num-frames", "17", "--num-sampling-steps", "2", "--batch-size", "2"],
]
JOBS[2] += ["--watermark", "true", "--lossless", "--keep-state", "--num-sample", "2"]


def test_jobs_through_one_engine_make_what_separate_runs_make(tmp_path: Path) -> None:
    with open_engine(job_of(tmp_path, *JOBS[0])) as engine:
        for number, argv in enumerate(JOBS):
            assert run_job(engine, job_of(tmp_path / f"one-{number}", *argv)) == 0
    for number, argv in enumerate(JOBS):
        job = job_of(tmp_path / f"own-{number}", *argv)
        with open_engine(job) as engine:
            assert run_job(engine, job) == 0
        made = files(tmp_path / f"own-{number}")
        assert len(made) == len(job.tasks)
        assert files(tmp_path / f"one-{number}") == made


def test_an_engine_that_serves_keeps_t5_where_it_was_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    load = TextEncoder.load
    place: Any = ""

    def counted(*given: Any, **named: Any) -> TextEncoder:
        loaded.append(named["offload_layers"])
        return load(*given, **named)

    monkeypatch.setattr(TextEncoder, "load", counted)
    monkeypatch.setattr(
        open_module, "choose_warm", lambda *given: replace(choose_warm(*given), text=place)
    )
    serves = {"small": Shape(height=32, width=48, num_frames=1, dtype="fp32")}
    made = []
    # The mode, where T5 is between jobs, and of each time that it is loaded: layer by layer or not.
    for memory, place, loads in (
        ("speed", "reload", [False, False]),
        ("speed", "device", [False]),
        ("balanced", "host", [True]),  # that mode alone would give T5 back after each job
    ):
        folder = tmp_path / place
        jobs = [job_of(folder / p, "--prompt", p, *IMAGE, "--memory", memory) for p in "ab"]
        with open_engine(jobs[0], serves) as engine:
            for job in jobs:
                assert run_job(engine, job) == 0
            assert engine.pipeline.text.stays == (place != "reload")
        assert loaded == loads
        loaded.clear()
        made.append([job.tasks[0].output.read_bytes() for job in jobs])
    assert made[0] == made[1] == made[2]


def test_a_job_for_other_models_than_are_open_is_refused(tmp_path: Path) -> None:
    with open_engine(job_of(tmp_path, "--prompt", "x", *IMAGE)) as engine:
        job = job_of(tmp_path, "--prompt", "x", *IMAGE, "--dtype", "bf16")
        with pytest.raises(UserError) as caught:
            run_job(engine, job)
    assert str(caught.value).startswith("dtype 'bf16': the models that are open have 'fp32'")
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_and_progress_are_of_their_own_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job_of(tmp_path, "--prompt", "x", *IMAGE)
    with log_on_screen(), open_engine(first) as engine:
        run_job(engine, job_of(tmp_path / "quiet", "--prompt", "x", *IMAGE))
        assert capsys.readouterr().err == ""
        loud = job_of(tmp_path / "loud", "--prompt", "x", *IMAGE, "--verbose", "1", "--sheet")
        run_job(engine, loud)
        said = capsys.readouterr().err
        assert "1 frame of 32x48" in said
        assert "denoise: 100%" in said
        run_job(engine, job_of(tmp_path / "again", "--prompt", "x", *IMAGE))
        assert capsys.readouterr().err == ""
    page = (tmp_path / "loud" / "sheet.html").read_text(encoding="utf-8")
    rows = [name for name in ("denoise", "load") if f"<th scope='row'>{name}</th>" in page]
    assert rows == ["denoise"]  # the models were loaded for the job before


def test_two_calls_give_the_same_and_count_their_own_seconds() -> None:
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    first, second = (pipeline.generate(replace(REQUEST, num_frames=17)) for _ in range(2))
    for one, other in ((first.latents, second.latents), (first.videos, second.videos)):
        assert one[0] is not None
        assert np.array_equal(one[0], other[0])  # type: ignore[arg-type]
    assert first.seconds["load"] > 0
    assert second.seconds["load"] == 0  # nothing was
    whole = pipeline.models.clock.seconds
    assert {name: first.seconds.get(name, 0.0) + s for name, s in second.seconds.items()} == (
        pytest.approx(whole)
    )


def tensors() -> int:
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


def test_memory_is_flat_over_many_calls() -> None:
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    counts, sizes = [], []
    tracemalloc.start()
    try:
        for call in range(50):
            pipeline.generate(replace(REQUEST, seed=call, num_frames=17 if call % 10 == 5 else 1))
            if call in (9, 49):
                counts.append(tensors())
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert counts[1] == counts[0]
    assert sizes[1] - sizes[0] < 100_000  # bytes, in 40 calls


def test_embeddings_of_earlier_jobs_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_KEPT", 1)
    counts = []
    with open_engine(job_of(tmp_path, "--prompt", "x", *IMAGE)) as engine:
        for number in range(4):
            run_job(engine, job_of(tmp_path, "--prompt", f"ball number {number}", *IMAGE))
            counts.append(tensors())
    assert counts[3] == counts[1]


def test_few_frames_lie_between_main_and_the_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk of a request in docs/architecture.md can be followed by hand."""
    from opensora_sp.cli.infer import main

    seen: list[str] = []

    def generate_to(self: Pipeline, *arguments: Any, **named: Any) -> None:
        seen.extend(frame.function for frame in inspect.stack())
        raise UserError("seen")

    monkeypatch.setattr(Pipeline, "generate_to", generate_to)
    assert main([*SMALL, *IMAGE, "--prompt", "x", "--save-dir", str(tmp_path)]) == 2
    walk = seen[: seen.index("test_few_frames_lie_between_main_and_the_generation")]
    assert walk[0] == "generate_to"
    assert "main" in walk
    assert len(walk) <= 8, walk
