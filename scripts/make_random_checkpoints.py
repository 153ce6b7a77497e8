#!/usr/bin/env python3
"""Write random checkpoints of the published sizes, to test loading, memory and speed without them.

    python scripts/make_random_checkpoints.py OUT [--t5-layers 2] [--seed 0]

OUT gets `dit`, `t5`, `vae2d`, `vae3d` laid out as the published directories: STDiT3-XL/2 and both
VAEs whole, the text encoder at full width with few layers. Nothing is learnt, so videos made with
them are noise; scales are chosen so that runs in bf16 stay finite. One seed gives one set of bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUITE = Path(__file__).resolve().parent.parent / "opensora_sp_conformance"

Shapes = dict[str, tuple[int, ...]]

DIT_CONFIG: dict[str, Any] = {
    "architectures": ["STDiT3"],
    "model_type": "STDiT3",
    "depth": 28,
    "hidden_size": 1152,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "caption_channels": 4096,
    "model_max_length": 300,
    "pred_sigma": True,
    "qk_norm": True,
    "class_dropout_prob": 0.1,
    "drop_path": 0.0,
    "torch_dtype": "bfloat16",
}
T5_CONFIG: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "dropout_rate": 0.1,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "torch_dtype": "bfloat16",
}
VAE2D_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
VAE3D_CONFIG: dict[str, Any] = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "micro_frame_size": 17,
    "shift": [-0.10, 0.34, 0.27, 0.98],
    "scale": [3.85, 2.32, 2.33, 3.06],
    "vae_2d": {
        "type": "VideoAutoencoderKL",
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "subfolder": "vae",
        "micro_batch_size": 4,
    },
    "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
    "torch_dtype": "bfloat16",
}


def standard_deviation(name: str, shape: tuple[int, ...]) -> float:
    """Of a random weight that is neither a norm's nor a table."""
    std = 0.02 if len(shape) == 1 else math.sqrt(shape[0] / math.prod(shape))
    if name == "shared.weight":
        return 1.0
    if name.endswith("SelfAttention.q.weight"):
        std /= math.sqrt(T5_CONFIG["d_kv"])  # T5 does not scale its attention scores
    return std


def make_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """One random weight, drawn from the seed and its own name: order and neighbours do not matter.

    Matrices and kernels keep the variance of what they are given; norms start as the identity.
    """
    if name in ("scale", "shift"):
        return torch.tensor(VAE3D_CONFIG[name]).reshape(shape)
    if name == "rope.freqs":
        return 10000.0 ** (-torch.arange(shape[0], dtype=torch.float32) / shape[0])
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    std = standard_deviation(name, shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    # In half precision at once: the float32 draw of the largest weight is freed before the next.
    return torch.randn(shape, generator=generator).mul_(std).to(torch.bfloat16)


def write_safetensors(path: Path, shapes: Shapes, seed: int) -> None:
    """Write weights one at a time; safetensors' own writer needs all of them in memory at once."""
    exact = {"scale", "shift", "rope.freqs"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * (4 if name in exact else 2)
        kind = "F32" if name in exact else "BF16"
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _partial(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(make_weight(name, shape, seed).view(torch.uint8).numpy().data)
    os.replace(_partial(path), path)


def write_t5_shards(directory: Path, shapes: Shapes, seed: int) -> None:
    """Write the text encoder as two .bin shards and their index, cut where half the bytes lie."""
    names = [name for name in shapes if name != "encoder.embed_tokens.weight"]
    total = sum(math.prod(shapes[name]) for name in names)
    parts: tuple[list[str], list[str]] = ([], [])
    done = 0
    for name in names:
        parts[done * 2 >= total].append(name)
        done += math.prod(shapes[name])
    index: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        weights = {name: make_weight(name, shapes[name], seed) for name in part}
        if "shared.weight" in weights:  # the same storage twice, as published
            weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        torch.save(weights, _partial(directory / file))
        os.replace(_partial(directory / file), directory / file)
        index.update(dict.fromkeys(weights, file))
    content = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    write_json(directory / "pytorch_model.bin.index.json", content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def published_shapes(t5_layers: int) -> dict[str, Shapes]:
    """Names and shapes by model, the text encoder cut to its first `t5_layers` layers."""
    manifest: dict[str, dict[str, list[int]]] = json.loads((SUITE / "manifest.json").read_text())
    shapes = {
        model: {name: tuple(shape) for name, shape in weights.items()}
        for model, weights in manifest.items()
    }
    shapes["t5"] = {
        name: shape
        for name, shape in shapes["t5"].items()
        if not name.startswith("encoder.block.") or int(name.split(".")[2]) < t5_layers
    }
    return shapes


def write_all(out: Path, t5_layers: int, seed: int) -> None:
    """Write the four directories under `out`."""
    shapes = published_shapes(t5_layers)
    dit, t5, vae2d, vae3d = (out / name for name in ("dit", "t5", "vae2d/vae", "vae3d"))
    for directory in (dit, t5, vae2d, vae3d):
        directory.mkdir(parents=True)
    write_json(dit / "config.json", DIT_CONFIG)
    write_safetensors(dit / "model.safetensors", shapes["dit"], seed)
    write_json(vae2d / "config.json", VAE2D_CONFIG)
    write_json(vae3d / "config.json", VAE3D_CONFIG)
    write_safetensors(vae3d / "model.safetensors", shapes["vae3d"], seed)
    layers = {"num_layers": t5_layers, "num_decoder_layers": t5_layers}
    write_json(t5 / "config.json", {**T5_CONFIG, **layers})
    write_t5_shards(t5, shapes["t5"], seed)
    for file in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(SUITE / "t5" / file, t5 / file)


def size_on_disk(files: Iterable[Path]) -> float:
    """Gigabytes (1e9 bytes) of the given files."""
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="directory to write, new or empty")
    parser.add_argument("--t5-layers", type=int, default=2, choices=range(1, 25), metavar="1..24")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} exists and is not an empty directory: name another or remove it")
    args.out.mkdir(parents=True, exist_ok=True)
    shapes = published_shapes(args.t5_layers)
    shapes["t5"].pop("encoder.embed_tokens.weight")
    needed = 2e-9 * sum(math.prod(shape) for part in shapes.values() for shape in part.values())
    free = shutil.disk_usage(args.out).free / 1e9
    if free < needed + 0.1:
        parser.error(f"{args.out} needs {needed:.1f} GB and has {free:.1f} GB free")

    started = time.monotonic()
    write_all(args.out, args.t5_layers, args.seed)
    seconds = time.monotonic() - started
    print(f"wrote {size_on_disk(args.out.rglob('*')):.2f} GB to {args.out} in {seconds:.0f} s; use")
    print(" ".join(f"--ckpt-path-{n} {args.out / n}" for n in ("dit", "t5", "vae2d", "vae3d")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
