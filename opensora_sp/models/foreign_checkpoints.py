"""Checkpoints in other forms than the published one: told by their files. Imports no torch.

The program reads the published layout alone, strictly. What people bring in other forms is named
in the refusal, with the command that converts it: `opensora-sp convert`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from opensora_sp.base import access

KINDS = ("dit", "t5", "vae3d")  # of vae2d only a config.json is needed
# Open-Sora's training writes epochN-global_stepM/: model/ in shards, the average in ema.pt.
TRAINED_FOLDER, AVERAGE = "model", "ema.pt"
STATE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
WEIGHT_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
PIPELINE_FOLDERS = ("text_encoder", "tokenizer")


def other_form(kind: str, path: str | Path) -> str | None:
    """What a path holds that is not the published layout, in words; None where it is unknown."""
    place = Path(path)
    if access.is_file(place) and place.suffix in STATE_SUFFIXES:
        return f"one file of weights ({place.name})"
    if not access.is_dir(place):
        return None
    if kind == "t5" and access.is_dir(place / PIPELINE_FOLDERS[0]):
        return f"a diffusers pipeline with {' and '.join(PIPELINE_FOLDERS)}"
    if kind != "t5" and (access.is_dir(place / TRAINED_FOLDER) or access.is_file(place / AVERAGE)):
        return f"a checkpoint of Open-Sora's own training ({TRAINED_FOLDER}/, {AVERAGE})"
    if weight_files(place):
        return "weights under other names, or without a config.json"
    return None


def weight_files(directory: Path) -> list[Path]:
    """The index or the single file of weights in a directory; of several forms the first."""
    for stem in WEIGHT_STEMS:
        for suffix in (".safetensors", ".bin"):
            for name in (f"{stem}{suffix}.index.json", f"{stem}{suffix}"):
                if access.is_file(directory / name):
                    return [directory / name]
    return sorted(p for p in directory.iterdir() if p.suffix in (".pt", ".pth") and p.is_file())


def how_to_convert(kind: str, path: str | Path) -> str | None:
    """What to do with a path in another form, as the end of a sentence; None where unknown."""
    form = other_form(kind, path) if kind in KINDS else None
    if form is None:
        return None
    command = f"opensora-sp convert {kind} {shlex.quote(str(path))} NEW_DIR"
    if kind == "vae3d":
        command += " --vae2d VAE2D_DIR"
    return f"it is {form}: convert it with `{command}`"
