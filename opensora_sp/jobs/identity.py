"""What decides an output's content, as plain data: to be stored, compared and named.

Two runs with one identity make one video (beyond float rounding), wherever they run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.hashes import sampled_digest
from opensora_sp.base.redaction import address_identity
from opensora_sp.base.value_types import shown
from opensora_sp.request.request import Request, RunSettings, Task, reference_paths

Identity = dict[str, Any]


# How a request is computed, not what: a run that ended for want of memory may go on with less.
_NOT_CONTENT = ("micro_batch_size",)
# What only the file shows, not the latents.
_FILE_ONLY = ("save_fps",)


def identity_of(task: Task, settings: RunSettings, models: Mapping[str, str]) -> Identity:
    """What decides a task's file: the request as it was asked for, before its prompt is refined."""
    request = {k: v for k, v in task.request.to_dict().items() if k not in _NOT_CONTENT}
    if task.original_prompt is not None:
        request["prompt"] = task.original_prompt
    # Where a reference lies does not matter, what it shows does.
    del request["reference_path"]
    refined = settings.prompt_generator or "the default" if settings.llm_refine else None
    identity = {
        "request": request,
        "references": _references(task.request),
        "dtype": settings.dtype,
        "text weights": settings.t5_weights,
        "refined by": refined,
        "watermark": settings.watermark,
        "lossless": settings.lossless and not task.request.is_image,
        "models": dict(models),
    }
    return dict(json.loads(json.dumps(identity)))


def _references(request: Request) -> list[str]:
    paths = reference_paths(request)
    return [sampled_digest([Path(p)]) if access.is_file(p) else address_identity(p) for p in paths]


def latents_identity(identity: Identity) -> Identity:
    """The part that decides the latents: what is left out may change between them and the file."""
    request = {k: v for k, v in identity["request"].items() if k not in _FILE_ONLY}
    # The VAE enters the latents through references and through the frames that clips share.
    encodes = identity["references"] or request["loop"] > 1
    models = {k: v for k, v in identity["models"].items() if encodes or not k.startswith("vae")}
    kept = {k: v for k, v in identity.items() if k not in ("watermark", "lossless")}
    return kept | {"request": request, "models": models}


def digest(identity: Identity) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def without_addresses(identity: Identity) -> Identity:
    """An identity with its addresses as they are stored now: older records hold them in full."""
    found = identity.get("references")
    if not isinstance(found, list):
        return identity
    stored = [
        address_identity(one) if isinstance(one, str) and " sha256:" not in one else one
        for one in found
    ]
    return identity | {"references": stored}


def difference(before: Identity, now: Identity) -> str | None:
    """The first thing that differs, with both values, for a person; None where nothing does."""
    old, new = _flat(without_addresses(before)), _flat(now)
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in old or name not in new or old[name] != new[name]:
            was, is_now = shown(old.get(name)), shown(new.get(name))
            if name.startswith("models"):
                return (
                    f"its {name.partition('.')[2]} weights were others ({was} then, {is_now} now)"
                )
            return f"its {name.removeprefix('request.')} was {was} and is {is_now} now"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
