"""The video VAE of Open-Sora 1.2: a spatial VAE per frame, then a temporal VAE per chunk.

A video is cut into chunks of `micro_frame_size` frames that know nothing of each other. The unit
of decoding is fixed (one chunk of one sample through the temporal VAE, then its frames through
the spatial VAE in groups of `micro_batch_size`), so whoever decodes a unit gets the same pixels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_sp.base.errors import CheckpointError
from opensora_sp.base.geometry import MICRO_FRAME_SIZE, Chunk, split_chunks
from opensora_sp.models.checkpoint import WeightFiles, load_module, read_config
from opensora_sp.models.configs import VAE2D, read_vae3d, vae2d_home
from opensora_sp.models.temporal_vae import TemporalVAE, TemporalVAEConfig

# Open-Sora scales spatial latents by this factor whatever the spatial VAE's own config.json says:
# the temporal VAE was trained on latents of that scale.
SPATIAL_SCALE = 0.18215
MICRO_BATCH_SIZE = 4

NoiseSource = Callable[[str, tuple[int, ...]], Tensor]

_ENCODER_PARTS = (
    "spatial_vae.module.encoder.",
    "spatial_vae.module.quant_conv.",
    "temporal_vae.encoder.",
    "temporal_vae.quant_conv.",
)
_TEMPORAL_TYPES = ("VAE_Temporal_SD", "VAE_Temporal")


@dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """Sizes of both VAEs; None for a micro size means everything at once."""

    spatial: Mapping[str, Any]  # the arguments of diffusers' AutoencoderKL
    temporal: TemporalVAEConfig
    micro_frame_size: int | None = MICRO_FRAME_SIZE
    micro_batch_size: int | None = MICRO_BATCH_SIZE

    def __post_init__(self) -> None:
        for name in ("micro_frame_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise CheckpointError(f"{name} is {value!r}: it must be an integer of at least 1")

    @classmethod
    def read(cls, vae3d: Path, vae2d: Path) -> VideoVAEConfig:
        """Read config.json of both directories; `vae2d` may hold it itself or in its `vae/`.

        Raises:
            CheckpointError: a directory or config.json is absent or describes another model.
        """
        read_config(vae3d)  # its refusals of a directory that is not there
        video = read_vae3d(Path(vae3d))
        home = vae2d_home(Path(vae2d))
        spatial = read_config(home, VAE2D)
        kind = spatial.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise CheckpointError(f"{home / 'config.json'} is of a {kind}, not of an AutoencoderKL")
        temporal = video["vae_temporal"]
        kind = temporal.get("type", _TEMPORAL_TYPES[0])
        if kind not in _TEMPORAL_TYPES:
            raise CheckpointError(
                f"vae_temporal.type in {Path(vae3d) / 'config.json'} is {kind!r}: "
                f"this program knows {' and '.join(_TEMPORAL_TYPES)}"
            )
        return cls(
            spatial=spatial,
            temporal=TemporalVAEConfig.from_dict(temporal),
            micro_frame_size=video.get("micro_frame_size", MICRO_FRAME_SIZE),
            micro_batch_size=video["vae_2d"].get("micro_batch_size", MICRO_BATCH_SIZE),
        )


class SpatialVAE(nn.Module):
    """The AutoencoderKL, held as `module` because the published weights are named so."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        AutoencoderKL = _autoencoder_class()  # noqa: N806
        known = inspect.signature(AutoencoderKL.__init__).parameters
        given = {k: v for k, v in config.items() if k in known}
        try:
            self.module: Any = AutoencoderKL(**given)
        except Exception as error:  # what a bad value raises differs by version and by key
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(
                f"the spatial VAE's config.json does not describe an AutoencoderKL: {reason}"
            ) from error

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        factor: int = 2 ** (len(self.module.config.block_out_channels) - 1)
        return factor

    @property
    def pixel_width(self) -> int:
        """Channels that its decoder computes for every pixel, after the last upsampling."""
        widths = self.module.config.block_out_channels
        return int(widths[min(1, len(widths) - 1)])

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior (mean, std), each [N, 4, h, w] and unscaled, of frames [N, 3, H, W]."""
        posterior = self.module.encode(frames, return_dict=False)[0]
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [N, 3, 8h, 8w] of unscaled latents [N, 4, h, w]."""
        frames: Tensor = self.module.decode(latents, return_dict=False)[0]
        return frames


