"""Overlap chunks: the parts in which streams are exchanged. Arithmetic without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class OverlapChunk:
    """Frames start..stop of one stream, exchanged by one all-to-all.

    before: frames of all chunks that come earlier in the loop. An uneven split of this chunk starts
    its longer parts there, so that the sum over all chunks is as even as possible.
    """

    stream: int
    start: int
    stop: int
    before: int


def cut(shapes: Sequence[tuple[int, int]], chunks: int) -> list[list[OverlapChunk]]:
    """Overlap chunks of streams of these (samples, frames): one each, `chunks` of a lone one."""
    cuts: list[list[OverlapChunk]] = []
    before = 0
    for s, (batch, frames) in enumerate(shapes):
        parts = max(1, min(chunks, frames)) if len(shapes) == 1 else 1
        edges = [frames * i // parts for i in range(parts + 1)]
        cuts.append([])
        for start, stop in pairwise(edges):
            cuts[-1].append(OverlapChunk(s, start, stop, before))
            before += batch * (stop - start)
    return cuts
