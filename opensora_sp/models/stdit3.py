"""STDiT3, Open-Sora 1.2's diffusion transformer, as single-device segments.

The block loop in `opensora_sp.engine.blocks` calls the segments in order. Nothing here knows of
ranks. Activations are [B,T,S,C] from the embedder to the head, so a shard of T or S is just a
smaller tensor. Latents come and go in patch form [B,T,S,P·P·4], each patch ordered (channel, row,
column); see `patchify`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_sp.base.errors import CheckpointError
from opensora_sp.base.geometry import PATCH, patch_grid
from opensora_sp.base.transfer import to_device
from opensora_sp.models.compiler import Run, directly
from opensora_sp.models.configs import DIT, check_heads, checked, read_dit
from opensora_sp.models.frame_groups import FrameGroups
from opensora_sp.models.kernels.fused import modulated_norm, residual_norm_
from opensora_sp.models.kernels.reference import attend
from opensora_sp.models.layers import (
    CrossAttention,
    KeyValue,
    Mlp,
    SelfAttention,
    SinusoidEmbedder,
    position_table,
    rotary_tables,
)
from opensora_sp.models.offload import LayerOffload


@dataclass(frozen=True, kw_only=True)
class STDiT3Config:
    """The transformer's sizes; defaults are the published STDiT3-XL/2."""

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    in_channels: int = 4
    caption_channels: int = 4096
    model_max_length: int = 300
    input_sq_size: int = 512
    qk_norm: bool = True
    pred_sigma: bool = True

    @property
    def out_channels(self) -> int:
        """Channels of the raw output; the first `in_channels` are the velocity."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: Path | str) -> STDiT3Config:
        """From a checkpoint's config.json; unknown keys are ignored, impossible values refused."""
        raw = checked(raw, DIT, source)
        config = cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        patch = list(raw.get("patch_size", (1, PATCH, PATCH)))
        if patch != [1, PATCH, PATCH]:
            raise CheckpointError(
                f"{source}: patch_size {patch} is not supported, only [1, 2, 2] (STDiT3-XL/2)"
            )
        if raw.get("skip_y_embedder"):
            raise CheckpointError(
                f"{source}: skip_y_embedder true is not supported (training only)"
            )
        check_heads(raw, source)
        return config

    @classmethod
    def load(cls, directory: Path) -> STDiT3Config:
        """Read `config.json` of a DiT checkpoint directory."""
        return cls.from_dict(read_dit(directory), directory / "config.json")


@dataclass(frozen=True)
class StepTables:
    """What one step's time and frame rate mean for all blocks; made once a step.

    t [B,T or 1,C] drives the head, blocks [B,T or 1,6,C] every block.
    groups: which frames have equal rows; None where nobody said.
    """

    t: Tensor
    blocks: Tensor
    groups: FrameGroups | None = None

    def grouped(self, keys: Sequence[Sequence[Hashable]]) -> StepTables:
        """The same tables, with groups: rows are equal where these keys [B][T or 1] are."""
        return replace(self, groups=FrameGroups.of_frames(self.blocks, keys))

    def frames(self, start: int, stop: int) -> StepTables:
        """The tables of frames start..stop; tables shared by all frames stay as they are."""
        if self.t.shape[1] == 1:
            return self
        groups = None if self.groups is None else self.groups.frames(start, stop)
        return StepTables(self.t[:, start:stop], self.blocks[:, start:stop], groups)

    @property
    def ungrouped(self) -> StepTables:
        """The same tables without groups: tensors alone."""
        return StepTables(self.t, self.blocks)


