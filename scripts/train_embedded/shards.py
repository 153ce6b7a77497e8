"""The clips that `flow` is trained on, drawn in batches from the shards that `latents` writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_sp.base.geometry import patch_grid
from opensora_sp.models.tensor_files import load_tensor_file
from scripts.train_embedded.latents import shard_path

TOKENS = 1400  # patches of all frames in a batch, about
# Shape and place are learnt from pictures first, of which a batch holds four times as many.
# (until step, share of the batches)
PICTURES = ((6500, 0.5), (math.inf, 0.25))
FEWEST, MOST = 2, 48  # clips of a batch


class Shards:
    """The encoded clips, by shape; takes in new ones when asked."""

    def __init__(self, directory: Path, pieces: Any) -> None:
        self.directory, self.pieces, self.read = directory, pieces, 0
        self.buckets: dict[tuple[int, int, int], list[dict[str, Any]]] = {}

    def refresh(self) -> None:
        """Read the shards that are new."""
        while (path := shard_path(self.directory, self.read)).exists():
            shard = load_tensor_file(path)
            shard["tokens"] = [[self.ids(text) for text in texts] for texts in shard["captions"]]
            key = (*shard["size"], shard["frames"])
            self.buckets.setdefault(key, []).append(shard)
            self.read += 1

    def ids(self, text: str) -> list[int]:
        """Token ids with the end token."""
        return [*self.pieces.encode(text), self.pieces.eos_id()]

    def draw_shape(self, rng: np.random.Generator, step: int) -> tuple[int, int, int]:
        """Height, width and frames of a step's batches; a shape comes as often as it has shards."""
        pictures = rng.random() < next(share for until, share in PICTURES if step < until)
        shapes = [shape for shape in self.buckets if (shape[2] == 1) == pictures]
        weights = np.array([len(self.buckets[shape]) for shape in shapes], dtype=float)
        return shapes[int(rng.choice(len(shapes), p=weights / weights.sum()))]

    def draw(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> dict[str, Any]:
        """A batch of pictures, or of clips, of that shape."""
        shards, count = self.buckets[shape], self._count(shape)
        chosen = [_pick(rng, shards) for _ in range(count)]
        return {
            "z": torch.stack([shard["z"][i] for shard, i in chosen]),
            "tokens": [_phrasing(rng, shard, i) for shard, i in chosen],
            "facts": torch.stack([shard["facts"][i] for shard, i in chosen]).float(),
            "stands": torch.stack([shard["stands"][i] for shard, i in chosen]).long(),
            "shape": shape,
        }

    def draw_captions(self, rng: np.random.Generator, count: int) -> tuple[list[list[int]], Tensor]:
        """Captions of clips and pictures alike: their token ids, and what they tell."""
        groups = list(self.buckets.values())
        tokens, facts = [], []
        for _ in range(count):
            shard, i = _pick(rng, groups[int(rng.integers(len(groups)))])
            tokens.append(_phrasing(rng, shard, i))
            facts.append(shard["facts"][i])
        return tokens, torch.stack(facts).float()

    def _count(self, shape: tuple[int, int, int]) -> int:
        """Clips in a batch of this shape."""
        z = self.buckets[shape][0]["z"]
        rows, columns = patch_grid(z.shape[3], z.shape[4])
        return max(FEWEST, min(MOST, TOKENS // (rows * columns * z.shape[2])))


def _pick(rng: np.random.Generator, shards: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """One clip of all: its shard, and which one of it."""
    shard = shards[int(rng.integers(len(shards)))]
    return shard, int(rng.integers(shard["z"].shape[0]))


def _phrasing(rng: np.random.Generator, shard: dict[str, Any], clip: int) -> list[int]:
    """The token ids of one of the clip's captions."""
    choices: list[list[int]] = shard["tokens"][clip]
    return choices[int(rng.integers(len(choices)))]
