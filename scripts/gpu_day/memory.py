"""Measured beside planned memory of one guided step, in every memory mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from opensora_sp.benchmark.memory_meter import MemoryMeter
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.models.kernels.probe import DTYPE_NAMES
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import Options, Plan, make_plan
from opensora_sp.request.memory_modes import MEMORY_MODES, MemoryMode
from opensora_sp.request.runtime import Runtime
from scripts.gpu_day.day import Day
from scripts.gpu_day.rows import Row, failed, left_out
from scripts.gpu_day.sizes import Case
from scripts.gpu_day.timing import Budget, release, timed
from scripts.gpu_day.variants import TIME, Scene
from scripts.gpu_day.weights import offload_blocks

PART = "memory"
CLOSE = 0.05  # a plan within this of what is measured is right


def measure(day: Day, budget: Budget) -> Iterator[Row]:
    """One step in each mode, from the fastest to the smallest."""
    seconds = 0.0
    for mode in MEMORY_MODES.values():
        case = f"step, {day.sizes.largest.name}"
        if not budget.allows(seconds):
            yield left_out(PART, case, "no time was left for it", str(mode))
            continue
        before = budget.left
        try:
            row = _row(day, case, mode)
        except Exception as error:
            row = failed(PART, case, error, str(mode))
        release(day.device)
        seconds = before - budget.left
        yield row


def _row(day: Day, case: str, mode: MemoryMode) -> Row:
    release(day.device)
    meter = MemoryMeter(day.device)
    meter.reset()
    with torch.no_grad(), day.arithmetic():
        scene = Scene.of(day, day.sizes.largest)
        if mode.offload.layers:
            offload_blocks(scene.model, day.device)
            release(day.device)
            meter.reset()  # the weights were all there for a moment
        denoiser = parallelize(scene.model, None, scene.layout, Runtime.of(mode))
        velocity = denoiser.prepare(scene.conditions())
        z = denoiser.shard(scene.z)
        seconds = timed(lambda: velocity(z, TIME), day.device)
    figures = {"seconds": seconds, **compared(meter.peak_device_bytes(), planned(day, mode))}
    return Row(part=PART, case=case, variant=str(mode), figures=figures)


def planned(day: Day, mode: MemoryMode) -> int | None:
    """Bytes that the plan has for a step without the VAE, which is not loaded here."""
    models = day.sizes.planned
    if models is None:
        return None
    stage = next(s for s in plan_of(day, day.sizes.largest, mode).stages if s.name == "denoise")
    vae = models.vae_weights(encoder=False) * day.dtype.itemsize
    return stage.total - (vae if mode.offload.vae_stays else 0)


def plan_of(day: Day, case: Case, mode: MemoryMode) -> Plan:
    """The plan of a case on one rank. Needs planned sizes."""
    assert day.sizes.planned is not None
    shape = Shape(
        height=case.height,
        width=case.width,
        num_frames=case.frames,
        dtype=DTYPE_NAMES[day.dtype],
    )
    return make_plan(shape, 1, mode, day.sizes.planned, Options(chunks=1))


def compared(measured: int | None, plan: int | None) -> dict[str, Any]:
    """Figures of a peak beside its plan. Either may be unknown."""
    figures: dict[str, Any] = {"peak_bytes": measured, "planned_bytes": plan}
    if measured and plan:
        figures["planned_of_measured"] = plan / measured
        figures["within_5_percent"] = abs(plan / measured - 1) <= CLOSE
    return figures
