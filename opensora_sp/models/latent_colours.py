"""Colours of latents without the VAE: a linear map from 4 channels to RGB, for previews.

The map is fitted to the VAE that is loaded, by least squares: random smooth latents are decoded,
and each cell of a latent is matched with the mean colour of the 8 x 8 pixels that it became. A
preview then costs 12 multiplications a cell. It shows layout, colours and movement, but no detail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from opensora_sp.models.video_vae import VideoVAE

SAMPLES, SIDE = 32, 8
# Blobs of these widths in cells: latents of videos are smooth. A map that is fitted to white noise
# shows them with too much contrast.
BLOBS = (4, 8)


@dataclass(frozen=True)
class LatentColours:
    """weight [4,3] and bias [3]: from a cell of normalised latents to RGB in [-1, 1]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, vae: VideoVAE) -> LatentColours:
        """The map of least squared error for a VAE; it decodes 32 pictures of 64 x 64 pixels."""
        z = random_latents(vae.config.temporal.embed_dim)
        with torch.no_grad():
            decoded = [vae.decode(one[None, :, None], 1)[:, :, 0].float().cpu() for one in z]
        pixels = torch.cat(decoded)
        colours = F.adaptive_avg_pool2d(pixels, (SIDE, SIDE))
        cells = z.permute(0, 2, 3, 1).flatten(0, 2).double()
        wanted = colours.permute(0, 2, 3, 1).flatten(0, 2).double()
        known = torch.cat([cells, torch.ones(len(cells), 1, dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(known, wanted).solution
        return cls(solution[:-1].float(), solution[-1].float())

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures, uint8 [T,h,w,3] on the CPU, of normalised latents [4,T,h,w]."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        rgb = latents.float().permute(1, 2, 3, 0) @ weight + bias
        return ((rgb + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def random_latents(channels: int) -> Tensor:
    """[32,channels,8,8] of unit variance, in blobs of several widths; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for number in range(SAMPLES):
        side = max(1, SIDE // BLOBS[number % len(BLOBS)])
        coarse = torch.randn(1, channels, side, side, generator=generator)
        drawn.append(F.interpolate(coarse, size=(SIDE, SIDE), mode="nearest"))
    return torch.cat(drawn)
