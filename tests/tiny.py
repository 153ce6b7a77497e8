"""Tiny random models and requests for the tests, the same in every process."""

from __future__ import annotations

import torch

from opensora_sp.engine.guidance import Conditions
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config

TINY = STDiT3Config(hidden_size=32, depth=2, num_heads=2, caption_channels=16, model_max_length=12)


def tiny_transformer(config: STDiT3Config = TINY, seed: int = 0) -> STDiT3:
    """Random weights of a size at which every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    model = STDiT3(config)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name == "rope.freqs":
                continue
            noise = torch.randn(weight.shape, generator=generator)
            scale = 1.0 if weight.ndim == 1 or "table" in name else weight[0].numel() ** -0.5
            weight.copy_(1 + 0.1 * noise if "norm" in name else scale * noise)
    return model.eval().requires_grad_(False)


def conditions(
    batch: int = 1, *, cfg_scale: float = 7.0, height: int = 64, width: int = 96, seed: int = 1
) -> Conditions:
    """Random text of different lengths per sample."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(batch, TINY.model_max_length, dtype=torch.int64)
    tokens = []
    for i in range(batch):
        length = 3 + 4 * i
        masks[i, :length] = 1
        tokens.append(torch.randn(length, TINY.caption_channels, generator=generator))
    return Conditions(
        tokens=tokens, masks=masks, height=height, width=width, fps=24, cfg_scale=cfg_scale
    )


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
