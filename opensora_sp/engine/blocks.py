"""The one loop over the blocks of the transformer, and the exchange inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opensora_sp.base.finite import require_finite
from opensora_sp.models.layers import KeyValue
from opensora_sp.models.offload import LayerOffload
from opensora_sp.models.stdit3 import (
    SpatialBlock,
    STDiT3,
    StepTables,
    TemporalBlock,
)
from opensora_sp.models.step_kernels import PlainStep, StepKernels
from opensora_sp.parallel.overlap import OverlapChunk, cut
from opensora_sp.request.runtime import Runtime


@dataclass
class Stream:
    """Samples that advance together: x [B,T,S_local,C], their step tables, their text.

    text[2·i] belongs to spatial block i and text[2·i + 1] to temporal block i; each a list of B.
    """

    x: Tensor
    tables: StepTables
    text: Sequence[Sequence[KeyValue]]


class Pending(Protocol):
    """A tensor on its way."""

    def wait(self) -> Tensor:
        """Block until it has arrived."""
        ...


class Reshard(Protocol):
    """Moves an overlap chunk between the two shardings; see `opensora_sp.parallel.exchange`."""

    def to_frames(self, h: Tensor, chunk: OverlapChunk) -> Pending:
        """h [B,t,S_local,C], every frame of the chunk → whole frames [F_local,S,C]."""
        ...

    def to_patches(self, attended: Tensor, chunk: OverlapChunk, batch: int) -> Pending:
        """Whole frames [F_local,S,C] → [B,t,S_local,C], every frame of the chunk."""
        ...

    def held(self, chunk: OverlapChunk, batch: int) -> slice:
        """Which frames of the chunk's B·t, flattened, this rank holds as whole frames."""
        ...


@dataclass(frozen=True)
class Ready:
    """A tensor that is already here."""

    tensor: Tensor

    def wait(self) -> Tensor:
        """The tensor."""
        return self.tensor


class Local:
    """The identity: this rank holds all patches of all frames."""

    def to_frames(self, h: Tensor, chunk: OverlapChunk) -> Ready:
        """[B,t,S,C] → [B·t,S,C]."""
        return Ready(h.flatten(0, 1))

    def to_patches(self, attended: Tensor, chunk: OverlapChunk, batch: int) -> Ready:
        """[B·t,S,C] → [B,t,S,C]."""
        return Ready(attended.unflatten(0, (batch, -1)))

    def held(self, chunk: OverlapChunk, batch: int) -> slice:
        """All of them."""
        return slice(0, batch * (chunk.stop - chunk.start))


class Unsent:
    """Sends nothing: what would arrive is made up, in the shapes in which it would.

    patches, local: of a frame, and of these on this rank. made_up(*shape) makes a tensor.
    """

    def __init__(
        self, inner: Reshard, patches: int, local: int, made_up: Callable[..., Tensor]
    ) -> None:
        self.inner, self.patches, self.local, self.made_up = inner, patches, local, made_up

    def to_frames(self, h: Tensor, chunk: OverlapChunk) -> Ready:
        """As the inner one."""
        held = self.held(chunk, h.shape[0])
        return Ready(self.made_up(held.stop - held.start, self.patches, h.shape[-1]))

    def to_patches(self, attended: Tensor, chunk: OverlapChunk, batch: int) -> Ready:
        """As the inner one."""
        frames = chunk.stop - chunk.start
        return Ready(self.made_up(batch, frames, self.local, attended.shape[-1]))

    def held(self, chunk: OverlapChunk, batch: int) -> slice:
        """As the inner one."""
        return self.inner.held(chunk, batch)


class Blocking:
    """Waits for every exchange at once: what switching overlap off means."""

    def __init__(self, inner: Reshard) -> None:
        self.inner = inner

    def to_frames(self, h: Tensor, chunk: OverlapChunk) -> Ready:
        """As the inner one, arrived."""
        return Ready(self.inner.to_frames(h, chunk).wait())

    def to_patches(self, attended: Tensor, chunk: OverlapChunk, batch: int) -> Ready:
        """As the inner one, arrived."""
        return Ready(self.inner.to_patches(attended, chunk, batch).wait())

    def held(self, chunk: OverlapChunk, batch: int) -> slice:
        """As the inner one."""
        return self.inner.held(chunk, batch)


