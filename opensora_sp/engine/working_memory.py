"""What a rank's steps and its decoding hold at most, roughly: whether a CPU has room to keep more.

The planner's formulas (`opensora_sp.planner.peaks`) are exact for tensors. These are above them for
every mode and mesh, with a margin for what lies unused between blocks of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from opensora_sp.base.heap import freed_memory_kept
from opensora_sp.engine.decode import Decoded
from opensora_sp.engine.model_set import ModelSet
from opensora_sp.request.request import Request

if TYPE_CHECKING:
    from opensora_sp.models.video_vae import VideoVAE

# Values per token and channel: plain steps in half precision hold 16, both branches together.
_STEP_VALUES = 20
# Values per decoded pixel and channel of the second block: the VAE holds 3.
_PIXEL_VALUES = 5


def kept_in_steps(models: ModelSet, request: Request, batch: int) -> AbstractContextManager[bool]:
    """The context that a rank's steps run in, see `freed_memory_kept`."""
    return freed_memory_kept(models.session.device, step_bytes(models, request, batch))


def kept_in_decoding(
    models: ModelSet, request: Request, vae: VideoVAE, parts: Iterator[Decoded]
) -> Iterator[Decoded]:
    """The parts of a decode, with memory kept from the first to the last, see `freed_memory_kept`.

    Not for each by itself: what one frees the next one needs.
    """
    with freed_memory_kept(models.session.device, decoding_bytes(request, vae)):
        yield from parts


def step_bytes(models: ModelSet, request: Request, batch: int) -> float:
    """Bytes that a rank holds in a step of `batch` requests of this shape, beside its weights."""
    rows, columns = request.patch_grid
    tokens = batch * request.latent_shape[0] * rows * columns
    values = tokens * models.config.hidden_size * _STEP_VALUES
    return values * models.dtype.itemsize / models.mesh(request).sequence


def decoding_bytes(request: Request, vae: VideoVAE) -> float:
    """Bytes that a rank holds while it decodes one group of frames, beside its weights."""
    frames = min(vae.config.micro_batch_size or request.num_frames, request.num_frames)
    pixels = frames * request.height * request.width
    return pixels * vae.spatial_vae.pixel_width * _PIXEL_VALUES * vae.dtype.itemsize