class VideoVAE(nn.Module):
    """Both VAEs and the normalisation of their latents; single-device, deterministic.

    Latents z [B, 4, T, h, w] are normalised as the diffusion model wants them; pixels are in
    [-1, 1]. `micro_frame_size` other than the trained 17 changes the result.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = SpatialVAE(config.spatial)
        self.temporal_vae = TemporalVAE(config.temporal)
        per_channel = (1, config.temporal.embed_dim, 1, 1, 1)
        self.register_buffer("shift", torch.zeros(per_channel))
        self.register_buffer("scale", torch.ones(per_channel))

    @classmethod
    def on_meta(cls, config: VideoVAEConfig) -> VideoVAE:
        """Names and shapes only; nothing is allocated."""
        _autoencoder_class()  # imported first: what an import creates must not land on meta
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def load(
        cls,
        vae3d: Path,
        vae2d: Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        with_encoder: bool,
        micro_frame_size: int | None = None,
        micro_batch_size: int | None = None,
        in_host_memory: bool = False,
    ) -> VideoVAE:
        """Load the published directories; micro sizes default to those of the checkpoint.

        Without the encoder its weights are checked but neither read nor kept. in_host_memory:
        all weights stay in host memory, to be copied to `device` when they are used.

        Raises:
            CheckpointError: a directory, file or weight is absent or does not fit.
        """
        config = VideoVAEConfig.read(vae3d, vae2d)
        if micro_frame_size is not None:
            config = replace(config, micro_frame_size=micro_frame_size)
        if micro_batch_size is not None:
            config = replace(config, micro_batch_size=micro_batch_size)
        vae = cls.on_meta(config)
        load_module(
            vae,
            WeightFiles.open(Path(vae3d), ("model", "pytorch_model")),
            dtype=dtype,
            device=device,
            aliases=older_attention_names(),
            keep_float32=lambda name: name in ("shift", "scale"),
            skip=None if with_encoder else lambda name: name.startswith(_ENCODER_PARTS),
            in_host_memory=(lambda _: True) if in_host_memory else None,
        )
        if not with_encoder:
            vae.drop_encoder()
        return vae

    @classmethod
    def check(cls, vae3d: Path, vae2d: Path) -> tuple[int, int]:
        """Compare every weight's name and shape, reading none.

        Returns by how much time and space shrink. Raises CheckpointError as `load`.
        """
        with torch.device("meta"):
            vae = cls(VideoVAEConfig.read(vae3d, vae2d))
        weights = WeightFiles.open(Path(vae3d), ("model", "pytorch_model"))
        names = older_attention_names()
        load_module(
            vae, weights, dtype=torch.float32, device="cpu", aliases=names, skip=lambda _: True
        )
        return vae.temporal_vae.time_factor, vae.spatial_vae.factor

    def with_micro_sizes(self, micro_frame_size: int, micro_batch_size: int) -> VideoVAE:
        """This VAE, on the same weights, with other chunk and batch sizes; itself unchanged.

        micro_frame_size: frames of a chunk. micro_batch_size: frames that the spatial VAE takes
        at once.
        """
        other = copy.copy(self)  # shares parameters and buffers
        other.config = replace(
            self.config, micro_frame_size=micro_frame_size, micro_batch_size=micro_batch_size
        )
        return other

    def drop_encoder(self) -> None:
        """Forget the encoders, which only references need; `encode` then refuses."""
        self.spatial_vae.module.encoder = None
        self.spatial_vae.module.quant_conv = None
        self.temporal_vae.encoder = None
        self.temporal_vae.quant_conv = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the VAEs compute in."""
        return self.temporal_vae.post_quant_conv.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.temporal_vae.post_quant_conv.conv.weight.device

    def chunks(self, num_frames: int) -> list[Chunk]:
        """The independent chunks of a video of `num_frames` frames, in order."""
        return split_chunks(num_frames, self.config.micro_frame_size, self.temporal_vae.time_factor)

    def encode(self, video: Tensor, draw: NoiseSource | None = None) -> Tensor:
        """Normalised latents of a video.

        Args:
            video: [B, 3, F, H, W] in [-1, 1] on any device.
            draw: `draw(purpose, shape)` gives standard normal noise, float32 on the CPU, for
                "spatial" [B, 4, F, h, w] and then "temporal" [B, 4, T, h, w] posterior;
                None takes the posteriors' means.

        Returns:
            z [B, 4, T, h, w] float32 on this model's device; h, w are H, W // 8.
        """
        if self.temporal_vae.encoder is None:
            raise RuntimeError("this VideoVAE was loaded without its encoder")
        batch, _, num_frames, height, width = video.shape
        chunks = self.chunks(num_frames)
        side = (height // self.spatial_vae.factor, width // self.spatial_vae.factor)
        channels = (self.config.temporal.in_out_channels, self.config.temporal.embed_dim)
        count = sum(chunk.latents for chunk in chunks)
        spatial = draw("spatial", (batch, channels[0], num_frames, *side)) if draw else None
        temporal = draw("temporal", (batch, channels[1], count, *side)) if draw else None

        z = torch.empty(batch, channels[1], count, *side, device=self.device)
        for sample in range(batch):
            for chunk in chunks:
                frames = slice(chunk.frame_start, chunk.frame_start + chunk.frames)
                latents = slice(chunk.latent_start, chunk.latent_start + chunk.latents)
                noise = None if spatial is None else spatial[sample, :, frames]
                x = self._encode_frames(video[sample, :, frames], noise)
                noise = None if temporal is None else temporal[sample, :, latents]
                mean, std = self.temporal_vae.encode(x[None])
                z[sample, :, latents] = self._pick(mean[0], std[0], noise)
        return (z - self.shift) / self.scale

    def _encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled spatial latents [4, f, h, w] of frames [3, f, H, W], in groups."""
        size = self.config.micro_batch_size or frames.shape[1]
        groups = []
        for start in range(0, frames.shape[1], size):
            group = frames[:, start : start + size].to(self.device, self.dtype)
            mean, std = self.spatial_vae.encode(group.transpose(0, 1))
            draw = None if noise is None else noise[:, start : start + size].transpose(0, 1)
            groups.append(self._pick(mean, std, draw))
        return torch.cat(groups).transpose(0, 1) * SPATIAL_SCALE

    def _pick(self, mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
        """A sample of the posterior with the given noise, or its mean without."""
        return mean if noise is None else mean + std * noise.to(self.device, self.dtype)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """The whole video [B, 3, F, 8h, 8w] of z [B, 4, T, h, w], in this model's dtype.

        Raises:
            ValueError: T is not what `num_frames` frames encode to.
        """
        video: Tensor | None = None
        start = 0
        for frames in self.decode_chunks(z, num_frames):
            if video is None:
                batch, channels, _, height, width = frames.shape
                video = frames.new_empty(batch, channels, num_frames, height, width)
            video[:, :, start : start + frames.shape[2]] = frames
            start += frames.shape[2]
        assert video is not None
        return video

    def decode_chunks(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Yield the video of z [B, 4, T, h, w] chunk by chunk, [B, 3, f, 8h, 8w], in order.

        Only one chunk of pixels exists at a time.

        Raises:
            ValueError: T is not what `num_frames` frames encode to.
        """
        chunks = self.chunks(num_frames)
        count = sum(chunk.latents for chunk in chunks)
        if z.shape[2] != count:
            raise ValueError(f"{num_frames} frames have {count} latent frames, not {z.shape[2]}")
        for chunk in chunks:
            part = z[:, :, chunk.latent_start : chunk.latent_start + chunk.latents]
            yield self.decode_frames(self.decode_chunk_temporal(part, chunk.frames))

    def decode_chunk_temporal(self, z_chunk: Tensor, frames: int) -> Tensor:
        """Scaled spatial latents [B, 4, frames, h, w] of one chunk's z [B, 4, t, h, w]."""
        z = (z_chunk.to(self.device, torch.float32) * self.scale + self.shift).to(self.dtype)
        return torch.cat([self.temporal_vae.decode(sample, frames) for sample in z.split(1)])

    def decode_groups(
        self, z_chunk: Tensor, frames: int, start: int = 0, stop: int | None = None
    ) -> Iterator[Tensor]:
        """Yield frames start..stop of one chunk's z [B, 4, t, h, w], a group at a time.

        Each [B, 3, f, 8h, 8w]; `start` lies on the border of a group. Only one group of pixels
        exists at a time.
        """
        latents = self.decode_chunk_temporal(z_chunk, frames)
        size, stop = self.config.micro_batch_size or frames, frames if stop is None else stop
        for first in range(start, stop, size):
            yield self.decode_frames(latents[:, :, first : min(first + size, stop)])

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, f, 8h, 8w] of scaled spatial latents [B, 4, f, h, w], in groups.

        Equal to decoding each group of `micro_batch_size` frames by itself.
        """
        size = self.config.micro_batch_size or latents.shape[2]
        video: Tensor | None = None
        for sample in range(latents.shape[0]):
            for start in range(0, latents.shape[2], size):
                group = latents[sample, :, start : start + size].transpose(0, 1) / SPATIAL_SCALE
                pixels = self.spatial_vae.decode(group.to(self.device, self.dtype))
                if video is None:
                    shape = (latents.shape[0], pixels.shape[1], latents.shape[2], *pixels.shape[2:])
                    video = pixels.new_empty(shape)
                video[sample, :, start : start + size] = pixels.transpose(0, 1)
        assert video is not None, "no frames to decode"
        return video


def _autoencoder_class() -> Any:
    """diffusers' AutoencoderKL; the import takes seconds, so only those who build one pay."""
    from diffusers import AutoencoderKL

    return AutoencoderKL


def older_attention_names() -> dict[str, str]:
    """Names that diffusers gave the attention's weights before 0.18, to today's."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return {
        f"spatial_vae.module.{half}.mid_block.attentions.0.{old}.{leaf}": (
            f"spatial_vae.module.{half}.mid_block.attentions.0.{new}.{leaf}"
        )
        for half in ("encoder", "decoder")
        for old, new in names.items()
        for leaf in ("weight", "bias")
    }
