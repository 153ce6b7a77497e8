"""One rank's share of a step, computed on this device, and the step that it projects to.

Nothing is sent: a copy within the device stands for what arrives. So "seconds" is the compute of
the first rank of a sequence group, which has the longer parts. Bytes are counted by the planner.
A projected step adds latency and bytes over an assumed link to it: all of it if nothing hides it,
or only what is longer than the compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opensora_sp.engine.parallelize import parallelize
from opensora_sp.parallel.exchange import Comm
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.parallel.session import MeshComms
from opensora_sp.planner.cost import Workload, step_traffic
from opensora_sp.request.runtime import Runtime
from scripts.gpu_day.day import Day
from scripts.gpu_day.rows import Row, failed, left_out
from scripts.gpu_day.timing import Budget, release, repeat
from scripts.gpu_day.variants import TIME, Scene

PART = "shard"
RANK = 0


def measure(day: Day, budget: Budget) -> Iterator[Row]:
    """The step of one rank alone, then of one rank of each number of ranks."""
    counts, alone = [1, *day.sizes.ranks], None
    with torch.no_grad(), day.arithmetic():
        scene = Scene.of(day, day.sizes.largest)
        for place, ranks in enumerate(counts):
            mesh = plan_mesh(ranks, guided=True)
            if budget.left <= 0:
                yield left_out(PART, scene.case.name, "no time was left for it", f"N = {ranks}")
                continue
            share = budget.within(budget.left / (len(counts) - place))
            try:
                figures = _compute(scene, mesh, share)
                seconds = figures.setdefault("seconds", figures["warm_up"])
                alone = alone or (seconds if ranks == 1 else None)
                rows = [_row(scene, mesh, figures), *_projected(scene, mesh, seconds, alone)]
            except Exception as error:
                rows = [failed(PART, scene.case.name, error, f"N = {ranks}")]
            release(day.device)
            yield from rows


def _row(scene: Scene, mesh: Mesh, figures: dict[str, Any]) -> Row:
    calls, sent = _traffic(scene, mesh)
    figures |= {"ranks": mesh.size, "calls": calls, "sent_bytes": sent}
    name = f"N = {mesh.size} ({mesh.guidance} guidance × {mesh.sequence} sequence)"
    return Row(part=PART, case=scene.case.name, variant=name, figures=figures)


def _projected(scene: Scene, mesh: Mesh, compute: float, alone: float | None) -> Iterator[Row]:
    calls, sent = _traffic(scene, mesh)
    for link in scene.day.links if mesh.size > 1 else ():
        sending = calls * scene.day.call_seconds + sent / link
        exposed, hidden = compute + sending, max(compute, sending)
        figures: dict[str, Any] = {
            "ranks": mesh.size,
            "link_rate": link,
            "sending": sending,
            "exposed": exposed,
            "hidden": hidden,
        }
        if alone is not None:
            figures["efficiency_exposed"] = alone / (mesh.size * exposed)
            figures["efficiency_hidden"] = alone / (mesh.size * hidden)
        name = f"N = {mesh.size} over {link / 1e9:g} GB/s"
        yield Row(part="projection", case=scene.case.name, variant=name, figures=figures)


def _traffic(scene: Scene, mesh: Mesh) -> tuple[int, int]:
    """Collectives and bytes sent by this rank in a step."""
    config, layout = scene.day.sizes.transformer, scene.layout
    work = Workload(
        frames=layout.frames,
        size=layout.size,
        channels=config.hidden_size,
        depth=config.depth,
        text=config.model_max_length,
        itemsize=scene.day.dtype.itemsize,
    )
    kinds = step_traffic(work, mesh, RANK, _runtime(mesh)).values()
    return sum(calls for calls, _ in kinds), sum(size for _, size in kinds)


def _runtime(mesh: Mesh) -> Runtime:
    # As on an accelerator: a lone CFG branch is cut in two, to have something to overlap with.
    return Runtime.of("speed", chunks=2 if mesh.size > 1 else 1)


def _compute(scene: Scene, mesh: Mesh, budget: Budget) -> dict[str, Any]:
    place, layout = mesh.place(RANK), scene.layout
    comms = MeshComms(
        mesh=mesh,
        place=place,
        sequence=Comm(None, place.sequence, mesh.sequence, all_to_all=_local_copy),
        guidance=Comm(None, place.guidance, mesh.guidance, all_to_all=_local_copy),
    )
    own = Layout(frames=layout.frames, size=layout.size, ranks=mesh.sequence)
    denoiser = parallelize(scene.model, comms, own, _runtime(mesh))
    velocity = denoiser.prepare(scene.conditions())
    z = denoiser.shard(scene.z)
    return repeat(lambda: velocity(z, TIME), scene.day.device, budget, scene.day.sizes.rounds)


class _Arrived:
    def wait(self) -> None:
        """Return at once: the copy is in the device's own order."""


def _local_copy(received: Tensor, sent: Tensor, *sizes: Any, **settings: Any) -> _Arrived:
    count = min(received.numel(), sent.numel())
    received[:count].copy_(sent[:count])
    received[count:].zero_()
    return _Arrived()
