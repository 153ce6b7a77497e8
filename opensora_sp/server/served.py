"""What a server is opened for, what its engine found there, and whether a request fits.

The engine chooses its memory mode for the sizes of --serves and writes down what it has, once, when
it opens. The gateway judges requests by that file, and so does the engine before it makes one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import CheckpointError, UserError
from opensora_sp.base.outside_json import read_object
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.models.text_pieces import load_pieces
from opensora_sp.planner.devices import parse_memory, usable
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import Options, Plan, make_plan
from opensora_sp.planner.requests import options_of, shape_of, sizes_of, transformer_of
from opensora_sp.planner.warm import (
    Room,
    WarmEngine,
    fewer_frames,
    open_warm,
    shortfall,
    smaller_size,
    warm_plan,
)
from opensora_sp.request import named_configs
from opensora_sp.request.caption_notes import MOST_NOTES, check_captions
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.memory_modes import FASTEST
from opensora_sp.request.request import Checkpoints, EngineSettings, Job, Request
from opensora_sp.request.settings import parse_command_line, resolve, size_of
from opensora_sp.request.sizes import EMBEDDED_FRAMES, EMBEDDED_LARGEST
from opensora_sp.request.step_schedule import FILLS
from opensora_sp.server.settings import GroupSettings

# Where --serves is not given: the largest size that the published model was trained on, and the
# embedded one.
PUBLISHED = "720p-16s"
EMBEDDED: Mapping[str, tuple[int, int, int]] = {
    f"{EMBEDDED_LARGEST[1]}x{EMBEDDED_LARGEST[0]} of {EMBEDDED_FRAMES} frames": (
        *EMBEDDED_LARGEST,
        EMBEDDED_FRAMES,
    ),
}


def check_names(flag: str, names: Sequence[str]) -> None:
    """Raise UserError that lists the configurations where one of the names is none of them."""
    known = [name for name in named_configs.names() if name != "base"]
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {shown(name)} is not one of {', '.join(known)}")


def served_shapes(group: GroupSettings, first: Job) -> dict[str, Shape]:
    """The shapes that the engine is opened for, by name: of --serves, and of --warmup with them.

    They may all have references, and so the VAE's encoder, and a step cache. Raises UserError for
    an unknown name.
    """
    names = group.serves or ((PUBLISHED,) if first.engine.checkpoints is not None else ())
    found = dict(EMBEDDED) if not names else {}
    for name in dict.fromkeys((*names, *group.warmup)):
        check_names("--serves", [name])
        values = resolve(parse_command_line([f"--config={name}"]))
        found[name] = (*size_of(values), values["num_frames"])
    request = first.tasks[0].request
    return {
        name: replace(
            shape_of(
                replace(request, height=height, width=width, num_frames=frames),
                first.engine,
                group.batch_jobs,
                None,
            ),
            encodes=True,
            held=len(FILLS),
        )
        for name, (height, width, frames) in found.items()
    }


def engine_of_settings(group: GroupSettings, first: Job) -> WarmEngine | None:
    """What the engine will choose, as far as the settings tell; None where it has to look.

    They tell with --device-memory. Raises UserError where no memory mode fits what it is to serve.
    """
    settings = first.engine
    if settings.device_memory is None:
        return None
    memory = usable(parse_memory(settings.device_memory))
    ranks = group.ranks // (settings.replicas or 1)
    room = Room(device=settings.device or "", by_rank=(memory,) * group.ranks)
    return open_warm(
        served_shapes(group, first),
        room,
        ranks,
        sizes_of(settings.checkpoints),
        options_of(settings),
        tries=settings.no_plan,
    )


def facts_path(place: Path) -> Path:
    """The file of what an engine has."""
    return place / "engine_facts.json"


def write_facts(place: Path, warm: WarmEngine, digest: str) -> None:
    """Write what the engine of these settings has. Raises UserError where it cannot be written."""
    with atomic_output(facts_path(place)) as temporary:
        temporary.write_text(json.dumps({"settings": digest} | warm.to_dict()), encoding="ascii")


def read_facts(group: GroupSettings) -> WarmEngine | None:
    """What the engine has; None before it has opened, and for a file of other settings."""
    try:
        found = read_object(facts_path(group.place), most_bytes=1 << 20)
        return WarmEngine.from_dict(found) if found["settings"] == group.digest() else None
    except (ValueError, TypeError, KeyError, UserError):
        return None


def plan_request(group: GroupSettings, job: Job) -> tuple[Plan, WarmEngine | None]:
    """A job's plan on the engine, which is None where nobody knows yet what it has."""
    settings = job.engine
    warm = read_facts(group) or engine_of_settings(group, job)
    shape, models, options = _parts(job.tasks[0].request, settings)
    if warm is not None:
        return warm_plan(warm, shape, models, options), warm
    ranks = group.ranks // (settings.replicas or 1)
    return make_plan(shape, ranks, options.memory or FASTEST, models, options), None


