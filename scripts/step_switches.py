"""A step in which each optimisation of the folded step can be switched by itself, to be measured.

`SwitchedStep` with none of them computes what `PlainStep` computes, kernel by kernel, and with all
of them what `FoldedStep` computes; a test compares the counts. It is for one video and one group of
frames, without tiles. The program has no such switches, for nobody needs them beyond measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.benchmark.count.counter import ATTENTION, FUSED
from opensora_sp.benchmark.count.forward import ForwardSize
from opensora_sp.benchmark.count.table import Table, markdown
from opensora_sp.engine.guidance import Denoiser
from opensora_sp.models import folded_step
from opensora_sp.models.folded_step import FoldedStep
from opensora_sp.models.folded_weights import FoldBuffers
from opensora_sp.models.frame_groups import FrameGroups
from opensora_sp.models.kernels.folded import (
    accumulate_,
    head_norm,
    head_norm_,
    linear_gelu,
    turn,
    turn_pairs_,
    turns_pairs,
)
from opensora_sp.models.kernels.fused import norm_rotary_in_one_, residual_norm_
from opensora_sp.models.kernels.reference import attend, rms_norm, rotate
from opensora_sp.models.layers import KeyValue
from opensora_sp.models.stdit3 import Block, SpatialBlock, StepTables, TemporalBlock
from opensora_sp.request.runtime import Runtime
from scripts.count_forwards import program_table
from scripts.step_pair import Compute, Pair, through_blocks

FOLD_IN = "scale and shift in the weights of qkv and fc1"
ACCUMULATE = "gates in the weights, products added into the residual"
BIASES_ONCE = "their biases added once a LayerNorm"
HEAD_NORM = "query and key norm by one reduction"
ROTARY = "rotary embedding as a product"
GELU = "GELU in the product"
VIEWS = "attention reads views of the qkv product"
SHARE_FIRST = "the first spatial attention once for both branches"
FUSED_NORMS = "fused norms (CUDA)"

# What plain steps have already.
IN_PLAIN = frozenset({VIEWS})
IN_ORDER = (FOLD_IN, ACCUMULATE, BIASES_ONCE, HEAD_NORM, ROTARY, GELU, VIEWS)
IN_FOLDED = frozenset(IN_ORDER)
EVERY = (*IN_ORDER, SHARE_FIRST, FUSED_NORMS)


class SwitchedStep:
    """The segments of a block with some of the optimisations on; see `StepKernels`."""

    def __init__(self, on: frozenset[str]) -> None:
        self.on = on
        self._folded: dict[type[Block], tuple[Block, Tensor, dict[str, Tensor]]] = {}
        self._buffers: dict[type[Block], FoldBuffers] = {}
        self._matrices = FoldedStep()._matrices

    def attn_in(self, block: SpatialBlock, x: Tensor, tables: StepTables) -> Tensor:
        """LayerNorm, and modulation where it is not in the weights."""
        return _layer_norm(x) if FOLD_IN in self.on else block.attn_in(x, tables)

    def attend(self, block: SpatialBlock, h: Tensor, groups: FrameGroups | None) -> Tensor:
        """Whole frames [F,S,C] → [F,S,C]."""
        assert groups is not None
        q, k, v = self._qkv(block, h, self._weights(block, groups.rows))
        q_weight, k_weight = _norms(block)
        if not norm_rotary_in_one_(q, k, q_weight, k_weight):
            if HEAD_NORM in self.on:
                q, k = head_norm_(q, q_weight * k_weight), head_norm_(k)
            else:
                q, k = rms_norm(q, q_weight), rms_norm(k, k_weight)
        q, k, v = (self._as_read(part.transpose(1, 2)) for part in (q, k, v))
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def along_time(
        self,
        block: TemporalBlock,
        x: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """A whole temporal block, x [1,T,S,C]."""
        assert tables.groups is not None
        h = _layer_norm(x) if FOLD_IN in self.on else block.attn_in(x, tables)
        q, k, v = self._qkv(block, h[0], self._weights(block, tables.groups.rows))
        norms = _norms(block)
        if not norm_rotary_in_one_(q, k, *norms, rotary):
            q, k = self._turned(block, (q, k), norms, rotary)
        q, k, v = (self._as_read(part.permute(1, 2, 0, 3)) for part in (q, k, v))
        attended = attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        return self.rest(block, x, attended[None], tables, text)

    def rest(
        self,
        block: Block,
        x: Tensor,
        attended: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
    ) -> Tensor:
        """Everything after the self-attention, x [1,T,S,C] where it lies."""
        assert tables.groups is not None
        folded = self._weights(block, tables.groups.rows)
        shift = scale = gate = mlp_gate = None
        if not {FOLD_IN, ACCUMULATE} <= self.on:
            _, _, gate, shift, scale, mlp_gate = block._modulation(tables)
        if FOLD_IN in self.on:
            shift = scale = None
        cross, mlp, once = block.cross_attn, block.mlp, BIASES_ONCE in self.on
        if ACCUMULATE in self.on:
            accumulate_(x[0], attended[0], folded["proj"])
            if not once:
                x += folded["proj_bias"]
        else:
            assert gate is not None
            x.addcmul_(gate, block.attn.proj(attended))
        bias = folded["cross_q_bias"] if ACCUMULATE in self.on and once else cross.q_linear.bias
        q = F.linear(x[0], cross.q_linear.weight, bias).unflatten(-1, (cross.heads, -1))
        q = q.flatten(0, 1).transpose(0, 1)[None]
        seen = attend(q, *text[0])[0].transpose(0, 1).flatten(1).view(x.shape)
        if ACCUMULATE in self.on:
            accumulate_(x[0], seen[0], cross.proj.weight)
            pending = folded["before_mlp"] if once else cross.proj.bias
            h = residual_norm_(x, bias=pending, shift=shift, scale=scale)
        else:
            h = residual_norm_(x, added=cross.proj(seen), shift=shift, scale=scale)
        fc1: Tensor = mlp.fc1.weight
        fc1_bias: Tensor = mlp.fc1.bias
        if FOLD_IN in self.on:
            fc1, fc1_bias = folded["fc1"], folded["fc1_bias"]
        if GELU in self.on:
            hidden = linear_gelu(h[0], fc1, fc1_bias)[None]
        else:
            hidden = F.gelu(F.linear(h, fc1, fc1_bias), approximate="tanh")
        if ACCUMULATE in self.on:
            accumulate_(x[0], hidden[0], folded["fc2"])
            x += folded["fc2_bias"]
        else:
            assert mlp_gate is not None
            x.addcmul_(mlp_gate, mlp.fc2(hidden))
        return x

    def _qkv(
        self, block: Block, h: Tensor, folded: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight: Tensor = block.attn.qkv.weight
        bias: Tensor = block.attn.qkv.bias
        if FOLD_IN in self.on:
            weight, bias = folded["qkv"], folded["qkv_bias"]
        q, k, v = F.linear(h, weight, bias).unflatten(-1, (3, block.attn.heads, -1)).unbind(-3)
        return q, k, v

    def _turned(
        self,
        block: TemporalBlock,
        pair: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys [T,S,H,D], normed and turned."""
        by_pairs = turns_pairs(pair[0])
        if {ROTARY, HEAD_NORM} <= self.on and not by_pairs:
            q, k = (
                turn(head_norm(x), turns)
                for x, turns in zip(pair, self._matrices(block, rotary), strict=True)
            )
            return q, k
        if HEAD_NORM in self.on:
            q, k = (head_norm(x).mul_(weight) for x, weight in zip(pair, norms, strict=True))
        else:
            q, k = (rms_norm(x, weight) for x, weight in zip(pair, norms, strict=True))
        if ROTARY not in self.on:
            q, k = (rotate(x[None], rotary)[0] for x in (q, k))
            return q, k
        if by_pairs:
            return turn_pairs_(q.contiguous(), rotary), turn_pairs_(k.contiguous(), rotary)
        with patch.object(folded_step, "_norm_weights", lambda _: None):
            turns = self._matrices(block, rotary)[0]  # without the norm's weight
        return turn(q.contiguous(), turns), turn(k.contiguous(), turns)

    def _as_read(self, part: Tensor) -> Tensor:
        return part if VIEWS in self.on else part.contiguous()

    def _weights(self, block: Block, rows: Tensor) -> dict[str, Tensor]:
        """The folded weights that are on, of one block of each kind at a time."""
        kind = type(block)
        made = self._folded.get(kind)
        if made is None or made[0] is not block or made[1] is not rows:
            if kind not in self._buffers:
                self._buffers[kind] = FoldBuffers(block)
            fresh = self._fold(block, rows[0], self._buffers[kind])
            made = self._folded[kind] = (block, rows, fresh)
        return made[2]

    def _fold(self, block: Block, row: Tensor, into: FoldBuffers) -> dict[str, Tensor]:
        """As `opensora_sp.models.folded_weights.fold`, only what is on."""
        attn, cross, mlp = block.attn, block.cross_attn, block.mlp
        made: dict[str, Tensor] = {}
        if not self.on & {FOLD_IN, ACCUMULATE}:
            return made
        modulation = (block.scale_shift_table + row).unbind(0)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        if FOLD_IN in self.on:
            made["qkv"] = torch.mul(attn.qkv.weight, 1 + scale, out=into.qkv)
            made["qkv_bias"] = F.linear(shift[None], attn.qkv.weight, attn.qkv.bias)[0]
            made["fc1"] = torch.mul(mlp.fc1.weight, 1 + mlp_scale, out=into.fc1)
            made["fc1_bias"] = F.linear(mlp_shift[None], mlp.fc1.weight, mlp.fc1.bias)[0]
        if ACCUMULATE in self.on:
            made["proj"] = torch.mul(attn.proj.weight, gate[:, None], out=into.proj)
            made["proj_bias"] = bias = gate * attn.proj.bias
            made["fc2"] = torch.mul(mlp.fc2.weight, mlp_gate[:, None], out=into.fc2)
            made["fc2_bias"] = mlp_gate * mlp.fc2.bias
            if BIASES_ONCE in self.on:
                q = cross.q_linear
                made["cross_q_bias"] = F.linear(bias[None], q.weight, q.bias)[0]
                made["before_mlp"] = bias + cross.proj.bias
        return made


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