def patchify(z: Tensor) -> Tensor:
    """Latents [B,4,T,H,W] → patch form [B,T,S,16]; odd sides are zero-padded at the end."""
    height, width = z.shape[-2:]
    z = F.pad(z, (0, width % PATCH, 0, height % PATCH))
    z = z.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B,4,T,h,P,w,P]
    return z.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def unpatchify(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch form [B,T,S,C·4] → [B,C,T,H,W], cropped to `size` = (H, W)."""
    rows, _ = patch_grid(*size)
    z = patches.unflatten(3, (-1, PATCH, PATCH)).unflatten(2, (rows, -1))  # [B,T,h,w,C,P,P]
    z = z.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
    return z[..., : size[0], : size[1]]


def real_cells(size: tuple[int, int], channels: int = 4) -> Tensor:
    """Which cells of the patch form hold latents and which are padding: bool [S, channels·4]."""
    return patchify(torch.ones(1, channels, 1, *size))[0, 0] > 0


class Block(nn.Module):
    """What spatial and temporal blocks share: modulation, cross-attention, MLP."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        channels = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.zeros(6, channels))
        self.attn = SelfAttention(channels, config.num_heads, config.qk_norm)
        self.cross_attn = CrossAttention(channels, config.num_heads)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)

    def _modulation(self, tables: StepTables) -> tuple[Tensor, ...]:
        """shift, scale, gate of the attention, then of the MLP; each [B,T or 1,1,C]."""
        return (self.scale_shift_table + tables.blocks).unsqueeze(3).unbind(2)

    def attn_in(self, x: Tensor, tables: StepTables) -> Tensor:
        """x [B,T,S,C] → the self-attention's input, same shape."""
        shift, scale, *_ = self._modulation(tables)
        return modulated_norm(x, shift, scale)

    def rest(
        self,
        x: Tensor,
        attended: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
        *,
        in_place: bool = False,
        run: Run = directly,
    ) -> Tensor:
        """Everything after the self-attention, local to each token: [B,T,S,C] → [B,T,S,C].

        in_place: x is updated where it lies, which gradients do not allow. run: computes what is
        between the attentions.
        """
        _, _, gate, shift, scale, mlp_gate = self._modulation(tables)
        x, q = run(self.to_text, x, attended, gate, in_place)
        seen = self.cross_attn(q, text)
        del q
        x, h = run(self.to_mlp, x, seen, shift, scale, in_place)
        del seen
        out: Tensor = run(self.through_mlp, x, h, mlp_gate, in_place)
        return out

    def to_text(
        self, x: Tensor, attended: Tensor, gate: Tensor, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        """x and attended [B,T,S,C] → x with the self-attention in it, and its query of the text."""
        add = torch.Tensor.addcmul_ if in_place else torch.addcmul
        x = add(x, gate, self.attn.proj(attended))
        return x, self.cross_attn.query(x)

    def to_mlp(
        self, x: Tensor, seen: Tensor, shift: Tensor, scale: Tensor, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        """x [B,T,S,C] and what it saw of the text [B,T·S,C] → x with that, and MLP's input."""
        crossed = self.cross_attn.proj(seen.view(x.shape))
        if in_place:
            return x, residual_norm_(x, added=crossed, shift=shift, scale=scale)
        x = x + crossed
        return x, modulated_norm(x, shift, scale)

    def through_mlp(self, x: Tensor, h: Tensor, gate: Tensor, in_place: bool) -> Tensor:
        """x and the MLP's input [B,T,S,C] → x with the MLP in it; gate [B,T,1,C] or alike."""
        add = torch.Tensor.addcmul_ if in_place else torch.addcmul
        return add(x, gate, self.mlp(h))


class SpatialBlock(Block):
    """Self-attention within a frame. Split at the exchange: attn_in | attend | rest."""

    def attend(self, h: Tensor, run: Run = directly) -> Tensor:
        """Whole frames [F,S,C] → [F,S,C]; F may be 0."""
        return self.attn.within_frames(h, run)


class TemporalBlock(Block):
    """Self-attention along time at one position; local when every rank holds all frames."""

    def forward(
        self,
        x: Tensor,
        tables: StepTables,
        text: Sequence[KeyValue],
        rotary: tuple[Tensor, Tensor],
        *,
        in_place: bool = False,
        run: Run = directly,
    ) -> Tensor:
        """x [B,T,S,C] with all T frames → the same shape; in_place and run as for `rest`."""
        attended = self._along_time(x, tables, rotary, run)
        return self.rest(x, attended, tables, text, in_place=in_place, run=run)

    def heads(
        self, x: Tensor, tables: StepTables, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,S,C] → q, k, v of each position, along time: [B·S,H,T,D]."""
        return self.attn.heads_by_position(self.attn_in(x, tables), rotary)

    def _along_time(
        self, x: Tensor, tables: StepTables, rotary: tuple[Tensor, Tensor], run: Run
    ) -> Tensor:
        """Every position attends to itself in all frames: [B,T,S,C] → the same shape."""
        q, k, v = run(self.heads, x, tables.ungrouped, rotary)
        out = attend(q, k, v).unflatten(0, (x.shape[0], -1))  # [B,S,H,T,D]
        del q, k, v
        return out.permute(0, 3, 1, 2, 4).reshape(x.shape)


class PatchEmbedder(nn.Module):
    """Holds the patch convolution's weight; applied as a Linear, for its stride is its kernel."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, channels, (1, PATCH, PATCH), (1, PATCH, PATCH))

    def forward(self, patches: Tensor) -> Tensor:
        """[B,T,S,16] → [B,T,S,C]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TextEmbedder(nn.Module):
    """Projects T5's embeddings to C and holds the null embedding of unconditional guidance."""

    y_embedding: Tensor

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        shape = (config.model_max_length, config.caption_channels)
        self.register_buffer("y_embedding", torch.zeros(shape))
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)


class FinalLayer(nn.Module):
    """Norm, modulation by t, Linear to patches ordered (row, column, channel)."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.out_channels = config.out_channels
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, PATCH * PATCH * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, channels: int) -> Tensor:
        """x [B,T,S,C], t [B,T or 1,C] → [B,T,S,channels·4], ordered (channel, row, column).

        Reordering the weight's rows instead of the output costs nothing, and the rows of the
        variance, which nobody reads, are not computed.
        """
        shift, scale = (self.scale_shift_table + t.unsqueeze(2)).unsqueeze(3).unbind(2)
        # By views, for no index tensor is to be needed on the device.
        weight = self.linear.weight.unflatten(0, (-1, self.out_channels))  # [row·column,8,C]
        bias = self.linear.bias.unflatten(0, (-1, self.out_channels))
        weight, bias = (part.transpose(0, 1)[:channels].flatten(0, 1) for part in (weight, bias))
        return F.linear(modulated_norm(x, shift, scale), weight, bias)


class Rotary(nn.Module):
    """Frequencies of the temporal rotary embedding; they are part of the checkpoint."""

    freqs: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        self.register_buffer("freqs", 10_000.0**-exponents)


class STDiT3(nn.Module):
    """The segments and their weights, named as in the published checkpoint."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        channels = config.hidden_size
        self.x_embedder = PatchEmbedder(config.in_channels, channels)
        self.t_embedder = SinusoidEmbedder(channels)
        self.fps_embedder = SinusoidEmbedder(channels)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.y_embedder = TextEmbedder(config)
        self.spatial_blocks = nn.ModuleList(SpatialBlock(config) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(TemporalBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.rope = Rotary(channels // config.num_heads)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations run in."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_embedder.proj.weight.device

    @property
    def pairs(self) -> list[tuple[SpatialBlock, TemporalBlock]]:
        """The blocks in the order they run."""
        return list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))  # type: ignore[arg-type]

    def layers(self, *, offloaded: bool = False) -> LayerOffload:
        """The pairs of blocks in order; offloaded: their weights are in host memory until used."""
        # Two are kept: while a pair is finished, the next one's first attention is prepared.
        return LayerOffload(self.pairs, self.device, offloaded=offloaded, keep=2)

    def positions(self, grid: tuple[int, int], height: float, width: float) -> Tensor:
        """Position table [S,C] for a grid of patches, in the run's dtype on the model's device."""
        config = self.config
        table = position_table(grid, config.hidden_size, height, width, config.input_sq_size)
        return table.to(self.dtype).to(self.device)

    def rotary(self, frames: int) -> tuple[Tensor, Tensor]:
        """Rotary tables for T frames, float32."""
        return rotary_tables(self.rope.freqs, frames)

    def embed(self, z: Tensor, positions: Tensor) -> Tensor:
        """z [B,T,S,16] any float dtype, positions [S,C] → x [B,T,S,C]."""
        return self.x_embedder(z.to(self.dtype)) + positions

    def tables(self, t: Tensor, fps: Tensor, frame_mask: Tensor | None = None) -> StepTables:
        """t [B] in 0..1000, fps [B], frame_mask bool [B,T] or none → the step's tables.

        Frames whose mask is false are kept frames: they use the tables of timestep 0.
        """
        rate = self.fps_embedder(fps.to(self.device), self.dtype)
        now = self.t_embedder(t.to(self.device), self.dtype) + rate  # [B,C]
        now = now[:, None]
        if frame_mask is not None:
            still = self.t_embedder(torch.zeros_like(t).to(self.device), self.dtype) + rate
            chosen = to_device(frame_mask, self.device)[..., None]
            now = torch.where(chosen, now, still[:, None])  # [B,T,C]
        return StepTables(now, self.t_block(now).unflatten(-1, (6, -1)))

    def text_kv(
        self, tokens: Sequence[Tensor], layers: LayerOffload | None = None
    ) -> list[list[KeyValue]]:
        """Each sample's real tokens [L_b, caption_channels] → per block, per sample, k and v.

        In the order the blocks run: spatial 0, temporal 0, spatial 1, … Once per video.
        layers: the blocks, where they are not all on the model's device.
        """
        texts = [self.y_embedder.y_proj(y.to(self.device, self.dtype)) for y in tokens]
        pairs: Any = layers or self.layers()
        return [
            [block.cross_attn.key_value(text) for text in texts] for pair in pairs for block in pair
        ]

    def null_tokens(self, masks: Tensor) -> list[Tensor]:
        """The null embedding under each sample's mask [B,L] of 0/1 → B × [L_b, caption]."""
        # On the CPU, the result moved: some accelerators have no sound indexing by a mask.
        null = self.y_embedder.y_embedding.cpu()
        tokens = [null[: mask.numel()][mask.cpu().bool()] for mask in masks]
        return [kept.to(self.device) for kept in tokens]

    def head(self, x: Tensor, tables: StepTables, channels: int | None = None) -> Tensor:
        """x [B,T,S,C] → patches [B,T,S,channels·4]; by default only the velocity's channels."""
        return self.final_layer(x, tables.t, channels or self.config.in_channels)


def build_stdit3(config: STDiT3Config) -> STDiT3:
    """The model without memory behind its weights (meta device), ready for `load_module`."""
    with torch.device("meta"):
        return STDiT3(config)
