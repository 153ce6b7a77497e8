"""More ranks, less memory on each: the bytes of activations, counted."""

from __future__ import annotations

import torch
from peak import peak_bytes
from ranks import run_ranks
from tiny import TINY, conditions, normal, tiny_transformer

from opensora_sp.engine.parallelize import parallelize
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import open_session
from opensora_sp.request.runtime import Runtime

FRAMES, SIZE = 15, (30, 53)  # 480p's latent sides, quartered


def peak_of_a_velocity(rank: int, world: int, init_file: str, mesh: Mesh) -> int:
    """The most bytes of activations of one guided velocity on this rank."""
    model = tiny_transformer()
    with open_session("cpu") as session:
        layout = Layout(frames=FRAMES, size=SIZE, ranks=mesh.sequence)
        # Each rank folds whole weights, which would hide the activations of a model this small.
        denoiser = parallelize(model, session.build(mesh), layout, Runtime(step_kernels="plain"))
        z = denoiser.shard(normal(1, 4, FRAMES, *SIZE))
        velocity = denoiser.prepare(conditions())
        return peak_bytes(lambda: velocity(z, 500.0))


def test_peak_activations_fall_with_the_ranks() -> None:
    peaks = {
        world: max(run_ranks(peak_of_a_velocity, world, Mesh(sequence=world)))
        for world in (1, 2, 4, 8)
    }
    residual = FRAMES * 15 * 27 * TINY.hidden_size * 4  # x of one half, float32
    assert peaks[1] > 5 * residual  # the counter sees what there is
    for world in (2, 4, 8):
        # A quarter more than the even share: what is being sent and received.
        assert peaks[world] < 1.25 * peaks[1] / world, peaks


def test_guidance_groups_need_no_more_than_one_half() -> None:
    alone = run_ranks(peak_of_a_velocity, 1, Mesh())[0]
    pair = max(run_ranks(peak_of_a_velocity, 2, Mesh(guidance=2)))
    assert pair < 0.95 * alone


def test_the_counter_counts() -> None:
    def call() -> None:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b.view(10, 100)  # still 4000
        d = c * 2  # 8000
        del b, c, d
        torch.zeros(500)

    assert peak_bytes(call) == 8000
