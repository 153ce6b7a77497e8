"""The blocks of a small model on fixed inputs, for the tests of what computes them."""

from __future__ import annotations

import torch
from tiny import normal
from torch import Tensor

from opensora_sp.engine.blocks import Local, Stream, run_blocks
from opensora_sp.models.stdit3 import STDiT3, StepTables
from opensora_sp.models.step_kernels import StepKernels
from opensora_sp.request.runtime import Runtime

MASK = torch.tensor([[False, True, True, False, True], [True, True, False, False, True]])


def tables(model: STDiT3, batch: int, mask: Tensor | None) -> StepTables:
    """The tables of a step in the middle, with the groups of a mask like MASK."""
    made = model.tables(torch.full((batch,), 500.0), torch.full((batch,), 24.0), mask)
    return made.grouped([[True]] * batch if mask is None else mask.tolist())


def through_blocks(
    model: STDiT3, kernels: StepKernels, mask: Tensor | None, batch: int = 2, patches: int = 12
) -> Tensor:
    """Two streams with other text, 5 frames; the second's x in float32."""
    x = normal(batch, 5, patches, model.config.hidden_size).to(model.dtype)
    step = tables(model, batch, mask)
    streams = []
    for seed in (3, 4):
        words = [normal(3 + 4 * i, model.config.caption_channels, seed=seed) for i in range(batch)]
        text = model.text_kv([each.to(model.dtype) for each in words])
        streams.append(Stream(x.clone(), step, text))
    runtime = Runtime(tokens=getattr(kernels, "tokens", None))
    with torch.no_grad():
        return run_blocks(model, streams, Local(), runtime, kernels=kernels)[1].float()


def distance(one: Tensor, other: Tensor) -> float:
    """The relative RMS difference."""
    return float((one - other).norm() / other.norm())