class _Attention:
    """The spatial attention of all streams, in three phases that the loop interleaves."""

    def __init__(
        self, streams: list[Stream], reshard: Reshard, runtime: Runtime, kernels: StepKernels
    ) -> None:
        self.streams, self.kernels = streams, kernels
        self.reshard = reshard if runtime.overlap else Blocking(reshard)
        self.chunks = cut([(s.x.shape[0], s.x.shape[1]) for s in streams], runtime.chunks)

    def send(self, block: SpatialBlock, s: int) -> list[Pending]:
        """Start stream s on its way to frame sharding."""
        stream = self.streams[s]
        return [
            self.reshard.to_frames(
                self.kernels.attn_in(
                    block,
                    stream.x[:, p.start : p.stop],
                    stream.tables.frames(p.start, p.stop),
                ),
                p,
            )
            for p in self.chunks[s]
        ]

    def attend(self, block: SpatialBlock, s: int, arriving: list[Pending]) -> list[Pending]:
        """Attend within whole frames as they arrive and start them on their way back."""
        stream = self.streams[s]
        batch = stream.x.shape[0]
        leaving = []
        for p, pending in zip(self.chunks[s], arriving, strict=True):
            groups = stream.tables.frames(p.start, p.stop).groups
            if groups is not None:
                groups = groups.held(self.reshard.held(p, batch), p.stop - p.start)
            h = pending.wait()  # whole frames [F,S,C]; nobody else's, so they are overwritten
            h = self.kernels.attend(block, h, groups)
            leaving.append(self.reshard.to_patches(h, p, batch))
        return leaving

    def finish(
        self, block: SpatialBlock, s: int, returning: list[Pending], text: Sequence[KeyValue]
    ) -> Tensor:
        """Finish the spatial block on each chunk as it returns → x [B,T,S_local,C]."""
        stream = self.streams[s]
        parts = []
        for p, pending in zip(self.chunks[s], returning, strict=True):
            x, tables = stream.x[:, p.start : p.stop], stream.tables.frames(p.start, p.stop)
            parts.append(self.kernels.rest(block, x, pending.wait(), tables, text))
        if not torch.is_grad_enabled():
            return stream.x  # where it lies
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def along_time(
        self, block: TemporalBlock, s: int, text: Sequence[KeyValue], rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The temporal block → x [B,T,S_local,C]; local."""
        stream = self.streams[s]
        return self.kernels.along_time(block, stream.x, stream.tables, text, rotary)


def run_blocks(
    model: STDiT3,
    streams: list[Stream],
    reshard: Reshard,
    runtime: Runtime | None = None,
    *,
    equal_inputs: bool = False,
    layers: LayerOffload | None = None,
    kernels: StepKernels | None = None,
    pairs: int | None = None,
) -> list[Tensor]:
    """All blocks over all streams → each stream's final x.

    equal_inputs: every stream enters with the same x and tables (the two CFG branches, which
    differ in their text only), so the first spatial attention may be computed once for all.
    layers: the model's blocks, where they are not all on its device.
    kernels: how a block's segments are computed; by default as `PlainStep`.
    pairs: only so many pairs of blocks, from the first on.

    The collectives run in the order of this code, which is the same on every rank. Without
    gradients each stream's x is updated where it lies, so streams must not share it.
    """
    runtime = runtime or Runtime()
    rotary = model.rotary(streams[0].x.shape[1])
    kernels = kernels or PlainStep(runtime.tokens)
    attention = _Attention(streams, reshard, runtime, kernels)
    everyone = list(range(len(streams)))
    arriving: dict[int, list[Pending]] = {}

    for i, (spatial, temporal), following in _with_next(layers or model.layers(), pairs):
        if not arriving:
            share = i == 0 and equal_inputs and runtime.share_first
            arriving = {s: attention.send(spatial, s) for s in everyone[: 1 if share else None]}
        returning = {s: attention.attend(spatial, s, arriving.pop(s)) for s in list(arriving)}
        if len(returning) < len(streams):
            returning = dict.fromkeys(everyone, _arrived(returning[0]))
        for s, stream in enumerate(streams):
            stream.x = attention.finish(spatial, s, returning.pop(s), stream.text[2 * i])
            if runtime.check_blocks:
                require_finite(stream.x, f"the output of spatial block {i} (guidance stream {s})")
            stream.x = attention.along_time(temporal, s, stream.text[2 * i + 1], rotary)
            if runtime.check_blocks:
                require_finite(stream.x, f"the output of temporal block {i} (guidance stream {s})")
            if following is not None:
                # Sent before the next stream is finished here: that is what hides the exchange.
                arriving[s] = attention.send(following[0], s)
    return [stream.x for stream in streams]


def _arrived(pending: list[Pending]) -> list[Pending]:
    """Waited for once, to be read by several."""
    return [Ready(part.wait()) for part in pending]


Pair = tuple[SpatialBlock, TemporalBlock]


def _with_next(
    layers: LayerOffload, pairs: int | None = None
) -> Iterator[tuple[int, Pair, Pair | None]]:
    """(number, pair of blocks, the pair after it or None); both are on the device."""
    count = len(layers) if pairs is None else min(pairs, len(layers))
    # Asked for more than there are, the layers would take back the last one before its use.
    with closing(iter(layers)) as passing:
        here: Any = next(passing)
        for number in range(count):
            following: Any = next(passing) if number + 1 < count else None
            yield number, here, following
            here = following
