"""Open a run: ranks, session, models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora_sp.base.atomic import remove_leftovers
from opensora_sp.base.deadlines import parse_deadlines
from opensora_sp.base.screen import note
from opensora_sp.engine.model_set import Parallelism
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.text_cache import default_directory
from opensora_sp.engine.timing import Clock
from opensora_sp.jobs.memory_mode import choose_memory
from opensora_sp.jobs.records import FOLDER
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.parallel.nodes import crossing_note
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.parallel.watchdog.stages import Limits
from opensora_sp.request.request import Job, Request, RunSettings
from opensora_sp.request.runtime import Runtime


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
    places = [settings.save_dir, settings.save_dir / FOLDER]
    if session.watchdog is not None:
        session.watchdog.directories += places
    if session.leads:
        for place in places:
            remove_leftovers(place)


def mesh_of(job: Job, world: int) -> Mesh:
    """How the ranks share the job."""
    settings = job.settings
    return plan_mesh(
        world,
        guided=job.tasks[0].request.cfg_scale != 1,
        replicas=settings.replicas or 1,
        guidance=settings.guidance_parallel,
        sequence=settings.sequence_parallel,
    )


def load_pipeline(
    job: Job,
    session: Session,
    mesh: Mesh,
    *,
    clock: Clock | None = None,
    text_cache: bool = True,
) -> Pipeline:
    """The pipeline of one replica of the mesh, in a memory mode that fits; collective.

    clock: times the stages. text_cache: keep embeddings where the settings say.
    """
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
            text_weights=settings.t5_weights,
        ),
        parallelism=Parallelism(guidance=mesh.guidance, sequence=mesh.sequence),
        show_progress=settings.verbose > 0,
        allow_remote=settings.remote,
        check_finite=settings.check_finite,
        text_cache=_text_cache(settings, leads=session.whole.leads) if text_cache else None,
        clock=clock,
    )


def _text_cache(settings: RunSettings, *, leads: bool) -> Path | None:
    if settings.text_cache == "off":
        return None
    if settings.text_cache != "auto":
        return Path(settings.text_cache)
    directory = default_directory()
    if directory is None and leads and settings.verbose > 0:
        print(
            "note: text cache: off, for this user has no home directory: set HOME, or give "
            "--text-cache DIR",
            file=sys.stderr,
        )
    return directory


def announce(pipeline: Pipeline, request: Request, mesh: Mesh) -> None:
    """Say on rank 0 what is about to be made, and on what."""
    whole = pipeline.session.whole
    if not whole.leads or not pipeline.options.show_progress:
        return
    known = pipeline.models.max_length(request)
    if request.model_max_length is not None and request.model_max_length > known:
        note(f"this transformer knows {known} text tokens at most")
    if (crossing := crossing_note(mesh, whole.nodes)) is not None:
        note(crossing)
    frames, height, width = request.latent_shape
    rows, columns = request.patch_grid
    print(
        f"{request.num_frames} frames of {request.height}x{request.width} as {frames}x{height}x"
        f"{width} latents ({rows * columns} patches a frame), {request.steps} steps, "
        f"{pipeline.models.dtype} on {whole.world_size} x {whole.device.type} ({mesh})",
        file=sys.stderr,
    )
