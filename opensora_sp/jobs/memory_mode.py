"""The memory mode of a run: the one asked for, or the fastest that fits the free memory.

An engine that serves is planned for the sizes that it is to serve, and T5's place with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from opensora_sp.base.free_memory import free_bytes
from opensora_sp.base.launcher import read_launch
from opensora_sp.base.wording import plural
from opensora_sp.parallel.backend import device_module
from opensora_sp.parallel.session import Session
from opensora_sp.planner.devices import GB, parse_memory, usable
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import TextPlace
from opensora_sp.planner.requests import options_of, plan_job, sizes_of
from opensora_sp.planner.warm import Room, WarmEngine, open_warm, warm_plan
from opensora_sp.request.memory_modes import FASTEST, MemoryMode, memory_mode
from opensora_sp.request.request import EngineSettings, Job

# Of the memory that a CPU's ranks share: torch and Python are in it already when it is looked at.
_HOST_SHARE = 0.9
_T5: Mapping[TextPlace, str] = {
    "device": "T5 stays on the device",
    "host": "T5 stays in host memory, its layers are copied to the device as they are used",
    "cpu": "T5 stays in host memory and runs on the CPU",
    "reload": "T5 is loaded again for each new prompt",
}
_log = logging.getLogger(__name__)


def choose_memory(job: Job, session: Session) -> MemoryMode:
    """The mode to run in, before anything is loaded; the same on every rank. Collective.

    Raises SharedFault, with the ways out, where nothing fits and --no-plan is not given. On a CPU
    models have nowhere else to be, so there a plan is made for --device-memory only.
    """
    settings = job.engine
    asked = FASTEST if settings.memory == "auto" else memory_mode(settings.memory)
    _tell_of_idle_devices(session, quiet=job.settings.verbose == 0)
    if settings.device_memory is not None:
        memory = parse_memory(settings.device_memory)
    elif session.device.type == "cpu":
        return asked
    else:
        memory = min(session.control.all_gather_object(free_bytes(session.device)))
    if settings.no_plan or math.isinf(memory):
        return asked
    planned = session.control.together(
        lambda: plan_job(job, session.world_size, memory), leading_only=True
    )
    plan = session.control.broadcast_object(planned)
    assert plan is not None
    if session.leads and job.settings.verbose > 0:
        _log.info(
            f"plan: --memory {plan.mode}, {plan.peak / GB:.1f} of {memory / GB:.1f} GB at most, "
            f"{plan.flops / 1e15:.2f} PFLOP and {plan.sent / GB:.1f} GB sent on the busiest rank"
        )
    return plan.mode


def choose_warm(job: Job, whole: Session, serves: Mapping[str, Shape]) -> WarmEngine:
    """What an engine that is to serve these sizes runs with; the same on every rank. Collective.

    job: whose settings count. Raises SharedFault, with the ways out, where no mode fits them all
    and --no-plan is not given.
    """
    settings = job.engine
    room = _measure_room(settings, whole)
    ranks = whole.world_size // (settings.replicas or 1)
    options = replace(options_of(settings), chunks=whole.backend.chunks)
    if options.memory is None and room.device == "cpu" and settings.device_memory is None:
        options = replace(options, memory=FASTEST)  # weights have nowhere else to be

    def choose() -> tuple[WarmEngine, str]:
        models = sizes_of(settings.checkpoints)
        warm = open_warm(serves, room, ranks, models, options, tries=settings.no_plan)
        name, plan = max(
            ((name, warm_plan(warm, shape, models, options)) for name, shape in serves.items()),
            key=lambda entry: entry[1].peak,
        )
        there = "an unknown amount" if room.memory is None else f"{room.memory / GB:.3g} GB"
        return warm, f"{name} needs {plan.peak / GB:.3g} GB of {there} on the busiest rank"

    chosen = whole.control.together(choose, leading_only=True)
    warm, said = whole.control.broadcast_object(chosen)
    assert isinstance(warm, WarmEngine)
    if whole.leads:
        _log.info(f"engine: --memory {warm.mode}; {_T5[warm.text]}; {said}")
    return warm


def _measure_room(settings: EngineSettings, whole: Session) -> Room:
    """What the ranks have, before anything is loaded. Collective."""
    device = whole.device
    host = free_bytes(torch.device("cpu"))
    if settings.device_memory is not None:
        here = usable(parse_memory(settings.device_memory))
    elif device.type == "cpu":
        here = host * _HOST_SHARE / read_launch().local_world_size
    else:
        here = usable(free_bytes(device))
    by_rank = tuple(whole.control.all_gather_object(here))
    return Room(
        device=device.type,
        by_rank=() if math.isinf(min(by_rank)) else by_rank,
        host=None if math.isinf(host) else host * _HOST_SHARE,
    )


def _tell_of_idle_devices(session: Session, *, quiet: bool) -> None:
    """More devices than ranks on this node: say how all of them would be used."""
    module = device_module(session.device.type)
    if session.device.type == "cpu" or quiet or not session.leads:
        return
    here = read_launch().local_world_size
    count = int(module.device_count())
    if count > here:
        _log.warning(
            f"{count} {session.device.type} devices are visible, but {plural(here, 'rank')} "
            f"{'runs' if here == 1 else 'run'} on this node: torchrun --nproc_per_node {count} "
            "--no-python opensora-sp generate … uses them all"
        )
