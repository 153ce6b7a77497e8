"""STDiT3 in the order of operations of Open-Sora 1.2, to be counted beside the program.

One forward of both CFG branches as one batch. Attention is one fused operation where the reference
has a kernel for it: within frames, where a sequence is longer than the batch of sequences, and to
the text. Elsewhere its scores are materialised. Every other operation is by itself, in the order
and the dtype in which the reference computes it. The weights come by their names in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.benchmark.count.forward import ForwardSize
from opensora_sp.models.layers import position_table
from opensora_sp.models.stdit3 import STDiT3Config, build_stdit3

# Its functions → the parts that the program's count has.
PARTS = {
    "Oracle.rms_norm": "query and key norm",
    "Oracle.rotate": "rotary embedding",
    "Oracle.modulate": "norm and modulation",
    "gated": "gates and residuals",
    "Oracle.self_attention": "self-attention",
    "Oracle.cross_attention": "cross-attention",
    "Oracle.mlp": "MLP",
    "Oracle.block": "gates and residuals",
    "Oracle.embed_patches": "patch embedding",
    "Oracle.embed_text": "text",
    "Oracle.times": "time embedding",
    "Oracle.final": "head",
    "Oracle.forward": "head",
}


@dataclass(frozen=True)
class Inputs:
    """One forward: x [B,4,T,H,W], timestep [B], y [B,1,L,caption], mask [b,L] of 0/1.

    pixels: (height, width). fps [B]. x_mask: bool [B,T] or none.
    """

    x: Tensor
    timestep: Tensor
    y: Tensor
    mask: Tensor
    fps: Tensor
    pixels: tuple[float, float]
    x_mask: Tensor | None = None


class Oracle:
    """The forward over a checkpoint's weights, in their dtype."""

    def __init__(self, config: STDiT3Config, weights: Mapping[str, Tensor]) -> None:
        self.config, self.weights = config, weights
        self.dtype = weights["x_embedder.proj.weight"].dtype
        self.device = weights["x_embedder.proj.weight"].device

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The Linear called `name`."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def forward(self, inputs: Inputs) -> Tensor:
        """The raw output, float32 [B,8,T,H,W]."""
        height, width = inputs.x.shape[-2:]
        x = F.pad(inputs.x.to(self.dtype), (0, width % 2, 0, height % 2))
        grid = (x.shape[3] // 2, x.shape[4] // 2)
        shape = (x.shape[0], x.shape[2], grid[0] * grid[1])  # B, T, S
        x = self.embed_patches(x, grid, inputs.pixels)
        now = self.times(inputs.timestep, inputs.fps)
        still = None
        if inputs.x_mask is not None:
            still = self.times(torch.zeros_like(inputs.timestep), inputs.fps)
        text, lengths = self.embed_text(inputs.y, inputs.mask)
        for i in range(self.config.depth):
            for kind in ("spatial", "temporal"):
                name = f"{kind}_blocks.{i}"
                x = self.block(name, x, shape, now, still, inputs.x_mask, text, lengths)
        x = self.final(x, shape, now[0], None if still is None else still[0], inputs.x_mask)
        return self.unpatchify(x, shape, grid)[..., :height, :width].to(torch.float32)

    def embed_patches(
        self, x: Tensor, grid: tuple[int, int], pixels: tuple[float, float]
    ) -> Tensor:
        """[B,4,T,H,W] → tokens [B,T·S,C] with positions."""
        weights, channels = self.weights, self.config.hidden_size
        x = F.conv3d(
            x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=(1, 2, 2)
        )
        frames = x.shape[2]
        x = x.flatten(2).transpose(1, 2).unflatten(1, (frames, -1))
        table = position_table(grid, channels, *pixels, self.config.input_sq_size)
        return (x + table.to(self.device, self.dtype)).flatten(1, 2)

    def times(self, timestep: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """(t [B,C], its projection for all blocks [B,6,C])."""
        t = self.number("t_embedder", timestep) + self.number("fps_embedder", fps)
        return t, self.linear("t_block.1", F.silu(t)).unflatten(1, (6, -1))

    def number(self, name: str, values: Tensor) -> Tensor:
        """Numbers [B] → [B,C]."""
        steps = torch.arange(128, dtype=torch.float32, device=self.device) / 128
        frequencies = torch.exp(-math.log(10_000) * steps)
        angles = values.to(self.device, self.dtype)[:, None].float() * frequencies[None]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(self.dtype)
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", waves)))

    def embed_text(self, y: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
        """The real tokens of all samples end to end [1,ΣL,C], and how many each has."""
        y = self.mlp("y_embedder.y_proj", y.to(self.dtype)).squeeze(1)
        mask = mask.repeat(y.shape[0] // mask.shape[0], 1)
        lengths = [int(count) for count in mask.sum(dim=1)]
        kept = [each[row.bool().nonzero().flatten()] for each, row in zip(y, mask, strict=True)]
        return torch.cat(kept)[None], lengths

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """Linear, GELU, Linear."""
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def block(
        self,
        name: str,
        x: Tensor,
        shape: tuple[int, int, int],
        now: tuple[Tensor, Tensor],
        still: tuple[Tensor, Tensor] | None,
        x_mask: Tensor | None,
        text: Tensor,
        lengths: list[int],
    ) -> Tensor:
        """One block over tokens [B,T·S,C]."""
        table = self.weights[f"{name}.scale_shift_table"]
        parts = (table[None] + now[1]).chunk(6, dim=1)  # each [B,1,C]
        at_rest = None if still is None else (table[None] + still[1]).chunk(6, dim=1)

        def modulated(place: int) -> Tensor:
            h = self.modulate(x, parts[place], parts[place + 1])
            if at_rest is None or x_mask is None:
                return h
            other = self.modulate(x, at_rest[place], at_rest[place + 1])
            return by_frame(x_mask, h, other, shape)

        def gated(h: Tensor, place: int) -> Tensor:
            product = parts[place] * h
            if at_rest is None or x_mask is None:
                return product
            return by_frame(x_mask, product, at_rest[place] * h, shape)

        x = x + gated(self.self_attention(name, modulated(0), shape), 2)
        x = x + self.cross_attention(name, x, text, lengths)
        return x + gated(self.mlp(f"{name}.mlp", modulated(3)), 5)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm, ·(1 + scale), + shift."""
        return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift

    def self_attention(self, name: str, h: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Within frames or along time: [B,T·S,C] → the same."""
        batch, frames, patches = shape
        temporal = name.startswith("temporal")
        h = h.unflatten(1, (frames, patches))
        h = h.transpose(1, 2) if temporal else h
        h = h.reshape(-1, h.shape[2], h.shape[3])  # sequences [N,length,C]
        sequences, length, channels = h.shape
        qkv = self.linear(f"{name}.attn.qkv", h)
        qkv = qkv.view(sequences, length, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [N,H,length,D]
        q = self.rms_norm(q, self.weights[f"{name}.attn.q_norm.weight"])
        k = self.rms_norm(k, self.weights[f"{name}.attn.k_norm.weight"])
        if temporal:
            q, k = self.rotate(q), self.rotate(k)
        if length > sequences:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.materialised_attention(q, k, v)
        out = out.transpose(1, 2).reshape(sequences, length, channels)
        out = self.linear(f"{name}.attn.proj", out)
        if temporal:
            out = out.unflatten(0, (batch, patches)).transpose(1, 2)
        return out.reshape(batch, frames * patches, channels)

    def materialised_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q·kᵀ/√D)·v with its scores in memory, their softmax in float32."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.to(torch.float32).softmax(dim=-1).to(q.dtype) @ v

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm over D in float32, the weight in the run's dtype."""
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return weight * (wide * torch.rsqrt(variance + 1e-6)).to(x.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [N,H,T,D] in the dtype of its frequencies."""
        index = torch.arange(x.shape[-2], device=self.device)
        frequencies = self.weights["rope.freqs"]
        angles = index.to(frequencies.dtype)[:, None] * frequencies
        angles = angles.repeat_interleave(2, dim=-1)  # [T,D]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        # A scale of 1 is multiplied in, and channels that are not rotated, of which there are
        # none, are joined on.
        out = x * angles.cos() * 1.0 + turned * angles.sin() * 1.0
        return torch.cat((x[..., :0], out, x[..., :0]), dim=-1).to(x.dtype)

    def cross_attention(self, name: str, x: Tensor, text: Tensor, lengths: list[int]) -> Tensor:
        """Each sample's tokens [B,N,C] attend to its own text."""
        batch, count, channels = x.shape
        heads = self.config.num_heads
        q = self.linear(f"{name}.cross_attn.q_linear", x).view(batch, count, heads, -1)
        kv = self.linear(f"{name}.cross_attn.kv_linear", text).view(1, sum(lengths), 2, heads, -1)
        k, v = kv.unbind(2)
        # The reference's kernel takes samples of any lengths at once. Equal ones are a batch.
        if len(set(lengths)) == 1:
            k, v = (part.view(batch, lengths[0], heads, -1) for part in (k, v))
            out = packed_attention(q, k, v)
        else:
            parts = zip(q.split(1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
            out = torch.cat([packed_attention(*part) for part in parts])
        return self.linear(f"{name}.cross_attn.proj", out.reshape(batch, count, channels))

    def final(
        self,
        x: Tensor,
        shape: tuple[int, int, int],
        now: Tensor,
        still: Tensor | None,
        x_mask: Tensor | None,
    ) -> Tensor:
        """[B,T·S,C] → [B,T·S,32]."""
        table = self.weights["final_layer.scale_shift_table"][None]
        h = self.modulate(x, *(table + now[:, None]).chunk(2, dim=1))
        if still is not None and x_mask is not None:
            other = self.modulate(x, *(table + still[:, None]).chunk(2, dim=1))
            h = by_frame(x_mask, h, other, shape)
        return self.linear("final_layer.linear", h)

    def unpatchify(self, x: Tensor, shape: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
        """[B,T·S,32] → [B,8,T,H,W]."""
        x = x.view(shape[0], shape[1], *grid, 2, 2, self.config.out_channels)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(shape[0], -1, shape[1], 2 * grid[0], 2 * grid[1])


def inputs_of(size: ForwardSize) -> Inputs:
    """The inputs of one guided forward of this size, without contents."""
    batch = 2 * size.batch
    return Inputs(
        x=torch.empty(batch, 4, size.frames, *size.size, dtype=size.dtype, device="meta"),
        timestep=torch.full((batch,), 500.0),
        y=torch.empty(batch, 1, size.text, size.config.caption_channels, device="meta"),
        mask=torch.ones(batch, size.text, dtype=torch.int64),
        fps=torch.full((batch,), 24.0),
        pixels=size.pixels,
    )


def oracle_of(size: ForwardSize) -> Oracle:
    """The oracle over weights without contents."""
    model = build_stdit3(size.config).to(size.dtype)
    return Oracle(size.config, model.state_dict())


def by_frame(x_mask: Tensor, yes: Tensor, no: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Frames of [B,T·S,C] by a mask [B,T]."""
    yes, no = (each.unflatten(1, shape[1:]) for each in (yes, no))
    return torch.where(x_mask[:, :, None, None], yes, no).flatten(1, 2)


def packed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention on [B,length,H,D]."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
