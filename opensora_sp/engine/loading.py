"""The transformer of a run: from this rank's disk, or from the leading rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from opensora_sp.engine.shared_weights import HandedOut
from opensora_sp.models.checkpoint import WeightFiles, load_module
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config, build_stdit3
from opensora_sp.parallel.session import Session
from opensora_sp.request.memory_modes import NO_OFFLOAD, Offload

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
    offload: Offload = NO_OFFLOAD,
) -> STDiT3:
    """STDiT3 from its weight files or their directory; check_only compares names and shapes.

    offload: which weights stay in host memory, to be copied to `device` when they are used: with
    layer offload the blocks', with model offload alone all of them.
    """

    def in_host_memory(name: str) -> bool:
        if offload.layers:
            return name.startswith(("spatial_blocks.", "temporal_blocks."))
        return offload.models

    model = build_stdit3(config)
    load_module(
        model,
        WeightFiles.open(weights, "model") if isinstance(weights, Path) else weights,
        dtype=dtype,
        device=device,
        keep_float32=lambda name: name == "rope.freqs",
        skip=(lambda _: True) if check_only else None,
        in_host_memory=in_host_memory,
    )
    return model
