"""Which part of the model an operation belongs to, by the functions that called it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_COUNTING = {str(Path(_HERE, name)) for name in ("counter.py", "parts.py", "traffic.py")}

# The innermost function of the call that is in here decides. Methods are CLASS.METHOD, also of
# classes that inherit them; a Linear is CLASS.ATTRIBUTE of the module that calls it.
PARTS: Mapping[str, str] = {
    "STDiT3.embed": "patch embedding",
    "STDiT3.tables": "time embedding",
    "STDiT3.text_kv": "text",
    "STDiT3.rotary": "rotary embedding",
    "rotate": "rotary embedding",
    "RMSNorm.forward": "query and key norm",
    "rms_norm": "query and key norm",
    "modulated_norm": "norm and modulation",
    "Block._modulation": "norm and modulation",
    "SelfAttention.within_frames": "spatial attention",
    "SpatialBlock.attn.proj": "spatial attention",
    "SelfAttention.heads_by_position": "temporal attention",
    "TemporalBlock._along_time": "temporal attention",
    "TemporalBlock.attn.proj": "temporal attention",
    "CrossAttention.query": "cross-attention",
    "CrossAttention.forward": "cross-attention",
    "CrossAttention.key_value": "text",
    "Mlp.forward": "MLP",
    "Block.to_text": "gates and residuals",
    "Block.to_mlp": "gates and residuals",
    "Block.through_mlp": "gates and residuals",
    "_Attention.attend": "tiles",
    "_Attention.finish": "tiles",
    "PlainStep.attend": "tiles",
    "PlainStep.rest": "tiles",
    "by_tokens": "tiles",
    # The folded step.
    "_layer_norm": "norm and modulation",
    "fold": "folded weights",
    "FoldedStep._matrices": "folded weights",
    "head_norm": "query and key norm",
    "head_norm_": "query and key norm",
    "turn": "rotary embedding",
    "_heads_in_frames": "spatial attention",
    "_within_frames": "spatial attention",
    "_along_time": "temporal attention",
    "_cross_attention": "cross-attention",
    "_to_mlp": "norm and modulation",
    "_mlp": "MLP",
    "FoldedStep.rest": "spatial attention",
    "FoldedStep.along_time": "temporal attention",
    "FoldedStep.attend": "tiles",
    "FinalLayer.forward": "head",
    "Velocity.__call__": "guidance",
}


def part_of_call(parts: Mapping[str, str]) -> str:
    """The part that the running operation belongs to; the innermost function's name without one."""
    first = ""
    for names in _callers(sys._getframe(1)):
        for name in names:
            if name in parts:
                return parts[name]
        first = first or names[0]
    return first


def _callers(frame: FrameType | None) -> Iterator[list[str]]:
    """The names of each calling function, the innermost first, without torch's own."""
    called: nn.Module | None = None  # the module of torch that the next function called
    while frame is not None:
        file = frame.f_code.co_filename
        owner = frame.f_locals.get("self")
        if file.startswith(_TORCH):
            called = owner if isinstance(owner, nn.Module) else called
        elif file not in _COUNTING:
            if called is not None and (name := _attribute(owner, called)):
                yield [f"{cls.__name__}.{name}" for cls in type(owner).__mro__]
            called = None
            method = frame.f_code.co_name
            if owner is None:
                yield [method]
            else:
                yield [f"{cls.__name__}.{method}" for cls in type(owner).__mro__]
        frame = frame.f_back


def _attribute(owner: Any, module: nn.Module) -> str | None:
    """What a module calls another one that lies in it; None for one that does not."""
    if not isinstance(owner, nn.Module) or owner is module:
        return None
    return next((name for name, one in owner.named_modules() if one is module), None)