def _parts(request: Request, settings: EngineSettings) -> tuple[Shape, ModelSizes, Options]:
    shape = shape_of(request, settings, 1, transformer_of(settings))
    return shape, _sizes_of(settings.checkpoints), options_of(settings)


@cache
def _sizes_of(checkpoints: Checkpoints | None) -> ModelSizes:
    """Read once: the engine keeps the models that it has loaded, whatever comes to the files."""
    return sizes_of(checkpoints)


def why_not(
    job: Job, warm: WarmEngine | None, *, by_name: bool = False, batch: int = 1
) -> str | None:
    """Why a job does not fit and the nearest that does, in one line with flags; None if it fits.

    by_name: the client gave its size as a resolution. batch: so many of it together. The first
    flag is the one at fault: the number of frames where fewer of them fit, else the size.
    """
    shape, models, options = _parts(job.tasks[0].request, job.engine)
    parts = replace(shape, batch=batch), models, options
    if warm is None or warm.tries or (short := shortfall(warm, *parts)) is None:
        return None
    frames, size = fewer_frames(warm, *parts), smaller_size(warm, *parts)
    ways = []
    if frames is not None:
        ways.append(f"{plural(frames, 'frame')} at this size")
    if size is not None:
        ways.append(f"{size[1]}x{size[0]} at this length")
    nearest = f"the nearest that fits: {', or '.join(ways)}" if ways else "nothing smaller fits"
    asked = f"--image-size {shape.width}x{shape.height}"
    if by_name:
        asked = f"--resolution of {shape.width}x{shape.height}"
    frame_count = f"--num-frames {shape.num_frames}"
    blamed = (frame_count, asked) if frames is not None else (asked, frame_count)
    return f"{blamed[0]} with {blamed[1]} does not fit: {short}; {nearest}"


def prompt_notes(group: GroupSettings, job: Job) -> list[str]:
    """What the model does not read of a job's prompt, in lines; as many as a run says at most.

    Where T5's vocabulary is not known here, what caption cleaning drops is found alone. So it is
    with a shared queue and no checkpoints: its groups may have other models than the embedded one.
    """
    request, checkpoints = job.tasks[0].request, job.engine.checkpoints
    known = _sizes_of(checkpoints).tokens
    length = min(request.model_max_length or known, known)
    pieces = None
    if checkpoints is not None or not group.shared:
        pieces = _pieces_of(checkpoints or embedded_checkpoints())
    found = check_captions(request, pieces, length)
    return [line for one in found for line in one.notes(translates=False)][:MOST_NOTES]


@cache
def _pieces_of(checkpoints: Checkpoints) -> Any:
    try:
        return load_pieces(checkpoints.t5)
    except CheckpointError:
        return None


def cost_of(group: GroupSettings, job: Job, plan: Plan) -> dict[str, Any]:
    """What a job costs, as its folder keeps it: FLOPs of the busiest rank, for all clips.

    engine: the digest of the settings. shape: equal for jobs that take equally long.
    """
    request, cost = job.tasks[0].request, plan.cost
    alone = make_plan(plan.shape, 1, plan.mode, plan.models, _free(plan.options))
    shape = plan.shape
    return {
        "engine": group.digest(),
        "shape": f"{shape.width}x{shape.height}x{shape.num_frames} {shape.steps} {request.loop} "
        f"{shape.guided} {shape.encodes}" + f" {shape.computed}" * (shape.left_out > 0),
        "steps": request.steps * request.loop,
        "denoise": cost.denoise * request.loop,
        "decode": cost.decode * request.loop,
        "tflop": round(alone.flops * request.loop / 1e12, 3),
        "peak_memory_mb": round(plan.peak / 1e6, 1),
    }


def _free(options: Options) -> Options:
    return replace(options, guidance=None, sequence=None)
