"""The embedded default model: the published layout, exact in bfloat16, and it does as told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_sp.models.checkpoint import WeightFiles

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
    assert files_below(embedded_dir) == {*model_files, "README.md", "dit/step_cache.yaml"}
    assert sum((embedded_dir / name).stat().st_size for name in model_files) <= 16 * 2**20


@pytest.mark.parametrize("part", ["dit", "t5", "vae3d"])
def test_weights_are_named_as_published(part: str, embedded_dir: Path, suite_dir: Path) -> None:
    manifest = json.loads((suite_dir / "manifest.json").read_text())[part]
    weights = WeightFiles.open(embedded_dir / part, WEIGHTS[part])
    assert numberless(list(weights.shapes)) == numberless(list(manifest))
    dimensions = {name: len(shape) for name, shape in manifest.items()}
    wrong = [n for n, s in weights.shapes.items() if len(s) != dimensions.get(n, len(s))]
    assert not wrong


def test_weights_are_exact_in_bfloat16(embedded_dir: Path) -> None:
    exact = ("rope.freqs", "shift", "scale")
    weights = {n: w for n, w in read(embedded_dir).items() if not n.endswith(exact)}
    assert [n for n, w in weights.items() if not torch.equal(w.bfloat16().to(w.dtype), w)] == []
    assert [n for n, w in weights.items() if not torch.isfinite(w).all()] == []


def test_tokens_are_t5s_and_fit_the_embedding(embedded_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_dir / "t5")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("a red boat on a calm lake. aesthetic score: 6.5.")["input_ids"]
    assert ids[-1] == 1
    assert 2 not in ids  # nothing unknown
    config = json.loads((embedded_dir / "t5" / "config.json").read_text())
    assert len(tokenizer) <= config["vocab_size"]
    dit = json.loads((embedded_dir / "dit" / "config.json").read_text())
    assert dit["caption_channels"] == config["d_model"]


def test_it_shows_what_the_prompt_says() -> None:
    from opensora_sp.engine.pipeline import Pipeline
    from opensora_sp.request.request import Request
    from scripts.train_embedded.judge import look

    asked = [
        ("red ball", "to the right", ("red", "circle", "right")),
        ("green square", "to the left", ("green", "square", "left")),
        ("blue triangle", "up", ("blue", "triangle", "up")),
        ("yellow hoop", "down and to the right", ("yellow", "ring", "down-right")),
    ]
    requests = [
        Request(
            prompt=f"a {thing} moves {way} over a gray background",
            prompt_index=index,
            height=64,
            width=96,
            num_frames=17,
        )
        for index, (thing, way, _) in enumerate(asked)
    ]
    result = Pipeline.load(dtype="fp32").generate(requests)
    seen = [look(video)[0] for video in result.videos if video is not None]
    found = [(thing.colour, thing.shape, thing.motion) for thing in seen]
    assert found == [what for _, _, what in asked]
