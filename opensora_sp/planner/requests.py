"""From a request and its settings to the shape that is planned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_sp.parallel.backend_table import BACKENDS, for_device
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import Options, Plan, make_plan
from opensora_sp.planner.report import check_fits
from opensora_sp.request.computed_steps import heaviest_batch, most_computed
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.memory_modes import MemoryMode, memory_mode
from opensora_sp.request.request import Checkpoints, EngineSettings, Job, Request
from opensora_sp.request.step_choice import planned_schedule
from opensora_sp.request.step_schedule import FILLS


def sizes_of(checkpoints: Checkpoints | None) -> ModelSizes:
    """Of the given checkpoints, or of the embedded model. Raises UserError as `ModelSizes.read`."""
    return ModelSizes.read(checkpoints or embedded_checkpoints())


def transformer_of(settings: EngineSettings) -> Path:
    """The directory of the transformer that the settings name."""
    return (settings.checkpoints or embedded_checkpoints()).dit


def shape_of(
    request: Request,
    settings: EngineSettings,
    batch: int,
    transformer: Path | None,
    together: Sequence[Request] = (),
) -> Shape:
    """What of a request decides its cost, in batches of `batch`.

    transformer: the directory whose step schedules count; None where there is none. together: the
    requests of the batch, where they are known: a step at which frames of one join is computed
    for all. Of several clips the one counts that computes most. Raises UserError where no schedule
    fits, as `opensora_sp.request.step_choice.choose_schedule`.
    """
    schedule = planned_schedule(request, transformer)
    return Shape(
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        batch=batch,
        guided=request.cfg_scale != 1,
        steps=request.steps,
        dtype=settings.dtype,
        micro_batch=request.micro_batch_size,
        micro_frames=request.micro_frame_size,
        encodes=bool(request.reference_path) or request.loop > 1,
        left_out=request.steps - most_computed(together or [request], schedule),
        held=0 if schedule is None else FILLS.index(schedule.fill) + 1,
    )


def options_of(settings: EngineSettings) -> Options:
    """What the settings fix of a plan."""
    return Options(
        memory=None if settings.memory == "auto" else memory_mode(settings.memory),
        serial_guidance=settings.guidance == "serial",
        # Where only the leading rank has the weights it decodes alone, whatever was asked for.
        vae_decode="rank0" if settings.weights_from == "rank0" else settings.vae_decode,
        t5_on_cpu=settings.t5_device == "cpu",
        t5_int8=settings.t5_weights == "int8",
        step_kernels=settings.step_kernels,
        chunks=_chunks_of(settings),
        guidance=settings.guidance_parallel,
        sequence=settings.sequence_parallel,
    )


def _chunks_of(settings: EngineSettings) -> int:
    """Overlap chunks of the backend that the settings name; of an accelerator's if they do not."""
    if settings.backend is not None:
        return BACKENDS[settings.backend].chunks
    if settings.device is not None:
        return for_device(settings.device).chunks
    return Options.chunks


def plan_job(job: Job, ranks: int, memory: float) -> Plan:
    """The plan of a job's largest batch on devices with so many bytes.

    ranks: of the run; replicas divide them. Raises UserError, with ways out, where no mode fits.
    """
    shape, models, options = _parts(job)
    return check_fits(shape, ranks // (job.engine.replicas or 1), models, options, memory)


def plan_in_mode(job: Job, ranks: int, mode: MemoryMode) -> Plan:
    """As `plan_job`, of a mode that is chosen already, whether or not it fits."""
    shape, models, options = _parts(job)
    return make_plan(shape, ranks // (job.engine.replicas or 1), mode, models, options)


def _parts(job: Job) -> tuple[Shape, ModelSizes, Options]:
    batches = [[task.request for task in tasks] for tasks in job.batches()]
    first = batches[0][0]
    encodes = next((t.request for t in job.tasks if t.request.reference_path), first)
    transformer = transformer_of(job.engine)
    heaviest = heaviest_batch(batches, planned_schedule(first, transformer))
    shape = shape_of(encodes, job.engine, len(heaviest), transformer, heaviest)
    return shape, sizes_of(job.engine.checkpoints), options_of(job.engine)
