"""Command: bring a checkpoint of another form into the published layout.

    opensora-sp convert dit epoch3-global_step9000 NEW_DIR
    opensora-sp convert dit fine_tuned.pt NEW_DIR --config published/config.json
    opensora-sp convert t5 pipeline_folder NEW_DIR

Takes Open-Sora's own training output, one file of weights (.pt, .pth, .bin, .safetensors, also with
the weights under "state_dict" and "module." before their names), T5 with its decoder, and the
text_encoder/ and tokenizer/ of a diffusers pipeline. Files are read as everywhere: what could run
code is refused. NEW_DIR appears whole, and only if every weight's name and shape is right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base import access
from opensora_sp.base.atomic import reported
from opensora_sp.base.errors import CheckpointError, UserError
from opensora_sp.base.screen import note, on_any_screen, result
from opensora_sp.base.value_types import shown
from opensora_sp.cli.console import refuse
from opensora_sp.cli.parser import RefusingParser
from opensora_sp.models.foreign_checkpoints import (
    AVERAGE,
    KINDS,
    PIPELINE_FOLDERS,
    TRAINED_FOLDER,
    weight_files,
)
from opensora_sp.request.preflight import check_save_dir

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model", "module", "ema", "model_state_dict")
SHARD_BYTES = 4 << 30
# Of T5 only the encoder is used; google/t5-v1_1-xxl holds all of it.
_NOT_THE_ENCODER = ("decoder.", "lm_head.")
_T5_FILES = ("config.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
_PUBLISHED_DIT = {"model_type": "STDiT3"}  # absent keys mean STDiT3-XL/2's values
_PUBLISHED_VAE = {"model_type": "VideoAutoencoderPipeline", "vae_temporal": "VAE_Temporal_SD"}


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns 0, or 2 with one line where that cannot be done."""
    try:
        asked = parser().parse_args(argv)
        convert(asked.kind, asked.source, asked.target, asked.config, asked.key, asked.vae2d)
    except UserError as error:
        return refuse(error, same_everywhere=True)
    result(asked.target)
    return 0


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = RefusingParser(
        prog="opensora-sp convert",
        usage="opensora-sp convert {dit,t5,vae3d} SOURCE NEW_DIR [flags]",
        description="Brings a checkpoint of another form into the published layout: Open-Sora's "
        "own training output, one file of weights, T5 with its decoder, or a diffusers pipeline.",
    )
    made.add_argument("kind", choices=KINDS, help="which of the models it is")
    made.add_argument("source", type=Path, metavar="SOURCE", help="a file or a directory")
    made.add_argument("target", type=Path, metavar="NEW_DIR", help="must not be there yet")
    made.add_argument(
        "--config", type=Path, metavar="FILE", help="its config.json (default: the published sizes)"
    )
    made.add_argument(
        "--key", metavar="NAME", help="which weights, where a file holds several (model, ema, ...)"
    )
    made.add_argument(
        "--vae2d", type=Path, metavar="DIR", help="with vae3d: the vae2d directory it goes with"
    )
    return made


def convert(
    kind: str,
    source: Path,
    target: Path,
    config: Path | None = None,
    key: str | None = None,
    vae2d: Path | None = None,
) -> None:
    """Write a checkpoint in the published layout into a new directory, or nothing.

    Args:
        config: its config.json, where none lies beside it.
        key: which of several sets of weights in one file.
        vae2d: the directory that a vae3d is checked with.

    Raises:
        UserError: the target is there, the source is in no form that is known, holds code, or its
            weights do not fit its config.json.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} is there already: give a directory that is not")
    if not access.exists(source):
        raise UserError(f"{source} does not exist: give the checkpoint that is to be converted")
    if not access.is_file(source) and not access.is_dir(source):
        raise UserError(f"{source} is neither a regular file nor a directory")
    check_save_dir(str(target.parent), f"NEW_DIR {shown(str(target))}: its folder")
    if kind == "vae3d" and vae2d is None:
        raise UserError("--vae2d is needed with vae3d: its weights are checked with that config")
    # Missing folders above the target are made at the end: a refusal leaves nothing behind.
    there = next(place for place in access.absolute(target).parents if access.is_dir(place))
    with reported(target):
        temporary = tempfile.TemporaryDirectory(
            prefix=".opensora-sp-", dir=there, ignore_cleanup_errors=True
        )
    with temporary as folder, _reading(source):
        made = Path(folder) / "checkpoint"
        settings = _settings(kind, source, config)
        with reported(target):
            made.mkdir()
            for name, content in settings.items():
                (made / name).write_bytes(content)
        _write(_weights(kind, source, key), made, target)
        try:
            _check(kind, made, vae2d)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(made), str(source))) from error
        with reported(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            made.rename(target)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turn an error of the system, while files of the source are read, into one UserError line."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or source)
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def _settings(kind: str, source: Path, config: Path | None) -> dict[str, bytes]:
    """The contents of config.json, and of T5 those of the tokenizer, by name."""
    settings: dict[str, bytes] = {}
    home = source if access.is_dir(source) else source.parent
    places = [home]
    if kind == "t5":
        places += [home / folder for folder in PIPELINE_FOLDERS]
        for name in _T5_FILES:
            found = [place / name for place in places if access.is_file(place / name)]
            if found:
                settings[name] = _bytes(found[0])
        if "spiece.model" not in settings:
            raise UserError(f"{source} has no spiece.model: T5's tokenizer is needed beside it")
    beside = [home / "config.json", home / TRAINED_FOLDER / "config.json"]
    found = [path for path in beside if access.is_file(path)]
    if config is not None:
        content = _object(config)  # whether or not another lies beside the weights
    if config is not None and found and content != _object(found[0]):
        # Sizes that no weight's shape shows (input_sq_size) would be wrong in silence.
        raise UserError(
            f"--config {config} differs from {found[0]}: leave it out, or move that away"
        )
    if config is not None or found:
        settings["config.json"] = _bytes(config or found[0])
    elif kind != "t5":
        published = _PUBLISHED_DIT if kind == "dit" else _PUBLISHED_VAE
        settings["config.json"] = (json.dumps(published) + "\n").encode()
        note(f"{source} has no config.json: the published model's sizes are taken")
    if "config.json" not in settings:
        raise UserError(f"{source} has no config.json: give it with --config")
    return settings


def _bytes(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


def _object(path: Path) -> Any:
    from opensora_sp.base.outside_json import read_object

    return read_object(path)


def _weights(kind: str, source: Path, key: str | None) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by its published name, one after the other."""
    dropped = 0
    for name, tensor in _all_weights(kind, source, key):
        if kind == "t5" and name.startswith(_NOT_THE_ENCODER):
            dropped += 1
            continue
        yield name, tensor
    if dropped:
        note(f"{dropped} weights of T5's decoder are left out: only the encoder is used")


