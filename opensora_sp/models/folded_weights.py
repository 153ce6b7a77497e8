"""A block's weights with one row of a step's tables folded into them.

In a step the modulation and the gates of a block are the same vectors for all frames of a group.
So they can be multiplied into the matrices once, instead of into the activations of every token:

- LN(x)·(1 + scale) + shift, then W and b  =  LN(x), then W·(1 + scale) by column and b + W·shift
- gate·(W·a + b)  =  (gate·W by row)·a + gate·b

They are in the format that the device computes in: see `opensora_sp.models.kernels.cpu_half`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_sp.models.kernels.cpu_half import wide
from opensora_sp.models.stdit3 import Block


class FoldBuffers:
    """Memory for the folded matrices of one block. It is used again by the next block."""

    def __init__(self, block: Block) -> None:
        dtype = wide(block.scale_shift_table).dtype
        self.qkv = torch.empty_like(block.attn.qkv.weight, dtype=dtype)
        self.proj = torch.empty_like(block.attn.proj.weight, dtype=dtype)
        self.fc1 = torch.empty_like(block.mlp.fc1.weight, dtype=dtype)
        self.fc2 = torch.empty_like(block.mlp.fc2.weight, dtype=dtype)


@dataclass(frozen=True)
class FoldedWeights:
    """What a block computes a group of frames with; each a matrix [out,in] or a vector [out].

    The products of proj, of the cross-attention's projection and of fc2 add into the residual
    without a bias. The biases of the first two are pending until the MLP's LayerNorm reads the
    residual: cross_q_bias makes up for the first of them, before_mlp is both.
    """

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    cross_q_bias: Tensor
    before_mlp: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


def fold(block: Block, row: Tensor, into: FoldBuffers) -> FoldedWeights:
    """A block's weights under a row [6,C] of the blocks' table; the matrices are in `into`."""
    modulation = (wide(block.scale_shift_table) + wide(row)).unbind(0)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    attn, cross, mlp = block.attn, block.cross_attn, block.mlp
    proj_bias = gate * attn.proj.bias
    qkv, fc1 = _into(attn.qkv, into.qkv), _into(mlp.fc1, into.fc1)
    # Before qkv and fc1 are scaled, which may be where they lie.
    qkv_bias = _through(qkv, shift, attn.qkv.bias)
    fc1_bias = _through(fc1, mlp_shift, mlp.fc1.bias)
    return FoldedWeights(
        qkv=torch.mul(qkv, 1 + scale, out=into.qkv),
        qkv_bias=qkv_bias,
        proj=torch.mul(_into(attn.proj, into.proj), gate[:, None], out=into.proj),
        cross_q_bias=_through(wide(cross.q_linear.weight), proj_bias, cross.q_linear.bias),
        before_mlp=proj_bias + cross.proj.bias,
        fc1=torch.mul(fc1, 1 + mlp_scale, out=into.fc1),
        fc1_bias=fc1_bias,
        fc2=torch.mul(_into(mlp.fc2, into.fc2), mlp_gate[:, None], out=into.fc2),
        fc2_bias=mlp_gate * mlp.fc2.bias,
    )


def _into(linear: nn.Linear, room: Tensor) -> Tensor:
    """A matrix in the format of `room`: itself, or copied there."""
    return linear.weight if linear.weight.dtype == room.dtype else room.copy_(linear.weight)


def _through(weight: Tensor, vector: Tensor, bias: Tensor) -> Tensor:
    """W·vector + b: a product, so that it accumulates in float32 and rounds once."""
    return F.linear(vector[None], weight, wide(bias))[0]
