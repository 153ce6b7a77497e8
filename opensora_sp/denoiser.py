"""The one block loop of the program, and the guided velocity built on it.

Nothing here knows how many ranks there are: the loop takes a `Reshard` that moves activations
between patch sharding (everything but spatial attention) and frame sharding (spatial attention);
on one device that is `Local`, the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from opensora_sp.finite import require_finite
from opensora_sp.models.layers import KeyValue
from opensora_sp.models.stdit3 import (
    SpatialBlock,
    STDiT3,
    StepTables,
    patchify,
    real_cells,
    unpatchify,
)
from opensora_sp.runtime import Runtime
from opensora_sp.sizes import PATCH


@dataclass
class Stream:
    """Samples that advance together: x [B,T,S_local,C], their step tables, their text.

    text[2·i] belongs to spatial block i and text[2·i + 1] to temporal block i; each a list of B.
    """

    x: Tensor
    tables: StepTables
    text: Sequence[Sequence[KeyValue]]


@dataclass(frozen=True)
class Piece:
    """Frames start..stop of one stream, exchanged in one go.

    `before` counts the frames of all pieces that come earlier in the loop: whoever splits the
    piece unevenly starts its longer parts there, so that the pieces' sum comes out even.
    """

    stream: int
    start: int
    stop: int
    before: int


class Pending(Protocol):
    """A tensor on its way."""

    def wait(self) -> Tensor:
        """Block until it has arrived."""
        ...


class Reshard(Protocol):
    """Moves a piece between the two shardings; see `opensora_sp.parallel.exchange`."""

    def to_frames(self, h: Tensor, piece: Piece) -> Pending:
        """h [B,t,S_local,C], every frame of the piece → whole frames [F_local,S,C]."""
        ...

    def to_patches(self, attended: Tensor, piece: Piece, batch: int) -> Pending:
        """Whole frames [F_local,S,C] → [B,t,S_local,C], every frame of the piece."""
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

    def to_frames(self, h: Tensor, piece: Piece) -> Ready:
        """[B,t,S,C] → [B·t,S,C]."""
        return Ready(h.flatten(0, 1))

    def to_patches(self, attended: Tensor, piece: Piece, batch: int) -> Ready:
        """[B·t,S,C] → [B,t,S,C]."""
        return Ready(attended.unflatten(0, (batch, -1)))


class Blocking:
    """Waits for every exchange at once: what switching overlap off means."""

    def __init__(self, inner: Reshard) -> None:
        self.inner = inner

    def to_frames(self, h: Tensor, piece: Piece) -> Ready:
        """As the inner one, arrived."""
        return Ready(self.inner.to_frames(h, piece).wait())

    def to_patches(self, attended: Tensor, piece: Piece, batch: int) -> Ready:
        """As the inner one, arrived."""
        return Ready(self.inner.to_patches(attended, piece, batch).wait())


def cut(shapes: Sequence[tuple[int, int]], chunks: int) -> list[list[Piece]]:
    """The pieces of each stream, given its (samples, frames): one each, or parts of a lone one."""
    pieces: list[list[Piece]] = []
    before = 0
    for s, (batch, frames) in enumerate(shapes):
        parts = max(1, min(chunks, frames)) if len(shapes) == 1 else 1
        edges = [frames * i // parts for i in range(parts + 1)]
        pieces.append([])
        for start, stop in pairwise(edges):
            pieces[-1].append(Piece(s, start, stop, before))
            before += batch * (stop - start)
    return pieces


class _Attention:
    """The spatial attention of all streams, in three moves that the loop interleaves."""

    def __init__(self, streams: list[Stream], reshard: Reshard, runtime: Runtime) -> None:
        self.streams = streams
        self.reshard = reshard if runtime.overlap else Blocking(reshard)
        self.pieces = cut([(s.x.shape[0], s.x.shape[1]) for s in streams], runtime.chunks)

    def send(self, block: SpatialBlock, s: int) -> list[Pending]:
        """Start stream s on its way to frame sharding."""
        stream = self.streams[s]
        return [
            self.reshard.to_frames(
                block.attn_in(stream.x[:, p.start : p.stop], stream.tables.frames(p.start, p.stop)),
                p,
            )
            for p in self.pieces[s]
        ]

    def attend(self, block: SpatialBlock, s: int, arriving: list[Pending]) -> list[Pending]:
        """Attend within whole frames as they arrive and start them on their way back."""
        batch = self.streams[s].x.shape[0]
        return [
            self.reshard.to_patches(block.attend(pending.wait()), piece, batch)
            for piece, pending in zip(self.pieces[s], arriving, strict=True)
        ]

    def finish(
        self, block: SpatialBlock, s: int, returning: list[Pending], text: Sequence[KeyValue]
    ) -> Tensor:
        """Finish the spatial block on each piece as it returns → x [B,T,S_local,C]."""
        stream = self.streams[s]
        parts = [
            block.rest(
                stream.x[:, p.start : p.stop],
                pending.wait(),
                stream.tables.frames(p.start, p.stop),
                text,
            )
            for p, pending in zip(self.pieces[s], returning, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def run_blocks(
    model: STDiT3,
    streams: list[Stream],
    reshard: Reshard,
    runtime: Runtime | None = None,
    *,
    equal_inputs: bool = False,
) -> list[Tensor]:
    """All blocks over all streams → each stream's final x.

    equal_inputs: every stream enters with the same x and tables (the two guidance halves, which
    differ in their text only), so the first spatial attention may be computed once for all.

    The collectives run in the order of this code, which is the same on every rank.
    """
    runtime = runtime or Runtime()
    rotary = model.rotary(streams[0].x.shape[1])
    attention = _Attention(streams, reshard, runtime)
    everyone = list(range(len(streams)))
    share = equal_inputs and runtime.share_first
    pairs = model.pairs

    arriving = {s: attention.send(pairs[0][0], s) for s in (everyone[:1] if share else everyone)}
    for i, (spatial, temporal) in enumerate(pairs):
        returning = {s: attention.attend(spatial, s, arriving[s]) for s in arriving}
        if len(returning) < len(streams):
            once: list[Pending] = [Ready(pending.wait()) for pending in returning[0]]
            returning = dict.fromkeys(everyone, once)
        for s, stream in enumerate(streams):
            x = attention.finish(spatial, s, returning[s], stream.text[2 * i])
            if runtime.check_blocks:
                require_finite(x, f"the output of spatial block {i} (guidance stream {s})")
            stream.x = temporal(x, stream.tables, stream.text[2 * i + 1], rotary)
            if runtime.check_blocks:
                require_finite(stream.x, f"the output of temporal block {i} (guidance stream {s})")
            if i + 1 < len(pairs):
                # Sent before the next stream is finished here: that is what hides the exchange.
                arriving[s] = attention.send(pairs[i + 1][0], s)
    return [stream.x for stream in streams]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank does of a video, handed in by `opensora_sp.parallel.parallelize`.

    reshard: moves activations for the spatial attention.
    patches: the patches of every frame that this rank holds.
    halves: the guidance halves it computes when a request is guided; 0 is the conditional one.
    swap: gives the other half's velocity for this one's, where they are on different ranks.
    gather: patch shards [B,T,S_local,c] → [B,T,S,c] on the leading rank, None elsewhere.
    """

    reshard: Reshard
    patches: slice
    halves: tuple[int, ...]
    swap: Callable[[Tensor], Pending] | None
    gather: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the velocity depends on besides the latents, per sample: the same on every rank.

    tokens: B × [L_b, caption_channels], the real tokens only; masks [B,L] of 0/1, where L is the
    padded length: the unconditional half sees the null embedding under the same mask.
    height, width: pixels as in the size table; fps: as given to the model.
    """

    tokens: Sequence[Tensor]
    masks: Tensor
    height: int
    width: int
    fps: float
    cfg_scale: float


class Denoiser:
    """The guided velocity on one rank's shard. Holds weights it does not own; mutates nothing."""

    def __init__(
        self, model: STDiT3, size: tuple[int, int], share: Share, runtime: Runtime
    ) -> None:
        self.model, self.size, self.runtime = model, size, runtime
        self.share = share

    def shard(self, z: Tensor) -> Tensor:
        """Latents [B,4,T,H,W] → this rank's patches [B,T,S_local,16] on the model's device."""
        return patchify(z)[:, :, self.share.patches].contiguous().to(self.model.device)

    def gather(self, patches: Tensor) -> Tensor | None:
        """Patches [B,T,S_local,16] → latents [B,4,T,H,W] on the leading rank, None elsewhere."""
        whole = self.share.gather(patches)
        return None if whole is None else unpatchify(whole, self.size)

    def positions(self, height: float, width: float) -> Tensor:
        """Positions [S_local,C] of this rank's patches, for a request of these pixels."""
        rows, columns = (-(-side // PATCH) for side in self.size)
        return self.model.positions((rows, columns), height, width)[self.share.patches]

    def prepare(self, conditions: Conditions) -> Velocity:
        """Everything that is computed once per video: positions, text K/V, padding."""
        return Velocity(self, conditions)


class Velocity:
    """velocity(z, t, kept) for `opensora_sp.sampling.sample`, on patch shards."""

    def __init__(self, denoiser: Denoiser, conditions: Conditions) -> None:
        model, share = denoiser.model, denoiser.share
        self._model, self._share, self._runtime = model, share, denoiser.runtime
        self._positions = denoiser.positions(conditions.height, conditions.width)
        self._conditions = conditions
        guided = conditions.cfg_scale != 1
        self._halves = share.halves if guided else (0,)
        self._swap = share.swap if guided else None
        self._text = {
            half: model.text_kv(
                model.null_tokens(conditions.masks) if half else list(conditions.tokens)
            )
            for half in self._halves
        }
        padding = ~real_cells(denoiser.size, model.config.in_channels)[share.patches]
        self._padding = padding.to(model.device) if bool(padding.any()) else None

    def __call__(self, z: Tensor, t: float, generate: Tensor | None = None) -> Tensor:
        """z [B,T,S_local,16], t in 0..1000, generate: bool [B,T], frames not kept → velocity.

        Float32, of z's shape; padded cells have velocity zero, or they would drift into the
        picture at the next step.
        """
        velocities = [v.float() for v in self._all_halves(z, t, generate)]
        velocity = velocities[0]
        if len(velocities) == 2:
            conditional, unconditional = velocities
            velocity = torch.lerp(unconditional, conditional, self._conditions.cfg_scale)
        if self._padding is not None:
            velocity = velocity.masked_fill(self._padding, 0.0)
        return velocity

    def _all_halves(self, z: Tensor, t: float, generate: Tensor | None) -> list[Tensor]:
        """The halves' velocities, conditional first, in the run's dtype."""
        mine = self._own_halves(z, t, generate)
        if self._swap is None:
            return mine
        other = self._swap(mine[0]).wait()
        return [mine[0], other] if self._halves == (0,) else [other, mine[0]]

    def _own_halves(self, z: Tensor, t: float, generate: Tensor | None) -> list[Tensor]:
        model, batch = self._model, z.shape[0]
        x = model.embed(z, self._positions)
        fps = torch.full((batch,), float(self._conditions.fps))
        tables = model.tables(torch.full((batch,), t), fps, generate)
        streams = [Stream(x, tables, self._text[half]) for half in self._halves]
        together = [streams] if not self._runtime.serial_guidance else [[s] for s in streams]
        outputs = [
            out
            for group in together
            for out in run_blocks(
                model, group, self._share.reshard, self._runtime, equal_inputs=len(group) > 1
            )
        ]
        return [model.head(out, tables) for out in outputs]
