"""Numbers that are no numbers any more stop a run at once, where they first appear.

A NaN in one rank's patches reaches every rank at the next attention and a black video hours
later; the place where it began is what a person needs to know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError


def require_finite(tensor: Tensor, what: str, *, hint: str = "") -> None:
    """Raises UserError naming `what` and how much of it is NaN or infinite, if any is.

    Costs one pass over the tensor and, on an accelerator, one wait for the device.
    """
    if bool(torch.isfinite(tensor).all()):
        return
    broken = ~torch.isfinite(tensor)
    nans = int(torch.isnan(tensor).sum())
    raise UserError(
        f"{what} holds {int(broken.sum())} values of {tensor.numel()} that are NaN or infinite "
        f"({nans} NaN): {hint or 'check the weights, or run with --dtype bf16 or fp32'}"
    )