def _norms(block: Block) -> tuple[Tensor, Tensor]:
    norms = folded_step._norm_weights(block)
    assert norms is not None
    return norms


@dataclass(frozen=True)
class Variant:
    """One set of switches, and what it is: `base`, with or without the optimisation `name`."""

    base: Literal["plain", "folded"]
    name: str
    on: frozenset[str]

    @property
    def label(self) -> str:
        """What its seconds are listed under."""
        if not self.name:
            return self.base
        return f"{self.base} {'and' if self.name in self.on else 'without'} {self.name}"

    @property
    def timed(self) -> bool:
        """Whether it is another computation of a pair on a CPU."""
        return self.name not in (SHARE_FIRST, FUSED_NORMS)


def every_variant() -> list[Variant]:
    """Both steps as they are, plain with each optimisation, folded without each.

    Plain steps have `VIEWS` already, and no biases to gather. Without added products a folded step
    has none either. The fused norms compute rotation too, so they come on top of all others.
    """
    folded = IN_FOLDED | {SHARE_FIRST}
    plain_steps, folded_steps = [Variant("plain", "", IN_PLAIN)], [Variant("folded", "", folded)]
    for name in EVERY:
        if name not in (VIEWS, BIASES_ONCE):
            plain_steps.append(Variant("plain", name, IN_PLAIN | {name}))
        if name == FUSED_NORMS:
            folded_steps.append(Variant("folded", name, folded | {name}))
            continue
        gone = {name, BIASES_ONCE} if name == ACCUMULATE else {name}
        folded_steps.append(Variant("folded", name, folded - gone))
    return [*plain_steps, *folded_steps]


