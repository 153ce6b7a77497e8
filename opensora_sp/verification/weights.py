"""Check of checkpoint directories against the published weights: files, names, shapes, hashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import CheckpointError, UserError
from opensora_sp.base.hashes import SUMS, sha256
from opensora_sp.models.checkpoint import WeightFiles, read_config
from opensora_sp.models.video_vae import older_attention_names
from opensora_sp.verification.published import SDXL_VAE

MANIFEST = Path(__file__).parents[1] / "assets" / "manifest.json"
STEMS = {"dit": ("model",), "t5": ("pytorch_model", "model"), "vae3d": ("model", "pytorch_model")}
_MAY_LACK = {"encoder.embed_tokens.weight"}  # some files repeat the weight `shared` by it
_NAMED = 3


@dataclass(frozen=True)
class WeightCheck:
    """One line of the result: the directory, what was checked, and what was wrong, if anything."""

    directory: Path
    what: str
    wrong: str | None = None

    def __str__(self) -> str:
        return f"{self.directory}: {self.what}: {self.wrong or 'ok'}"


def recognise(directory: Path) -> str:
    """Which checkpoint a directory holds (dit, t5, vae2d or vae3d), by its config.json.

    Raises CheckpointError for any other.
    """
    if access.is_file(directory / "vae" / "config.json"):
        return "vae2d"
    kind = read_config(directory).get("model_type")
    known = {"STDiT3": "dit", "t5": "t5", "VideoAutoencoderPipeline": "vae3d"}
    if kind not in known:
        raise CheckpointError(
            f"{directory}/config.json has model_type {kind!r}: it is none of {', '.join(known)}"
        )
    return known[kind]


def check_directory(directory: Path) -> Iterator[WeightCheck]:
    """Check one checkpoint directory, without a network.

    Names and shapes are checked without reading the weights. Hashes need all of them.
    """
    try:
        kind = recognise(directory)
    except CheckpointError as error:
        yield WeightCheck(directory, "kind", str(error))
        return
    try:
        wrong = _compare_config(directory) if kind == "vae2d" else _compare(kind, directory)
    except CheckpointError as error:
        wrong = str(error)
    what = "sizes of the VAE" if kind == "vae2d" else "names and shapes"
    yield WeightCheck(directory, f"{kind}, {what}", wrong)
    if access.is_file(directory / SUMS):
        yield WeightCheck(directory, f"{kind}, hashes", _compare_hashes(directory))
    else:
        yield WeightCheck(directory, f"{kind}, no {SUMS}, so contents were not compared")


def _compare_config(directory: Path) -> str | None:
    config = read_config(directory / "vae")
    wrong = [name for name, value in SDXL_VAE.items() if config.get(name, value) != value]
    return (
        f"vae/config.json differs from the published one in {', '.join(wrong)}" if wrong else None
    )


def _compare(kind: str, directory: Path) -> str | None:
    """Compare names and shapes with those of the published model."""
    shapes = WeightFiles.open(directory, STEMS[kind]).shapes
    newer = older_attention_names()
    found = {newer.get(name, name): shape for name, shape in shapes.items()}
    wanted = {
        name: tuple(shape)
        for name, shape in json.loads(MANIFEST.read_text(encoding="utf-8"))[kind].items()
    }
    lists = {
        "missing": [n for n in wanted if n not in found and n not in _MAY_LACK],
        "unexpected": [n for n in found if n not in wanted],
        "of another shape": [n for n in found if n in wanted and found[n] != wanted[n]],
    }
    said = [f"{len(names)} {what} ({_some(names)})" for what, names in lists.items() if names]
    return "; ".join(said) or None


def _compare_hashes(directory: Path) -> str | None:
    wrong = []
    try:
        lines = access.read_text(directory / SUMS, limit=access.CONFIG_LIMIT).splitlines()
    except UserError as error:
        return str(error)
    for number, line in enumerate(lines, 1):
        expected, _, name = line.partition("  ")
        file = directory / name
        # The list may come from elsewhere, so it must not reach files outside the directory.
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            wrong.append(f"line {number} of {SUMS} names no file of this directory")
        elif not access.is_file(file):
            wrong.append(f"{name} is missing")
        elif (actual := sha256(file)) != expected:
            wrong.append(f"{name} has {actual[:12]}… instead of {expected[:12]}…")
    return f"{'; '.join(wrong)}: download it again" if wrong else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
