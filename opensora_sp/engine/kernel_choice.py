"""The kernels of a pipeline: those that were asked for, or the fastest that are right here.

Rank 0 decides and tells the others, because ranks with different kernels would round differently.
On CPUs nothing is measured: torch's own attention is the only one there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from opensora_sp.models.kernels.active import Kernels, Lengths
from opensora_sp.models.kernels.attention import (
    AUTO,
    DEFAULT,
    KERNELS,
    Choice,
    check_attention,
    refusal,
)
from opensora_sp.models.kernels.fused import fused_kernels
from opensora_sp.models.kernels.probe import DTYPE_NAMES, Shape, candidates, fastest, probe, works
from opensora_sp.request.request import Request

if TYPE_CHECKING:
    from opensora_sp.engine.model_set import ModelSet
    from opensora_sp.models.stdit3 import STDiT3Config

PLAIN = "plain torch"
_log = logging.getLogger(__name__)


def kernels_asked_for(
    attention: str, config: STDiT3Config, dtype: torch.dtype, device: torch.device
) -> Kernels:
    """The kernels of a pipeline before its first video.

    Raises UserError for an attention kernel that does not run here or computes something else.
    """
    if attention in (AUTO, DEFAULT):
        return Kernels()
    check_attention(attention, device.type, DTYPE_NAMES[dtype])
    width = config.hidden_size // config.num_heads
    choice = Choice(attention, KERNELS[attention].widths(width)[0])
    trouble = works(choice, dtype, device, width)
    if trouble is not None:
        raise refusal(attention, trouble, device.type, DTYPE_NAMES[dtype])
    return Kernels(anywhere=choice)


def choose_kernels(
    models: ModelSet, requests: Sequence[Request], text_lengths: Sequence[int]
) -> bool:
    """Choose what these requests need and no earlier one did; whether there was any. Collective.

    text_lengths: tokens of each request's text. The choices are kept in `models.kernels`.
    """
    if models.session.device.type == "cpu":
        return False
    fused = choose_fused(models)
    return choose_attention(models, requests, text_lengths) or fused


def choose_fused(models: ModelSet) -> bool:
    """Decide on fused kernels, once a pipeline: all ranks use them or none does. Collective."""
    session, kernels, config = models.session, models.kernels, models.config
    if kernels.fused_why is not None:
        return False
    module, why = None, "plain torch, as asked for"
    if models.runtime.fused_kernels != "off":
        module, why = fused_kernels(session.device, models.dtype, config.num_heads, _width(config))
    troubles = session.control.all_gather_object(why if module is None else None)
    trouble = next((said for said in troubles if said is not None), None)
    kernels.fused, kernels.fused_why = (module, why) if trouble is None else (None, trouble)
    return True


def choose_attention(
    models: ModelSet, requests: Sequence[Request], text_lengths: Sequence[int]
) -> bool:
    """The attention part of `choose_kernels`: whether there were any to choose. Collective."""
    session, kernels = models.session, models.kernels
    if models.runtime.attention != AUTO or session.device.type == "cpu":
        return False
    width = _width(models.config)
    new = {
        lengths: shape
        for lengths, shape in attention_shapes(models, requests, text_lengths).items()
        if lengths not in kernels.attention
    }
    if not new:
        return False
    found: Mapping[Lengths, Choice] | None = None
    if session.leads:
        found = _fastest(new, models.dtype, session.device, width)
    chosen = session.control.broadcast_object(found)
    assert chosen is not None
    kernels.attention.update(chosen)
    return True


def attention_shapes(
    models: ModelSet, requests: Sequence[Request], text_lengths: Sequence[int]
) -> dict[Lengths, Shape]:
    """The attentions of these requests on the rank with the largest share, by their kinds."""
    ranks = models.mesh(requests[0]).sequence
    frames, *_ = requests[0].latent_shape
    rows, columns = requests[0].patch_grid
    patches, batch = rows * columns, len(requests)
    heads, width = models.config.num_heads, _width(models.config)
    own_frames, own_patches = -(-frames // ranks), -(-patches // ranks)
    found = {
        Lengths.of(frames, frames): Shape(batch * own_patches, heads, frames, frames, width),
        Lengths.of(patches, patches): Shape(batch * own_frames, heads, patches, patches, width),
    }
    for length in text_lengths:
        found[Lengths.text(length)] = Shape(1, heads, frames * own_patches, length, width)
    return found


def described_attention(models: ModelSet) -> dict[str, str]:
    """The attention kernels for a report: by "self, N tokens" and "text, to N tokens"."""
    kernels, width = models.kernels, _width(models.config)
    if kernels.anywhere is not None:
        return {"everywhere": kernels.anywhere.described(width)}
    return {
        (f"text, to {kind.keys} tokens" if kind.crossed else f"self, {kind.keys} tokens"): (
            choice.described(width)
        )
        for kind, choice in sorted(kernels.attention.items())
    } or {"everywhere": DEFAULT}


def say(models: ModelSet) -> None:
    """Say on rank 0 which kernels were chosen."""
    parts = described_attention(models).items()
    said = "; ".join(f"{kind}: {choice}" for kind, choice in parts)
    _log.info("attention: %s; norms: %s", said, models.kernels.fused_why or PLAIN)


def _width(config: STDiT3Config) -> int:
    return config.hidden_size // config.num_heads


def _fastest(
    shapes: Mapping[Lengths, Shape], dtype: torch.dtype, device: torch.device, width: int
) -> dict[Lengths, Choice]:
    """The probe's answer for each kind."""
    if len(candidates(device.type, DTYPE_NAMES[dtype], width)) == 1:
        return dict.fromkeys(shapes, Choice(DEFAULT, width))
    return dict(_probed(shapes, dtype, device))


def _probed(
    shapes: Mapping[Lengths, Shape], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Lengths, Choice]]:
    for lengths, shape in shapes.items():
        trial = probe(shape, dtype, device)
        for choice, why in trial.out.items():
            _log.debug("attention %s on %s: %s", choice.described(shape.width), lengths, why)
        yield lengths, fastest(trial.seconds, shape.width)
