"""The schedule: which tasks are made together, and by which replica. Pure arithmetic.

Every rank computes the same schedule, so replicas need not communicate while they denoise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opensora_sp.engine.progress import Position
from opensora_sp.request.request import Task


@dataclass(frozen=True)
class Work:
    """Tasks that are made together. start: the position that all of them have reached."""

    tasks: tuple[Task, ...]
    start: Position = field(default_factory=Position)

    @property
    def steps(self) -> int:
        """Denoising steps that are left, summed over the tasks."""
        request = self.tasks[0].request
        left = (request.loop - self.start.clip) * request.steps - self.start.step
        return len(self.tasks) * max(0, left)

    @property
    def denoised(self) -> bool:
        """Whether all latents are saved, so that only decoding is left."""
        return self.start.clip >= self.tasks[0].request.loop


def regroup(
    batches: Sequence[Sequence[Task]], positions: Mapping[Task, Position | None]
) -> list[Work]:
    """The batches without finished tasks (position None), split where positions differ.

    A video does not depend on its batch, so a batch may lose tasks.
    """
    works = []
    for batch in batches:
        groups: dict[Position, list[Task]] = {}
        for task in batch:
            position = positions[task]
            if position is not None:
                groups.setdefault(position, []).append(task)
        works += [Work(tuple(tasks), position) for position, tasks in groups.items()]
    return works


def deal(works: Sequence[Work], replicas: int) -> list[list[Work]]:
    """The list of each replica. Each work, in order, goes to the replica with the least to do.

    Work counts by the steps that are left, so equal works go to the replicas in turn.
    """
    lists: list[list[Work]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for work in works:
        least = loads.index(min(loads))
        lists[least].append(work)
        loads[least] += work.steps + len(work.tasks)  # decoding counts too
    return lists
