"""The arithmetic of the layers, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.models.kernels.active import active
from opensora_sp.models.kernels.attention import run

# F.rms_norm came after torch 2.3; where it exists it may be one fused kernel.
_fused_rms_norm = getattr(F, "rms_norm", None)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm over the last axis, its statistics in float32; any shape in and out."""
    if _fused_rms_norm is not None:
        return _fused_rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine (eps 1e-6), then ·(1 + scale) + shift.

    x [B,T,S,C]; shift and scale [B,T or 1,1,C] → [B,T,S,C].
    """
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding over interleaved channel pairs; x [B,T,S,H,D] → the same, x's dtype."""
    cos, sin = (table[:, None, None, :] for table in tables)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of queries and keys [...,H,D], then `rotate` where a table is given."""
    q, k = rms_norm(q, q_weight), rms_norm(k, k_weight)
    return (q, k) if rotary is None else (rotate(q, rotary), rotate(k, rotary))


def residual_norm_(
    x: Tensor,
    *,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x += added + bias where it lies; then LayerNorm, modulated where shift and scale are given.

    Shapes as for `modulated_norm`; added as x, bias [C].
    """
    for more in (added, bias):
        if more is not None:
            x.add_(more)
    if shift is None or scale is None:
        return F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return modulated_norm(x, shift, scale)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v on [N,H,length,D]; a batch or query of length 0 gives that shape back.

    By the kernel that was chosen for these lengths: see `opensora_sp.models.kernels.attention`.
    """
    if q.numel() == 0:
        return torch.empty_like(q)
    return run(active().choice(q.shape[2], k.shape[2], q.shape[3]), q, k, v)
