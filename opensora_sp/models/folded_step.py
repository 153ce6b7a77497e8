"""The folded step: a step's modulation and gates are in the weights, not in passes over the tokens.

It is equal to `PlainStep` in algebra and differs in rounding. It is for inference, and for steps
with few groups of frames; everything else is handed to the plain one. Every operation is one that
all backends have, except where `opensora_sp.models.kernels.folded` has a better one for a device.

On a CPU that does not compute in half precision a segment is in float32 throughout. What lies
between segments is in the model's own format everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.models.compiler import Run, directly
from opensora_sp.models.folded_weights import FoldBuffers, FoldedWeights, fold
from opensora_sp.models.frame_groups import FrameGroups
from opensora_sp.models.kernels.cpu_half import wide
from opensora_sp.models.kernels.folded import (
    accumulate_,
    head_norm,
    head_norm_,
    linear_gelu,
    rotation_matrices,
    turn,
    turn_pairs_,
    turns_pairs,
)
from opensora_sp.models.kernels.fused import norm_rotary_in_one_, residual_norm_
from opensora_sp.models.kernels.reference import attend
from opensora_sp.models.layers import KeyValue, RMSNorm
from opensora_sp.models.stdit3 import Block, SpatialBlock, StepTables, TemporalBlock
from opensora_sp.models.step_kernels import PlainStep
from opensora_sp.models.tiling import ranges, tiles

# Each group is another set of folded weights. A step of one video has two at most: the frames that
# it generates, and those that it keeps.
_MOST_FOLDS = 2


@dataclass
class _Folded:
    """One block's weights, folded for the groups of one step's tables."""

    block: Block
    rows: Tensor
    weights: list[FoldedWeights]


class FoldedStep:
    """The segments of one step's blocks from folded weights. tokens, run: as for `PlainStep`.

    One spatial and one temporal block are folded at a time, when the first of their segments runs:
    with layer offload their weights are on the device then. The memory is used again for the next.
    """

    def __init__(self, tokens: int | None = None, run: Run = directly) -> None:
        self.tokens, self._run, self._plain = tokens, run, PlainStep(tokens, run)
        self._folded: dict[type[Block], _Folded] = {}
        self._buffers: dict[tuple[type[Block], int], FoldBuffers] = {}
        self._turns: tuple[Tensor, Tensor] | None = None  # rotary cosines and their matrices

    def attn_in(self, block: SpatialBlock, x: Tensor, tables: StepTables) -> Tensor:
        """LayerNorm alone."""
        if not _folds(tables.groups):
            return self._plain.attn_in(block, x, tables)
        return _layer_norm(x)

    def attend(self, block: SpatialBlock, h: Tensor, groups: FrameGroups | None) -> Tensor:
        """Some frames of one group at a time, written over their input."""
        if groups is None or not _folds(groups):
            return self._plain.attend(block, h, groups)
        if h.numel() == 0:
            return h
        weights = self._weights(block, groups)
        parts = [
            (slice(run.start + part.start, run.start + part.stop), group)
            for run, group in groups.runs(0, h.shape[0])
            for part in ranges(run.stop - run.start, h.shape[1], self.tokens)
        ]
        if len(parts) == 1:
            return _within_frames(block, h, weights[parts[0][1]], self._run)
        for frames, group in parts:
            h[frames] = _within_frames(block, h[frames], weights[group], self._run)
        return h

    def rest(
        self,
        block: Block,
        x: Tensor,
        attended: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
    ) -> Tensor:
        """Tile by tile, each sample and each group of frames by itself."""
        if tables.groups is None or not _folds(tables.groups):
            return self._plain.rest(block, x, attended, tables, text)
        weights = self._weights(block, tables.groups)
        for t, c in tiles(x.shape, self.tokens):
            for b, frames, group in _by_group(tables.groups, x, t):
                self._after_attention(
                    block, x[b, frames, c], weights[group], text[b], attended[b, frames, c]
                )
        return x

    def along_time(
        self,
        block: TemporalBlock,
        x: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The attention in tiles of positions, what follows it in tiles of frames."""
        if tables.groups is None or not _folds(tables.groups):
            return self._plain.along_time(block, x, tables, text, rotary)
        weights = self._weights(block, tables.groups)

        @cache
        def matrices() -> tuple[Tensor, Tensor]:
            return self._matrices(block, rotary)

        for b in range(x.shape[0]):
            runs = list(tables.groups.runs(b, x.shape[1]))
            for c in ranges(x.shape[2], x.shape[1], self.tokens):
                tile = wide(x[b, :, c])
                attended = _along_time(block, tile, runs, weights, rotary, matrices, self._run)
                for frames, group in runs:
                    accumulate_(tile[frames], attended[frames], weights[group].proj)
                _store(tile, x[b, :, c])
        for t, c in tiles(x.shape, self.tokens):
            for b, frames, group in _by_group(tables.groups, x, t):
                self._after_attention(block, x[b, frames, c], weights[group], text[b])
        return x

    def _after_attention(
        self,
        block: Block,
        x: Tensor,
        folded: FoldedWeights,
        text: KeyValue,
        attended: Tensor | None = None,
    ) -> None:
        """Projection, cross-attention and MLP, added into x [F,S,C].

        attended: of the same shape; None where it was added already, without its bias.
        """
        residual = wide(x)
        if attended is not None:
            accumulate_(residual, attended, folded.proj)
        _cross_attention(block, residual, folded, text)
        _mlp(residual, folded, self._run)
        _store(residual, x)

    def _weights(self, block: Block, groups: FrameGroups) -> list[FoldedWeights]:
        """A block's weights folded for each group; made when another block or step had its turn."""
        kind = type(block)
        made = self._folded.get(kind)
        if made is None or made.block is not block or made.rows is not groups.rows:
            weights = []
            for group, row in enumerate(groups.rows):
                if (kind, group) not in self._buffers:
                    self._buffers[kind, group] = FoldBuffers(block)
                weights.append(fold(block, row, self._buffers[kind, group]))
            made = self._folded[kind] = _Folded(block, groups.rows, weights)
        return made.weights

    def _matrices(
        self, block: TemporalBlock, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Norm weight and rotation of each frame as one matrix, for queries and for keys."""
        if self._turns is None or self._turns[0] is not rotary[0]:
            self._turns = (rotary[0], rotation_matrices(rotary))
        norms = _norm_weights(block)
        turns, dtype = self._turns[1], wide(block.scale_shift_table).dtype
        if norms is None:
            return turns.to(dtype), turns.to(dtype)
        q, k = (turns * weight.float()[:, None] for weight in norms)
        return q.to(dtype), k.to(dtype)


def _folds(groups: FrameGroups | None) -> bool:
    """Whether a step with these groups is computed from folded weights."""
    return groups is not None and len(groups.rows) <= _MOST_FOLDS and not torch.is_grad_enabled()


def _by_group(groups: FrameGroups, x: Tensor, t: slice) -> list[tuple[int, slice, int]]:
    """(sample, frames, group) of the frames t of x [B,T,S,C]; none where x is empty."""
    if x.numel() == 0:
        return []
    part = groups.frames(t.start, t.stop)
    return [
        (b, slice(t.start + run.start, t.start + run.stop), group)
        for b in range(x.shape[0])
        for run, group in part.runs(b, t.stop - t.start)
    ]


def _store(residual: Tensor, x: Tensor) -> None:
    """Put a widened part of the residual stream back where it came from."""
    if residual.dtype != x.dtype:
        x.copy_(residual)


def _layer_norm(x: Tensor) -> Tensor:
    """Of x [B,T,S,C] or [T,S,C], contiguous."""
    if x.is_contiguous():
        return F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    # torch copies a tile before it reads it; a fused kernel reads it where it lies.
    return residual_norm_(x) if x.ndim == 4 else residual_norm_(x[None])[0]


def _norm_weights(block: Block) -> tuple[Tensor, Tensor] | None:
    """The weights of the queries' and the keys' norm; None in a model without these norms."""
    q_norm, k_norm = block.attn.q_norm, block.attn.k_norm
    if isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
        return q_norm.weight, k_norm.weight
    return None


def _within_frames(block: SpatialBlock, h: Tensor, folded: FoldedWeights, run: Run) -> Tensor:
    """Every patch attends to its frame: normed h [F,S,C] → [F,S,C], before the projection."""
    norms = _norm_weights(block)
    q, k, v = run(_heads_in_frames, wide(h), folded.qkv, folded.qkv_bias, norms, block.attn.heads)
    out = attend(*(part.transpose(1, 2) for part in (q, k, v)))
    return out.transpose(1, 2).flatten(2).to(h.dtype)


def _heads_in_frames(
    h: Tensor, weight: Tensor, bias: Tensor, norms: tuple[Tensor, Tensor] | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed h [F,S,C] → q, k, v [F,S,H,D], whose products are those of normed q and k."""
    q, k, v = F.linear(h, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3)  # views of one
    if norms is not None and not norm_rotary_in_one_(q, k, *norms):
        # Only the product of a query and a key counts, so the query has both weights.
        q, k = head_norm_(q, norms[0] * norms[1]), head_norm_(k)
    return q, k, v


def _along_time(
    block: TemporalBlock,
    x: Tensor,
    runs: Sequence[tuple[slice, int]],
    weights: Sequence[FoldedWeights],
    rotary: tuple[Tensor, Tensor],
    matrices: Callable[[], tuple[Tensor, Tensor]],
    run: Run,
) -> Tensor:
    """Every position attends to itself in all frames: wide x [T,S,C] → [T,S,C], not yet projected.

    matrices: of `FoldedStep._matrices`, where no kernel computes norm and rotation in one.
    """
    if x.numel() == 0:
        return x
    h = _layer_norm(x)
    parts = [F.linear(h[some], weights[group].qkv, weights[group].qkv_bias) for some, group in runs]
    del h
    qkv = parts[0] if len(parts) == 1 else torch.cat(parts)
    del parts
    q, k, v = qkv.unflatten(-1, (3, block.attn.heads, -1)).unbind(-3)  # views [T,S,H,D]
    del qkv
    norms = _norm_weights(block)
    if norms is None or not norm_rotary_in_one_(q, k, *norms, rotary):
        # A compiler makes graphs of real numbers.
        if run is directly and turns_pairs(q):
            weights_of = norms or (None, None)
            q, k = (_in_pairs(*each, rotary) for each in zip((q, k), weights_of, strict=True))
        else:
            q, k = (
                run(_turned, x, turns, norms is not None)
                for x, turns in zip((q, k), matrices(), strict=True)
            )
    out = attend(*(part.permute(1, 2, 0, 3) for part in (q, k, v)))  # [S,H,T,D]
    return out.permute(2, 0, 1, 3).flatten(2)


def _in_pairs(x: Tensor, weight: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """As `_turned`, with the norm's weight and the rotary tables themselves."""
    heads = x.contiguous() if weight is None else head_norm(x).mul_(weight)
    return turn_pairs_(heads, rotary)


def _turned(x: Tensor, matrices: Tensor, normed: bool) -> Tensor:
    """Queries or keys [T,S,H,D], normed where the model does so, by the matrix of their frame."""
    return turn(head_norm(x) if normed else x.contiguous(), matrices)


def _cross_attention(block: Block, x: Tensor, folded: FoldedWeights, text: KeyValue) -> None:
    cross = block.cross_attn
    q = F.linear(x, wide(cross.q_linear.weight), folded.cross_q_bias)
    q = q.unflatten(-1, (cross.heads, -1)).flatten(0, 1).transpose(0, 1)[None]  # [1,H,F·S,D]
    seen = attend(q, *(wide(part) for part in text))[0].transpose(0, 1).flatten(1).view(x.shape)
    del q
    accumulate_(x, seen, cross.proj.weight)


def _mlp(x: Tensor, folded: FoldedWeights, run: Run) -> None:
    # Products that add into the residual, and the one that ends in GELU, are one call of a library
    # each. A compiler would make two passes of them.
    hidden = linear_gelu(run(_to_mlp, x, folded.before_mlp), folded.fc1, folded.fc1_bias)
    accumulate_(x, hidden, folded.fc2)
    x += folded.fc2_bias


def _to_mlp(x: Tensor, bias: Tensor) -> Tensor:
    """The biases that are pending, added into x [F,S,C], and the MLP's input."""
    return residual_norm_(x[None], bias=bias)[0]
