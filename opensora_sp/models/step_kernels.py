"""How the segments of a block are computed: what the block loop asks, and the plain answer.

The block loop in `opensora_sp.engine.blocks` knows the order of the segments and the exchange
between them. A `StepKernels` knows their arithmetic. `PlainStep` calls the modules as they are
written; `opensora_sp.models.folded_step.FoldedStep` computes the same from folded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from opensora_sp.models.compiler import Run, directly
from opensora_sp.models.frame_groups import FrameGroups
from opensora_sp.models.layers import KeyValue
from opensora_sp.models.stdit3 import Block, SpatialBlock, StepTables, TemporalBlock
from opensora_sp.models.tiling import ranges, tiles


class StepKernels(Protocol):
    """The segments of one step's blocks. Without gradients x is updated where it lies."""

    def attn_in(self, block: SpatialBlock, x: Tensor, tables: StepTables) -> Tensor:
        """x [B,t,S_local,C] and the tables of its frames → what is sent to `attend`, same shape."""
        ...

    def attend(self, block: SpatialBlock, h: Tensor, groups: FrameGroups | None) -> Tensor:
        """Whole frames h [F,S,C], which may be overwritten → attended [F,S,C]; F may be 0.

        groups: of these frames, as of one sample; None where the tables do not say.
        """
        ...

    def rest(
        self,
        block: Block,
        x: Tensor,
        attended: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
    ) -> Tensor:
        """Everything after the self-attention: x and attended [B,t,S_local,C] → x."""
        ...

    def along_time(
        self,
        block: TemporalBlock,
        x: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """A whole temporal block: x [B,T,S_local,C] with all frames → x."""
        ...


class PlainStep:
    """Each segment as its module computes it. tokens: computed at once; None is all of them.

    run: computes what is between the attentions; see `opensora_sp.models.compiler`.
    """

    def __init__(self, tokens: int | None = None, run: Run = directly) -> None:
        self.tokens, self._run = tokens, run

    def attn_in(self, block: SpatialBlock, x: Tensor, tables: StepTables) -> Tensor:
        """LayerNorm and modulation."""
        return by_tokens(partial(self._run, block.attn_in), x, tables.ungrouped, self.tokens)

    def attend(self, block: SpatialBlock, h: Tensor, groups: FrameGroups | None) -> Tensor:
        """Some frames at a time, written over their input."""
        parts = list(ranges(h.shape[0], h.shape[1], self.tokens))
        if len(parts) <= 1 or torch.is_grad_enabled():
            return block.attend(h, self._run)
        for frames in parts:
            h[frames] = block.attend(h[frames], self._run)
        return h

    def rest(
        self,
        block: Block,
        x: Tensor,
        attended: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
    ) -> Tensor:
        """Tile by tile."""
        if torch.is_grad_enabled():
            return block.rest(x, attended, tables, text)
        for t, c in tiles(x.shape, self.tokens):
            some = tables.frames(t.start, t.stop)
            block.rest(x[:, t, c], attended[:, t, c], some, text, in_place=True, run=self._run)
        return x

    def along_time(
        self,
        block: TemporalBlock,
        x: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Some positions at a time."""
        if torch.is_grad_enabled():
            return block(x, tables, text, rotary)
        for c in ranges(x.shape[2], x.shape[0] * x.shape[1], self.tokens):
            block(x[:, :, c], tables, text, rotary, in_place=True, run=self._run)
        return x


def by_tokens(
    compute: Callable[[Tensor, StepTables], Tensor],
    x: Tensor,
    tables: StepTables,
    tokens: int | None,
) -> Tensor:
    """compute(x [B,T,S,C], tables) → [B,T,S,c], as many tokens at a time as there is room for."""
    parts = list(tiles(x.shape, tokens))
    if len(parts) <= 1 or torch.is_grad_enabled():
        return compute(x, tables)
    whole: Tensor | None = None
    for t, c in parts:
        some = compute(x[:, t, c], tables.frames(t.start, t.stop))
        if whole is None:
            whole = some.new_empty((*x.shape[:3], some.shape[-1]))
        whole[:, t, c] = some
    assert whole is not None
    return whole
