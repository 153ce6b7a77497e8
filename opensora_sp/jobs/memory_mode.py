"""The memory mode of a run: the one asked for, or the fastest that fits the free memory."""

from __future__ import annotations

import logging
import math

from opensora_sp.base.free_memory import free_bytes
from opensora_sp.base.launcher import read_launch
from opensora_sp.parallel.backend import device_module
from opensora_sp.parallel.session import Session
from opensora_sp.planner.devices import GB, parse_memory
from opensora_sp.planner.requests import plan_job
from opensora_sp.request.memory_modes import FASTEST, MemoryMode, memory_mode
from opensora_sp.request.request import Job

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


def _tell_of_idle_devices(session: Session, *, quiet: bool) -> None:
    """More devices than ranks on this node: say how all of them would be used."""
    module = device_module(session.device.type)
    if session.device.type == "cpu" or quiet or not session.leads:
        return
    here = read_launch().local_world_size
    count = int(module.device_count())
    if count > here:
        _log.warning(
            f"{count} {session.device.type} devices are visible but {here} rank(s) run on "
            f"this node: torchrun --nproc_per_node {count} --no-python opensora-sp generate … uses "
            "them all"
        )
