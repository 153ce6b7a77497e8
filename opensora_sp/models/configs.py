"""config.json of the four models: what each key may be, looked at before a model is built.

One table for loading and for planning. Only the keys that this program uses are judged; absent
ones mean the published model's. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import CheckpointError
from opensora_sp.base.outside_json import check_keys, inner_object, read_object
from opensora_sp.base.value_types import (
    ValueType,
    boolean,
    file_stem,
    integer,
    number,
    optional,
    shown,
)

_MOST_BYTES = 2**20
_SHARD = file_stem()
_WIDTH, _COUNT, _LAYERS = integer(1, 65536), integer(1, 4096), integer(1, 512)
_CHANNELS = integer(1, 8192)


def many(kind: ValueType, most: int) -> ValueType:
    """Lists of 1 to `most` values of a kind."""

    def legal(value: Any) -> bool:
        right = isinstance(value, (list, tuple)) and 1 <= len(value) <= most
        return right and all(kind.legal(entry) for entry in value)

    return ValueType("LIST", f"a list of 1 to {most} values, each {kind.allowed}", kind.read, legal)


def _words(allowed: str = "a word") -> ValueType:
    return ValueType(
        "TEXT", allowed, str, lambda value: isinstance(value, str) and len(value) <= 200
    )


DIT: Mapping[str, ValueType] = {
    "hidden_size": _WIDTH,
    "depth": _LAYERS,
    "num_heads": _COUNT,
    "mlp_ratio": number(0, 64, above=True),
    "in_channels": integer(1, 64),
    "caption_channels": _WIDTH,
    "model_max_length": integer(1, 100_000),
    "input_sq_size": _WIDTH,
    "qk_norm": boolean(),
    "pred_sigma": boolean(),
    "skip_y_embedder": optional(boolean()),
    "patch_size": many(integer(1, 64), 3),
}
T5: Mapping[str, ValueType] = {
    "model_type": _words(),
    "d_model": _WIDTH,
    "d_ff": integer(1, 262_144),
    "d_kv": _COUNT,
    "num_heads": _COUNT,
    "num_layers": _LAYERS,
    "num_decoder_layers": optional(integer(0, 512)),
    "vocab_size": integer(1, 10_000_000),
    "feed_forward_proj": _words(),
    "relative_attention_num_buckets": integer(2, 65536),
    "relative_attention_max_distance": integer(2, 10_000_000),
    "layer_norm_epsilon": number(0, 1, above=True),
    "dropout_rate": number(0, 1),
    "initializer_factor": number(0),
}
VAE2D: Mapping[str, ValueType] = {
    "_class_name": _words(),
    "block_out_channels": many(_CHANNELS, 8),
    "down_block_types": many(_words(), 8),
    "up_block_types": many(_words(), 8),
    "layers_per_block": integer(1, 64),
    "norm_num_groups": _COUNT,
    "in_channels": integer(1, 64),
    "out_channels": integer(1, 64),
    "latent_channels": integer(1, 64),
    "act_fn": _words("the name of an activation function"),
    "force_upcast": optional(boolean()),
    "use_quant_conv": boolean(),
    "use_post_quant_conv": boolean(),
    "mid_block_add_attention": boolean(),
}
VAE3D: Mapping[str, ValueType] = {
    "micro_frame_size": optional(integer(1, 10_000), word="null"),
}
VAE3D_SPATIAL: Mapping[str, ValueType] = {
    "micro_batch_size": optional(integer(1, 10_000), word="null"),
}
VAE3D_TEMPORAL: Mapping[str, ValueType] = {
    key: optional(kind, word="null")
    for key, kind in {
        "type": _words(),
        "in_out_channels": integer(1, 64),
        "latent_embed_dim": integer(1, 64),
        "embed_dim": integer(1, 64),
        "filters": _CHANNELS,
        "num_res_blocks": integer(1, 64),
        "channel_multipliers": many(integer(1, 64), 8),
        "temporal_downsample": many(boolean(), 7),
        "num_groups": _COUNT,
    }.items()
}


def read_dit(directory: Path) -> dict[str, Any]:
    """config.json of a transformer's directory; CheckpointError names the file and the key."""
    path = directory / "config.json"
    content = checked(read_config_object(path), DIT, path)
    check_heads(content, path)
    return content


def check_heads(content: Mapping[str, Any], source: Path | str) -> None:
    """Raises CheckpointError where a transformer's width cannot be shared by its heads."""
    width, heads = content.get("hidden_size", 1152), content.get("num_heads", 16)
    if width % (2 * heads) or width % 4:
        raise CheckpointError(
            f"{source}: hidden_size {width} must be a multiple of 4 and of twice num_heads {heads}"
        )


def read_t5(directory: Path) -> dict[str, Any]:
    """As `read_dit`, of the text encoder."""
    path = directory / "config.json"
    return checked(read_config_object(path), T5, path)


def read_vae2d(directory: Path) -> dict[str, Any]:
    """As `read_dit`, of the spatial VAE, whose file may be in the directory's `vae/`."""
    path = vae2d_home(directory) / "config.json"
    return checked(read_config_object(path), VAE2D, path)


def vae2d_home(directory: Path) -> Path:
    """Where the spatial VAE's config.json is."""
    inner = directory / "vae"
    return inner if access.is_dir(inner) else directory


def read_vae3d(directory: Path) -> dict[str, Any]:
    """As `read_dit`, of the video VAE; its vae_2d and vae_temporal are objects, maybe empty."""
    path = directory / "config.json"
    content = checked(read_config_object(path), VAE3D, path)
    for key, kinds in (("vae_2d", VAE3D_SPATIAL), ("vae_temporal", VAE3D_TEMPORAL)):
        content[key] = inner_object(content, key, f"{path}: ", error=CheckpointError)
        check_keys(content[key], kinds, f"{path}: {key}.", error=CheckpointError)
    return content


def read_config_object(path: Path) -> dict[str, Any]:
    """The object in a config.json, whatever its keys. Raises CheckpointError."""
    return read_object(path, most_bytes=_MOST_BYTES, error=CheckpointError)


def read_shards(index: Path) -> dict[str, str]:
    """An index of weight files: the shard of every weight, all of them in the index's directory.

    Raises CheckpointError for what is no such index, and for a shard that is elsewhere or absent.
    A shard may be a link that leads on, as in the hub's cache; the index names neighbours only.
    """
    listed = read_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map: download it again")
    known: set[str] = set()
    for shard in listed.values():
        if isinstance(shard, str) and shard in known:
            continue
        if not _SHARD.legal(shard) or not access.is_file(index.parent / shard):
            raise CheckpointError(
                f"{index.name} names the shard {shown(shard)}, which is not in {index.parent}"
            )
        known.add(shard)
    return dict(listed)


def checked(
    content: Mapping[str, Any], kinds: Mapping[str, ValueType], source: Path | str
) -> dict[str, Any]:
    """The content, whose known keys are of their kinds. Raises CheckpointError."""
    check_keys(content, kinds, f"{source}: ", error=CheckpointError)
    return dict(content)
