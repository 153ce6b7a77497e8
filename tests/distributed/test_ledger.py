"""Bytes counted where they are sent equal the plan's formula, to the byte."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from tiny import TINY, conditions, normal, tiny_transformer

from opensora_sp.engine.parallelize import parallelize
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import open_session
from opensora_sp.planner.cost import Workload, step_traffic
from opensora_sp.request.runtime import Runtime

RUNTIMES = [
    Runtime(),
    Runtime(share_first=False),
    Runtime(serial_guidance=True, chunks=3),
    Runtime(chunks=2, overlap=False),
]
Traffic = dict[str, tuple[int, int]]


def counted_and_planned(
    rank: int, world: int, init_file: str, meshes: list[Mesh]
) -> list[tuple[Traffic, Traffic]]:
    """What one guided or unguided velocity sent, and what the plan says it sends."""
    pairs = []
    model = tiny_transformer()
    frames, size, batch = 7, (5, 9), 2
    with open_session("cpu") as session, torch.no_grad():
        for mesh in meshes:
            comms = session.build(mesh)
            for runtime in RUNTIMES:
                for cfg_scale in (7.0, 1.0) if mesh.guidance == 1 else (7.0,):
                    layout = Layout(frames=frames, size=size, ranks=mesh.sequence)
                    denoiser = parallelize(model, comms, layout, runtime)
                    velocity = denoiser.prepare(conditions(batch, cfg_scale=cfg_scale))
                    z = denoiser.shard(normal(batch, 4, frames, *size))
                    before = session.ledger.snapshot()
                    velocity(z, 500.0)
                    spent = session.ledger.since(before)
                    counted = {k: (e.calls, e.bytes_sent) for k, e in spent.items() if e.calls}
                    work = Workload(
                        frames=frames,
                        size=size,
                        channels=TINY.hidden_size,
                        depth=TINY.depth,
                        batch=batch,
                        guided=cfg_scale != 1,
                        itemsize=4,
                    )
                    pairs.append((counted, step_traffic(work, mesh, rank, runtime)))
    return pairs


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_ledger_equals_plan(world: int) -> None:
    meshes = [Mesh(sequence=world)]
    if world % 2 == 0:
        meshes.append(Mesh(guidance=2, sequence=world // 2))
    for pairs in run_ranks(counted_and_planned, world, meshes):
        assert len(pairs) == sum(len(RUNTIMES) * (2 if m.guidance == 1 else 1) for m in meshes)
        for counted, planned in pairs:
            assert counted == planned
