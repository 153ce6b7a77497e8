"""Norms in one pass over memory, in Triton: for CUDA, and for whatever else has a Triton.

Imported where Triton is there; `opensora_sp.models.kernels.fused` decides. Each function computes
what the one of its name in `opensora_sp.models.kernels.reference` computes, in float32 from the
first read to the one rounding at the end. Nothing here has gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Heads of one program of norm_rotary_, and its warps: 8 numbers of q and of k a thread. More spill
# registers; see scripts/compile_kernels.py.
ROWS = 16
HEAD_WARPS = 8
WARPS = 4


@triton.jit
def norm_rotary_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    rows,
    heads,
    patches,
    frames,
    token_stride,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
    per_program: tl.constexpr,
    turned: tl.constexpr,
):
    """q and k in place: a row is one head of one token; tokens are ordered [B,T,S]."""
    row = tl.program_id(0).to(tl.int64) * per_program + tl.arange(0, per_program)
    token = row // heads
    lane = tl.arange(0, block)
    there = (row < rows)[:, None] & (lane < width)[None, :]
    at = (token * token_stride + (row % heads) * width)[:, None] + lane[None, :]
    turn_cos = tl.full([1, 1], 1.0, tl.float32)
    turn_sin = tl.full([1, 1], 0.0, tl.float32)
    if turned:
        pair = tl.arange(0, block // 2)
        known = (row < rows)[:, None] & (pair < width // 2)[None, :]
        place = ((token // patches) % frames)[:, None] * (width // 2) + pair[None, :]
        turn_cos = tl.load(cos + place, mask=known, other=0.0)
        turn_sin = tl.load(sin + place, mask=known, other=0.0)
    _one(q, q_weight, at, lane, there, turn_cos, turn_sin, eps, width, block, per_program, turned)
    _one(k, k_weight, at, lane, there, turn_cos, turn_sin, eps, width, block, per_program, turned)


@triton.jit
def _one(  # type: ignore[no-untyped-def]
    x,
    weight,
    at,
    lane,
    there,
    turn_cos,
    turn_sin,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
    per_program: tl.constexpr,
    turned: tl.constexpr,
):
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + lane, mask=lane < width, other=0.0).to(tl.float32)
    mean = tl.sum(value * value, axis=1) / width
    value = value * (1.0 / tl.sqrt(mean + eps))[:, None] * scale[None, :]
    if turned:
        even, odd = tl.split(tl.reshape(value, (per_program, block // 2, 2)))
        pairs = tl.join(even * turn_cos - odd * turn_sin, odd * turn_cos + even * turn_sin)
        value = tl.reshape(pairs, (per_program, block))
    tl.store(x + at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def residual_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    added,
    bias,
    shift,
    scale,
    frames,
    patches,
    batch_stride,
    frame_stride,
    patch_stride,
    table_batch_stride,
    table_frame_stride,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
    has_added: tl.constexpr,
    has_bias: tl.constexpr,
    modulated: tl.constexpr,
):
    """A program is one token of x [B,T,S,C], which may be a part of a larger tensor."""
    token = tl.program_id(0).to(tl.int64)
    frame = (token // patches) % frames
    sample = token // (patches * frames)
    lane = tl.arange(0, block)
    there = lane < width
    at = sample * batch_stride + frame * frame_stride + (token % patches) * patch_stride + lane
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if has_added:
        value += tl.load(added + token * width + lane, mask=there, other=0.0).to(tl.float32)
    if has_bias:
        value += tl.load(bias + lane, mask=there, other=0.0).to(tl.float32)
    if has_added or has_bias:
        # The norm is that of the residual as it is stored, as in the plain path.
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=there)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=0) / width
    apart = tl.where(there, value - mean, 0.0)
    spread = tl.sum(apart * apart, axis=0) / width
    normed = apart * (1.0 / tl.sqrt(spread + eps))
    if modulated:
        row = sample * table_batch_stride + frame * table_frame_stride + lane
        larger = tl.load(scale + row, mask=there, other=0.0).to(tl.float32)
        moved = tl.load(shift + row, mask=there, other=0.0).to(tl.float32)
        normed = normed * (1.0 + larger) + moved
    tl.store(out + token * width + lane, normed.to(out.dtype.element_ty), mask=there)


def norm_rotary_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMS-norm of every head, then the rotary embedding: q, k [B,T,S,H,D] in place, and returned.

    q and k are views of one product, so tokens lie equally far apart: see `takes_heads`. rotary:
    cosines and sines [T,D/2] in float32, or None for the norm alone.
    """
    _, frames, patches, heads, width = q.shape
    rows = q.numel() // width
    if not rows:
        return q, k
    cos, sin = (table.contiguous() for table in rotary or (q_weight, q_weight))
    norm_rotary_kernel[(triton.cdiv(rows, ROWS),)](
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        rows,
        heads,
        patches,
        frames,
        q.stride(2),
        eps,
        width=width,
        block=triton.next_power_of_2(width),
        per_program=ROWS,
        turned=rotary is not None,
        num_warps=HEAD_WARPS,
        enable_fp_fusion=True,
    )
    return q, k


def takes_heads(q: Tensor, k: Tensor) -> bool:
    """Whether `norm_rotary_` can read q and k [B,T,S,H,D] where they are."""
    if q.ndim != 5 or q.stride() != k.stride() or q.shape != k.shape:
        return False
    _, frames, patches, _, width = q.shape
    apart = q.stride(2)
    strides = (frames * patches * apart, patches * apart, apart, width, 1)
    # An axis of one element may have any stride.
    return all(n == 1 or q.stride(i) == strides[i] for i, n in enumerate(q.shape))


def residual_norm_(
    x: Tensor,
    *,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """x += added + bias where it lies; → LayerNorm(x)·(1 + scale) + shift, contiguous.

    x, added [B,T,S,C]; bias [C]; shift and scale [B,T or 1,1,C], both or neither.
    """
    batch, frames, patches, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    strides: Any = (0, 0)
    if shift is not None and scale is not None:
        shift, scale = (t.expand(batch, frames, 1, width) for t in (shift, scale))
        if shift.stride() != scale.stride() or shift.stride(3) != 1:
            shift, scale = shift.contiguous(), scale.contiguous()
        strides = shift.stride()[:2]
    residual_norm_kernel[(batch * frames * patches,)](
        x,
        out,
        x if added is None else added.contiguous(),
        x if bias is None else bias,
        x if shift is None else shift,
        x if scale is None else scale,
        frames,
        patches,
        *x.stride()[:3],
        *strides,
        eps,
        width=width,
        block=triton.next_power_of_2(width),
        has_added=added is not None,
        has_bias=bias is not None,
        modulated=shift is not None,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out
