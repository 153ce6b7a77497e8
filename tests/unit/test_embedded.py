"""The embedded default model: the published layout, reproducible, and worth looking at."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_sp.models.checkpoint import WeightFiles, load_module
from opensora_sp.models.stdit3 import STDiT3Config, build_stdit3
from opensora_sp.models.video_vae import VideoVAE

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_embedded.py"

# Directory and file stem of each part's weights.
WEIGHTS = {
    "dit": "model",
    "t5": "pytorch_model",
    "vae2d/vae": "diffusion_pytorch_model",
    "vae3d": "model",
}


def files_below(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def read(directory: Path) -> dict[str, Tensor]:
    """All weights of the model, named part/weight."""
    found = {}
    for part, stem in WEIGHTS.items():
        weights = WeightFiles.open(directory / part, stem)
        found.update({f"{part}/{name}": weights.get(name).clone() for name in weights.shapes})
    return found


def numberless(names: list[str]) -> set[str]:
    """Names with every block or layer number as N, so that models of any depth compare."""
    return {re.sub(r"\.\d+\.", ".N.", re.sub(r"\.\d+\.", ".N.", name)) for name in names}


def test_layout_is_the_published_one(embedded_dir: Path, suite_dir: Path) -> None:
    model_files = {
        name
        for part in ("dit", "t5", "vae2d", "vae3d")
        for name in (f"{part}/{file}" for file in files_below(suite_dir / part))
        if not Path(name).name.startswith("cases")
    }
    assert files_below(embedded_dir) == model_files
    assert sum((embedded_dir / name).stat().st_size for name in model_files) <= 16 * 2**20


@pytest.mark.parametrize("part", ["dit", "t5", "vae3d"])
def test_weights_are_named_as_published(part: str, embedded_dir: Path, suite_dir: Path) -> None:
    manifest = json.loads((suite_dir / "manifest.json").read_text())[part]
    weights = WeightFiles.open(embedded_dir / part, WEIGHTS[part])
    assert numberless(list(weights.shapes)) == numberless(list(manifest))
    dimensions = {name: len(shape) for name, shape in manifest.items()}
    wrong = [n for n, s in weights.shapes.items() if len(s) != dimensions.get(n, len(s))]
    assert not wrong


def test_shipped_files_are_what_the_script_makes(embedded_dir: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_embedded", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_model(tmp_path)
    for name in files_below(embedded_dir):
        if name.endswith((".json", ".model")):
            assert (tmp_path / name).read_bytes() == (embedded_dir / name).read_bytes(), name
    shipped, made = read(embedded_dir), read(tmp_path)
    assert shipped.keys() == made.keys()
    for name, weight in shipped.items():
        # One rounding step of bfloat16, for processors whose random numbers differ in the last bit.
        torch.testing.assert_close(made[name], weight, rtol=2**-7, atol=1e-6, msg=name)


def test_tokens_are_t5s_and_fit_the_embedding(embedded_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_dir / "t5")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("a red boat on a calm lake. aesthetic score: 6.5.")["input_ids"]
    assert ids[-1] == 1
    assert 2 not in ids
    config = json.loads((embedded_dir / "t5" / "config.json").read_text())
    assert len(tokenizer) <= config["vocab_size"]
    dit = json.loads((embedded_dir / "dit" / "config.json").read_text())
    assert dit["caption_channels"] == config["d_model"]


def test_pictures_are_visible(embedded_dir: Path) -> None:
    vae = VideoVAE.load(
        embedded_dir / "vae3d",
        embedded_dir / "vae2d",
        dtype=torch.float32,
        device="cpu",
        with_encoder=False,
    )
    z = torch.randn(1, 4, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        video = vae.decode(z, 5)
    assert 0.2 < video.std() < 0.6, "neither flat grey nor saturated"
    assert (video.abs() > 1).float().mean() < 0.1, "few pixels are clipped"
    per_frame = video.std(dim=(1, 3, 4))
    assert per_frame.min() > 0.1, "every frame shows something"


def test_velocity_has_the_size_of_the_noise(embedded_dir: Path) -> None:
    model = build_stdit3(STDiT3Config.load(embedded_dir / "dit"))
    weights = WeightFiles.open(embedded_dir / "dit", "model")
    load_module(model, weights, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 1, 300, model.config.caption_channels, generator=generator)
    mask = torch.zeros(1, 300, dtype=torch.int64)
    mask[:, :20] = 1
    x = torch.randn(1, 4, 5, 8, 12, generator=generator)
    sizes = [torch.tensor([value]) for value in (24.0, 64.0, 96.0)]
    for t in (1000.0, 500.0, 50.0):
        with torch.no_grad():
            velocity = model(x, torch.tensor([t]), y, mask, *sizes)[:, :4]
        assert 0.5 < velocity.std() < 2.5
