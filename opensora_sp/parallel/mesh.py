"""Replica × guidance × sequence: what each rank of the world works on. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensora_sp.base.errors import UserError
from opensora_sp.base.wording import plural


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The world's ranks along three axes; sequence varies fastest, so its exchange stays in a node.

    replicas: groups that generate different videos.
    guidance: 2 when the conditional and the unconditional branch of CFG (classifier-free guidance)
    run on different ranks, else 1.
    sequence: ranks that share the patches of one video (of one CFG branch).
    """

    replicas: int = 1
    guidance: int = 1
    sequence: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.replicas * self.guidance * self.sequence

    @property
    def replica_size(self) -> int:
        """Ranks that work on one video."""
        return self.guidance * self.sequence

    def place(self, rank: int) -> Place:
        """A rank's coordinates."""
        return Place(
            replica=rank // self.replica_size,
            guidance=rank // self.sequence % self.guidance,
            sequence=rank % self.sequence,
        )

    def rank(self, place: Place) -> int:
        """The rank with these coordinates."""
        return (place.replica * self.guidance + place.guidance) * self.sequence + place.sequence

    def replica_ranks(self, rank: int) -> list[int]:
        """The ranks that work on this rank's video; the first leads it."""
        first = self.place(rank).replica * self.replica_size
        return list(range(first, first + self.replica_size))

    def sequence_groups(self) -> list[list[int]]:
        """Every set of ranks that exchanges activations."""
        return [
            list(range(start, start + self.sequence))
            for start in range(0, self.size, self.sequence)
        ]

    def guidance_groups(self) -> list[list[int]]:
        """Every pair of ranks that exchanges velocities (or single ranks without a pair)."""
        return [
            [self.rank(Place(replica, branch, part)) for branch in range(self.guidance)]
            for replica in range(self.replicas)
            for part in range(self.sequence)
        ]

    def __str__(self) -> str:
        return (
            f"{self.replicas} × {self.guidance} × {self.sequence} (replicas × guidance × sequence)"
        )


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in the mesh; guidance 0 is the conditional CFG branch."""

    replica: int
    guidance: int
    sequence: int


def legal_meshes(world: int, guided: bool) -> list[Mesh]:
    """Every mesh of `world` ranks; guidance 2 needs a request with both CFG branches."""
    small = [r for r in range(1, math.isqrt(world) + 1) if world % r == 0]
    divisors = sorted({*small, *(world // r for r in small)})
    return [
        Mesh(replicas=r, guidance=g, sequence=world // (r * g))
        for r in divisors
        for g in ((1, 2) if guided else (1,))
        if world % (r * g) == 0
    ]


def plan_mesh(
    world: int,
    *,
    guided: bool,
    replicas: int | None = 1,
    guidance: int | None = None,
    sequence: int | None = None,
) -> Mesh:
    """The mesh for `world` ranks, honouring what a person fixed.

    Left alone: one replica (None: as many as the rest needs), guidance 2 where the ranks are even
    and the request is guided (scale other than 1), the rest sequence. Raises UserError listing
    the legal products.
    """
    legal = [m for m in legal_meshes(world, guided) if replicas in (None, m.replicas)]
    fitting = [
        mesh
        for mesh in legal
        if guidance in (None, mesh.guidance) and sequence in (None, mesh.sequence)
    ]
    if not fitting:
        asked = " ".join(
            f"{flag} {value}"
            for flag, value in (
                ("--replicas", None if replicas == 1 else replicas),
                ("--guidance-parallel", guidance),
                ("--sequence-parallel", sequence),
            )
            if value is not None
        )
        options = ", ".join(f"{m.replicas}×{m.guidance}×{m.sequence}" for m in legal) or "none"
        why = "" if guided else " (guidance 2 needs --cfg-scale other than 1)"
        raise UserError(
            f"{asked} does not fit {plural(world, 'rank')}{why}; "
            f"legal replicas×guidance×sequence: {options}"
        )
    return min(fitting, key=lambda m: (m.replicas, -m.guidance))
