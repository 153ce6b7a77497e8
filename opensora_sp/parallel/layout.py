"""Which rank holds which patches and which frames. Arithmetic that every rank does alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from opensora_sp.base.geometry import patch_grid


def split(total: int, parts: int, start: int = 0) -> tuple[int, ...]:
    """`total` in `parts` of floor or ceil; the longer ones at start, start + 1, … modulo parts."""
    return tuple(share(total, parts, part, start) for part in range(parts))


def share(total: int, parts: int, part: int, start: int = 0) -> int:
    """One part of `split`, without the others."""
    base, longer = divmod(total, parts)
    return base + ((part - start) % parts < longer)


def bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of each part laid end to end."""
    stops = list(accumulate(sizes))
    return [(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one video of T latent frames of H×W cells is shared by `ranks` ranks.

    Between spatial attentions a rank holds its `patches` of every frame; around them it holds
    its `frames` whole. Splits are uneven where they must be and parts may be empty.
    """

    frames: int
    size: tuple[int, int]
    ranks: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; odd sides count a padded one."""
        return patch_grid(*self.size)

    @property
    def patch_count(self) -> int:
        """S, the patches of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_split(self) -> tuple[int, ...]:
        """Patches per rank, contiguous in row-major order."""
        return split(self.patch_count, self.ranks)

    def patches(self, rank: int) -> slice:
        """The patches that a rank holds."""
        return slice(*bounds(self.patch_split)[rank])

    def frame_split(self, count: int, before: int) -> tuple[int, ...]:
        """Frames per rank for an overlap chunk of `count` frames after `before` others in the loop.

        The longer parts start where the previous chunk's stopped. So the chunks are independent,
        and their sum is within one frame of even.
        """
        return split(count, self.ranks, before % self.ranks)
