"""The temporal VAE of Open-Sora 1.2: causal 3D convolutions that shorten time by four.

It runs on the latents of the spatial VAE, so its input has 4 channels, not 3. Attribute names
follow the published checkpoint, whose weights are `temporal_vae.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_sp.base.errors import CheckpointError

_NORM_EPS = 1e-5
_LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class TemporalVAEConfig:
    """Sizes of the temporal VAE; the defaults are the published ones (`VAE_Temporal_SD`)."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        between = len(self.channel_multipliers) - 1
        if between < 0 or len(self.temporal_downsample) != between:
            raise CheckpointError(
                f"vae_temporal.temporal_downsample has {len(self.temporal_downsample)} entries: "
                f"it needs one fewer than channel_multipliers {list(self.channel_multipliers)}"
            )
        if self.filters % self.num_groups:
            raise CheckpointError(
                f"vae_temporal.filters is {self.filters}: it must be a multiple of the "
                f"{self.num_groups} normalisation groups"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TemporalVAEConfig:
        """From `vae_temporal` of a config.json: absent keys as published, unknown ones ignored."""
        known: dict[str, Any] = {}
        for name, default in cls().__dict__.items():
            value = values.get(name)
            if value is not None:
                known[name] = tuple(value) if isinstance(default, tuple) else value
        return cls(**known)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.filters * multiplier for multiplier in self.channel_multipliers)

    @property
    def time_factor(self) -> int:
        """How many frames share one latent frame."""
        factor: int = 2 ** sum(bool(flag) for flag in self.temporal_downsample)
        return factor


class CausalConv3d(nn.Module):
    """Convolution over [B, C, T, H, W] that sees no later frame; only T shrinks, by `stride`."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.time_pad = kernel - stride
        around = kernel // 2
        self.conv = nn.Conv3d(
            channels_in,
            channels_out,
            kernel,
            stride=(stride, 1, 1),
            padding=(0, around, around),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.time_pad:
            x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0))
        out: Tensor = self.conv(x)
        return out


class ResBlock(nn.Module):
    """Two (GroupNorm, SiLU, causal 3x3x3) around a shortcut, [B, C_in, ...] -> [B, C_out, ...]."""

    def __init__(self, channels_in: int, channels_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels_in, eps=_NORM_EPS)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, channels_out, eps=_NORM_EPS)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3, bias=False)
        self.conv3: nn.Module | None = None
        if channels_in != channels_out:
            self.conv3 = CausalConv3d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


def _res_blocks(channels_in: int, channels_out: int, config: TemporalVAEConfig) -> nn.Sequential:
    return nn.Sequential(
        *(
            ResBlock(channels_in if index == 0 else channels_out, channels_out, config.num_groups)
            for index in range(config.num_res_blocks)
        )
    )


class TemporalEncoder(nn.Module):
    """Spatial latents [B, 4, F, h, w], F a multiple of the time factor -> [B, 8, T, h, w]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        channels = config.filters
        for level, width in enumerate(widths):
            self.block_res_blocks.append(_res_blocks(channels, width, config))
            channels = width
            if level < len(widths) - 1:
                halves = config.temporal_downsample[level]
                self.conv_blocks.append(
                    CausalConv3d(width, width, 3, stride=2) if halves else nn.Identity()
                )
        self.res_blocks = _res_blocks(channels, channels, config)
        self.norm1 = nn.GroupNorm(config.num_groups, channels, eps=_NORM_EPS)
        self.conv2 = CausalConv3d(channels, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = self.res_blocks(x)
        x = self.conv2(F.silu(self.norm1(x)))
        return x


class TemporalDecoder(nn.Module):
    """Latents [B, 4, T, h, w] -> spatial latents [B, 4, T * time factor, h, w]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], 3)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config)
        # Both lists are indexed by level, finest first, and run from the coarsest level down.
        coarser = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(above, width, config) for above, width in zip(coarser, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if doubles else nn.Identity()
            for width, doubles in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.doubles = config.temporal_downsample
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0], eps=_NORM_EPS)
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0 and self.doubles[level - 1]:
                x = _channels_to_time(self.conv_blocks[level - 1](x))
        x = self.conv_out(F.silu(self.norm1(x)))
        return x


def _channels_to_time(x: Tensor) -> Tensor:
    """[B, C * 2, T, H, W] -> [B, C, T * 2, H, W], the 2 being the faster index on both sides."""
    batch, channels, frames, height, width = x.shape
    x = x.reshape(batch, channels // 2, 2, frames, height, width)
    return x.transpose(2, 3).reshape(batch, channels // 2, 2 * frames, height, width)


class TemporalVAE(nn.Module):
    """Encodes and decodes one independent chunk of spatial latents."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.time_factor = config.time_factor
        self.encoder: nn.Module | None = TemporalEncoder(config)
        self.quant_conv: nn.Module | None = CausalConv3d(
            2 * config.latent_embed_dim, 2 * config.embed_dim, 1
        )
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = TemporalDecoder(config)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a chunk of `frames` frames."""
        return -(-frames // self.time_factor)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior (mean, std), each [B, 4, T, h, w], of one chunk x [B, 4, F, h, w]."""
        assert self.encoder is not None, "this temporal VAE was loaded without its encoder"
        assert self.quant_conv is not None
        missing = -x.shape[2] % self.time_factor
        # In front, so that a clip's last frame is always the last of its latent frame.
        x = F.pad(x, (0, 0, 0, 0, missing, 0))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(*_LOGVAR_RANGE))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """Spatial latents [B, 4, frames, h, w] of one chunk z [B, 4, ceil(frames / 4), h, w]."""
        if z.shape[2] != self.latent_frames(frames):
            raise ValueError(
                f"{z.shape[2]} latent frames do not make {frames} frames: "
                f"that takes {self.latent_frames(frames)}"
            )
        x: Tensor = self.decoder(self.post_quant_conv(z))
        return x[:, :, x.shape[2] - frames :]
