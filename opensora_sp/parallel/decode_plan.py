"""Which rank decodes which frames of a clip, by rounds. Arithmetic that every rank does alike.

The 17-frame chunks of a video are independent of each other, and once a chunk has been through the
temporal VAE its frames are too, in the groups that the spatial VAE takes at once. Whole chunks are
dealt out first. What is left at the end, at most one chunk a rank, is cut between groups of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A published chunk's temporal decoding costs as much as decoding this many frames spatially
# (34.5 against 9.1 TFLOP a frame at 720p): cutting a chunk in two means paying for it twice.
TEMPORAL_FRAMES = 4


@dataclass(frozen=True)
class Part:
    """Frames start..stop of one chunk, both on the borders of groups."""

    chunk: int
    start: int
    stop: int

    @property
    def frames(self) -> int:
        """How many there are."""
        return self.stop - self.start


Unit = tuple[Part, ...]  # what one rank decodes in one round; nothing where it is empty


def plan_decode(frames: Sequence[int], ranks: int, group: int) -> list[tuple[Unit, ...]]:
    """Rounds of one unit per rank, in the order of the video: first by round, then by rank.

    frames: of each chunk. group: frames that the spatial VAE takes at once.
    """
    rounds: list[tuple[Unit, ...]] = []
    whole = 0
    while len(frames) - whole > ranks:
        rounds.append(
            tuple((Part(c, 0, frames[c]),) for c in range(whole, whole + ranks)),
        )
        whole += ranks
    groups = [
        Part(chunk, start, min(start + group, frames[chunk]))
        for chunk in range(whole, len(frames))
        for start in range(0, frames[chunk], group)
    ]
    return [*rounds, _cut(groups, ranks)]


def has_several_groups(frames: int, chunk: int, group: int) -> bool:
    """Whether a video of so many frames can be shared: of one group the others would have nothing.

    chunk: frames of a chunk. group: frames that the spatial VAE takes at once, within a chunk.
    """
    return frames > min(chunk, group)


def decoded_frames(rounds: Sequence[Sequence[Unit]]) -> list[int]:
    """Frames that each rank decodes in all."""
    return [
        sum(part.frames for units in rounds for part in units[rank])
        for rank in range(len(rounds[0]))
    ]


def _cut(groups: Sequence[Part], ranks: int) -> tuple[Unit, ...]:
    """The groups as one run per rank, such that the most that any of them costs is least."""
    low, high = 1, sum(part.frames + TEMPORAL_FRAMES for part in groups)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(groups, middle)) <= ranks:
            high = middle
        else:
            low = middle + 1
    units = [_merge(run) for run in _fill(groups, low)]
    return (*units, *[()] * (ranks - len(units)))


def _fill(groups: Sequence[Part], limit: int) -> list[list[Part]]:
    """Runs of groups that each cost at most `limit`, or are a single group."""
    runs: list[list[Part]] = []
    cost = 0
    for part in groups:
        fresh = not runs or runs[-1][-1].chunk != part.chunk
        more = part.frames + TEMPORAL_FRAMES * fresh
        if not runs or cost + more > limit:
            runs.append([])
            cost, more = 0, part.frames + TEMPORAL_FRAMES
        runs[-1].append(part)
        cost += more
    return runs


def _merge(run: Sequence[Part]) -> Unit:
    """Neighbouring groups of one chunk as one part."""
    merged: list[Part] = []
    for part in run:
        if merged and merged[-1].chunk == part.chunk:
            merged[-1] = Part(part.chunk, merged[-1].start, part.stop)
        else:
            merged.append(part)
    return tuple(merged)
