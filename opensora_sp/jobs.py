"""A whole run of the command line: open the session, encode all texts, generate every task."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opensora_sp import faults
from opensora_sp.atomic import remove_leftovers
from opensora_sp.deadlines import parse_deadlines
from opensora_sp.generate import caption, generate
from opensora_sp.media import probe_encoder
from opensora_sp.outputs import describe, open_outputs
from opensora_sp.parallel.nodes import crossing_note
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.parallel.stages import Limits
from opensora_sp.pipeline import Parallelism, Pipeline
from opensora_sp.refine import refine_batches
from opensora_sp.request import Job, Request, RunSettings, Task
from opensora_sp.runtime import Runtime
from opensora_sp.runtime.fitting import choose_memory
from opensora_sp.sheet_sink import RunSheet


def run_job(job: Job) -> int:
    """Generate every task of the job on this rank and its peers; returns the exit code 0.

    Raises UserError for what a person can mend; anything else is a bug.
    """
    settings, started = job.settings, time.perf_counter()
    with open_job_session(settings) as session:
        pipeline = load_pipeline(job, session)
        batches = _unfinished(job, session)
        if settings.llm_refine and batches:
            batches = refine_batches(
                batches, session, settings.prompt_generator, verbose=settings.verbose > 0
            )
        if batches:
            _generate_all(pipeline, settings, batches, started)
    return 0


@contextmanager
def open_job_session(settings: RunSettings) -> Iterator[Session]:
    """The session that the settings ask for, its leftovers of killed runs removed."""
    limits = Limits(
        heartbeat=settings.heartbeat_timeout, deadlines=parse_deadlines(settings.deadlines)
    )
    with open_session(
        settings.device,
        settings.backend,
        launcher=settings.launcher,
        timeout_s=settings.timeout,
        limits=limits,
    ) as session:
        _tidy(session, settings)
        yield session


def _tidy(session: Session, settings: RunSettings) -> None:
    """Remove what a killed run left where this one writes; a killed rank's is removed at once."""
    if session.liveness is not None:
        session.liveness.directories.append(settings.save_dir)
    if session.leads:
        remove_leftovers(settings.save_dir)


def load_pipeline(job: Job, session: Session) -> Pipeline:
    """The pipeline that the job's settings ask for, in a memory mode that fits; collective."""
    settings = job.settings
    return Pipeline.load(
        settings.checkpoints,
        session=session,
        dtype=settings.dtype,
        weights_from=settings.weights_from,
        runtime=Runtime.of(
            choose_memory(job, session),
            serial_guidance=settings.guidance == "serial",
            overlap=settings.overlap,
            chunks=session.backend.chunks,
            check_blocks=settings.check_finite == "blocks",
            vae_decode=settings.vae_decode,
            text_encoder=settings.t5_device,
        ),
        parallelism=Parallelism(
            replicas=settings.replicas or 1,
            guidance=settings.guidance_parallel,
            sequence=settings.sequence_parallel,
        ),
        show_progress=settings.verbose > 0,
        allow_remote=settings.allow_remote,
        check_finite=settings.check_finite,
    )


def _unfinished(job: Job, session: Session) -> list[Sequence[Task]]:
    """The batches that are still to be made, as the leading rank sees them."""
    if not job.settings.skip_existing:
        return list(job.batches())
    there = session.share([task.output.exists() for task in job.tasks] if session.leads else None)
    finished = {task for task, exists in zip(job.tasks, there, strict=True) if exists}
    if session.leads:
        for task in sorted(finished, key=lambda task: task.output):
            print(f"{task.output} is there already, skipped", file=sys.stderr)
    # A video does not depend on what it is batched with, so a batch may lose some of its own.
    batches = ([task for task in batch if task not in finished] for batch in job.batches())
    return [batch for batch in batches if batch]


def _generate_all(
    pipeline: Pipeline, settings: RunSettings, batches: Sequence[Sequence[Task]], started: float
) -> None:
    leads, first = pipeline.session.leads, batches[0][0].request
    if not first.is_image:
        # A broken encoder is found now, not after hours of denoising.
        pipeline.session.together(
            lambda: probe_encoder(first.save_fps, *first.decoded_size), leading_only=True
        )
    announce(pipeline, first)
    encode_all_text(pipeline, batches)
    pipeline.release_text_encoder()
    sheet = RunSheet() if settings.sheet and leads else None
    for batch in batches:
        _run_batch(pipeline, settings, batch, sheet)
        with pipeline.session.stage("between outputs"):
            faults.reach("between-outputs")
    if sheet is not None:
        _write_sheet(pipeline, settings, sheet, first, started)


def announce(pipeline: Pipeline, request: Request) -> None:
    """Say on the leading rank what is about to be made, and on what."""
    session = pipeline.session
    if not session.leads or not pipeline.show_progress:
        return
    known = pipeline.max_length(request)
    if request.model_max_length is not None and request.model_max_length > known:
        print(f"note: this transformer knows {known} text tokens at most", file=sys.stderr)
    if (note := crossing_note(pipeline.mesh(request), session.nodes)) is not None:
        print(f"note: {note}", file=sys.stderr)
    frames, height, width = request.latent_shape
    rows, columns = request.patch_grid
    print(
        f"{request.num_frames} frames of {request.height}x{request.width} as {frames}x{height}x"
        f"{width} latents ({rows * columns} patches a frame), {request.steps} steps, "
        f"{pipeline.dtype} on {session.world_size} x {session.device.type} "
        f"({pipeline.mesh(request)})",
        file=sys.stderr,
    )


def encode_all_text(pipeline: Pipeline, batches: Sequence[Sequence[Task]]) -> None:
    """Every caption of the run in one go, so that T5 can give its memory back before denoising."""
    requests = [task.request for batch in batches for task in batch]
    captions = [caption(request, clip) for request in requests for clip in range(request.loop)]
    pipeline.encode_captions(captions, pipeline.max_length(requests[0]))


def _run_batch(
    pipeline: Pipeline, settings: RunSettings, batch: Sequence[Task], sheet: RunSheet | None
) -> None:
    started = time.perf_counter()
    requests = [task.request for task in batch]
    with open_outputs(pipeline, settings, batch, sheet) as sinks:
        generate(pipeline, requests, sinks, keep_latents=False)
    if pipeline.session.leads:
        seconds = time.perf_counter() - started
        if sheet is not None:
            sheet.took(batch, seconds)
        if pipeline.show_progress:
            print(f"done in {seconds:.1f} s", file=sys.stderr, flush=True)
        for task in batch:
            print(task.output, flush=True)


def _write_sheet(
    pipeline: Pipeline, settings: RunSettings, sheet: RunSheet, first: Request, started: float
) -> None:
    timings = {"whole run": time.perf_counter() - started, **pipeline.clock.seconds}
    sheet.write(settings, describe(pipeline, settings, first), timings)
    print(settings.sheet_path, flush=True)
