"""What decides an output's content, as plain data: to be stored, compared and named.

Two runs with one identity make one video (beyond float rounding), wherever they run. Which
settings belong to it is part of their declarations: see `changes` in request/setting.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.hashes import sampled_digest, sha256
from opensora_sp.base.redaction import address_identity
from opensora_sp.base.value_types import shown
from opensora_sp.request.llm_endpoint import model_asked
from opensora_sp.request.request import EngineSettings, JobSettings, Request, Task, reference_paths
from opensora_sp.request.setting import Setting, settings_of
from opensora_sp.request.step_cache import OFF
from opensora_sp.request.step_kernels import kernels_of
from opensora_sp.request.step_schedule import StepSchedule, steps_text

Identity = dict[str, Any]


@dataclass(frozen=True)
class _Output:
    """What an output is made from and by."""

    task: Task
    engine: EngineSettings
    settings: JobSettings
    models: Mapping[str, str]


def reference_digests(request: Request) -> list[str]:
    """Which references a request has: where one lies does not matter, what it shows does."""
    paths = reference_paths(request)
    return [sampled_digest([Path(p)]) if access.is_file(p) else address_identity(p) for p in paths]


def _references(output: _Output) -> list[str]:
    return reference_digests(output.task.request)


def _prompt(output: _Output) -> str:
    # As it was asked for: a language model need not say the same again.
    refined = output.task.original_prompt
    return output.task.request.prompt if refined is None else refined


def _refiner(output: _Output) -> str | None:
    settings = output.settings
    if not settings.llm_refine:
        return None
    return model_asked(settings.prompt_generator) or "the default"


def _lossless(output: _Output) -> bool:
    return output.settings.lossless and not output.task.request.is_image


def _watermark_font(output: _Output) -> str | None:
    return _file_digest(output.settings.watermark_font)


def _signed_by(output: _Output) -> str | None:
    return _file_digest(output.settings.label_certificate)


def _file_digest(path: str | None) -> str | None:
    """What a file holds, wherever it lies; the path of one that is not there."""
    return sha256(Path(path)) if path is not None and access.is_file(path) else path


def _step_kernels(output: _Output) -> str:
    return kernels_of(output.task.request, output.engine.step_kernels)


def _step_cache(output: _Output) -> str:
    """What is computed and what fills the rest, whatever it is called and wherever it came from."""
    asked = output.task.request.step_cache
    if not isinstance(asked, StepSchedule):
        return asked
    computed = steps_text(asked.computed)
    return f"{asked.fill}, steps {computed} of {asked.steps}" if asked.left_out else OFF


# The settings that an identity does not hold as they are: by field, the entry made of them.
_MADE_OF: Mapping[str, tuple[str, Callable[[_Output], Any]]] = {
    "reference_path": ("references", _references),
    "checkpoints": ("models", lambda output: dict(output.models)),
    "llm_refine": ("refined by", _refiner),
    "prompt_generator": ("refined by", _refiner),
    "lossless": ("lossless", _lossless),
    "watermark_font": ("watermark font", _watermark_font),
    "label_certificate": ("signed by", _signed_by),
    "step_kernels": ("step kernels", _step_kernels),
    "step_cache": ("step cache", _step_cache),
}
# Entries made of settings that came later, and what was in effect before.
_BEFORE: Mapping[str, Any] = {
    "step kernels": "plain",
    "step cache": OFF,
    "watermark font": None,
    "signed by": None,
}


def _deciding(cls: type[Any]) -> Iterator[Setting]:
    """The settings of a dataclass that decide an output."""
    return (one for one in settings_of(cls).values() if one.changes != "nothing")


def identity_of(
    task: Task, engine: EngineSettings, settings: JobSettings, models: Mapping[str, str]
) -> Identity:
    """What decides a task's file: the request as it was asked for, before its prompt is refined.

    models: as `weight_digests.model_digests`.
    """
    output = _Output(task, engine, settings, models)
    request = {
        one.field: getattr(task.request, one.field)
        for one in _deciding(Request)
        if one.field not in _MADE_OF
    }
    request["prompt"] = _prompt(output)
    identity: dict[str, Any] = {
        "request": request,
        "references": _references(output),
        "step cache": _step_cache(output),
    }
    for values in (engine, settings):
        for one in _deciding(type(values)):
            if one.field in _MADE_OF:
                name, make = _MADE_OF[one.field]
                identity[name] = make(output)
            else:
                identity[one.identity_name] = getattr(values, one.field)
    # Last: where weights differ and something else does too, that is said.
    identity["models"] = identity.pop("models")
    return dict(json.loads(json.dumps(identity)))


def _file_only(cls: type[Any]) -> set[str]:
    return {one.identity_name for one in _deciding(cls) if one.changes == "file"}


def latents_identity(identity: Identity) -> Identity:
    """The part that decides the latents: what is left out may change between them and the file."""
    leave_out = _file_only(Request)
    request = {k: v for k, v in identity["request"].items() if k not in leave_out}
    # The VAE enters the latents through references and through the frames that clips share.
    encodes = identity["references"] or request["loop"] > 1
    models = {k: v for k, v in identity["models"].items() if encodes or not k.startswith("vae")}
    leave_out = _file_only(EngineSettings) | _file_only(JobSettings)
    kept = {k: v for k, v in identity.items() if k not in leave_out}
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
    """The first thing that differs, with both values, for a person; None where nothing does.

    A setting that `before` does not know came later: until then its default was in effect.
    """
    new = _flat(now)
    known = {**_defaults(), **_BEFORE}
    defaults = {name: value for name, value in known.items() if name in new}
    old = defaults | _flat(without_addresses(before))
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in old or name not in new or old[name] != new[name]:
            was, is_now = shown(old.get(name)), shown(new.get(name))
            if name.startswith("models"):
                return (
                    f"its {name.partition('.')[2]} weights were others ({was} then, {is_now} now)"
                )
            return f"its {name.removeprefix('request.')} was {was} and is {is_now} now"
    return None


@cache
def _defaults() -> Mapping[str, Any]:
    """The defaults of what an identity holds as it is, by its flat name."""
    found = {}
    for cls, prefix in ((Request, "request."), (EngineSettings, ""), (JobSettings, "")):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for one in _deciding(cls):
            if one.field not in _MADE_OF and defaults[one.field] is not dataclasses.MISSING:
                found[prefix + one.identity_name] = defaults[one.field]
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
