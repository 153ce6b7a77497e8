"""Digests of a model's weights, which tell one checkpoint from another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_sp.base.hashes import sampled_digest
from opensora_sp.request.request import Checkpoints


def text_encoder_digest(directory: Path) -> str:
    """Which text encoder a directory holds: weights, sizes and tokenizer."""
    return _model_digest(directory, ("pytorch_model", "model"), ("config.json", "spiece.model"))


def transformer_digest(directory: Path) -> str:
    """Which transformer a directory holds: weights and sizes. The fingerprint of step schedules."""
    return _model_digest(directory, ("model",), ("config.json",))


def model_digests(checkpoints: Checkpoints) -> dict[str, str]:
    """Which models these directories hold, by short name. Reads a few MB of each."""
    return {
        "dit": transformer_digest(checkpoints.dit),
        "t5": text_encoder_digest(checkpoints.t5),
        "vae2d": sampled_digest([checkpoints.vae2d / "vae" / "config.json"]),
        "vae3d": _model_digest(checkpoints.vae3d, ("model",), ("config.json",)),
    }


def _model_digest(directory: Path, stems: Sequence[str], others: Sequence[str]) -> str:
    from opensora_sp.models.checkpoint import WeightFiles

    weights = WeightFiles.open(directory, stems).files
    return sampled_digest([*(directory / name for name in others), *sorted(weights)])
