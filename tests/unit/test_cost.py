"""The plan's formulas against the figures known for STDiT3-XL/2 at 720p 16 s."""

from __future__ import annotations

import pytest

from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.planner.cost import Workload, project_step, step_flops, step_traffic
from opensora_sp.request.runtime import Runtime

LONG_720P = Workload(frames=120, size=(90, 160), channels=1152, depth=28)


def gigabytes(mesh: Mesh, rank: int = 0, runtime: Runtime | None = None) -> float:
    traffic = step_traffic(LONG_720P, mesh, rank, runtime or Runtime())
    return sum(size for _, size in traffic.values()) / 1e9


def test_bytes_of_a_720p_16s_step() -> None:
    two = step_traffic(LONG_720P, plan_mesh(2, guided=True), 1, Runtime())
    assert two == {"velocity": (1, 120 * 3600 * 16 * 2)}  # nothing but the velocity
    assert round(gigabytes(plan_mesh(4, guided=True)), 1) <= 13.9
    assert gigabytes(plan_mesh(8, guided=True)) <= 10.5
    # Without guidance groups, both halves exchanged: the published scheme's own figures.
    plain = Runtime(share_first=False)
    assert gigabytes(Mesh(sequence=2), runtime=plain) == pytest.approx(27.9, abs=0.05)
    assert gigabytes(Mesh(sequence=4), runtime=plain) == pytest.approx(20.9, abs=0.05)
    assert gigabytes(Mesh(sequence=8), runtime=plain) == pytest.approx(12.2, abs=0.05)


def test_no_collective_carries_a_full_hidden_state() -> None:
    full = 120 * 3600 * 1152 * 2
    for world in (2, 4, 8):
        mesh = plan_mesh(world, guided=True)
        for calls, size in step_traffic(LONG_720P, mesh, 0, Runtime()).values():
            assert size / calls < full / 2


def test_sharing_the_first_attention_saves_one_exchange_of_one_half() -> None:
    mesh = Mesh(sequence=4)
    saved = gigabytes(mesh, runtime=Runtime(share_first=False)) - gigabytes(mesh)
    assert saved == pytest.approx(gigabytes(mesh, runtime=Runtime(share_first=False)) / 56)


def test_chunks_of_time_cost_no_bytes() -> None:
    mesh = Mesh(guidance=2, sequence=4)
    assert gigabytes(mesh, runtime=Runtime(chunks=3)) == gigabytes(mesh)


def test_flops_of_a_video() -> None:
    # 72.9 PFLOP for 30 steps and the decode; the decode is the smaller part.
    petaflops = 30 * step_flops(LONG_720P, Mesh(), 0) / 1e15
    assert 68 < petaflops < 72.9
    mesh = Mesh(guidance=2, sequence=3)
    shares = [step_flops(LONG_720P, mesh, rank) for rank in range(6)]
    assert sum(shares) == pytest.approx(step_flops(LONG_720P, Mesh(), 0))


def test_projection_grows_with_slower_links_and_never_beats_perfect_scaling() -> None:
    mesh = plan_mesh(8, guided=True)
    fast, slow = (
        project_step(LONG_720P, mesh, Runtime(), one_rank_seconds=8.0, link_bytes_per_second=speed)
        for speed in (200e9, 20e9)
    )
    assert fast.compute == slow.compute >= 1.0
    assert slow.exchange > 5 * fast.exchange
    assert fast.hidden <= fast.exposed
