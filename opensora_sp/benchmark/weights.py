"""The weight files of a run: size and SHA-256 of each, as hubs publish them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opensora_sp.base.hashes import sha256
from opensora_sp.models.checkpoint import WeightFiles
from opensora_sp.request.request import Checkpoints

_AT_ONCE = 4


def weight_files(checkpoints: Checkpoints) -> list[tuple[str, Path]]:
    """(name in the report, path) of every file that weights are read from."""
    stems = {
        "dit": (checkpoints.dit, ("model",)),
        "t5": (checkpoints.t5, ("pytorch_model", "model")),
        "vae3d": (checkpoints.vae3d, ("model", "pytorch_model")),
    }
    return [
        (f"{part}/{path.name}", path)
        for part, (directory, names) in stems.items()
        for path in WeightFiles.open(directory, names).files
    ]


def describe_weights(checkpoints: Checkpoints, *, hashes: bool) -> list[dict[str, Any]]:
    """Name, bytes and, where wanted, SHA-256 (hex) of each file."""
    files = weight_files(checkpoints)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        sums = pool.map(sha256, [path for _, path in files]) if hashes else [None] * len(files)
        return [
            {"file": name, "bytes": path.stat().st_size, "sha256": digest}
            for (name, path), digest in zip(files, sums, strict=True)
        ]
