"""The frames that clips keep: references by strategy, and the end of the clip before.

Everything happens on the leading rank, which alone reads files and holds the VAE; what leaves
here is the clip's starting latents and its frame mask, handed out to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora_sp.base.errors import CheckpointError, PromptFault, UserError
from opensora_sp.base.geometry import split_chunks
from opensora_sp.engine.model_set import ModelSet
from opensora_sp.engine.noise import noise_key
from opensora_sp.media.fetch import Remote
from opensora_sp.media.reader import MAX_REFERENCE_BYTES
from opensora_sp.parallel.agreement import broadcast_checked
from opensora_sp.request.conditions import all_groups, layout_of
from opensora_sp.request.mask_strategy import FrameLayout, Placement, plan_clip
from opensora_sp.request.request import Request, reference_paths

if TYPE_CHECKING:
    from opensora_sp.media.frames import ReferenceFrames
    from opensora_sp.models.video_vae import NoiseSource, VideoVAE


@dataclass(frozen=True)
class _Part:
    """Frames first .. first + count of a reference, encoded by themselves.

    latent: the number, among the latent frames of the whole reference, of the first one that they
    become. placed: a placement's `frames` that this part is for; None for a run of whole chunks
    of the reference, which placements that count in its latent frames share.
    """

    first: int
    count: int
    latent: int
    placed: tuple[int, int] | None = None


def _parts(placements: Sequence[Placement], frames: int, micro: int) -> list[_Part]:
    """What of a reference of `frames` frames the placements need, each frame of the grid once."""
    chunks = split_chunks(frames, micro)
    needed: set[int] = set()
    ends: dict[tuple[int, int], _Part] = {}
    for p in placements:
        if p.length == 0:
            continue
        if p.frames is None:
            needed |= {
                number
                for number, chunk in enumerate(chunks)
                if chunk.latent_start < p.ref_start + p.length
                and chunk.latent_start + chunk.latents > p.ref_start
            }
        else:
            latent = chunks[-1].latent_start + chunks[-1].latents - p.length
            ends[p.frames] = _Part(*p.frames, latent, placed=p.frames)
    runs: list[_Part] = []
    for number in sorted(needed):
        chunk = chunks[number]
        if number - 1 in needed:
            runs[-1] = replace(runs[-1], count=runs[-1].count + chunk.frames)
        else:
            runs.append(_Part(chunk.frame_start, chunk.frames, chunk.latent_start))
    return runs + list(ends.values())


class _Kept:
    """A reference's latent frames, as far as anything places them; CPU, float32."""

    def __init__(self, latents: int, side: Sequence[int]) -> None:
        self.latents, self._side = latents, tuple(side)
        self._runs: list[tuple[int, Tensor]] = []  # (first latent frame, [4,t,h,w])
        self._ends: dict[tuple[int, int], Tensor] = {}

    def add(self, part: _Part, z: Tensor) -> None:
        """Latents [4,t,h,w] of a part."""
        if part.placed is None:
            self._runs.append((part.latent, z.float().cpu()))
        else:
            self._ends[part.placed] = z.float().cpu()

    def take(self, placement: Placement) -> Tensor:
        """The latent frames [4,length,h,w] that a placement places."""
        if placement.length and placement.frames is not None:
            return self._ends[placement.frames]
        taken = torch.empty(4, placement.length, *self._side)
        filled = 0
        for start, z in self._runs:
            first = max(start, placement.ref_start)
            last = min(start + z.shape[1], placement.ref_start + placement.length)
            if first < last:
                target = slice(first - placement.ref_start, last - placement.ref_start)
                taken[:, target] = z[:, first - start : last - start]
                filled += last - first
        if filled != placement.length:
            raise RuntimeError(f"{placement} is to be placed, but was not encoded")
        return taken

    def whole(self) -> Tensor:
        """[4,T,h,w], zero where nothing was encoded."""
        z = torch.zeros(4, self.latents, *self._side)
        for start, run in self._runs:
            z[:, start : start + run.shape[1]] = run
        return z


