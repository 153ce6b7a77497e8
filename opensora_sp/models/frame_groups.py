"""Which frames of a step are modulated alike.

All frames that a step generates share one row of its tables. In a masked run the kept frames share
another one, that of timestep 0. Frames of one group can be computed with one set of weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameGroups:
    """The groups of some frames.

    rows [G,6,C]: each group's row of the blocks' table.
    of: for each sample the group of each of its frames, or of all of them in one number.
    """

    rows: Tensor
    of: tuple[tuple[int, ...], ...]

    @classmethod
    def of_frames(cls, table: Tensor, keys: Sequence[Sequence[Hashable]]) -> FrameGroups:
        """The groups of a table [B,T or 1,6,C] whose rows are equal where the keys [B][T or 1] are.

        The keys are numbers on the host, so that no rank asks its device what is in a table.
        """
        found: dict[Hashable, int] = {}
        first: list[Tensor] = []
        of = []
        for sample, row in enumerate(keys):
            for frame, key in enumerate(row):
                if key not in found:
                    found[key] = len(found)
                    first.append(table[sample, frame])
            of.append(tuple(found[key] for key in row))
        return cls(torch.stack(first), tuple(of))

    def frames(self, start: int, stop: int) -> FrameGroups:
        """The groups of frames start..stop of every sample."""
        return FrameGroups(self.rows, tuple(_cut(row, start, stop) for row in self.of))

    def held(self, frames: slice, per_sample: int) -> FrameGroups:
        """The groups of a part of all samples' frames laid end to end, as of one sample."""
        flat = [g for row in self.of for g in (row * per_sample if len(row) == 1 else row)]
        return FrameGroups(self.rows, (tuple(flat[frames]),))

    def runs(self, sample: int, frames: int) -> Iterator[tuple[slice, int]]:
        """Consecutive frames of one group: (which, group), over a sample's so many frames."""
        row = self.of[sample]
        if len(row) == 1:
            yield slice(0, frames), row[0]
            return
        start = 0
        for group, members in groupby(row):
            stop = start + len(list(members))
            yield slice(start, stop), group
            start = stop


def _cut(row: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    return row if len(row) == 1 else row[start:stop]
