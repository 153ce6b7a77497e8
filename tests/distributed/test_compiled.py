"""Compiled steps on one rank and on several: the rehearsal makes every graph, and one rank's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_denoiser import few_steps, relative
from tiny import tiny_transformer

from opensora_sp.engine.compiling import rehearse
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.progress import ResumePoint
from opensora_sp.models import compiler
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import open_session
from opensora_sp.request.memory_modes import Offload
from opensora_sp.request.runtime import Runtime

FRAMES, SIZE = 5, (6, 10)  # 15 patches: uneven on two ranks
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"step_kernels": "plain", "chunks": 2},
    "folded": {"step_kernels": "folded", "tokens": 30},
    "offloaded": {
        **{"step_kernels": "plain", "serial_guidance": True},
        "offload": Offload(models=True, layers=True),
    },
}


def compare(rank: int, world: int, init_file: str) -> dict[str, tuple[float, int, int]]:
    """On rank 0: the error of each way, its graphs after the rehearsal, and those made later."""
    compiler.BACKENDS["cpu"] = compiler.Backend("eager")
    model, found = tiny_transformer(), {}
    shape, mask = (FRAMES, SIZE), torch.ones(1, FRAMES)
    mask[:, 0], mask[-1, -1] = 0.0, 0.4
    with open_session("cpu") as session, torch.no_grad():
        mesh = Mesh(sequence=world)
        comms = session.build(mesh)
        for name, way in WAYS.items():
            layout = Layout(frames=FRAMES, size=SIZE, ranks=world)
            denoiser = parallelize(model, comms, layout, Runtime(compile=True, **way))
            compiling = denoiser.compiler
            assert compiling is not None
            rehearse_alone(session, denoiser, mask)
            assert compiling.trouble is None
            made = compiling.graphs
            got = few_steps(denoiser, shape, masked=True, batch=1)
            later = compiling.compilations - made
            if got is not None:
                alone = Layout(frames=FRAMES, size=SIZE, ranks=1)
                kernels = Runtime(step_kernels=way["step_kernels"])
                want = few_steps(
                    parallelize(model, None, alone, kernels), shape, masked=True, batch=1
                )
                assert want is not None
                found[name] = (relative(got, want), made, later)
    return found


def rehearse_alone(session: Any, denoiser: Any, mask: torch.Tensor) -> None:
    """As `generate` rehearses, without its models."""

    class Models:
        def __init__(self) -> None:
            self.session = session

        def mesh(self, request: object) -> None:
            return None

    class Guided:
        cfg_scale = 7.0

    start = ResumePoint(0, torch.zeros(1, 4, FRAMES, *SIZE), mask)
    rehearse(Models(), denoiser, Guided(), start, [1000.0, 400.0], show=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_steps_on_ranks(world: int) -> None:
    found = run_ranks(compare, world)[0]
    for name, (error, graphs, later) in found.items():
        assert error <= 1e-5, name
        assert graphs > 0 and later == 0, name
    assert set(found) == set(WAYS)
