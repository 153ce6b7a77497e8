"""The choices of a run that change its speed and memory, never its result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Choices for the block loop.

    serial_guidance: one guidance half after the other (half the activations, nothing to share)
        instead of both block by block.
    overlap: exchange one piece of work while another computes.
    chunks: parts of T that a lone stream is cut into, so that there is something to overlap with.
    share_first: compute the first spatial self-attention once for both guidance halves, whose
        inputs are still equal there.
    check_blocks: look for NaN and infinity after every block, and name the first one.
    """

    serial_guidance: bool = False
    overlap: bool = True
    chunks: int = 1
    share_first: bool = True
    check_blocks: bool = False
