"""Conversion of decoded pixels to bytes, on the device where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError


def to_bytes(video: Tensor, first_frame: int = 0) -> Tensor:
    """[...,3,F,H,W], any float dtype, nominally in [-1, 1] → uint8 [...,F,H,W,3], same device.

    A byte is floor(255 (x + 1) / 2 + 0.5) of x clamped to [-1, 1], in float32. Open-Sora 1.2 rounds
    in the same way. first_frame: the number of the first of these frames, for an error.

    Raises UserError where a value is NaN or infinite.
    """
    wide = video.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise UserError(
            f"the decoded video has NaN or infinite values near frame {first_frame}: "
            "run it with --dtype bf16 or fp32, or check the weights"
        )
    wide = (wide.clamp(-1, 1) + 1).mul_(127.5).add_(0.5).floor_().to(torch.uint8)
    return wide.movedim(-4, -1).contiguous()
