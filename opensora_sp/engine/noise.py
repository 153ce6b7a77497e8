"""Keyed randomness: every draw has a name, so no draw depends on what was drawn before it.

A video is the same on every device, backend, rank count and mesh, whatever was skipped or
resumed, for its noise is a function of (seed, prompt, sample, clip, purpose, step) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_sp.request.request import Request


@dataclass(frozen=True)
class NoiseKey:
    """Names one video's draws; prompt and sample are indices in the run's lists."""

    seed: int
    prompt: int = 0
    sample: int = 0
    clip: int = 0

    def normal(self, shape: tuple[int, ...], purpose: str, step: int = 0) -> Tensor:
        """Standard normal float32 on the CPU, a function of the key and the arguments alone."""
        name = f"{self.seed}/{self.prompt}/{self.sample}/{self.clip}/{purpose}/{step}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32)


def draw_noise(requests: Sequence[Request], clip: int, step: int | None = None) -> Tensor:
    """A clip's starting noise [B,4,T,H,W], or the fresh noise of one step of a masked run."""
    shape = (4, *requests[0].latent_shape)
    purpose, number = ("start", 0) if step is None else ("step", step)
    return torch.stack([noise_key(r, clip).normal(shape, purpose, number) for r in requests])


def noise_key(request: Request, clip: int) -> NoiseKey:
    """What names a clip's draws."""
    return NoiseKey(request.seed, request.prompt_index, request.sample_index, clip)
