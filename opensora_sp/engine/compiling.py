"""Compilation before a video's first step: one pair of blocks is computed on made-up activations.

All blocks share their graphs, so a pair meets every form that the steps will. What compiling takes
is a stage of its own, no step waits for it, and the ranks agree on whether it worked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora_sp.base.access import user_cache
from opensora_sp.engine.guidance import Denoiser
from opensora_sp.engine.progress import ResumePoint
from opensora_sp.engine.sampling import generated_at
from opensora_sp.models.compiler import Compiler
from opensora_sp.request.request import Request

if TYPE_CHECKING:
    from opensora_sp.engine.model_set import ModelSet

_log = logging.getLogger(__name__)


def new_compiler(device: torch.device) -> Compiler:
    """A compiler; what inductor makes is kept in the user's cache, or where its variable says."""
    folder = user_cache("compiled")
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return Compiler(device)


def rehearse(
    models: ModelSet,
    denoiser: Denoiser,
    request: Request,
    start: ResumePoint,
    times: Sequence[float],
    *,
    show: bool,
) -> None:
    """Make the graphs of a clip's steps at these times, where they are not there yet. Collective.

    start: what the clip begins from. show: say so. A failure is always said, on the leading rank.
    """
    compiler = denoiser.compiler
    assert compiler is not None
    # Also where this rank has had trouble since: what follows is collective.
    batch, _, frames = start.z.shape[:3]
    guided, ways = request.cfg_scale != 1, list(_different(times, start.mask))
    mesh = models.mesh(request)
    masks = tuple(None if way is None else str(way.tolist()) for way in ways)
    shape = (batch, frames, denoiser.size, mesh, guided, masks)
    if compiler.knows(shape):
        return
    before, compiler.quiet = compiler.compilations, True
    if show and compiler.trouble is None:
        _log.info("compiling the blocks by %s, once for each size", compiler.backend.name)
    with compiler.rehearsing(shape):
        for generate in ways:
            if compiler.trouble is None:
                denoiser.rehearse(batch, frames, generate, guided=guided)
    compiler.quiet = False
    troubles = models.session.control.all_gather_object(compiler.trouble)
    trouble = next((said for said in troubles if said is not None), None)
    if trouble is not None:
        compiler.trouble = trouble
    if trouble is not None and models.session.whole.leads:
        _log.warning("compilation is off: %s: the run goes on without it", trouble)
    elif show and compiler.compilations > before:
        _log.info("compiled by %s", compiler.described())


def _different(times: Sequence[float], frame_mask: Tensor | None) -> Iterator[Tensor | None]:
    """Which frames the steps generate, bool [B,T] as a step is given it; each way once."""
    if frame_mask is None or bool((frame_mask == 1).all()):
        yield None
        return
    seen: list[Tensor] = []
    for t in times:
        generate = generated_at(frame_mask, t)
        if not any(torch.equal(generate, other) for other in seen):
            seen.append(generate)
            yield generate
