"""Matrices kept in 8 bits: a scale per output row, and the product computed as ever.

Weights take half the memory that bfloat16 does. Each matrix is widened when it is used, so what
changes is the weights' rounding alone, not the arithmetic: a row's largest weight over 254 at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_sp.models.offload import pinned

_LARGEST = 127


class EightBitLinear(nn.Module):
    """y = x W^T for W [out, in] kept as int8 rows times a float32 scale [out, 1]."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    @classmethod
    def of(cls, weight: Tensor) -> EightBitLinear:
        """The nearest to a floating matrix [out, in], which computes in the matrix's dtype."""
        scale = weight.abs().amax(dim=1, keepdim=True).float() / _LARGEST
        scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays one
        rows = torch.round(weight.float() / scale).to(torch.int8)
        return cls(rows, scale, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] in the dtype of the matrix that this stands for."""
        return F.linear(x.to(self.dtype), self.weight.to(self.dtype).mul_(self.scale))


def quantize_(module: nn.Module, used_on: torch.device | None = None) -> None:
    """Put an EightBitLinear in the place of every Linear without bias below `module`.

    used_on: the device that the matrices are copied to when they are used. They stay in host
        memory, page-locked for it where that is possible. None: they are where they are used.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.bias is None:
            made = EightBitLinear.of(child.weight)
            if used_on is not None:
                made.weight = pinned(made.weight, used_on)
            setattr(module, name, made)
        else:
            quantize_(child, used_on)