def count(on: frozenset[str], size: ForwardSize, *, cuda: bool = True) -> Table:
    """One guided forward with these switches, and the operations that CUDA or every device has."""

    def switched(denoiser: Denoiser, frames: int, *, guided: bool) -> SwitchedStep:
        return SwitchedStep(on)

    with patch.object(Denoiser, "step_kernels", switched):
        runtime = Runtime(share_first=SHARE_FIRST in on)
        norms = FUSED_NORMS in on
        return program_table(
            runtime, FUSED if cuda else {ATTENTION}, size=size, cuda=cuda, norms=norms
        )


def switched_pair(pair: Pair, on: frozenset[str]) -> Compute:
    """One pair of blocks with these switches, as `scripts.step_pair.ways` has it."""
    return through_blocks(pair, lambda: SwitchedStep(on))


def counts(sizes: Mapping[str, tuple[ForwardSize, bool]]) -> dict[str, dict[str, Any]]:
    """Each variant's kernels and bytes of a whole guided forward, by its label.

    sizes: what it is called, the size, and whether the operations are those of CUDA.
    """
    found: dict[str, dict[str, Any]] = {}
    for variant in every_variant():
        for name, (size, cuda) in sizes.items():
            figures = whole_step(variant.on, size, cuda=cuda)
            found.setdefault(variant.label, {})[name] = figures
    return found


def whole_step(on: frozenset[str], size: ForwardSize, *, cuda: bool) -> dict[str, int]:
    """Kernels and bytes of all pairs of blocks, from those of one pair and of two.

    All pairs but the first are alike, so this is what counting all of them gives, in less time.
    """
    one, two = (
        count(on, replace(size, config=replace(size.config, depth=depth)), cuda=cuda)
        for depth in (1, 2)
    )
    more = size.config.depth - 1
    return {
        "kernels": one.kernels + more * (two.kernels - one.kernels),
        "bytes": one.bytes + more * (two.bytes - one.bytes),
    }


def alone_table(
    moved: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, Mapping[str, float]]
) -> str:
    """Markdown of plain and folded steps, and of each optimisation on or off.

    moved: of `counts`. seconds: by the number format, then by the label of a variant.
    """
    sizes = list(next(iter(moved.values())))
    head = ("", "kernels", *(f"TB, {size}" for size in sizes), *(f"CPU s, {d}" for d in seconds))
    rows = []
    for variant in every_variant():
        found = moved[variant.label]
        cells = [variant.label, f"{found[sizes[0]]['kernels']:,}"]
        cells += [f"{found[size]['bytes'] / 1e12:.4g}" for size in sizes]
        cells += [
            f"{each[variant.label]:.2f}" if variant.label in each else "–"
            for each in seconds.values()
        ]
        rows.append(cells)
    return markdown([head, *rows])
