"""Encode clips for the transformer: python -m scripts.train_embedded.latents STATE_DIR

Needs the encoders that `vae` leaves behind. Writes shards of clips of one shape; shard number n
holds the same clips on every run, so the set can be continued at any time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.base.geometry import MICRO_FRAME_SIZE, split_chunks
from opensora_sp.models.video_vae import SPATIAL_SCALE, VideoVAE
from scripts.train_embedded.captions import OBJECTS, caption, facts
from scripts.train_embedded.state import pick_device, read_state, save_state
from scripts.train_embedded.vae import CLIP, LARGEST, as_input, build, keys_of, spatial_encode
from scripts.train_embedded.world import Scene, cover, draw_scene, render

SEED = 14
SHARD = 192  # clips
PICTURES = 1536  # in a shard of single pictures, which cost little
CAPTIONS = 3  # phrasings kept of each clip
PATCH = 16  # pixels of the side of one of the transformer's patches
STANDS = 0.3  # share of a patch that an object must cover to stand there


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape, and how many shards of them come in each round.

    things: objects in each; None: mostly one. motion: what every object does; None: drawn.
    """

    size: tuple[int, int]
    frames: int
    shards: int = 1
    things: int | None = None
    motion: str | None = None

    @property
    def count(self) -> int:
        """Clips in a shard: fewer where each costs much to encode."""
        if self.frames == 1:
            return PICTURES if self.size != LARGEST else PICTURES // 4
        if self.size != LARGEST:
            return SHARD
        return SHARD // 2 if self.frames == CLIP else SHARD // 4


# A clip of the largest size is worth several small ones in work, and two objects, or one that
# turns, are harder than one that goes somewhere: both come up more often than they would by chance.
ROUND = (
    Bucket((64, 96), 17, 6),
    Bucket((64, 96), 17, 4, things=2),
    Bucket((64, 96), 17, 1, motion="spin"),
    Bucket((64, 96), 34, 3),
    Bucket((64, 96), 51, 2),
    Bucket((64, 64), 17, 1),
    Bucket((96, 64), 17, 1),
    Bucket((96, 96), 17, 1),
    Bucket((80, 128), 17, 1),
    Bucket((96, 144), 17, 3),
    Bucket((96, 144), 17, 2, things=2),
    Bucket((96, 144), 17, 1, motion="spin"),
    Bucket((144, 144), 17, 1),
    Bucket(LARGEST, 17, 2),
    Bucket(LARGEST, 17, 3, things=2),
    Bucket(LARGEST, 17, 1, motion="spin"),
    Bucket(LARGEST, 51, 3),
    Bucket(LARGEST, 51, 3, things=2),
    Bucket(LARGEST, 51, 1, motion="spin"),
    Bucket((64, 96), 1, 1),
    Bucket((64, 96), 1, 1, things=2),
    Bucket((96, 96), 1, 1),
    Bucket((96, 144), 1, 1, things=2),
    Bucket((144, 144), 1, 1),
    Bucket(LARGEST, 1, 1),
    Bucket(LARGEST, 1, 1, things=2),
)


def schedule(number: int) -> Bucket:
    """The bucket of shard `number`: the rounds repeat, the shapes interleaved."""
    order = [(i / b.shards, b) for b in ROUND for i in range(b.shards)]
    order.sort(key=lambda entry: entry[0])
    return order[number % len(order)][1]


def key_frames(frames: int) -> list[int]:
    """The frames whose latents a clip's are: the last of every four, counted from a chunk's end."""
    return [
        chunk.frame_start + index
        for chunk in split_chunks(frames, MICRO_FRAME_SIZE)
        for index in range(chunk.frames)[keys_of(chunk.frames)]
    ]


def standing(scene: Scene, frames: list[int]) -> Tensor:
    """Which object stands at each patch of these frames: its place in OBJECTS, or -1; int8 [T,S].

    The size must be whole patches.
    """
    found = torch.full((len(frames), scene.height // PATCH, scene.width // PATCH), -1)
    most = torch.full(found.shape, STANDS)
    for thing in scene.things:
        pixels = torch.from_numpy(cover(scene, thing, frames)).float()
        share = F.avg_pool2d(pixels[:, None], PATCH)[:, 0]
        found[share > most] = OBJECTS.index(f"{thing.colour} {thing.shape}")
        most = most.maximum(share)
    return found.flatten(1).to(torch.int8)


@torch.no_grad()
def encode_shard(vae: VideoVAE, number: int) -> dict[str, Any]:
    """z [N,4,T,h,w], N × CAPTIONS captions and what they tell [N,facts], with the clips' shape.

    Beside them, which object stands where, [N,T,S] as of `standing`.
    """
    bucket = schedule(number)
    rng = np.random.default_rng([SEED, number])
    keys = key_frames(bucket.frames)
    z, texts, told, stands = [], [], [], []
    for _ in range(bucket.count):
        scene = draw_scene(
            rng, bucket.size, bucket.frames, things=bucket.things, motion=bucket.motion
        )
        video = as_input(render(scene, keys))[None].to(vae.device)
        mean, _ = spatial_encode(vae, video)
        z.append((mean * SPATIAL_SCALE - vae.shift) / vae.scale)
        texts.append([caption(scene, rng) for _ in range(CAPTIONS)])
        told.append(facts(scene))
        stands.append(standing(scene, keys))
    whole = {"z": torch.cat(z).cpu(), "captions": texts, "facts": torch.tensor(told)}
    whole["stands"] = torch.stack(stands)
    return {**whole, "size": list(bucket.size), "frames": bucket.frames}


def shard_path(directory: Path, number: int) -> Path:
    """Where shard `number` is kept."""
    return directory / "latents" / f"{number:04d}.pt"


def main() -> None:
    """Write shards until there are as many as wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the state is kept")
    parser.add_argument("--shards", type=int, default=342)
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator's name in torch")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    state = read_state(arguments.directory / "vae_encoder.pt", device)
    if state is None:
        raise SystemExit(f"{arguments.directory} has no vae_encoder.pt: run the vae stage first")
    vae = build().to(device)
    vae.load_state_dict(state["model"])
    (arguments.directory / "latents").mkdir(exist_ok=True)
    for number in range(arguments.shards):
        path = shard_path(arguments.directory, number)
        if not path.exists():
            save_state(path, encode_shard(vae, number))
            print(f"{path.name}: {schedule(number)}", flush=True)


if __name__ == "__main__":
    main()
