"""Decodes a clip on all ranks of a session; the frames arrive in order at the leading rank.

It works in rounds. In each, every rank decodes one unit of the plan, then one all-to-all gathers
the finished frames, as bytes, on the leading rank. So no rank holds more than one unit, and the
leading one no more than a round, however long the clip is. The kernels and the batches they run on
are those of decoding alone, so the frames are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opensora_sp.base.geometry import Chunk
from opensora_sp.media.pixels import to_bytes
from opensora_sp.models.video_vae import VideoVAE
from opensora_sp.parallel.decode_plan import Part, Unit, plan_decode
from opensora_sp.parallel.exchange import Transfer, gather_parts, scatter_parts
from opensora_sp.parallel.session import Session


@dataclass(frozen=True)
class Decoded:
    """The next frames of a batch of videos: uint8 [B,f,H,W,3] on the CPU.

    pixels: the same [B,3,f,H,W] in [-1, 1], in the VAE's dtype, where they were asked for.
    """

    frames: Tensor
    pixels: Tensor | None = None


def decode_alone(
    vae: VideoVAE, z: Tensor, num_frames: int, keep_from: int | None = None
) -> Iterator[Decoded]:
    """Decode z [B,4,T,h,w] on this device, group by group.

    keep_from: the chunk from which on pixels are wanted beside the frames.
    """
    for number, chunk in enumerate(vae.chunks(num_frames)):
        start = chunk.frame_start
        for pixels in vae.decode_groups(_latents(z, chunk), chunk.frames):
            keeps = keep_from is not None and number >= keep_from
            yield Decoded(to_bytes(pixels, start).cpu(), pixels if keeps else None)
            start += pixels.shape[2]


def decode_shared(
    session: Session,
    vae: VideoVAE,
    z: Tensor | None,
    shape: tuple[int, int, int, int],
    num_frames: int,
    keep_from: int | None = None,
) -> Iterator[Decoded]:
    """Decode z [B,4,T,h,w], known to the leading rank, on all ranks of the session. Collective.

    Yields on the leading rank only; every rank must run it to its end. shape: (B, 4, h, w).
    keep_from: as for `decode_alone`.
    """
    if session.world_size == 1:
        assert z is not None
        yield from decode_alone(vae, z, num_frames, keep_from)
        return
    work = _Shared(session, vae, shape, num_frames, keep_from)
    # The leading rank may have been busy for longer than a collective may.
    session.control.barrier()
    arriving = work.send_latents(0, z)
    for number, units in enumerate(work.rounds):
        received = arriving.wait()
        if number + 1 < len(work.rounds):
            # Ahead of the frames, so that nobody waits for the leading rank to have written them.
            arriving = work.send_latents(number + 1, z)
        mine = session.control.together(partial(work.decode, units, received))
        assert mine is not None
        sizes = [work.payload(unit) for unit in units]
        whole = gather_parts(session.world, mine, sizes).wait()
        del mine
        if session.leads:
            yield from work.read_round(units, whole)
        del whole  # or the leading rank would hold this round while it decodes the next


class _Shared:
    """One rank's side of a shared decode; units are known to all, their contents to one."""

    def __init__(
        self,
        session: Session,
        vae: VideoVAE,
        shape: tuple[int, int, int, int],
        num_frames: int,
        keep_from: int | None,
    ) -> None:
        self._session, self._vae, self._shape = session, vae, shape
        self._chunks = vae.chunks(num_frames)
        self._keep_from = len(self._chunks) if keep_from is None else keep_from
        factor = vae.spatial_vae.factor
        self._size = (shape[2] * factor, shape[3] * factor)
        lengths = [chunk.frames for chunk in self._chunks]
        group = vae.config.micro_batch_size or max(lengths)
        self.rounds: Sequence[tuple[Unit, ...]] = plan_decode(lengths, session.world_size, group)

    def send_latents(self, number: int, z: Tensor | None) -> Transfer:
        """Scatter the latents of a round from the leading rank."""
        units, comm = self.rounds[number], self._session.world
        batch, channels, height, width = self._shape
        cells = batch * channels * height * width
        sizes = [sum(self._chunks[part.chunk].latents for part in unit) * cells for unit in units]
        like = torch.empty(0, device=self._session.device)
        parts = None
        if z is not None:
            parts = [
                _latents(z, self._chunks[part.chunk]).to(like) for unit in units for part in unit
            ]
        return scatter_parts(comm, parts, sizes, like)

    def payload(self, unit: Unit) -> int:
        """Bytes of a unit's frames on their way."""
        return sum(self._bytes(part) for part in unit)

    def decode(self, units: Sequence[Unit], received: Tensor) -> Tensor:
        """This rank's unit of a round, from its latents → its frames as flat bytes."""
        unit = units[self._session.world.rank]
        flat = torch.empty(self.payload(unit), dtype=torch.uint8, device=self._session.device)
        batch, channels, height, width = self._shape
        place = 0
        for part in unit:
            chunk = self._chunks[part.chunk]
            count = batch * channels * chunk.latents * height * width
            z = received[:count].view(batch, channels, chunk.latents, height, width)
            received = received[count:]
            self._fill(flat[place : place + self._bytes(part)], part, z)
            place += self._bytes(part)
        return flat

    def _fill(self, flat: Tensor, part: Part, z: Tensor) -> None:
        chunk = self._chunks[part.chunk]
        whole, raw = self._views(flat, part)
        at = 0
        for pixels in self._vae.decode_groups(z, chunk.frames, part.start, part.stop):
            stop = at + pixels.shape[2]
            # Made for raw pixels too: what is not finite is found where all ranks hear of it.
            frames = to_bytes(pixels, chunk.frame_start + part.start + at)
            if raw is None:
                whole[:, at:stop] = frames
            else:
                raw[:, :, at:stop] = pixels
            at = stop

    def read_round(self, units: Sequence[Unit], whole: Tensor) -> Iterator[Decoded]:
        """On the leading rank: the frames of a round, flat and end to end, in order."""
        sizes = [self.payload(unit) for unit in units]
        for unit, flat in zip(units, whole.split(sizes), strict=True):
            yield from self.read(unit, flat)

    def read(self, unit: Unit, flat: Tensor) -> Iterator[Decoded]:
        """On the leading rank: the frames of one unit, part by part."""
        for part, own in zip(unit, flat.split([self._bytes(p) for p in unit]), strict=True):
            frames, pixels = self._views(own, part)
            if pixels is not None:
                first = self._chunks[part.chunk].frame_start + part.start
                frames = to_bytes(pixels, first)
            yield Decoded(frames.cpu(), pixels)

    def _bytes(self, part: Part) -> int:
        kept = part.chunk >= self._keep_from
        values = self._shape[0] * part.frames * self._size[0] * self._size[1] * 3
        return values * (self._vae.dtype.itemsize if kept else 1)

    def _views(self, flat: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
        """A part's bytes as frames [B,f,H,W,3], or as pixels [B,3,f,H,W] where those travel."""
        batch, (height, width) = self._shape[0], self._size
        if part.chunk < self._keep_from:
            return flat.view(batch, part.frames, height, width, 3), None
        return flat, flat.view(self._vae.dtype).view(batch, 3, part.frames, height, width)


def _latents(z: Tensor, chunk: Chunk) -> Tensor:
    return z[:, :, chunk.latent_start : chunk.latent_start + chunk.latents]
