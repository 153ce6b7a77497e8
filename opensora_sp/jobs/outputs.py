"""The output file of a task: its writer, the sinks before it, and its metadata.

Only the leading rank opens outputs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp import __version__
from opensora_sp.base.screen import result
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.jobs.finishing import Finishing
from opensora_sp.jobs.sheet_sink import RunSheet
from opensora_sp.media.background import HELD_CHUNKS, Background, BackgroundSink
from opensora_sp.media.labels import FileLabel
from opensora_sp.media.sinks import Collector, Sink
from opensora_sp.media.watermark import Watermarked
from opensora_sp.media.writer import VideoWriter
from opensora_sp.request.caption_notes import captions
from opensora_sp.request.labels import file_label, mark_style
from opensora_sp.request.naming import numbered
from opensora_sp.request.request import Job, Request, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = ("torch", "transformers", "diffusers", "av")


@contextmanager
def open_outputs(
    pipeline: Pipeline,
    job: Job,
    batch: Sequence[Task],
    sheet: RunSheet | None = None,
    *,
    finishing: Finishing | None = None,
    done: Callable[[], None] = lambda: None,
    numbers: Sequence[str] | None = None,
) -> Iterator[list[Sink]]:
    """A sink for each task of a batch. On the leading rank it is the task's file.

    numbers: of each task's content, for its label; without, its request's digest.

    A thread writes the frames. When the block ends well it completes the files, which then appear,
    and calls done, on the leading rank only. finishing: lets that go on after the block; without,
    the block ends when all is done. The batch before is complete when the first frames come.
    Waiting for the thread, and opening the files, is the stage "write".
    """
    if not pipeline.session.leads:
        yield [Collector() for _ in batch]
        return
    clock = pipeline.models.clock
    with ExitStack() as stack:
        with clock.stage("write"):
            numbers = numbers or [task.request.digest() for task in batch]
            sinks = [
                stack.enter_context(open_output(pipeline, job, task, sheet, number=number))
                for task, number in zip(batch, numbers, strict=True)
            ]
        background = Background(held_bytes(batch[0].request, len(batch)))
        own = Finishing(clock)
        before = (finishing or own).settle  # or two batches' frames would wait
        try:
            yield [BackgroundSink(sink, background, before) for sink in sinks]
        except BaseException:
            background.abandon()
            raise
        (finishing or own).begin(background, stack.pop_all(), done)
    with clock.stage("write"):
        own.settle()


def held_bytes(request: Request, batch: int) -> int:
    """Bytes of decoded frames that may wait to be written: two chunks of every video."""
    height, width = request.decoded_size
    frames = min(request.micro_frame_size, request.num_frames)
    return HELD_CHUNKS * batch * frames * height * width * 3


@contextmanager
def open_output(
    pipeline: Pipeline, job: Job, task: Task, sheet: RunSheet | None = None, *, number: str
) -> Iterator[Sink]:
    """A sink for the file of a task, which appears whole when the block ends well.

    sheet: the contact sheet that shows the task, with the frames of the file. number: of its
    content, for its label.
    """
    label = file_label(job.settings, number)
    with _open_file(pipeline, job, task, label) as sink:
        if sheet is not None:
            sink = sheet.watch(task, sink)
        style = mark_style(job.settings)
        if style is not None:
            sink = Watermarked(sink, *task.request.decoded_size, style)
        yield sink


@contextmanager
def _open_file(pipeline: Pipeline, job: Job, task: Task, label: FileLabel | None) -> Iterator[Sink]:
    request = task.request
    metadata = describe(pipeline, job, request)
    metadata["captions"] = captions(request)  # what the model was told, clip by clip
    if task.original_prompt is not None:
        metadata["original_prompt"] = task.original_prompt
    if request.is_image:
        image = _ImageSink()
        yield image
        image.save(task, metadata, label)
        return
    height, width = request.decoded_size
    writer = VideoWriter(
        task.output,
        fps=request.save_fps,
        height=height,
        width=width,
        metadata=metadata,
        lossless=job.settings.lossless,
        label=label,
    )
    with ExitStack() as stack:
        yield _LateSink(stack, writer)


class _LateSink:
    """A sink that opens its writer at the first frames, so that a kill before leaves no file."""

    def __init__(self, stack: ExitStack, writer: VideoWriter) -> None:
        self._stack, self._writer, self._open = stack, writer, False

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]."""
        if not self._open:
            self._stack.enter_context(self._writer)
            self._open = True
        self._writer.write(frames)


class _ImageSink:
    """A sink that keeps the one frame of an image until the block ends well."""

    def __init__(self) -> None:
        self.frames: NDArray[np.uint8] | None = None

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [1,H,W,3]."""
        self.frames = frames

    def save(self, task: Task, metadata: dict[str, Any], label: FileLabel | None) -> None:
        """Write the PNG."""
        from opensora_sp.media.writer import write_image

        if self.frames is None:
            raise RuntimeError(f"nothing was decoded for {task.output}")
        write_image(task.output, self.frames[0], metadata, label)


def describe(pipeline: Pipeline, job: Job, request: Request) -> dict[str, Any]:
    """What a finished file says of itself: request, run, versions."""
    session = pipeline.session
    versions = {"opensora_sp": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "request": request.public_dict(),
        "checkpoints": "embedded" if job.engine.checkpoints is None else "given",
        "dtype": job.engine.dtype,
        "watermark": job.settings.watermark,
        "label": job.settings.label,
        "device": session.device.type,
        "ranks": session.world_size,
        "versions": versions,
    }


def write_run_sheet(
    pipeline: Pipeline,
    job: Job,
    sheet: RunSheet | None,
    started: float,
    before: Mapping[str, float],
) -> None:
    """Write the contact sheet of all replicas on rank 0, and say where it is. Collective.

    sheet: of this rank's outputs, None where it leads none. started: of the job, on
    `time.perf_counter`. before: seconds per stage that the pipeline had spent by then.
    """
    whole = pipeline.session.whole
    sheets = whole.control.all_gather_object(sheet)
    if not whole.leads:
        return
    order = [task.output for task in job.tasks]
    joined = RunSheet.joined([one for one in sheets if one is not None], order)
    if joined.is_empty:
        return
    spent = pipeline.models.clock.seconds.items()
    timings = {"whole run": time.perf_counter() - started}
    timings |= {name: s - before.get(name, 0.0) for name, s in spent if s != before.get(name)}
    timings |= pipeline.models.clock.beside
    path = _sheet_path(job)
    joined.write(path, describe(pipeline, job, job.tasks[0].request), timings)
    result(path)


def _sheet_path(job: Job) -> Path:
    """Where the sheet goes: numbered as the first output is, so that it replaces no other run's."""
    first = job.tasks[0].output
    found = re.fullmatch(r"sample_\d{4,}(?:-\d+)?_(\d+)", first.stem)
    number = int(found[1]) if found and job.settings.default_names else 1
    return numbered(job.settings.sheet_path, number)
