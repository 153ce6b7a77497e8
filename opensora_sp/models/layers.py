"""The arithmetic that STDiT3's blocks are made of.

Shapes: B samples, T latent frames, S patches of one frame, C channels, H heads, D head width,
L text tokens, F frames of all samples (F = B·T). Every function here is pure.
Source of all facts: Open-Sora 1.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_sp.base.transfer import to_device
from opensora_sp.models.compiler import Run, directly
from opensora_sp.models.kernels.fused import norm_rotary
from opensora_sp.models.kernels.reference import attend, rms_norm, rotate

MAX_PERIOD = 10_000.0
SINUSOID_WIDTH = 256


def sinusoid(values: Tensor) -> Tensor:
    """values [N] → float32 [N, SINUSOID_WIDTH]: cosines, then sines, of period 2π to 2π·10000."""
    half = SINUSOID_WIDTH // 2
    exponents = torch.arange(half, dtype=torch.float32) / half
    frequencies = to_device(torch.exp(-math.log(MAX_PERIOD) * exponents), values.device)
    angles = values.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(
    grid: tuple[int, int], channels: int, height: float, width: float, input_sq_size: int
) -> Tensor:
    """2D sine-cosine positions of one frame's patches, row-major: [S, C], float32 on the CPU.

    `grid` counts patches (rows, columns); `height` and `width` are the request's pixels.
    The first half of the channels follows the column, the second the row.
    """
    rows, columns = grid
    scale = math.sqrt(height * width) / input_sq_size
    base = round(math.sqrt(rows * columns))
    down = torch.arange(rows, dtype=torch.float32) / scale * (base / rows)
    across = torch.arange(columns, dtype=torch.float32) / scale * (base / columns)
    axis = channels // 2
    inverse = MAX_PERIOD ** (-torch.arange(0, axis, 2, dtype=torch.float32) / axis)

    def encode(place: Tensor) -> Tensor:
        angles = place[:, None] * inverse[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    by_column = encode(across)[None].expand(rows, columns, axis)
    by_row = encode(down)[:, None].expand(rows, columns, axis)
    return torch.cat([by_column, by_row], dim=-1).reshape(rows * columns, channels)


def rotary_tables(frequencies: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of frame index × frequency: two [T, D/2] in float32."""
    index = to_device(torch.arange(frames, dtype=torch.float32), frequencies.device)
    angles = index[:, None] * frequencies.float()[None]
    return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    """Per-head norm of queries and keys, with weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Any [..., width] → the same shape."""
        return rms_norm(x, self.weight)


class SelfAttention(nn.Module):
    """Fused qkv laid out (3, H, D), query and key norm; its projection is applied by the block."""

    def __init__(self, channels: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        width = channels // heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm: nn.Module = RMSNorm(width) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(width) if qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels)

    def heads_of(
        self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [..., C] → q, k, v [..., H, D], q and k normed, and turned where rotary is given."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            q, k = norm_rotary(q, k, self.q_norm.weight, self.k_norm.weight, rotary)
        elif rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def within_frames(self, h: Tensor, run: Run = directly) -> Tensor:
        """Every patch of a frame attends to its frame: [F,S,C] → [F,S,C], before the projection."""
        q, k, v = (part.transpose(1, 2) for part in run(self.heads_of, h))  # [F,H,S,D]
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def heads_by_position(
        self, h: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B,T,S,C] → q, k, v of each position, along time: [B·S,H,T,D]."""
        q, k, v = self.heads_of(h, rotary)  # [B,T,S,H,D]
        q, k, v = (part.permute(0, 2, 3, 1, 4).flatten(0, 1) for part in (q, k, v))
        return q, k, v


KeyValue = tuple[Tensor, Tensor]  # k and v of one sample's text, each [1,H,L,D]


class CrossAttention(nn.Module):
    """Attention to the text: no norm, no gate, no mask; each sample sees exactly its own tokens."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def key_value(self, text: Tensor) -> KeyValue:
        """text [L,C] of one sample → k, v [1,H,L,D]."""
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def query(self, x: Tensor) -> Tensor:
        """x [B,T,S,C] → q [B,H,T·S,D]."""
        return self.q_linear(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, text: Sequence[KeyValue]) -> Tensor:
        """q as `query` makes it and B pairs of k, v → [B,T·S,C], before the projection."""
        # Sample by sample: masks leave the fast kernels, and lengths differ between prompts.
        parts = [attend(q[i : i + 1], k, v) for i, (k, v) in enumerate(text)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] → [..., width_out]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SinusoidEmbedder(nn.Module):
    """A number → C channels: sinusoid, Linear, SiLU, Linear (timestep and fps)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOID_WIDTH, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """values [N] → [N,C]. They are rounded to the run's dtype first, as in training."""
        return self.mlp(sinusoid(values.to(dtype)).to(dtype))