def _all_weights(kind: str, source: Path, key: str | None) -> Iterator[tuple[str, Tensor]]:
    from opensora_sp.models.checkpoint import WeightFiles

    if access.is_dir(source):
        home = source
        if kind == "t5" and access.is_dir(source / PIPELINE_FOLDERS[0]):
            home = source / PIPELINE_FOLDERS[0]
        if kind != "t5" and access.is_dir(source / TRAINED_FOLDER):
            home = source / TRAINED_FOLDER
            if access.is_file(source / AVERAGE):
                note(f"the weights of {home} are taken; the average in {source / AVERAGE} is not")
        files = weight_files(home)
        if not files:
            raise CheckpointError(f"{home} holds no weights that are known")
        source = files[0]
    if source.name.endswith(".index.json"):
        stem = source.name.partition(".")[0]
        weights = WeightFiles.open(source.parent, stem)
        for name in weights.shapes:
            yield _plain(name), weights.get(name)
    elif source.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(source), framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    yield _plain(name), file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{source} is corrupt or cut short: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from error
    else:
        yield from _of_state(source, key)


def _of_state(source: Path, key: str | None) -> Iterator[tuple[str, Tensor]]:
    """The weights of a file of torch.save, bare or inside one of the usual wrappers."""
    import torch

    from opensora_sp.models.tensor_files import load_tensor_file

    content: Any = load_tensor_file(source, mmap=True)
    if key is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            raise UserError(f"{source} holds no weights under --key {key}")
        content = content[key]
    for _ in range(3):
        sets = content if isinstance(content, Mapping) else {}
        inner = [name for name in WRAPPERS if isinstance(sets.get(name), Mapping)]
        if len(inner) > 1:
            raise UserError(
                f"{source} holds several sets of weights ({', '.join(inner)}): choose one with "
                f"--key {inner[0]}"
            )
        if not inner:
            break
        content = content[inner[0]]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds no weights by name")
    odd = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd or not content:
        raise CheckpointError(
            f"{source} holds other things than weights ({', '.join(odd[:3]) or 'nothing'}): "
            f"they are looked for bare or under {', '.join(WRAPPERS)}"
        )
    # Lightning's modules hold the model under this name.
    lightning = all(str(name).startswith("model.") for name in content)
    for name, tensor in content.items():
        yield _plain(str(name).removeprefix("model." if lightning else "")), tensor


def _plain(name: str) -> str:
    """A weight's name without what data parallelism and compilation put before it."""
    while True:
        short = name.removeprefix("module.").removeprefix("_orig_mod.")
        if short == name:
            return name
        name = short


def _write(weights: Iterator[tuple[str, Tensor]], made: Path, target: Path) -> None:
    """Shards of at most `SHARD_BYTES` with their index; one shard stands alone."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    part: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        if part:
            try:
                with reported(target):
                    save_file(part, str(made / f"part-{len(shards)}.safetensors"))
            except SafetensorError as error:  # so a full disk is said
                raise UserError(
                    f"cannot write weights into {made.parent.parent}: {error}"
                ) from None
            shards.append(list(part))
        part, size = {}, 0

    for name, tensor in weights:
        if any(name in shard for shard in shards) or name in part:
            raise CheckpointError(f"the weight {name} is there twice")
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"the weight {name} has NaN or infinite values")
        # A copy: the file's pages may be shared between weights, which safetensors refuses.
        part[name] = tensor.detach().clone().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            flush()
    flush()
    with reported(target):
        _name_shards(shards, made)


def _name_shards(shards: Sequence[Sequence[str]], made: Path) -> None:
    if len(shards) == 1:
        (made / "part-0.safetensors").rename(made / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (made / f"part-{number}.safetensors").rename(made / file)
        where |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": where}, indent=1)
    (made / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")


def _check(kind: str, made: Path, vae2d: Path | None) -> None:
    """Raises CheckpointError where a name or a shape does not fit the config.json."""
    if kind == "dit":
        from opensora_sp.engine.loading import load_transformer
        from opensora_sp.models.stdit3 import STDiT3Config

        load_transformer(made, STDiT3Config.load(made), check_only=True)
    elif kind == "t5":
        from opensora_sp.models.text_encoder import TextEncoder

        TextEncoder.check(made)
    elif vae2d is not None:
        from opensora_sp.models.video_vae import VideoVAE

        VideoVAE.check(made, vae2d)


if __name__ == "__main__":
    sys.exit(main())
