"""Write the trained model as the program reads it: python -m scripts.train_embedded.export STATES

Four directories, as published, in opensora_sp/assets/embedded or where --to says. The weights are
the moving average of the transformer and text encoder and the newest VAEs, rounded to bfloat16:
what the files hold is exact in every dtype that the program runs in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.train_embedded.architecture import DIT, T5, VAE2D, VAE3D
from scripts.train_embedded.state import read_state
from scripts.train_embedded.tokens import tokenizer_files

TARGET = Path(__file__).resolve().parents[2] / "opensora_sp" / "assets" / "embedded"
FLOW_PARTS = ("dit.", "t5.")
EXACT = ("rope.freqs", "shift", "scale")  # float32 in the published files too


def export(states: Path, target: Path) -> None:
    """Write dit/, t5/, vae2d/ and vae3d/ into `target`; existing files are replaced."""
    cpu = torch.device("cpu")
    vae, flow = read_state(states / "vae.pt", cpu), read_state(states / "flow.pt", cpu)
    if vae is None or flow is None:
        raise SystemExit(f"{states} has no vae.pt or no flow.pt: run those stages first")
    write_vae(vae["model"], target / "vae2d" / "vae", target / "vae3d")
    average: dict[str, Tensor] = flow["average"]
    write_json(target / "dit" / "config.json", DIT)
    write_safetensors(target / "dit" / "model.safetensors", part(average, "dit."))
    write_t5(part(average, "t5."), target / "t5")
    (target / "t5" / "spiece.model").write_bytes((states / "spiece.model").read_bytes())


def export_flow(states: Path, path: Path) -> None:
    """Write the transformer and the text encoder alone, for a training that goes on elsewhere."""
    flow = read_state(states / "flow.pt", torch.device("cpu"))
    if flow is None:
        raise SystemExit(f"{states} has no flow.pt: run that stage first")
    weights = {
        prefix + name: weight
        for prefix in FLOW_PARTS
        for name, weight in part(flow["average"], prefix).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, weights, step=str(flow["step"]))


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below a prefix, in bfloat16, without it."""
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    return {n: w.contiguous() if n in EXACT else rounded(w) for n, w in own.items()}


def rounded(weight: Tensor) -> Tensor:
    """In bfloat16, in memory of its own."""
    return weight.detach().to(torch.bfloat16).clone(memory_format=torch.contiguous_format)


def write_vae(weights: Mapping[str, Tensor], spatial: Path, video: Path) -> None:
    """The video VAE's checkpoint holds both VAEs; the spatial one is written by itself as well."""
    stats = {name: weights[name].flatten().tolist() for name in ("shift", "scale")}
    write_json(video / "config.json", {**VAE3D, **stats})
    write_safetensors(video / "model.safetensors", part(weights, ""))
    write_json(spatial / "config.json", VAE2D)
    write_safetensors(
        spatial / "diffusion_pytorch_model.safetensors", part(weights, "spatial_vae.module.")
    )


def write_t5(weights: dict[str, Tensor], directory: Path) -> None:
    """The text encoder as published: PyTorch shards in float32, an index, and the tokenizer."""
    weights = {name: weight.float() for name, weight in weights.items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    shards: dict[str, list[str]] = {f"pytorch_model-0000{i}-of-00002.bin": [] for i in (1, 2)}
    first, second = shards.values()
    for name in sorted(weights):
        (second if name.startswith("encoder.block.1.") else first).append(name)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(w.numel() * w.element_size() for w in weights.values())},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    write_json(directory / "config.json", T5)
    write_json(directory / "pytorch_model.bin.index.json", index)
    for shard, names in shards.items():
        torch.save({name: weights[name] for name in names}, directory / shard)
    for name, content in tokenizer_files().items():
        write_json(directory / name, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, in the given order, with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, weights: Mapping[str, Tensor], **metadata: str) -> None:
    """In the order that the format itself puts the weights in."""
    from safetensors.torch import save

    path.write_bytes(save(dict(weights), metadata={"format": "pt", **metadata}))


def main() -> None:
    """Write the model and say where and how large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the states are kept")
    parser.add_argument("--to", type=Path, default=TARGET)
    parser.add_argument(
        "--flow", type=Path, metavar="FILE", help="only what flow trains, for restore --flow"
    )
    arguments = parser.parse_args()
    if arguments.flow:
        export_flow(arguments.directory, arguments.flow)
        print(f"{arguments.flow}: {arguments.flow.stat().st_size / 1e6:.2f} MB")
        return
    export(arguments.directory, arguments.to)
    size = sum(path.stat().st_size for path in arguments.to.rglob("*") if path.is_file())
    print(f"{arguments.to}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
