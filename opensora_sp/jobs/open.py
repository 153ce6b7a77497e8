"""Open an engine: ranks, session, mesh, models. It stays open for as many jobs as are wanted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opensora_sp.base.atomic import remove_leftovers
from opensora_sp.base.deadlines import parse_deadlines
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.engine.model_set import Parallelism
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.text_cache import default_directory
from opensora_sp.engine.timing import Clock
from opensora_sp.engine.weight_digests import model_digests
from opensora_sp.jobs.memory_mode import choose_memory, choose_warm
from opensora_sp.jobs.records import FOLDER
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.parallel.nodes import crossing_note
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.parallel.watchdog.stages import Limits
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.warm import WarmEngine
from opensora_sp.request.request import EngineSettings, Job, Request
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.setting import field_names

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """What stays open between jobs, on one rank.

    whole: the session of all ranks. replicas: groups of ranks that make different videos.
    pipeline: the models of this rank's replica. digests: of the weights, by model. warm: what was
    chosen for the sizes that it serves; None where it was opened for one job.
    """

    settings: EngineSettings
    whole: Session
    replicas: int
    pipeline: Pipeline
    digests: dict[str, str]
    warm: WarmEngine | None = None

    def require_same(self, settings: EngineSettings) -> None:
        """Raise UserError where a job asks for other models or ranks than are open."""
        for name in field_names(EngineSettings):
            asked, is_open = getattr(settings, name), getattr(self.settings, name)
            if asked != is_open:
                raise UserError(
                    f"{name} {shown(asked)}: the models that are open have {shown(is_open)}; "
                    "open them again with the other value"
                )

    def mesh(self, request: Request) -> Mesh:
        """How all ranks share requests of this kind."""
        return dataclasses.replace(self.pipeline.models.mesh(request), replicas=self.replicas)


@contextmanager
def open_engine(job: Job, serves: Mapping[str, Shape] | None = None) -> Iterator[Engine]:
    """Open the session and the models that a job asks for; further jobs may use them. Collective.

    The job decides what cannot change while the models are loaded: the memory mode, which has to
    fit its largest batch, and, with replicas, whether its requests are guided. serves: shapes by
    name that further jobs may have; the memory mode has to fit them instead, and T5 stays between
    jobs where there is room. Raises UserError for what a person can mend.
    """
    with open_engine_session(job.engine) as whole:
        mesh = mesh_of(job, whole.world_size)
        session = whole.split(mesh) if mesh.replicas > 1 else whole
        warm = None if serves is None else choose_warm(job, whole, serves)
        pipeline = load_pipeline(job, session, mesh, warm=warm)
        digests = whole.control.together(
            lambda: model_digests(pipeline.models.checkpoints), leading_only=True
        )
        digests = whole.control.broadcast_object(digests)
        yield Engine(job.engine, whole, mesh.replicas, pipeline, digests, warm)


@contextmanager
def open_engine_session(settings: EngineSettings) -> Iterator[Session]:
    """The session that the settings ask for."""
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
        yield session


def tidy(session: Session, save_dir: Path) -> None:
    """Remove what a killed run left where this one writes; a killed rank's is removed at once."""
    places = [save_dir, save_dir / FOLDER]
    if session.control.watchdog is not None:
        known = session.control.watchdog.directories
        session.control.watchdog.directories += [place for place in places if place not in known]
    if session.leads:
        for place in places:
            remove_leftovers(place)


def mesh_of(job: Job, world: int) -> Mesh:
    """How the ranks share the job."""
    settings = job.engine
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
    warm: WarmEngine | None = None,
) -> Pipeline:
    """The pipeline of one replica of the mesh, in a memory mode that fits; collective.

    clock: times the stages. text_cache: keep embeddings where the settings say. warm: what was
    chosen for an engine that serves; None chooses for this job.
    """
    settings = job.engine
    # The groups of replicas are made once; without replicas each request gets the mesh it can use.
    fixed = Parallelism(guidance=mesh.guidance, sequence=mesh.sequence)
    asked = Parallelism(guidance=settings.guidance_parallel, sequence=settings.sequence_parallel)
    pipeline = Pipeline.load(
        settings.checkpoints,
        session=session,
        dtype=settings.dtype,
        weights_from=settings.weights_from,
        runtime=Runtime.of(
            choose_memory(job, session) if warm is None else warm.mode,
            serial_guidance=settings.guidance == "serial",
            overlap=settings.overlap,
            chunks=session.backend.chunks,
            check_blocks=settings.check_finite == "blocks",
            vae_decode=settings.vae_decode,
            text_encoder="host" if warm is not None and warm.text == "host" else settings.t5_device,
            attention=settings.attention,
            fused_kernels=settings.fused_kernels,
            text_weights=settings.t5_weights,
            step_kernels=settings.step_kernels,
            compile=settings.enable_compile,
        ),
        parallelism=fixed if mesh.replicas > 1 else asked,
        show_progress=job.settings.verbose > 0,
        allow_remote=settings.remote,
        check_finite=settings.check_finite,
        text_cache=_text_cache(job, leads=session.whole.leads) if text_cache else None,
        clock=clock,
    )
    pipeline.text.stays = warm is not None and warm.text != "reload"
    return pipeline


def _text_cache(job: Job, *, leads: bool) -> Path | None:
    where = job.engine.text_cache
    if where == "off":
        return None
    if where != "auto":
        return Path(where)
    directory = default_directory()
    if directory is None and leads and job.settings.verbose > 0:
        _log.warning(
            "text cache: off, for this user has no home directory: set HOME, or give "
            "--text-cache DIR"
        )
    return directory


def show_progress(pipeline: Pipeline, *, show: bool) -> None:
    """Whether the pipeline says what it does, from the next call on."""
    pipeline.options = dataclasses.replace(pipeline.options, show_progress=show)
    pipeline.text.show_progress = show


def announce(pipeline: Pipeline, request: Request, mesh: Mesh) -> None:
    """Say on rank 0 what is about to be made, and on what."""
    whole = pipeline.session.whole
    if not whole.leads or not pipeline.options.show_progress:
        return
    known = pipeline.models.max_length(request)
    if request.model_max_length is not None and request.model_max_length > known:
        _log.warning("this transformer knows %d text tokens at most", known)
    if (crossing := crossing_note(mesh, whole.nodes)) is not None:
        _log.warning(crossing)
    frames, height, width = request.latent_shape
    rows, columns = request.patch_grid
    _log.info(
        f"{plural(request.num_frames, 'frame')} of "
        f"{request.height}x{request.width} as {frames}x{height}x{width} latents "
        f"({rows * columns} patches a frame), {plural(request.steps, 'step')}, "
        f"{pipeline.models.dtype} on {whole.world_size} x {whole.device.type} ({mesh})"
    )
