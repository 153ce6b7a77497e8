"""What is measured: the published sizes, or reduced ones that a CPU computes in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opensora_sp.base.geometry import latent_shape
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.models.temporal_vae import TemporalVAEConfig
from opensora_sp.planner.models import ModelSizes
from opensora_sp.request.sizes import resolve_frames, resolve_size
from scripts.make_random_checkpoints import T5_CONFIG, VAE2D_CONFIG


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of a video. height, width: pixels. frames: of the video, not of the latents."""

    name: str
    height: int
    width: int
    frames: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        return latent_shape(self.frames, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The models and the videos of a day.

    steps: the cases of a guided step, in the order of their value. largest: the case of the memory
    modes, of the shards and of attention. decode: frames of its pictures, shorter ones first.
    tokens: attention's tokens at once.
    planned: the models as the planner knows them; None where its formulas are not made for them.
    """

    name: str
    transformer: STDiT3Config
    spatial_vae: Mapping[str, Any]
    temporal_vae: TemporalVAEConfig
    t5: Mapping[str, Any]
    steps: Sequence[Case]
    largest: Case
    decode: Sequence[int]
    tokens: int
    ranks: Sequence[int] = (2, 4, 8)
    rounds: int = 5
    planned: ModelSizes | None = field(default_factory=ModelSizes)


def published(resolution: str, duration: str) -> Case:
    """A size of Open-Sora 1.2's table, 9:16."""
    height, width = resolve_size(resolution, "9:16")
    return Case(
        name=f"{resolution} {duration}",
        height=height,
        width=width,
        frames=resolve_frames(duration),
    )


def full() -> Sizes:
    """The published models and sizes."""
    largest = published("720p", "16s")
    return Sizes(
        name="full",
        transformer=STDiT3Config(),
        spatial_vae=VAE2D_CONFIG,
        temporal_vae=TemporalVAEConfig(),
        t5={**T5_CONFIG, "num_layers": 24, "num_decoder_layers": 24},
        steps=[published("240p", "2s"), largest, published("720p", "2s"), published("480p", "2s")],
        largest=largest,
        decode=[51, 408],
        tokens=65536,
    )


def reduced() -> Sizes:
    """Head width 72 and the shapes of the published models, small enough for a CPU."""
    case = Case(name="64x96 17", height=64, width=96, frames=17)
    return replace(
        full(),
        name="reduced",
        transformer=STDiT3Config(
            hidden_size=144, depth=2, num_heads=2, caption_channels=64, model_max_length=20
        ),
        spatial_vae={
            **VAE2D_CONFIG,
            "block_out_channels": [16, 16, 16, 16],
            "norm_num_groups": 8,
            "layers_per_block": 1,
        },
        temporal_vae=TemporalVAEConfig(filters=16, num_groups=8, num_res_blocks=1),
        t5={
            **T5_CONFIG,
            "d_model": 64,
            "d_ff": 128,
            "num_heads": 2,
            "vocab_size": 100,
            "num_layers": 2,
            "num_decoder_layers": 2,
        },
        steps=[case, Case(name="64x96 34", height=64, width=96, frames=34)],
        largest=case,
        decode=[4, 17],
        tokens=512,
        ranks=(2, 4),
        rounds=3,
        planned=None,
    )


SIZES = {"full": full, "reduced": reduced}
