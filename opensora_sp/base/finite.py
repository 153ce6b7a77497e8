"""A check for NaN and infinity, which ends a run where they first appear.

A NaN on one rank reaches all ranks at the next spatial attention. Without the check the run would
go on and produce a black video, and nobody could tell where the NaN began.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError


def require_finite(tensor: Tensor, what: str, *, hint: str = "") -> None:
    """Raise UserError, with `what` and the number of bad values, where any is NaN or infinite.

    The check costs one pass over the tensor and, on an accelerator, one synchronization.
    """
    if bool(torch.isfinite(tensor).all()):
        return
    broken = ~torch.isfinite(tensor)
    nans = int(torch.isnan(tensor).sum())
    raise UserError(
        f"{what} holds {int(broken.sum())} values of {tensor.numel()} that are NaN or infinite "
        f"({nans} NaN): {hint or 'check the weights, or run with --dtype bf16 or fp32'}"
    )
