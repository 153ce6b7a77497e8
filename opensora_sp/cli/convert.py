"""Command: bring a checkpoint of another form into the published layout.

    python -m opensora_sp.cli.convert dit epoch3-global_step9000 NEW_DIR
    python -m opensora_sp.cli.convert dit fine_tuned.pt NEW_DIR --config published/config.json
    python -m opensora_sp.cli.convert t5 pipeline_folder NEW_DIR

Takes Open-Sora's own training output, one file of weights (.pt, .pth, .bin, .safetensors, also with
the weights under "state_dict" and "module." before their names), T5 with its decoder, and the
text_encoder/ and tokenizer/ of a diffusers pipeline. Files are read as everywhere: what could run
code is refused. NEW_DIR appears whole, and only if every weight's name and shape is right.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from opensora_sp import access
from opensora_sp.cli.console import refuse
from opensora_sp.errors import CheckpointError, UserError
from opensora_sp.foreign_checkpoints import (
    AVERAGE,
    KINDS,
    PIPELINE_FOLDERS,
    TRAINED_FOLDER,
    weight_files,
)
from opensora_sp.screen import note, on_any_screen, result

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model", "module", "ema", "model_state_dict")
SHARD_BYTES = 4 << 30
# Of T5 only the encoder is used; google/t5-v1_1-xxl holds all of it.
_NOT_THE_ENCODER = ("decoder.", "lm_head.")
_T5_FILES = ("config.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
_PUBLISHED_DIT = {"model_type": "STDiT3"}  # absent keys mean STDiT3-XL/2's values
_PUBLISHED_VAE = {"model_type": "VideoAutoencoderPipeline", "vae_temporal": "VAE_Temporal_SD"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@on_any_screen
def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns 0, or 2 with one line where that cannot be done."""
    parser = _Parser(prog="convert", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS, help="which of the models it is")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a file or a directory")
    parser.add_argument("target", type=Path, metavar="NEW_DIR", help="must not be there yet")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="its config.json (default: the published sizes)"
    )
    try:
        asked = parser.parse_args(argv)
        convert(asked.kind, asked.source, asked.target, asked.config)
    except UserError as error:
        return refuse(error, same_everywhere=True)
    result(asked.target)
    return 0


def convert(kind: str, source: Path, target: Path, config: Path | None = None) -> None:
    """Write a checkpoint in the published layout into a new directory, or nothing.

    Raises:
        UserError: the target is there, the source is in no form that is known, holds code, or its
            weights do not fit its config.json.
    """
    if access.exists(target):
        raise UserError(f"{target} is there already: give a directory that is not")
    if not access.exists(source):
        raise UserError(f"{source} does not exist: give the checkpoint that is to be converted")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".opensora-sp-", dir=target.parent) as folder:
        made = Path(folder) / "checkpoint"
        made.mkdir()
        _settings(kind, source, made, config)
        _write(_weights(kind, source), made)
        _check(kind, made)
        made.rename(target)


def _settings(kind: str, source: Path, made: Path, config: Path | None) -> None:
    """config.json, and of T5 the tokenizer."""
    home = source if access.is_dir(source) else source.parent
    places = [home]
    if kind == "t5":
        places += [home / folder for folder in PIPELINE_FOLDERS]
        for name in _T5_FILES:
            found = [place / name for place in places if access.is_file(place / name)]
            if found:
                shutil.copy(found[0], made / name)
        if not (made / "spiece.model").exists():
            raise UserError(f"{source} has no spiece.model: T5's tokenizer is needed beside it")
    own = home / "config.json"
    if config is not None or access.is_file(own):
        shutil.copy(config or own, made / "config.json")
    elif kind != "t5":
        published = _PUBLISHED_DIT if kind == "dit" else _PUBLISHED_VAE
        (made / "config.json").write_text(json.dumps(published) + "\n", encoding="utf-8")
        note(f"{source} has no config.json: the published model's sizes are taken")
    if not (made / "config.json").exists():
        raise UserError(f"{source} has no config.json: give it with --config")


def _weights(kind: str, source: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by its published name, one after the other."""
    dropped = 0
    for name, tensor in _all_weights(kind, source):
        if kind == "t5" and name.startswith(_NOT_THE_ENCODER):
            dropped += 1
            continue
        yield name, tensor
    if dropped:
        note(f"{dropped} weights of T5's decoder are left out: only the encoder is used")


def _all_weights(kind: str, source: Path) -> Iterator[tuple[str, Tensor]]:
    from opensora_sp.models.checkpoint import WeightFiles

    if access.is_dir(source):
        home = source
        if kind == "t5" and access.is_dir(source / PIPELINE_FOLDERS[0]):
            home = source / PIPELINE_FOLDERS[0]
        if kind == "dit" and access.is_dir(source / TRAINED_FOLDER):
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
    else:
        yield from _of_state(source)


def _of_state(source: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a file of torch.save, bare or inside one of the usual wrappers."""
    import torch

    from opensora_sp.models.tensor_files import load_tensor_file

    content: Any = load_tensor_file(source, mmap=True)
    for _ in range(3):
        inner = [key for key in WRAPPERS if isinstance(content, Mapping) and key in content]
        if not inner or not isinstance(content[inner[0]], Mapping):
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
    for name, tensor in content.items():
        yield _plain(str(name)), tensor


def _plain(name: str) -> str:
    """A weight's name without what data parallelism and compilation put before it."""
    while True:
        short = name.removeprefix("module.").removeprefix("_orig_mod.")
        if short == name:
            return name
        name = short


def _write(weights: Iterator[tuple[str, Tensor]], made: Path) -> None:
    """Shards of at most `SHARD_BYTES` with their index; one shard stands alone."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    part: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        if part:
            save_file(part, str(made / f"part-{len(shards)}.safetensors"))
            shards.append(list(part))
        part, size = {}, 0

    for name, tensor in weights:
        if any(name in shard for shard in shards) or name in part:
            raise CheckpointError(f"the weight {name} is there twice")
        # A copy: the file's pages may be shared between weights, which safetensors refuses.
        part[name] = tensor.detach().clone().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            flush()
    flush()
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


def _check(kind: str, made: Path) -> None:
    """Raises CheckpointError where a name or a shape does not fit the config.json."""
    if kind == "dit":
        from opensora_sp.loading import load_transformer
        from opensora_sp.models.stdit3 import STDiT3Config

        load_transformer(made, STDiT3Config.load(made), check_only=True)
    elif kind == "t5":
        from opensora_sp.models.text_encoder import TextEncoder

        TextEncoder.check(made)


if __name__ == "__main__":
    sys.exit(main())
