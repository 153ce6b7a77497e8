"""Checkpoints as people have them: named in the refusal, and converted by the command it names."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_sp.base.errors import CheckpointError
from opensora_sp.cli.convert import main
from opensora_sp.models.checkpoint import WeightFiles
from opensora_sp.models.text_encoder import TextEncoder
from opensora_sp.request.embedded import EMBEDDED
from opensora_sp.request.preflight import check_checkpoints

Weights = dict[str, Tensor]
Make = Callable[[Path, Weights], Path]


def weights_of(kind: str) -> Weights:
    stems = {"dit": "model", "t5": "pytorch_model", "vae3d": "model"}
    files = WeightFiles.open(EMBEDDED / kind, stems[kind])
    return {name: files.get(name).clone() for name in files.shapes}


def in_shards(folder: Path, weights: Weights, stem: str, suffix: str) -> None:
    """As ColossalAI and transformers write them: two files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = sorted(weights)
    where: dict[str, str] = {}
    save: Any = save_file if suffix == "safetensors" else torch.save
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}.{suffix}"
        save({name: weights[name].contiguous() for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


def bare(home: Path, weights: Weights) -> Path:
    """A training folder whose config.json lies with the weights."""
    folder = home / "epoch1-global_step5"
    in_shards(with_config("dit", folder / "model"), weights, "pytorch_model", "bin")
    return folder


def lightning(home: Path, weights: Weights) -> Path:
    with_config("dit", home)
    torch.save({"state_dict": {f"model.{n}": w for n, w in weights.items()}}, home / "last.ckpt")
    return home / "last.ckpt"


def with_config(kind: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(EMBEDDED / kind / "config.json", folder / "config.json")
    return folder


def trained(home: Path, weights: Weights) -> Path:
    """epochN-global_stepM/ of Open-Sora's own training."""
    folder = with_config("dit", home / "epoch3-global_step9000")
    in_shards(folder / "model", weights, "pytorch_model", "bin")
    torch.save({name: torch.zeros_like(w) for name, w in weights.items()}, folder / "ema.pt")
    return folder


def trained_safetensors(home: Path, weights: Weights) -> Path:
    folder = with_config("dit", home / "epoch0-global_step10")
    in_shards(folder / "model", weights, "model", "safetensors")
    return folder


def average(home: Path, weights: Weights) -> Path:
    folder = with_config("dit", home / "epoch3-global_step9000")
    torch.save(weights, folder / "ema.pt")
    return folder / "ema.pt"


def wrapped(home: Path, weights: Weights) -> Path:
    with_config("dit", home)
    state = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save({"state_dict": state, "epoch": 3, "lr": 1e-4}, home / "last.pth")
    return home / "last.pth"


def compiled(home: Path, weights: Weights) -> Path:
    with_config("dit", home)
    torch.save({f"_orig_mod.module.{n}": w for n, w in weights.items()}, home / "best.pt")
    return home / "best.pt"


def hugging_face(home: Path, weights: Weights) -> Path:
    folder = with_config("dit", home / "hf")
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def one_safetensors(home: Path, weights: Weights) -> Path:
    with_config("dit", home)
    save_file(weights, home / "fine_tuned.safetensors")
    return home / "fine_tuned.safetensors"


def paths_with(kind: str, path: Path) -> dict[str, str | None]:
    paths: dict[str, str | None] = {n: str(EMBEDDED / n) for n in ("dit", "t5", "vae2d", "vae3d")}
    return paths | {kind: str(path)}


def convert(kind: str, source: Path, target: Path, *more: str) -> None:
    assert main([kind, str(source), str(target), *more]) == 0
    assert check_checkpoints(paths_with(kind, target)) is not None


def same(one: Weights, other: Weights) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    "make",
    [
        trained,
        trained_safetensors,
        bare,
        average,
        wrapped,
        compiled,
        lightning,
        hugging_face,
        one_safetensors,
    ],
)
def test_a_fine_tuned_transformer_is_named_and_converted(tmp_path: Path, make: Make) -> None:
    weights = weights_of("dit")
    source = make(tmp_path / "with a blank", weights)
    with pytest.raises(CheckpointError) as refused:
        check_checkpoints(paths_with("dit", source))
    # The command that the refusal names is the one that helps.
    command = shlex.split(str(refused.value).split("`")[1])
    assert command[:3] == ["opensora-sp", "convert", "dit"]
    assert command[4:] == ["NEW_DIR"]
    target = tmp_path / "converted"
    convert("dit", Path(command[3]), target)
    assert same(load_file(target / "model.safetensors"), weights)
    assert not list(tmp_path.glob(".opensora-sp-*"))


def test_t5_with_its_decoder_and_in_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of("t5")
    whole = weights | {"lm_head.weight": torch.ones(3, 2), "decoder.block.0.x": torch.ones(2)}
    full, pipeline = tmp_path / "full", tmp_path / "pipeline"
    for folder, tokens in ((full, full), (pipeline / "text_encoder", pipeline / "tokenizer")):
        with_config("t5", folder)
        tokens.mkdir(exist_ok=True)
        for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(EMBEDDED / "t5" / name, tokens / name)
    torch.save(whole, full / "pytorch_model.bin")
    in_shards(pipeline / "text_encoder", weights, "model", "safetensors")
    with pytest.raises(CheckpointError, match="T5 with its decoder: convert it"):
        TextEncoder.check(full)
    with pytest.raises(CheckpointError, match="a diffusers pipeline with text_encoder"):
        check_checkpoints(paths_with("t5", pipeline))
    for source in (full, pipeline):
        target = tmp_path / f"new-{source.name}"
        convert("t5", source, target)
        assert same(load_file(target / "model.safetensors"), weights)
        TextEncoder.check(target)
    (full / "spiece.model").unlink()
    (full / "spiece.model").symlink_to("/proc/self/mem")
    assert main(["t5", str(full), str(tmp_path / "new")]) == 2
    assert f"{full / 'spiece.model'} cannot be read" in capsys.readouterr().err


def test_a_large_one_becomes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora_sp.cli.convert.SHARD_BYTES", 200_000)
    weights = weights_of("dit")
    convert("dit", wrapped(tmp_path, weights), tmp_path / "new")
    assert len(list((tmp_path / "new").glob("model-*-of-*.safetensors"))) > 2
    files = WeightFiles.open(tmp_path / "new", "model")
    assert same({name: files.get(name) for name in files.shapes}, weights)


def test_what_cannot_be_converted_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of("dit")
    lacking, odd, empty = (with_config("dit", tmp_path / n) for n in ("lacking", "odd", "empty"))
    torch.save(dict(list(weights.items())[1:]), lacking / "pytorch_model.bin")
    torch.save({"state_dict": {"a": 1}}, odd / "last.pt")
    hostile = with_config("dit", tmp_path / "hostile")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(hostile / "model.bin"))
    (tmp_path / "there").mkdir()
    # A regular file that cannot be read, by root neither: address 0 of this process.
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    (unreadable / "config.json").symlink_to("/proc/self/mem")
    torch.save(weights, unreadable / "pytorch_model.bin")
    for source, target, said in (
        (lacking, "new", "1 missing"),
        (unreadable, "new", f"{unreadable / 'config.json'} cannot be read: Input/output error"),
        (odd, "new", "other things than weights (a)"),
        (empty, "new", "no weights that are known"),
        (hostile, "new", "holds code"),
        (tmp_path / "absent", "new", "does not exist"),
        (lacking, "there", "is there already"),
    ):
        assert main(["dit", str(source), str(tmp_path / target)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert said in error
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".opensora-sp-*"))


def test_without_a_config_the_published_sizes_are_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of("dit")
    torch.save(weights, tmp_path / "ema.pt")
    assert main(["dit", str(tmp_path / "ema.pt"), str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert "the published model's sizes are taken" in said
    assert "of another shape" in said
    config = str(EMBEDDED / "dit" / "config.json")
    convert("dit", tmp_path / "ema.pt", tmp_path / "new", "--config", config)


def test_nothing_is_chosen_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of("dit")
    home = with_config("dit", tmp_path / "home")
    torch.save({"model": weights, "ema": {n: w + 1 for n, w in weights.items()}}, home / "a.pt")
    assert main(["dit", str(home / "a.pt"), str(tmp_path / "new")]) == 2
    assert "several sets of weights (model, ema)" in capsys.readouterr().err
    assert main(["dit", str(home / "a.pt"), str(tmp_path / "new"), "--key", "none"]) == 2
    convert("dit", home / "a.pt", tmp_path / "new", "--key", "ema")
    made = load_file(tmp_path / "new" / "model.safetensors")
    assert same(made, {n: w + 1 for n, w in weights.items()})
    # A size that no weight shows must not come from somewhere else.
    other = json.loads((home / "config.json").read_text()) | {"input_sq_size": 17}
    (tmp_path / "other.json").write_text(json.dumps(other))
    argv = ["dit", str(home / "a.pt"), str(tmp_path / "b"), "--key", "model"]
    assert main([*argv, "--config", str(tmp_path / "other.json")]) == 2
    assert "differs from" in capsys.readouterr().err
    name = next(n for n, w in weights.items() if w.is_floating_point())
    torch.save(weights | {name: weights[name] * float("nan")}, home / "nan.pt")
    assert main(["dit", str(home / "nan.pt"), str(tmp_path / "b")]) == 2
    assert f"the weight {name} has NaN" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_vae_is_checked_with_its_spatial_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of("vae3d")
    home = with_config("vae3d", tmp_path / "epoch2-global_step7")
    in_shards(home / "model", weights, "model", "safetensors")
    assert main(["vae3d", str(home), str(tmp_path / "new")]) == 2
    assert "--vae2d is needed" in capsys.readouterr().err
    convert("vae3d", home, tmp_path / "new", "--vae2d", str(EMBEDDED / "vae2d"))
    assert same(load_file(tmp_path / "new" / "model.safetensors"), weights)
    bad = with_config("vae3d", tmp_path / "bad")
    torch.save({"nonsense": torch.ones(2)}, bad / "pytorch_model.bin")
    argv = ["vae3d", str(bad), str(tmp_path / "b"), "--vae2d", str(EMBEDDED / "vae2d")]
    assert main(argv) == 2
    assert str(bad) in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
