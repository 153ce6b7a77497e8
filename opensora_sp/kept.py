"""The frames that clips keep: references by strategy, and the end of the clip before.

Everything happens on the leading rank, which alone reads files and holds the VAE; what leaves
here is the clip's starting latents and its frame mask, handed out to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora_sp.conditioning import (
    Group,
    apply_strategy,
    parse_mask_strategy,
    plan_strategy,
)
from opensora_sp.errors import PromptFault, UserError
from opensora_sp.models.video_vae import split_chunks
from opensora_sp.parallel.agreement import hand_out_checked
from opensora_sp.randomness import NoiseKey
from opensora_sp.request import Request
from opensora_sp.sizes import repeated_frames

if TYPE_CHECKING:
    from opensora_sp.models.video_vae import VideoVAE
    from opensora_sp.pipeline import Pipeline


def dropped_frames(request: Request) -> int:
    """Frames that a later clip repeats of the one before, dropped when clips are joined."""
    return repeated_frames(request.condition_frame_length)


class KeptFrames:
    """What every clip of a batch keeps. Made on every rank; full on the leading one only.

    needed: whether any clip is still to be denoised; without, nothing is read or encoded.
    """

    def __init__(
        self, pipeline: Pipeline, requests: Sequence[Request], *, needed: bool = True
    ) -> None:
        self._pipeline, self._requests = pipeline, requests
        self._groups = [parse_mask_strategy(request.mask_strategy) for request in requests]
        keeps = any(request.reference_path for request in requests) or requests[0].loop > 1
        self._needed = needed and keeps
        # Per request, per reference: normalised latents [4,T,h,w] on the CPU.
        self._latents: list[list[Tensor]] = [[] for _ in requests]
        self._tail: list[Tensor] = []  # decoded chunks [B,3,f,H,W] that the next clip continues
        if self._needed:
            with pipeline.clock.stage("wait"):
                pipeline.session.together(self._read_all, leading_only=True)

    @property
    def references(self) -> list[list[Tensor]]:
        """The references' latents [4,T,h,w], per request; empty on ranks that do not lead."""
        return self._latents

    def start(self, clip: int, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """A clip's starting latents and frame mask [B,T] from its noise [B,4,T,H,W], on all ranks.

        The mask is None for a plain run. Collective when the batch keeps anything at all.
        """
        if not self._needed:
            return noise, None
        session = self._pipeline.session
        noise = noise.clone()
        with self._pipeline.clock.stage("wait"):
            mask = session.share(
                session.together(
                    lambda: torch.stack([self._place(i, clip, z) for i, z in enumerate(noise)]),
                    leading_only=True,
                )
            )
        if bool((mask == 1).all()):
            return noise, None
        placed = noise if session.leads else None
        with self._pipeline.clock.stage("hand out"):
            z = hand_out_checked(session, placed, noise.shape, noise.dtype)
        return z.cpu(), mask

    def watched_from(self, clip: int) -> int | None:
        """The chunk from which on `watch` needs a clip's pixels; None where nothing continues it.

        The same on every rank.
        """
        if not self._continues(clip) or self._requests[0].loop_carry != "frames":
            return None
        return self._first_chunk(clip)

    def watch(self, pixels: Tensor | None) -> None:
        """Look at the next decoded pixels [B,3,f,H,W] of a clip, from `watched_from` on."""
        if pixels is not None:
            self._tail.append(pixels.float().cpu())

    def finish(self, clip: int, latents: Tensor | None) -> None:
        """Make the finished clip a reference of the next one; latents [B,4,T,H,W] where known."""
        if not self._continues(clip) or latents is None:
            return
        request = self._requests[0]
        if request.loop_carry == "frames":
            latents = self._encode_tail(clip, latents)
        length = request.condition_frame_length
        for i, clip_latents in enumerate(latents):
            number = len(self._latents[i])
            self._latents[i].append(clip_latents.float().cpu())
            self._groups[i] = [g for g in self._groups[i] if g.loop > clip]
            self._groups[i].append(Group(clip + 1, number, -length, 0, length, 0.0))
            # Every clip is a reference with a number of its own, but only those that are still
            # asked for are kept, so memory does not grow with the loops.
            wanted = {group.ref for group in self._groups[i]}
            for other in range(number):
                if other not in wanted:
                    self._latents[i][other] = clip_latents.new_empty((4, 0, *latents.shape[-2:]))

    def _continues(self, clip: int) -> bool:
        return self._needed and clip + 1 < self._requests[0].loop

    def _read_all(self) -> None:
        for i, request in enumerate(self._requests):
            self._read(i, request)

    def _read(self, i: int, request: Request) -> None:
        paths = [path for path in request.reference_path.split(";") if path]
        if not paths:
            return
        vae = self._pipeline.vae(request, encoder=True)
        for number, path in enumerate(paths):
            with self._pipeline.clock.stage("read references"):
                from opensora_sp.references import read_reference

                with _blamed_on(i):
                    reference = read_reference(
                        path.strip(),
                        request.height,
                        request.width,
                        fps=request.reference_fps,
                        allow_remote=self._pipeline.allow_remote,
                    )

            def draw(which: str, shape: tuple[int, ...], number: int = number) -> Tensor:
                return noise_key(request, 0).normal(shape, f"reference {number} {which}")

            with self._pipeline.clock.stage("encode references"):
                z = vae.encode(reference.video[None], draw)
            self._latents[i].append(z[0].float().cpu())

    def _place(self, i: int, clip: int, z: Tensor) -> Tensor:
        with _blamed_on(i):
            placements = plan_strategy(
                self._groups[i],
                clip,
                [latents.shape[1] for latents in self._latents[i]],
                z.shape[1],
                self._requests[i].align,
            )
        return apply_strategy(z, self._latents[i], placements)

    def _first_chunk(self, clip: int) -> int:
        """The chunk in which the frames that clip + 1 continues begin."""
        request = self._requests[0]
        frames, length = request.latent_shape[0], request.condition_frame_length
        group = Group(clip + 1, 0, -length, 0, length, 0.0)
        start = plan_strategy([group], clip + 1, [frames], frames, request.align)[0].ref_start
        chunks = split_chunks(request.num_frames, request.micro_frame_size)
        return max(n for n, chunk in enumerate(chunks) if chunk.latent_start <= start)

    def _encode_tail(self, clip: int, latents: Tensor) -> Tensor:
        """The finished clip's decoded frames encoded again, as far as the next one keeps them.

        Chunks are independent, so encoding only the last ones gives what encoding the whole clip
        would. The frames before them are zeros that no strategy reaches.
        """
        request, vae = self._requests[0], self._vae()
        chunks = split_chunks(request.num_frames, request.micro_frame_size)
        first = self._first_chunk(clip)
        start, latent_start = chunks[first].frame_start, chunks[first].latent_start
        tail = torch.cat(self._tail, dim=2)
        encoded = torch.zeros_like(latents)
        for i, own in enumerate(self._requests):

            def draw(which: str, shape: tuple[int, ...], own: Request = own) -> Tensor:
                skipped = start if which == "spatial" else latent_start
                full = (*shape[:2], shape[2] + skipped, *shape[3:])
                return noise_key(own, clip).normal(full, f"carry {which}")[:, :, skipped:]

            with self._pipeline.clock.stage("encode references"):
                z = vae.encode(tail[i : i + 1], draw)
            encoded[i, :, latent_start:] = z[0]
        self._tail.clear()
        return encoded

    def _vae(self) -> VideoVAE:
        return self._pipeline.vae(self._requests[0], encoder=True)


@contextmanager
def _blamed_on(place: int) -> Iterator[None]:
    """A mistake in this block is that of one request of the batch: the others can be made."""
    try:
        yield
    except UserError as error:
        raise PromptFault(str(error), place) from error


def noise_key(request: Request, clip: int) -> NoiseKey:
    """What names a clip's draws."""
    return NoiseKey(request.seed, request.prompt_index, request.sample_index, clip)
