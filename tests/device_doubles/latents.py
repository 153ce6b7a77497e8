"""Keeps what a run denoised, so that the real command line can be compared bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def keep(folder: Path) -> None:
    """Save every video's latents as `latents.pt` in the folder, on the rank that gathers them."""
    from opensora_sp.engine.guidance import Denoiser

    gather = Denoiser.gather

    def gather_and_save(self: Denoiser, patches: Tensor) -> Tensor | None:
        whole = gather(self, patches)
        if whole is not None:
            torch.save(whole.cpu(), folder / "latents.pt")
        return whole

    Denoiser.gather = gather_and_save  # type: ignore[method-assign]
