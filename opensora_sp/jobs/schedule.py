"""A list of work, shared by replicas: what is made together, and by whom. Pure arithmetic.

Every rank computes the same plan, so no replica asks another for work while it denoises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opensora_sp.engine.progress import Position
from opensora_sp.request.request import Task


@dataclass(frozen=True)
class Work:
    """Tasks that are made together from where all of them stand."""

    tasks: tuple[Task, ...]
    start: Position = field(default_factory=Position)

    @property
    def steps(self) -> int:
        """Denoising steps that are left, each counted for every task."""
        request = self.tasks[0].request
        left = (request.loop - self.start.clip) * request.steps - self.start.step
        return len(self.tasks) * max(0, left)

    @property
    def denoised(self) -> bool:
        """Whether all latents are there, so that only the decoder is needed."""
        return self.start.clip >= self.tasks[0].request.loop


def regroup(
    batches: Sequence[Sequence[Task]], positions: Mapping[Task, Position | None]
) -> list[Work]:
    """The batches without the tasks that are finished (None), parted where positions differ.

    A video does not depend on what it is batched with, so a batch may lose some of its own.
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
    """Each replica's list: in order, always to the one that has the least to do so far.

    Equal works go round in turn; what a run before has half done counts for what is left of it.
    """
    lists: list[list[Work]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for work in works:
        least = loads.index(min(loads))
        lists[least].append(work)
        loads[least] += work.steps + len(work.tasks)  # decoding counts too
    return lists
