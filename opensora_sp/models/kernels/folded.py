"""The operations of a folded step: each does in one or two passes what plain torch does in many.

They are for inference: inputs and residuals are overwritten. Shapes as in
`opensora_sp.models.layers`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.models.kernels.cpu_half import computes_natively, wide

# One kernel where it exists and the device has it; on a CPU it is a chain of float32 passes.
_fused_rms_norm = getattr(torch.ops.aten, "_fused_rms_norm", None)
# Numbers of a part whose passes find it in a CPU's cache: 4 MB in float32 for each thread, and for
# four at most. Smaller parts have more threads wait for one another.
_CACHED, _MOST_THREADS = 1 << 20, 4


def on_cuda(x: Tensor) -> bool:
    """Whether the forms that CUDA has are used; whoever counts them without one replaces this."""
    return x.device.type == "cuda"


def accumulate_(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """x += a·weightᵀ as one product that adds into x: x [F,S,C], a [F,S,K], weight [C,K].

    x may be some positions of all frames. Then it is not one matrix, but one for each frame.
    """
    a, weight = wide(a), wide(weight)
    if x.is_contiguous():
        x.view(-1, x.shape[-1]).addmm_(a.reshape(-1, a.shape[-1]), weight.t())
    elif on_cuda(x):
        x.baddbmm_(a, weight.t().expand(x.shape[0], -1, -1))
    else:  # without the copies that a batched product makes here
        for frame, part in zip(x, a, strict=True):
            frame.addmm_(part, weight.t())
    return x


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of a Linear: x [...,C], weight [K,C] → [...,K]; in the product where that exists.

    The sources of the two fused forms are torch's own; both compute the tanh form.
    """
    if on_cuda(x):
        # Its CPU kernel computes the erf form.
        rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])
    if has_gelu_product(x):
        onednn: Any = torch.ops.mkldnn
        fused: Tensor = onednn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return fused
    return gelu_(F.linear(x, weight, bias))


def gelu_(x: Tensor) -> Tensor:
    """tanh-GELU where x lies."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return torch.ops.aten.gelu_(x, approximate="tanh")
    # 0.5·(1 + tanh(u)) is 1 / (1 + 2^(-2u·log₂e)). torch's tanh of a vector takes a CPU five times
    # as long as its exp2: docs/speed.md. Part by part, so that the passes find the numbers in the
    # cache.
    linear = -2 * math.sqrt(2 / math.pi) * math.log2(math.e)
    first, cubed = x.new_tensor(linear), 0.044715 * linear
    length = _CACHED * min(torch.get_num_threads(), _MOST_THREADS)
    room = torch.empty_like(x.view(-1)[:length])
    for part in x.view(-1).split(length):
        above = room[: part.numel()]
        torch.addcmul(first, part, part, value=cubed, out=above).mul_(part).exp2_().add_(1)
        part.div_(above)
    return x


def has_gelu_product(x: Tensor) -> bool:
    """Whether `linear_gelu` of x is one product of oneDNN on a CPU."""
    if x.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if x.dtype == torch.float32:
        # Without AVX-512 its product takes longer than the one behind F.linear and a pass for the
        # GELU together: docs/speed.md has the times.
        return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return x.dtype == torch.bfloat16 and computes_natively(x.dtype)


def head_norm_(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm of each head, x [...,H,D] → the same shape; x may be overwritten."""
    if on_cuda(x) and _fused_rms_norm is not None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    x.mul_(_rms_factor(x, eps))
    return x if weight is None else x.mul_(weight)


def head_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """As `head_norm_` without a weight, into a new tensor that is contiguous."""
    if on_cuda(x) and _fused_rms_norm is not None:
        return F.rms_norm(x, (x.shape[-1],), None, eps).contiguous()
    return torch.mul(x, _rms_factor(x, eps)).contiguous()


def _rms_factor(x: Tensor, eps: float) -> Tensor:
    """What a head is multiplied by, x [...,H,D] → [...,H,1], in x's dtype.

    The norm is a reduction that accumulates in float32 by itself, so x is read once as it is.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.float().square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def rotation_matrices(rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary tables, two [T,D/2] → what a row of D channels is multiplied by: float32 [T,D,D].

    Channels 2i and 2i+1 turn by the angle of frequency i.
    """
    cos, sin = rotary
    frames, half = cos.shape
    matrices = cos.new_zeros(frames, half, 2, half, 2)  # row pair, of the pair; column likewise
    pairs = matrices.diagonal(dim1=1, dim2=3)  # a view [T,2,2,D/2]
    pairs[:, 0, 0] = cos
    pairs[:, 0, 1] = sin
    pairs[:, 1, 0] = -sin
    pairs[:, 1, 1] = cos
    return matrices.view(frames, 2 * half, 2 * half)


def turns_pairs(x: Tensor) -> bool:
    """Whether `turn_pairs_` takes x and is the faster way; torch has it in float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def turn_pairs_(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x [T,S,H,D] contiguous, where it lies: each pair of channels as a complex number, turned."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.complex(*rotary)[:, None, None])
    return x


def turn(x: Tensor, matrices: Tensor) -> Tensor:
    """x [T,S,H,D] contiguous times the matrix of its frame [T,D,D] → the same shape."""
    return torch.bmm(x.flatten(1, 2), matrices).view(x.shape)
