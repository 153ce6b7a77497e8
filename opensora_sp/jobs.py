"""A whole run of the command line: open the session, encode all texts, generate every task."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from opensora_sp import __version__
from opensora_sp.generate import Collector, Sink, caption, generate
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.pipeline import Parallelism, Pipeline
from opensora_sp.request import Job, Request, RunSettings, Task
from opensora_sp.runtime import Runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = ("torch", "transformers", "diffusers", "av")


def run_job(job: Job) -> int:
    """Generate every task of the job on this rank and its peers; returns the exit code 0.

    Raises UserError for what a person can mend; anything else is a bug.
    """
    settings = job.settings
    with open_session(settings.device, settings.backend, timeout_s=settings.timeout) as session:
        pipeline = Pipeline.load(
            settings.checkpoints,
            session=session,
            dtype=settings.dtype,
            runtime=Runtime(
                serial_guidance=settings.guidance == "serial",
                overlap=settings.overlap,
                chunks=session.backend.chunks,
            ),
            parallelism=Parallelism(
                replicas=settings.replicas,
                guidance=settings.guidance_parallel,
                sequence=settings.sequence_parallel,
            ),
            show_progress=settings.verbose > 0,
            allow_remote=settings.allow_remote,
        )
        batches = _unfinished(job, session)
        if not batches:
            return 0
        _announce(pipeline, batches[0][0].request)
        _encode_all_text(pipeline, batches)
        for batch in batches:
            _run_batch(pipeline, settings, batch)
        session.wait_for_all()
    return 0


def _unfinished(job: Job, session: Session) -> list[Sequence[Task]]:
    """The batches that are still to be made, as the leading rank sees them."""
    left: list[Sequence[Task]] = []
    for batch in job.batches():
        skip = (
            job.settings.skip_existing and session.leads and all(t.output.exists() for t in batch)
        )
        if session.share(skip if session.leads else None):
            if session.leads:
                for task in batch:
                    print(f"{task.output} is there already, skipped", file=sys.stderr)
        else:
            left.append(batch)
    return left


def _announce(pipeline: Pipeline, request: Request) -> None:
    session = pipeline.session
    if not session.leads or not pipeline.show_progress:
        return
    frames, height, width = request.latent_shape
    rows, columns = request.patch_grid
    print(
        f"{request.num_frames} frames of {request.height}x{request.width} as {frames}x{height}x"
        f"{width} latents ({rows * columns} patches a frame), {request.steps} steps, "
        f"{pipeline.dtype} on {session.world_size} x {session.device.type} "
        f"({pipeline.mesh(request)})",
        file=sys.stderr,
    )


def _encode_all_text(pipeline: Pipeline, batches: Sequence[Sequence[Task]]) -> None:
    """Every caption of the run in one go, so that T5 can give its memory back before denoising."""
    requests = [task.request for batch in batches for task in batch]
    captions = [caption(request, clip) for request in requests for clip in range(request.loop)]
    pipeline.encode_captions(captions, pipeline.max_length(requests[0]))
    pipeline.release_text_encoder()


def _run_batch(pipeline: Pipeline, settings: RunSettings, batch: Sequence[Task]) -> None:
    started = time.perf_counter()
    requests = [task.request for task in batch]
    leads = pipeline.session.leads
    with ExitStack() as outputs:
        sinks: list[Sink] = [
            outputs.enter_context(_open_output(pipeline, settings, task)) if leads else Collector()
            for task in batch
        ]
        generate(pipeline, requests, sinks, keep_latents=False)
    if leads:
        if pipeline.show_progress:
            print(f"done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        for task in batch:
            print(task.output, flush=True)


@contextmanager
def _open_output(pipeline: Pipeline, settings: RunSettings, task: Task) -> Iterator[Sink]:
    """The file of a task; it appears whole when the block ends well, or not at all."""
    from opensora_sp.media import VideoWriter

    request = task.request
    metadata = describe(pipeline, settings, request)
    if request.is_image:
        image = _ImageSink()
        yield image
        image.save(task, metadata)
        return
    height, width = request.decoded_size
    with VideoWriter(
        task.output,
        fps=request.save_fps,
        height=height,
        width=width,
        metadata=metadata,
        lossless=settings.lossless,
    ) as writer:
        yield writer


class _ImageSink:
    """Keeps the one frame of an image until the run has ended well."""

    def __init__(self) -> None:
        self.frames: NDArray[np.uint8] | None = None

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [1,H,W,3]."""
        self.frames = frames

    def save(self, task: Task, metadata: dict[str, Any]) -> None:
        """Write the PNG."""
        from opensora_sp.media import write_image

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
        "request": request.to_dict(),
        "checkpoints": "embedded" if settings.checkpoints is None else "given",
        "dtype": settings.dtype,
        "device": session.device.type,
        "ranks": session.world_size,
        "versions": versions,
    }
