"""Which ranks share a node. Links inside a node are fast, links between nodes are slow."""

from __future__ import annotations

import os
from collections.abc import Sequence

from opensora_sp.base.processes import this_node
from opensora_sp.parallel.mesh import Mesh, legal_meshes


def node_name() -> str:
    """This process's node: its machine, and the torchrun agent that started it there."""
    return f"{os.environ.get('GROUP_RANK', '')}@{this_node()}"


def number_nodes(names: Sequence[str]) -> tuple[int, ...]:
    """The node of each rank as a number, in order of appearance: a a b b → 0 0 1 1."""
    known = list(dict.fromkeys(names))
    return tuple(known.index(name) for name in names)


def crosses(mesh: Mesh, nodes: Sequence[int]) -> bool:
    """Whether a group that exchanges activations has ranks on several nodes."""
    return any(len({nodes[rank] for rank in ranks}) > 1 for ranks in mesh.sequence_groups())


def crossing_note(mesh: Mesh, nodes: Sequence[int]) -> str | None:
    """What to tell a person whose exchange leaves the node, and what would keep it inside."""
    if not crosses(mesh, nodes):
        return None
    guided = mesh.guidance == 2
    inside = [m for m in legal_meshes(mesh.size, guided) if not crosses(m, nodes)]
    better = min(inside, key=lambda m: (m.replicas, -m.guidance), default=None)
    advice = ""
    if better is not None and better.replicas > mesh.replicas:
        advice = f"; with several prompts --replicas {better.replicas} keeps it inside"
    elif better is not None:
        advice = f"; --sequence-parallel {better.sequence} keeps it inside"
    return (
        f"{mesh.sequence} ranks share a sequence over {len(set(nodes))} nodes, so that every "
        f"block's exchange goes between them{advice}"
    )
