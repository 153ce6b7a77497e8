"""The conformance suite, run through the production classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.models.kernels.cpu_half import arithmetic
from opensora_sp.parallel.session import Session
from opensora_sp.request.runtime import Runtime
from opensora_sp.verification import leading, sharded
from opensora_sp.verification.suite import Check, skipped

# The files that each part needs. A suite may hold only some of the parts.
SHARDED_PARTS = {
    "dit": ("dit/cases.safetensors", "dit/model.safetensors", "dit/config.json"),
    "dit_bf16": ("dit/cases_bf16.safetensors", "dit/model.safetensors", "dit/config.json"),
    "sampler": (
        "sampler/cases.safetensors",
        "sampler/cases.json",
        "dit/model.safetensors",
        "dit/config.json",
    ),
}
LEADING_PARTS = {
    "sizes": ("sizes.json",),
    "prompts": ("prompts.json",),
    "manifest": ("manifest.json",),
    "t5": ("t5/cases.safetensors", "t5/cases.json", "t5/config.json", "t5/spiece.model"),
    "vae3d": (
        "vae3d/cases.safetensors",
        "vae3d/config.json",
        "vae3d/model.safetensors",
        "vae2d/vae/config.json",
    ),
    "media": ("media/cases.safetensors",),
}


def run_suite(
    suite: Path, session: Session, dtype: torch.dtype, runtime: Runtime | None = None
) -> Iterator[Check]:
    """Run every part of a suite. Yields checks on rank 0 only, but every rank has to iterate.

    The transformer and sampler parts run on all ranks. The other parts run on rank 0 while the
    other ranks wait. With another dtype than float32 the sampler, T5 and VAE parts are skipped,
    because their limits are for float32. runtime: how the transformer is computed.
    Raises UserError where the directory holds no suite.
    """
    if not any(
        access.is_file(suite / files[0]) for files in (SHARDED_PARTS | LEADING_PARTS).values()
    ):
        raise UserError(
            f"--reference {suite}: no conformance suite there (none of dit/cases.safetensors, "
            "sampler/cases.json, prompts.json, …); leave it out for the one in the package "
            "opensora_sp_conformance"
        )
    exact = dtype == torch.float32
    float32_only = "its limits are float32's"
    # The same arithmetic for bf16 as in a run on this device.
    with torch.no_grad(), arithmetic(session.device, torch.bfloat16):
        if session.leads:
            for part, check in _leading(suite, session).items():
                runs = exact or part not in ("t5", "vae3d")
                yield from _part(suite, part, LEADING_PARTS[part], check, runs, float32_only)
        session.control.barrier()
        for part, check in _sharded(suite, session, dtype, runtime or Runtime()).items():
            runs = exact or part != "sampler"
            checks = _part(suite, part, SHARDED_PARTS[part], check, runs, float32_only)
            yield from (c for c in checks if session.leads)
        session.control.barrier()


def _part(
    suite: Path,
    part: str,
    files: tuple[str, ...],
    check: Callable[[], Iterator[Check]],
    runs: bool,
    why: str,
) -> Iterator[Check]:
    absent = [name for name in files if not access.is_file(suite / name)]
    if absent:
        yield skipped(part, f"{absent[0]} is not in this suite")
    elif not runs:
        yield skipped(part, why)
    else:
        yield from check()


def _leading(suite: Path, session: Session) -> dict[str, Callable[[], Iterator[Check]]]:
    return {
        "sizes": lambda: leading.size_checks(suite),
        "prompts": lambda: leading.prompt_checks(suite),
        "manifest": lambda: leading.manifest_checks(suite),
        "t5": lambda: leading.text_checks(suite, session.device),
        "vae3d": lambda: leading.vae_checks(suite, session.device),
        "media": lambda: leading.media_checks(suite),
    }


def _sharded(
    suite: Path, session: Session, dtype: torch.dtype, runtime: Runtime
) -> dict[str, Callable[[], Iterator[Check]]]:
    return {
        "dit": lambda: sharded.forward_checks(suite, session, dtype, runtime),
        "dit_bf16": lambda: sharded.bf16_checks(suite, session, runtime),
        "sampler": lambda: sharded.sampler_checks(suite, session, runtime),
    }