class ConditioningFrames:
    """What every clip of a batch keeps. Made on every rank; full on the leading one only.

    Of a reference only what some clip keeps is read and encoded: whole chunks, so that the result
    is that of encoding all of it.

    needed: whether any clip is still to be denoised; without, nothing is read or encoded.
    """

    def __init__(
        self,
        models: ModelSet,
        requests: Sequence[Request],
        *,
        allow_remote: Remote = False,
        needed: bool = True,
    ) -> None:
        self._models, self._requests, self._allow_remote = models, requests, allow_remote
        self._groups = [all_groups(request) for request in requests]
        keeps = any(request.reference_path for request in requests) or requests[0].loop > 1
        self._needed = needed and keeps
        # Per request, per reference: its frames and what is kept of them. Clips follow the files.
        self._frames: list[list[int]] = [[] for _ in requests]
        self._kept: list[list[_Kept]] = [[] for _ in requests]
        self._tail: list[Tensor] = []  # decoded chunks [B,3,f,H,W] that later clips keep
        if self._needed:
            with models.clock.stage("wait"):
                models.session.control.together(self._read_all, leading_only=True)

    @property
    def references(self) -> list[list[Tensor]]:
        """The references' latents [4,T,h,w], per request; empty on ranks that do not lead.

        Zero where nothing is kept of them.
        """
        return [[one.whole() for one in own] for own in self._kept]

    def start(self, clip: int, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """A clip's starting latents and frame mask [B,T] from its noise [B,4,T,H,W], on all ranks.

        The mask is None for a plain run. Collective when the batch keeps anything at all.
        """
        if not self._needed:
            return noise, None
        session = self._models.session
        noise = noise.clone()
        with self._models.clock.stage("wait"):
            mask = session.control.broadcast_object(
                session.control.together(
                    lambda: torch.stack([self._place(i, clip, z) for i, z in enumerate(noise)]),
                    leading_only=True,
                )
            )
        if bool((mask == 1).all()):
            return noise, None
        placed = noise if session.leads else None
        with self._models.clock.stage("hand out"):
            z = broadcast_checked(session, placed, noise.shape, noise.dtype)
        return z.cpu(), mask

    def watched_from(self, clip: int) -> int | None:
        """The chunk from which on `watch` needs a clip's pixels; None where nothing continues it.

        The same on every rank.
        """
        if not self._continues(clip) or self._requests[0].loop_carry != "frames":
            return None
        first = min(part.first for i in range(len(self._requests)) for part in self._asked(i, clip))
        chunks = split_chunks(self._requests[0].num_frames, self._requests[0].micro_frame_size)
        return max(n for n, chunk in enumerate(chunks) if chunk.frame_start <= first)

    def watch(self, pixels: Tensor | None) -> None:
        """Look at the next decoded pixels [B,3,f,H,W] of a clip, from `watched_from` on."""
        if pixels is not None:
            self._tail.append(pixels.float().cpu())

    def finish(self, clip: int, latents: Tensor | None) -> None:
        """Make the finished clip a reference of later ones; latents [B,4,T,H,W] where known."""
        if not self._continues(clip) or latents is None:
            return
        carries_frames = self._requests[0].loop_carry == "frames"
        tail = torch.cat(self._tail, dim=2) if carries_frames else None
        self._tail.clear()
        for i, own in enumerate(latents):
            request = self._requests[i]
            kept = _Kept(own.shape[1], own.shape[2:])
            if tail is None:
                kept.add(_Part(0, request.num_frames, 0), own)
            else:
                skipped = request.num_frames - tail.shape[2]
                for part in self._asked(i, clip):
                    video = tail[i, :, part.first - skipped :][:, : part.count]
                    kept.add(part, self._encode(request, clip, "carry", video, part))
            self._frames[i].append(request.num_frames)
            self._kept[i].append(kept)
            # Every clip is a reference with a number of its own, but only those that are still
            # asked for are kept, so memory does not grow with the loops.
            wanted = {group.ref for group in self._groups[i] if group.loop > clip}
            for number in range(len(self._kept[i])):
                if number not in wanted:
                    self._kept[i][number] = _Kept(0, own.shape[2:])

    def _continues(self, clip: int) -> bool:
        return self._needed and clip + 1 < self._requests[0].loop

    def _asked(self, i: int, clip: int) -> list[_Part]:
        """What later clips of a request keep of a clip. The same on every rank."""
        request = self._requests[i]
        number = len(reference_paths(request)) + clip
        groups = [g for g in self._groups[i] if g.ref == number]
        # Only this clip is asked for, so the other references' lengths do not matter.
        frames = [request.num_frames] * (number + 1)
        placements = [
            placement
            for later in range(clip + 1, request.loop)
            for placement in plan_clip(groups, later, frames, layout_of(request), request.align)
        ]
        return _parts(placements, request.num_frames, request.micro_frame_size)

    def _read_all(self) -> None:
        for i in range(len(self._requests)):
            with _blamed_on(i):
                self._read(i)

    def _read(self, i: int) -> None:
        """Read and encode what the clips of a request keep of its files."""
        from opensora_sp.media.frames import Recounted, open_reference

        request, stage = self._requests[i], self._models.clock.stage
        named = {g.ref for g in self._groups[i] if g.loop < request.loop and g.length}
        with ExitStack() as stack:
            with stage("read references"):
                files = [
                    stack.enter_context(
                        open_reference(
                            path,
                            fps=request.reference_fps,
                            allow_remote=self._allow_remote,
                        )
                    )
                    if number in named
                    else None
                    for number, path in enumerate(reference_paths(request))
                ]
            while True:
                try:
                    self._read_files(i, files)
                    return
                except Recounted:  # a length was wrong, and with it what is kept
                    continue

    def _read_files(self, i: int, files: Sequence[ReferenceFrames | None]) -> None:
        request = self._requests[i]
        # Of a file that no clip names nothing is known, and nothing is asked.
        self._frames[i] = [0 if file is None else file.count for file in files]
        self._kept[i] = []
        placements = list(self._all_placements(i))
        for number, file in enumerate(files):
            if file is None:
                self._kept[i].append(_Kept(0, request.latent_shape[1:]))
                continue
            own = [p for p in placements if p.ref == number]
            parts = _parts(own, file.count, request.micro_frame_size)
            with self._models.clock.stage("read references"):
                wanted = [(part.first, part.count) for part in parts]
                videos = file.read(wanted, request.height, request.width)
            layout = FrameLayout(file.count, request.micro_frame_size)
            kept = _Kept(layout.latents, request.latent_shape[1:])
            for part, video in zip(parts, videos, strict=True):
                kept.add(
                    part, self._encode(request, 0, f"reference {number}", video, part, file.count)
                )
            self._kept[i].append(kept)

    def _all_placements(self, i: int) -> Iterator[Placement]:
        """What every clip of a request places, of files and of the clips before it."""
        request = self._requests[i]
        for clip in range(request.loop):
            frames = self._frames[i] + [request.num_frames] * clip
            yield from plan_clip(self._groups[i], clip, frames, layout_of(request), request.align)

    def _encode(
        self,
        request: Request,
        clip: int,
        name: str,
        video: Tensor,
        part: _Part,
        frames: int | None = None,
    ) -> Tensor:
        """Latents [4,t,h,w] of a part [3,count,H,W] of a video of `frames` frames (the clip's).

        Chunks are independent, and the part's noise is cut out of that of the whole video, so this
        is what encoding all of it would give.
        """
        layout = FrameLayout(frames or request.num_frames, request.micro_frame_size)
        bounded = layout.frames <= _most_drawn(request)

        def draw(which: str, shape: tuple[int, ...]) -> Tensor:
            key, skipped = noise_key(request, clip), part.first
            total = layout.frames
            if which == "temporal":
                skipped, total = part.latent, layout.latents
            if not bounded:
                return key.normal(shape, f"{name} {which} from {skipped}")
            full = (*shape[:2], total, *shape[3:])
            return key.normal(full, f"{name} {which}")[:, :, skipped : skipped + shape[2]]

        source: NoiseSource = draw
        vae = self._vae(request)
        with self._models.clock.stage("encode references"):
            return vae.encode(video[None], source)[0]

    def _place(self, i: int, clip: int, z: Tensor) -> Tensor:
        request = self._requests[i]
        placements = plan_clip(
            self._groups[i], clip, self._frames[i], layout_of(request), request.align
        )
        taken = [self._kept[i][p.ref].take(p) for p in placements]
        own = [replace(p, ref=number, ref_start=0) for number, p in enumerate(placements)]
        return apply_strategy(z, taken, own)

    def _vae(self, request: Request) -> VideoVAE:
        return self._models.vae(request, encoder=True)


def _most_drawn(request: Request) -> int:
    """Frames of a reference up to which noise is drawn for all of it, whatever is kept."""
    return MAX_REFERENCE_BYTES // (3 * request.height * request.width * 4)


@contextmanager
def _blamed_on(place: int) -> Iterator[None]:
    """A mistake in this block is that of one request of the batch: the others can be made."""
    try:
        yield
    except CheckpointError:  # the VAE's, which all of them need
        raise
    except UserError as error:
        raise PromptFault(str(error), place) from error


def apply_strategy(
    z: Tensor, references: Sequence[Tensor], placements: Sequence[Placement]
) -> Tensor:
    """Copy the placed reference frames into z, in place, and return the frame mask [T].

    Args:
        z: the clip's noise [4, T, H, W].
        references: normalised latents of the prompt's references, each [4, T_ref, H, W].
        placements: from `plan_strategy` with these lengths; `frames` of a placement is not looked
            at, so for those of `plan_clip` the references are what was encoded for each.

    Returns:
        float32 [T] on the CPU: the edit ratio where a reference was placed and 1 elsewhere. All
        ones means a plain run.

    Raises:
        ValueError: a reference whose channels, height or width are not z's.
    """
    mask = torch.ones(z.shape[1])
    for p in placements:
        source = references[p.ref]
        if source.shape[0] != z.shape[0] or source.shape[2:] != z.shape[2:]:
            raise ValueError(
                f"reference {p.ref} has latents {list(source.shape)}, which do not fit the clip's "
                f"{list(z.shape)}"
            )
        target = slice(p.target_start, p.target_start + p.length)
        z[:, target] = source[:, p.ref_start : p.ref_start + p.length].to(z)
        mask[target] = p.edit_ratio
    return mask
