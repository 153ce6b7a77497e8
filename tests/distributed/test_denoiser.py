"""N ranks against one, in float32: one velocity and a few steps, on every kind of shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from ranks import run_ranks
from tiny import conditions, normal, tiny_transformer

from opensora_sp.base.geometry import latent_shape, patch_grid
from opensora_sp.engine.compiling import rehearse
from opensora_sp.engine.guidance import Denoiser
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.progress import ResumePoint
from opensora_sp.engine.sampling import sample
from opensora_sp.models import compiler
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import open_session
from opensora_sp.request.memory_modes import Offload
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.sizes import aspect_ratios, resolutions

FORWARD_LIMIT = 1e-5

Shape = tuple[int, tuple[int, int]]
# Latent frames of an image, 2, 4, 8 and 16 s; 5 of one chunk, run with masks and two samples.
DURATIONS = (1, 5, 15, 30, 60, 120)


def published_remainders(ranks: int) -> list[int]:
    """What the patch counts of the published sizes leave modulo the rank count."""
    sizes = {size for name in resolutions() for size in aspect_ratios(name).values()}
    grids = [patch_grid(*latent_shape(1, *size)[1:]) for size in sizes]
    return sorted({rows * columns % ranks for rows, columns in grids})


def small_size(ranks: int, remainder: int, odd: bool) -> tuple[int, int]:
    """Latent sides whose patch count leaves this remainder, with or without padded cells."""
    for rows, columns in itertools.product(range(1, 5), range(1, 24)):
        if rows * columns >= ranks and rows * columns % ranks == remainder:
            return (2 * rows - odd, 2 * columns - odd)
    raise AssertionError(f"no small size leaves {remainder} modulo {ranks}")


def shapes(ranks: int) -> list[Shape]:
    """Durations with remainders of the published sizes, odd sides in every other one, and two with
    fewer patches than ranks may have.

    Up to four ranks every pair; on more each duration with a third of the remainders, and each
    remainder with a third of the durations.
    """
    every = 1 if ranks <= 4 else 3
    classes = [
        (frames, remainder)
        for i, frames in enumerate(DURATIONS)
        for j, remainder in enumerate(published_remainders(ranks))
        if (i + j) % every == 0
    ]
    found = [
        (frames, small_size(ranks, remainder, odd=i % 2 == 1))
        for i, (frames, remainder) in enumerate(classes)
    ]
    return [*found, (1, (3, 3)), (2, (2, 2))]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def few_steps(denoiser: Denoiser, shape: Shape, *, masked: bool, batch: int) -> torch.Tensor | None:
    """A step or two from fixed noise; the latents on the leading rank.

    Two where the first leaves something for the second to spoil: kept frames, padded cells.
    """
    frames, size = shape
    mask = None
    if masked:
        mask = torch.ones(batch, frames)
        mask[:, 0] = 0.0
        mask[-1, -1] = 0.4
    velocity = denoiser.prepare(conditions(batch))
    return denoiser.gather(
        sample(
            denoiser.shard(normal(batch, 4, frames, *size)),
            [1000.0, 400.0] if masked or size[0] % 2 or size[1] % 2 else [1000.0],
            velocity,
            mask,
            lambda step: denoiser.shard(normal(batch, 4, frames, *size, seed=100 + step)),
        )
    )


def compare(
    rank: int, world: int, init_file: str, meshes: Sequence[Mesh], shapes: Sequence[Shape]
) -> dict[str, float]:
    """The relative error of every mesh and shape, on rank 0."""
    errors: dict[str, float] = {}
    model = tiny_transformer()
    with open_session("cpu") as session, torch.no_grad():
        for mesh in meshes:
            comms = session.build(mesh)
            runtimes = itertools.cycle(_runtimes(mesh))
            for (frames, size), runtime in zip(shapes, runtimes, strict=False):
                batch = 2 if frames == 5 else 1
                masked = frames in (5, 15)
                layout = Layout(frames=frames, size=size, ranks=mesh.sequence)
                denoiser = parallelize(model, comms, layout, runtime)
                got = few_steps(denoiser, (frames, size), masked=masked, batch=batch)
                assert (got is None) == (rank != 0)
                if got is not None:
                    single = Layout(frames=frames, size=size, ranks=1)
                    alone = parallelize(
                        model, None, single, Runtime(step_kernels=runtime.step_kernels)
                    )
                    want = few_steps(alone, (frames, size), masked=masked, batch=batch)
                    assert want is not None
                    errors[f"{mesh} {frames} {size}"] = relative(got, want)
    return errors


def _runtimes(mesh: Mesh) -> list[Runtime]:
    """Ways to compute, each in its turn with plain and with folded step kernels."""
    if mesh.sequence == 1:
        ways = [Runtime()]
    elif mesh.guidance == 2:
        ways = [Runtime(chunks=2), Runtime(overlap=False)]
    else:
        ways = [Runtime(), Runtime(serial_guidance=True, chunks=3), Runtime(share_first=False)]
    kernels: tuple[Literal["plain", "folded"], ...] = ("plain", "folded")
    return [replace(way, step_kernels=each) for each in kernels for way in ways]


@pytest.mark.parametrize(
    ("world", "guidance"),
    [*((world, 1) for world in range(2, 9)), *((world, 2) for world in (2, 4, 6, 8))],
)
def test_ranks_give_what_one_rank_gives(world: int, guidance: int) -> None:
    meshes = [Mesh(guidance=guidance, sequence=world // guidance)]
    classes = shapes(world)
    assert len({size for _, size in classes}) > world
    errors = run_ranks(compare, world, meshes, classes)[0]
    assert len(errors) == len(set(classes)) * len(meshes)
    worst = max(errors, key=lambda case: errors[case])
    assert errors[worst] <= 10 * FORWARD_LIMIT, (worst, errors[worst])


FRAMES, SIZE = 5, (6, 10)  # 15 patches: uneven on two ranks
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"step_kernels": "plain", "chunks": 2},
    "folded": {"step_kernels": "folded", "tokens": 30},
    "offloaded": {
        **{"step_kernels": "plain", "serial_guidance": True},
        "offload": Offload(models=True, layers=True),
    },
}


def compare_compiled(rank: int, world: int, init_file: str) -> dict[str, tuple[float, int, int]]:
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
    found = run_ranks(compare_compiled, world)[0]
    for name, (error, graphs, later) in found.items():
        assert error <= 1e-5, name
        assert (graphs > 0, later) == (True, 0), name
    assert set(found) == set(WAYS)
