"""Run with TRITON_INTERPRET=1: compares the Triton kernels with plain torch, prints JSON.

A process of its own, as Triton's interpreter has to be chosen before Triton is imported.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from opensora_sp.engine.blocks import Local, Stream, run_blocks
from opensora_sp.models.folded_step import FoldedStep
from opensora_sp.models.kernels import fused, triton_norms
from opensora_sp.models.kernels.active import Kernels, using
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config
from opensora_sp.request.runtime import Runtime


def block_difference(*, in_place: bool) -> float:
    """A pair of narrow blocks by fused kernels and by plain torch, in float32: the largest error.

    Two groups of frames and a part of the patches, as a masked run in tiles has them.
    """
    torch.manual_seed(0)
    config = STDiT3Config(hidden_size=96, depth=1, num_heads=4, caption_channels=8)
    model = STDiT3(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    spatial, temporal = model.pairs[0]
    batch, frames, patches = 2, 3, 5
    x = torch.randn(batch, frames, patches, 96)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    tables = model.tables(torch.full((batch,), 500.0), torch.full((batch,), 24.0), mask)
    text = [spatial.cross_attn.key_value(torch.randn(n, 96)) for n in (7, 4)]

    def computed(kernels: Kernels) -> torch.Tensor:
        whole = x.clone()
        part = whole[:, :, 1:4]
        with using(kernels), torch.no_grad():
            h = spatial.attn_in(part, tables)
            attended = spatial.attend(h.flatten(0, 1)).unflatten(0, (batch, frames))
            part = spatial.rest(part, attended, tables, text, in_place=in_place)
            return temporal(part, tables, text, model.rotary(frames), in_place=in_place)

    plain, by_kernels = computed(Kernels()), computed(Kernels(fused=triton_norms))
    return float((by_kernels - plain).norm() / plain.norm())


def folded_difference(tokens: int | None) -> float:
    """The same of a pair of folded blocks: two groups of frames, in one piece or in tiles."""
    torch.manual_seed(0)
    config = STDiT3Config(hidden_size=96, depth=1, num_heads=4, caption_channels=8)
    model = STDiT3(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, mask = torch.randn(2, 3, 5, 96), torch.tensor([[True, False, True], [True, True, True]])

    def computed(kernels: Kernels) -> torch.Tensor:
        with using(kernels), torch.no_grad():
            times, rates = torch.full((2,), 500.0), torch.full((2,), 24.0)
            tables = model.tables(times, rates, mask).grouped(mask.tolist())
            text = model.text_kv([torch.ones(n, 8) for n in (7, 4)])
            stream = Stream(x.clone(), tables, text)
            step = FoldedStep(tokens)
            return run_blocks(model, [stream], Local(), Runtime(tokens=tokens), kernels=step)[0]

    plain, by_kernels = computed(Kernels()), computed(Kernels(fused=triton_norms))
    return float((by_kernels - plain).norm() / plain.norm())


def main() -> None:
    """Print the errors, and how often kernels were called where they should be and not."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    cpu = torch.device("cpu")
    errors = {
        f"{dtype} {heads}x{width}": fused.difference(triton_norms, cpu, dtype, heads, width)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for heads, width in ((16, 72), (3, 24))
    }
    calls = []
    real = triton_norms.residual_norm_

    def counted(*given: torch.Tensor, **more: Any) -> torch.Tensor:
        calls.append(len(given))
        return real(*given, **more)

    triton_norms.residual_norm_ = counted  # type: ignore[assignment]
    blocks = {str(where): block_difference(in_place=where) for where in (True, False)}
    used = len(calls)
    folded = {str(tokens): folded_difference(tokens) for tokens in (None, 4)}
    used_folded = len(calls) - used
    x = torch.ones(1, 1, 2, 8)
    with using(Kernels(fused=triton_norms)), torch.enable_grad():
        fused.modulated_norm(x, x[:, :, :1], x[:, :, :1])
    with_gradients = len(calls) - used - used_folded
    q = torch.ones(1, 2, 3, 4, 8)
    heads_apart = q.transpose(2, 3).contiguous().transpose(2, 3)
    print(
        json.dumps(
            {
                "errors": errors,
                "blocks": blocks,
                "folded": folded,
                "calls": used,
                "calls folded": used_folded,
                "calls with gradients": with_gradients,
                "takes": [triton_norms.takes_heads(x, x) for x in (q, heads_apart)],
                "limits": {str(dtype): limit for dtype, limit in fused.LIMITS.items()},
                "empty": list(triton_norms.residual_norm_(torch.ones(2, 0, 3, 8)).shape),
            }
        )
    )


if __name__ == "__main__":
    main()
