"""The transformer of a run: from this rank's disk, or from the leading rank's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from opensora_sp.engine.shared_weights import HandedOut
from opensora_sp.models.checkpoint import WeightFiles, load_module
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config, build_stdit3
from opensora_sp.parallel.session import Session
from opensora_sp.request.runtime import Residency

WeightsFrom = Literal["disk", "rank0"]


def transformer_config(session: Session, directory: Path, source: WeightsFrom) -> STDiT3Config:
    """The transformer's config.json, of this rank's directory or of the leading one's."""
    if source == "disk":
        return STDiT3Config.load(directory)
    config = session.control.together(lambda: STDiT3Config.load(directory), leading_only=True)
    shared = session.control.broadcast_object(config)
    assert shared is not None
    return shared


def open_transformer(session: Session, directory: Path, source: WeightsFrom) -> WeightFiles:
    """Its weight files, with names and shapes known and no data read. Collective."""
    if source == "disk":
        files = session.control.together(lambda: WeightFiles.open(directory, "model"))
        assert files is not None
        return files
    leading = session.control.together(
        lambda: WeightFiles.open(directory, "model"), leading_only=True
    )
    return HandedOut(session, leading)


def load_transformer(
    weights: WeightFiles | Path,
    config: STDiT3Config,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    check_only: bool = False,
    residency: Residency = "resident",
) -> STDiT3:
    """STDiT3 from its weight files or their directory; check_only compares names and shapes.

    residency: what stays in host memory, from where `device` borrows it: nothing, everything
    (turns), or the blocks (streamed).
    """
    homes: dict[Residency, Callable[[str], bool] | None] = {
        "resident": None,
        "turns": lambda _: True,
        "streamed": lambda name: name.startswith(("spatial_blocks.", "temporal_blocks.")),
    }
    model = build_stdit3(config)
    load_module(
        model,
        WeightFiles.open(weights, "model") if isinstance(weights, Path) else weights,
        dtype=dtype,
        device=device,
        keep_float32=lambda name: name == "rope.freqs",
        skip=(lambda _: True) if check_only else None,
        at_home=homes[residency],
    )
    return model
