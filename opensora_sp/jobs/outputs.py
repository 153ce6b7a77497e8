"""The output file of a task: its writer, the sinks before it, and its metadata.

Only the leading rank opens outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from opensora_sp import __version__
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.jobs.sheet_sink import RunSheet
from opensora_sp.media.sinks import Collector, Sink
from opensora_sp.media.watermark import Watermarked
from opensora_sp.media.writer import VideoWriter
from opensora_sp.request.caption_notes import captions
from opensora_sp.request.request import Request, RunSettings, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = ("torch", "transformers", "diffusers", "av")


@contextmanager
def open_outputs(
    pipeline: Pipeline, settings: RunSettings, batch: Sequence[Task], sheet: RunSheet | None = None
) -> Iterator[list[Sink]]:
    """A sink for each task of a batch. On the leading rank it is the task's file.

    The files appear when the block ends well. Opening and finishing them is the stage "write".
    """
    if not pipeline.session.leads:
        yield [Collector() for _ in batch]
        return
    with ExitStack() as stack:
        with pipeline.models.clock.stage("write"):
            sinks = [stack.enter_context(open_output(pipeline, settings, t, sheet)) for t in batch]
        yield sinks
        with pipeline.models.clock.stage("write"):
            stack.close()


@contextmanager
def open_output(
    pipeline: Pipeline, settings: RunSettings, task: Task, sheet: RunSheet | None = None
) -> Iterator[Sink]:
    """A sink for the file of a task, which appears whole when the block ends well.

    sheet: the contact sheet that shows the task, with the frames of the file.
    """
    with _open_file(pipeline, settings, task) as sink:
        if sheet is not None:
            sink = sheet.watch(task, sink)
        if settings.watermark:
            sink = Watermarked(sink, *task.request.decoded_size)
        yield sink


@contextmanager
def _open_file(pipeline: Pipeline, settings: RunSettings, task: Task) -> Iterator[Sink]:
    request = task.request
    metadata = describe(pipeline, settings, request)
    metadata["captions"] = captions(request)  # what the model was told, clip by clip
    if task.original_prompt is not None:
        metadata["original_prompt"] = task.original_prompt
    if request.is_image:
        image = _ImageSink()
        yield image
        image.save(task, metadata)
        return
    height, width = request.decoded_size
    writer = VideoWriter(
        task.output,
        fps=request.save_fps,
        height=height,
        width=width,
        metadata=metadata,
        lossless=settings.lossless,
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

    def save(self, task: Task, metadata: dict[str, Any]) -> None:
        """Write the PNG."""
        from opensora_sp.media.writer import write_image

        if self.frames is None:
            raise RuntimeError(f"nothing was decoded for {task.output}")
        write_image(task.output, self.frames[0], metadata)


def describe(pipeline: Pipeline, settings: RunSettings, request: Request) -> dict[str, Any]:
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
        "checkpoints": "embedded" if settings.checkpoints is None else "given",
        "dtype": settings.dtype,
        "watermark": settings.watermark,
        "device": session.device.type,
        "ranks": session.world_size,
        "versions": versions,
    }
