"""The pieces in which streams are exchanged. Pure arithmetic without torch: plans need it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class OverlapChunk:
    """Frames start..stop of one stream, exchanged in one go.

    `before` counts the frames of all pieces that come earlier in the loop: whoever splits the
    piece unevenly starts its longer parts there, so that the pieces' sum comes out even.
    """

    stream: int
    start: int
    stop: int
    before: int


def cut(shapes: Sequence[tuple[int, int]], chunks: int) -> list[list[OverlapChunk]]:
    """The pieces of each stream, given its (samples, frames): one each, or parts of a lone one."""
    pieces: list[list[OverlapChunk]] = []
    before = 0
    for s, (batch, frames) in enumerate(shapes):
        parts = max(1, min(chunks, frames)) if len(shapes) == 1 else 1
        edges = [frames * i // parts for i in range(parts + 1)]
        pieces.append([])
        for start, stop in pairwise(edges):
            pieces[-1].append(OverlapChunk(s, start, stop, before))
            before += batch * (stop - start)
    return pieces
