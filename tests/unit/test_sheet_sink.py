"""The contact sheet of a run: the frames that its files have, and what is said of them."""

from __future__ import annotations

import base64
import gc
import html
import io
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opensora_sp.base.errors import UserError
from opensora_sp.jobs import outputs
from opensora_sp.jobs.open import open_engine
from opensora_sp.jobs.run import run_job
from opensora_sp.jobs.sheet_sink import PickingSink, RunSheet
from opensora_sp.media.sinks import Collector
from opensora_sp.media.writer import VideoWriter
from opensora_sp.request.request import Job, Task
from opensora_sp.request.settings import build_job, parse_command_line, resolve

SMALL = ["--image-size", "40", "64", "--num-sampling-steps", "1", "--dtype", "fp32"]
SMALL += ["--device", "cpu", "--lossless", "--verbose", "0", "--sheet"]


def job_of(folder: Path, *argv: str) -> Job:
    return build_job(resolve(parse_command_line([*SMALL, "--save-dir", str(folder), *argv])))


def make(job: Job) -> None:
    with open_engine(job) as engine:
        run_job(engine, job)


def frames_of(path: Path) -> NDArray[np.uint8]:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def articles(page: str) -> list[tuple[str, list[NDArray[np.uint8]], list[str]]]:
    """Text, pictures and captions of every entry."""
    found = []
    for article in re.findall(r"<article>(.*?)</article>", page, re.DOTALL):
        images = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            for data in re.findall(r'src="data:image/png;base64,([^"]+)"', article)
        ]
        captions = re.findall(r"<figcaption>(.*?)</figcaption>", article)
        found.append((html.unescape(re.sub(r"<[^>]*>", "\n", article)), images, captions))
    return found


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 0, 1, 6], [0, 10, 1]])
def test_frames_are_picked_from_any_chunks_and_all_pass_on(sizes: list[int]) -> None:
    video = np.random.default_rng(0).integers(0, 256, (sum(sizes), 12, 16, 3), dtype=np.uint8)
    collector = Collector()
    sink, start = PickingSink(collector, len(video)), 0
    for size in sizes:
        chunk = video[start : start + size].copy()
        sink.write(chunk)
        start += size
    np.testing.assert_array_equal(collector.frames, video)
    for chunk in collector.parts:
        chunk[:] = 0  # what was kept is a copy, so that no chunk stays in memory for it
    assert sorted(sink.frames) == [0, 5, 10]
    for index, frame in sink.frames.items():
        np.testing.assert_array_equal(frame, video[index])


def test_large_frames_are_kept_small_and_whole() -> None:
    video = np.zeros((1, 350, 700, 3), np.uint8)
    video[:, :175, :350] = 250
    sink = PickingSink(Collector(), 1)
    sink.write(video)
    kept = sink.frames[0]
    assert kept.shape == (320, 640, 3)
    assert kept[:155, :315].min() == 250
    assert kept[165:].max() == kept[:, 325:].max() == 0


@pytest.mark.parametrize("clips", [1, 3])
def test_the_sheet_shows_what_the_files_hold(clips: int, tmp_path: Path) -> None:
    frames = 20 + (clips - 1) * 3
    prompts = ["a <boat> & co", "second"]
    argv = ["--prompt", *prompts, "--num-frames", "20", "--batch-size", "2", "--num-sample", "2"]
    argv += ["--loop", str(clips), "--watermark", "true", "--save-fps", "10"]
    job = job_of(tmp_path, *argv, "--sample-name", "run")
    make(job)
    page = (tmp_path / "run-sheet.html").read_text(encoding="utf-8")
    shown = articles(page)
    assert len(shown) == len(job.tasks) == 4
    middle = frames // 2
    for task, (text, images, captions) in zip(job.tasks, shown, strict=True):
        video = frames_of(task.output)
        assert len(video) == frames
        assert captions == [
            "frame 0, 0.00 s",
            f"frame {middle}, {middle / 10:.2f} s",
            f"frame {frames - 1}, {(frames - 1) / 10:.2f} s",
        ]
        for image, want in zip(images, video[[0, middle, -1]], strict=True):
            np.testing.assert_array_equal(image, want)  # the mark included
        lines = text.split("\n")
        assert task.output.name in lines
        assert task.request.prompt in lines
        assert f"sample_index {task.request.sample_index}" in text
        assert f"prompt_index {task.request.prompt_index}" in text
        assert f"size 64×40 · frames {frames} · length {frames / 10:.2f} s · made in " in text
    rows = dict(re.findall(r"<tr><th scope='row'>(.*?)</th><td>(.*?)</td>", page))
    assert rows["loop"] == str(clips)
    assert rows["seed"] == "42"
    assert rows["versions.opensora_sp"]
    assert rows["watermark"] == "yes"
    assert {"whole run", "denoise", "decode", "write"} <= rows.keys()
    assert rows.keys().isdisjoint({"prompt", "prompt_index", "sample_index", "request"})


def test_a_marked_file_differs_in_its_corner_only(tmp_path: Path) -> None:
    made = {}
    for mark in ("true", "false"):
        job = job_of(tmp_path / mark, "--prompt", "x", "--num-frames", "image", "--watermark", mark)
        make(job)
        made[mark] = np.asarray(Image.open(job.tasks[0].output)).copy()
        ((_, images, captions),) = articles((tmp_path / mark / "sheet.html").read_text())
        assert captions == ["image"]
        np.testing.assert_array_equal(images, [made[mark]])
    changed = (made["true"] != made["false"]).any(-1)
    assert changed.any()
    assert not changed[:24].any()
    assert not changed[:, :48].any()


def test_a_folder_in_its_place_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "sheet.html").mkdir()
    with pytest.raises(UserError, match=r"sheet\.html is a directory"):
        job_of(tmp_path, "--prompt", "x")


@pytest.mark.parametrize(
    ("kind", "argv"),
    [
        ("mp4", ["--num-frames", "5"]),
        ("mp4", ["--num-frames", "5", "--watermark", "true", "--batch-size", "2"]),
        ("png", ["--num-frames", "image"]),
    ],
)
def test_a_list_keeps_no_output_alive(
    kind: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    of_kind = VideoWriter if kind == "mp4" else outputs._ImageSink
    begin, took = of_kind.__init__, RunSheet.took
    frames_held: list[int] = []

    def counted(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        made.add(self)

    def after(self: RunSheet, batch: Sequence[Task], seconds: float) -> None:
        took(self, batch, seconds)
        gc.collect()
        alive.append(len(made))
        frames_held.append(sum(len(watched.frames) for watched in self._watched))

    monkeypatch.setattr(of_kind, "__init__", counted)
    monkeypatch.setattr(RunSheet, "took", after)
    make(job_of(tmp_path, *argv, "--prompt", *"abcdef"))
    batches = 3 if "--batch-size" in argv else 6
    assert len(alive) == batches
    # Of the batch that is completed, and of the next, which has begun.
    assert max(alive) <= 2 * (6 // batches)
    assert frames_held == [0] * batches
    assert len(articles((tmp_path / "sheet.html").read_text())) == 6
