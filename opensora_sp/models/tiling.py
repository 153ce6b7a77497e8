"""Tiles: a block's work is cut into as many tokens as the device has room for. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def ranges(length: int, tokens_each: int, tokens: int | None) -> Iterator[slice]:
    """0..length in parts of at most `tokens` tokens, but at least one index, in order.

    tokens_each: tokens of one index. tokens None: everything at once.
    """
    step = length if tokens is None else max(1, tokens // max(1, tokens_each))
    for start in range(0, length, max(1, step)):
        yield slice(start, min(start + step, length))


def tiles(shape: Sequence[int], tokens: int | None) -> Iterator[tuple[slice, slice]]:
    """Tiles (of T, of S) of [B,T,S,…] of at most `tokens` tokens of all samples, in order.

    Whole frames as long as one fits, parts of a frame below that.
    """
    batch, frames, patches = shape[:3]
    for some_frames in ranges(frames, batch * patches, tokens):
        for some_patches in ranges(patches, batch * (some_frames.stop - some_frames.start), tokens):
            yield some_frames, some_patches
