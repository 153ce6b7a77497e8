"""Sizes of the four models, as published or as their config.json say, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_sp.models.configs import read_dit, read_t5, read_vae2d, read_vae3d
from opensora_sp.request.request import Checkpoints

# Both VAEs at the published widths, in weights; the second number is without the encoders.
_VAE_WEIGHTS, _VAE_DECODER_WEIGHTS = 393_341_015, 214_756_295


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Defaults are the published models: STDiT3-XL/2, T5 v1.1 XXL, the OpenSora VAE.

    vae_widths: channels of the spatial VAE's levels; filters: of the temporal one's finest level.
    """

    channels: int = 1152
    depth: int = 28
    mlp_ratio: float = 4.0
    caption: int = 4096
    tokens: int = 300
    t5_width: int = 4096
    t5_inner: int = 4096
    t5_hidden: int = 10240
    t5_layers: int = 24
    t5_heads: int = 64
    t5_vocabulary: int = 32128
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    filters: int = 128

    @classmethod
    def read(cls, checkpoints: Checkpoints) -> ModelSizes:
        """From the directories' config.json. Raises CheckpointError as loading them does."""
        usual = cls()
        dit, t5 = read_dit(checkpoints.dit), read_t5(checkpoints.t5)
        spatial = read_vae2d(checkpoints.vae2d)
        temporal = read_vae3d(checkpoints.vae3d)["vae_temporal"]
        heads = t5.get("num_heads", usual.t5_heads)
        return cls(
            channels=dit.get("hidden_size", usual.channels),
            depth=dit.get("depth", usual.depth),
            mlp_ratio=dit.get("mlp_ratio", usual.mlp_ratio),
            caption=dit.get("caption_channels", usual.caption),
            tokens=dit.get("model_max_length", usual.tokens),
            t5_width=t5.get("d_model", usual.t5_width),
            t5_inner=t5.get("d_kv", usual.t5_inner // usual.t5_heads) * heads,
            t5_hidden=t5.get("d_ff", usual.t5_hidden),
            t5_layers=t5.get("num_layers", usual.t5_layers),
            t5_heads=heads,
            t5_vocabulary=t5.get("vocab_size", usual.t5_vocabulary),
            vae_widths=tuple(spatial.get("block_out_channels", usual.vae_widths)),
            filters=temporal.get("filters") or usual.filters,
        )

    @property
    def pair_weights(self) -> int:
        """Weights of one spatial and one temporal block."""
        c, hidden = self.channels, int(self.channels * self.mlp_ratio)
        attention = 4 * c * c + 4 * c + 2 * 72
        crossed = 4 * c * c + 4 * c
        return 2 * (6 * c + attention + crossed + 2 * c * hidden + hidden + c)

    @property
    def folded_weights(self) -> int:
        """Weights that a folded step keeps of a pair of blocks: qkv, proj and both of the MLP."""
        return int(2 * (4 + 2 * self.mlp_ratio) * self.channels**2)

    @property
    def transformer_weights(self) -> int:
        """All weights of the transformer."""
        c = self.channels
        embedders = 17 * c + 2 * (257 * c + c * c + c) + 6 * (c * c + c)
        text = (self.caption + 1) * c + c * c + c + self.tokens * self.caption
        return self.depth * self.pair_weights + embedders + text + 34 * c + 32

    @property
    def t5_layer_weights(self) -> int:
        """Weights of one layer of the text encoder."""
        d = self.t5_width
        return 4 * d * self.t5_inner + 3 * d * self.t5_hidden + 2 * d

    @property
    def t5_weights(self) -> int:
        """All weights of the text encoder."""
        return self.t5_other_weights + self.t5_layers * self.t5_layer_weights

    @property
    def t5_other_weights(self) -> int:
        """Of the text encoder, the weights outside its layers: token embeddings."""
        return self.t5_vocabulary * self.t5_width

    def t5_layer_bytes(self, item: int, *, int8: bool) -> int:
        """One layer of the text encoder as it is kept: matrices in 8 bits have a scale per row."""
        if not int8:
            return self.t5_layer_weights * item
        rows = 3 * self.t5_inner + 2 * self.t5_width + 2 * self.t5_hidden
        return self.t5_layer_weights - 2 * self.t5_width + 4 * rows + 2 * self.t5_width * item

    def vae_weights(self, *, encoder: bool) -> int:
        """Weights of both VAEs, scaled from the published widths."""
        scale = (self.vae_widths[0] / 128) ** 2
        return int(scale * (_VAE_WEIGHTS if encoder else _VAE_DECODER_WEIGHTS))
