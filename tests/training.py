"""A training of the embedded model that is over in a moment: its clips and its settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from scripts.train_embedded import flow, shards
from scripts.train_embedded.captions import FACTS
from scripts.train_embedded.latents import shard_path


def write_clips(directory: Path, embedded_dir: Path) -> None:
    """One shard of six small clips of noise, and the shipped vocabulary."""
    (directory / "latents").mkdir(parents=True)
    shutil.copy(embedded_dir / "t5" / "spiece.model", directory)
    shard = {
        "z": torch.randn(6, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0)),
        "captions": [
            [f"a red ball goes {way}"] for way in ("up", "down", "left", "right", "on", "off")
        ],
        "facts": torch.eye(6, len(FACTS)) > 0,
        # Patches of a picture of 32 by 32 in every latent frame; -1 where nothing stands.
        "stands": (torch.arange(6 * 5 * 4) % 7 - 1).view(6, 5, 4).to(torch.int8),
        "size": [32, 32],
        "frames": 17,
    }
    torch.save(shard, shard_path(directory, 0))


def small_training() -> list[tuple[ModuleType, str, Any]]:
    """What to set: (module, name, value)."""
    return [
        (shards, "TOKENS", 24),
        (shards, "PICTURES", ((float("inf"), 0.0),)),
        (flow, "WARM_UP", 1),
        (flow, "WORDS_ALONE", 1),
        (flow, "CAPTIONS", 3),
        # The rate falls with what is left of the steps, which a run cut in two counts differently.
        (flow, "COOL_DOWN", 1e-6),
    ]
