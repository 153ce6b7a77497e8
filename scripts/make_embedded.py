#!/usr/bin/env python3
"""Write the small model that runs when no checkpoint is given: four directories, as published.

    python scripts/make_embedded.py [DIRECTORY]    (default: opensora_sp/assets/embedded)

Its weights are random numbers drawn from one fixed seed, so two runs on one machine give the same
bytes. Nothing is learnt: the pictures are coloured patches that depend on prompt and seed. The
gains below only keep every stage in the range that the real model works in, so that the patches
are neither flat grey nor clipped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

SEED = 1202
TARGET = ROOT / "opensora_sp" / "assets" / "embedded"
# Sentences in the manner of prompts; only the tokenizer's vocabulary is made from them.
CAPTIONS = Path(__file__).with_name("embedded_captions.txt")
VOCABULARY = 448
EXTRA_IDS = 100  # T5's sentinels <extra_id_0> ... follow the vocabulary

DIT: dict[str, Any] = {
    "architectures": ["STDiT3"],
    "model_type": "STDiT3",
    "hidden_size": 96,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "caption_channels": 64,
    "model_max_length": 300,
    "pred_sigma": True,
    "qk_norm": True,
    "class_dropout_prob": 0.1,
    "drop_path": 0.0,
    "torch_dtype": "bfloat16",
}
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 640,  # VOCABULARY + EXTRA_IDS, rounded up to a multiple of 128 as in T5 v1.1
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
    "torch_dtype": "float32",
}
VAE2D: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
VAE3D: dict[str, Any] = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "vae_2d": {"type": "VideoAutoencoderKL", "subfolder": "vae", "micro_batch_size": 4},
    "vae_temporal": {
        "type": "VAE_Temporal",
        "in_out_channels": 4,
        "latent_embed_dim": 4,
        "embed_dim": 4,
        "filters": 32,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 1, 1, 2],
        "temporal_downsample": [False, True, True],
    },
    "torch_dtype": "bfloat16",
}

# Factors on top of 1/sqrt(fan-in), by the end of the weight's name.
GAINS: dict[str, float] = {
    "shared.weight": 8.0,  # embeddings of size 1, as T5 starts from
    "SelfAttention.q.weight": 0.25,  # T5 has no softmax scale; this is d_kv ** -0.5
    "spatial_vae.module.decoder.conv_out.weight": 0.7,  # few pixels beyond black and white
    "cross_attn.proj.weight": 0.4,  # guidance multiplies what the text changes by about seven
}


def main() -> None:
    """Write the model and say where and how large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=TARGET)
    directory: Path = parser.parse_args().directory
    write_model(directory)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / 1e6:.2f} MB")


def write_model(directory: Path) -> None:
    """Write dit/, t5/, vae2d/ and vae3d/ into ``directory``; existing files are replaced."""
    write_dit(directory / "dit")
    write_t5(directory / "t5")
    write_vae(directory / "vae2d" / "vae", directory / "vae3d")


def write_dit(directory: Path) -> None:
    """config.json and model.safetensors of the diffusion transformer."""
    from opensora_sp.models.stdit3 import STDiT3Config, build_stdit3

    model = build_stdit3(STDiT3Config.from_dict(DIT, directory))
    weights = random_weights("dit", model)
    width = DIT["hidden_size"] // DIT["num_heads"]
    # The only buffer that is a formula: the reference stores it in float32.
    weights["rope.freqs"] = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    write_json(directory / "config.json", DIT)
    write_safetensors(directory / "model.safetensors", weights)


def write_vae(spatial: Path, video: Path) -> None:
    """The video VAE's checkpoint holds both VAEs; the spatial one is written by itself as well."""
    from opensora_sp.models.temporal_vae import TemporalVAEConfig
    from opensora_sp.models.video_vae import VideoVAE, VideoVAEConfig

    temporal = TemporalVAEConfig.from_dict(VAE3D["vae_temporal"])
    with torch.device("meta"):
        model = VideoVAE(VideoVAEConfig(spatial=VAE2D, temporal=temporal))
    weights = random_weights("vae", model)
    for name in ("scale", "shift"):
        weights[name] = torch.tensor(VAE3D[name], dtype=torch.float32).view(1, 4, 1, 1, 1)
    write_json(video / "config.json", VAE3D)
    write_safetensors(video / "model.safetensors", weights)

    prefix = "spatial_vae.module."
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    write_json(spatial / "config.json", VAE2D)
    write_safetensors(spatial / "diffusion_pytorch_model.safetensors", own)


def write_t5(directory: Path) -> None:
    """The text encoder as published: PyTorch shards in float32, an index, and the tokenizer."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**T5))
    weights = {name: w.float() for name, w in random_weights("t5", model).items()}
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
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """spiece.model, with T5's ids (pad 0, end 1, unknown 2), and the two tokenizer JSON files."""
    import sentencepiece

    model = io.BytesIO()
    # Sentences and model pass through memory, as file names would be stored inside the model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    directory.joinpath("spiece.model").write_bytes(model.getvalue())
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = [f"<extra_id_{index}>" for index in range(EXTRA_IDS)]
    special: dict[str, Any] = {**names, "additional_special_tokens": extra}
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {
            **special,
            "extra_ids": EXTRA_IDS,
            "model_max_length": 512,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
        },
    )


def random_weights(part: str, model: nn.Module) -> dict[str, Tensor]:
    """Every weight of a model on the meta device, drawn, in bfloat16."""
    state = model.state_dict()
    return {name: draw(part, name, tuple(state[name].shape)) for name in sorted(state)}


def draw(part: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """One weight, from its own random stream: adding or renaming another does not change it."""
    key = hashlib.sha256(f"{SEED}/{part}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        value = 0.02 * noise if name.endswith("bias") else 1.0 + 0.05 * noise
    elif "upsamplers" in name or "decoder.conv_blocks" in name:
        value = smooth_upsampling(shape) + 0.1 * noise / math.sqrt(fan_in(shape))
    else:
        value = noise / math.sqrt(fan_in(shape))
    for ending, gain in GAINS.items():
        if name.endswith(ending):
            value = value * gain
    return value.to(torch.bfloat16)


def fan_in(shape: Iterable[int]) -> int:
    """Inputs that one output sums over."""
    return math.prod(list(shape)[1:])


def smooth_upsampling(shape: tuple[int, ...]) -> Tensor:
    """A convolution that passes its channels on: blurred in space, repeated in time.

    Purely random ones would make every pixel and frame unlike its neighbours.
    """
    out_channels, in_channels, *kernel = shape
    repeat = out_channels // in_channels  # 2 where the channels are then split into two frames
    channels = torch.eye(in_channels).repeat_interleave(repeat, 0)
    if len(kernel) == 3:  # causal in time: the last tap is the present frame
        taps = torch.zeros(kernel)
        taps[-1, kernel[1] // 2, kernel[2] // 2] = 1.0
    else:
        row = torch.tensor([0.25, 0.5, 0.25])
        taps = torch.outer(row, row)
    return channels.view(out_channels, in_channels, *[1] * len(kernel)) * taps


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, in the given order, with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """In the order that the format itself puts the weights in."""
    from safetensors.torch import save

    path.write_bytes(save(dict(weights), metadata={"format": "pt"}))


if __name__ == "__main__":
    main()
