"""Which ranks share a node, what a person is told, and what a slow link between them costs."""

from __future__ import annotations

from typing import Any

import pytest

from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.nodes import crosses, crossing_note, number_nodes
from opensora_sp.planner.cost import Workload, project_step
from opensora_sp.request.runtime import Runtime


def test_nodes_are_numbered_as_they_appear() -> None:
    assert number_nodes(["b", "b", "a", "a"]) == (0, 0, 1, 1)
    assert number_nodes(["x"]) == (0,)


@pytest.mark.parametrize(
    ("mesh", "per_node", "told"),
    [
        (Mesh(guidance=2, sequence=4), 4, None),
        (Mesh(guidance=2, sequence=4), 8, None),
        (Mesh(replicas=2, guidance=2, sequence=4), 8, None),
        (Mesh(guidance=2, sequence=4), 2, "--replicas 2"),
        (Mesh(sequence=8), 4, "--replicas 2"),
        (Mesh(guidance=2, sequence=8), 4, "--replicas 2"),
        (Mesh(guidance=2, sequence=3), 2, "--replicas 3"),
    ],
)
def test_a_sequence_that_crosses_nodes_is_named(
    mesh: Mesh, per_node: int, told: str | None
) -> None:
    nodes = [rank // per_node for rank in range(mesh.size)]
    note = crossing_note(mesh, nodes)
    assert crosses(mesh, nodes) == (told is not None)
    assert (note is None) if told is None else (note is not None and told in note)


WORK = Workload(frames=30, size=(30, 52), channels=64, depth=2)


def step(mesh: Mesh, **links: Any) -> float:
    projection = project_step(
        WORK, mesh, Runtime(), one_rank_seconds=1.0, link_bytes_per_second=1e9, **links
    )
    return projection.exchange


def test_a_slow_link_costs_only_where_the_mesh_uses_it() -> None:
    two_nodes = [0, 0, 1, 1]
    inside, across = Mesh(guidance=2, sequence=2), Mesh(sequence=4)
    one_node = step(across)
    # Ten times slower between the nodes: all of the exchange, the latency of its calls aside.
    slow = step(across, nodes=two_nodes, between_bytes_per_second=1e8, call_seconds=0.0)
    assert slow == pytest.approx(10 * step(across, call_seconds=0.0))
    assert step(across, nodes=two_nodes, between_bytes_per_second=1e9) == one_node
    # Where the exchange stays inside, only the velocity pays.
    fast, paid = (
        step(inside, nodes=two_nodes, between_bytes_per_second=speed, call_seconds=0.0)
        for speed in (1e9, 1e8)
    )
    velocity = 30 * 15 * 26 // 2 * 16 * 2 / 1e9
    assert paid - fast == pytest.approx(9 * velocity)
