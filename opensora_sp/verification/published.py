"""Names and shapes of all weights at the published sizes, from models on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]
PUBLISHED = ("dit", "t5", "vae3d")  # the models that have weights of their own

SDXL_VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
T5_XXL: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def published_shapes(model: str) -> tuple[Shapes, frozenset[str]]:
    """Names and shapes of `dit`, `t5` or `vae3d`, and the aliases that a file may lack."""
    aliases: frozenset[str] = frozenset()
    with torch.device("meta"):
        if model == "dit":
            from opensora_sp.models.stdit3 import STDiT3, STDiT3Config

            module: nn.Module = STDiT3(STDiT3Config())
        elif model == "vae3d":
            from opensora_sp.models.temporal_vae import TemporalVAEConfig
            from opensora_sp.models.video_vae import VideoVAE, VideoVAEConfig

            module = VideoVAE(VideoVAEConfig(spatial=SDXL_VAE, temporal=TemporalVAEConfig()))
        elif model == "t5":
            from transformers import T5Config, T5EncoderModel

            module = T5EncoderModel(T5Config(**T5_XXL))
            aliases = frozenset({"encoder.embed_tokens.weight"})
        else:
            raise ValueError(f"no published model {model!r}")
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}, aliases
