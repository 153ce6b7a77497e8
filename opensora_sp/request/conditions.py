"""A check of a request's references and mask strategy, before torch or a model is loaded.

Frames are counted from the headers and packets of the files. The length of an address is not known
before it is fetched, so what depends on it is checked then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from opensora_sp.base.access import Remote
from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import is_address, without_secrets
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.request import sizes
from opensora_sp.request.mask_strategy import (
    END,
    FrameLayout,
    Group,
    Placement,
    parse_mask_strategy,
    plan_clip,
)
from opensora_sp.request.request import Request, reference_paths

# The assumed length, in frames, of a reference whose length is unknown.
UNKNOWN_FRAMES = 10 * sizes.MOST_FRAMES


@dataclass(frozen=True)
class Facts:
    """What is known of a reference. frames: at the requested rate; None for an address."""

    frames: int | None = None
    notes: tuple[str, ...] = ()


def layout_of(request: Request) -> FrameLayout:
    """The layout of a clip's frames in its latent frames."""
    return FrameLayout(request.num_frames, request.micro_frame_size)


def dropped_frames(request: Request) -> int:
    """Frames of a later clip that repeat the one before. Joining the clips drops them."""
    return layout_of(request).frames_before(request.condition_frame_length)


def total_frames(request: Request) -> int:
    """Frames of the whole output, without those that later clips repeat."""
    repeated = min(dropped_frames(request), request.num_frames)
    return request.num_frames + (request.loop - 1) * (request.num_frames - repeated)


def all_groups(request: Request) -> list[Group]:
    """A request's groups, followed by the groups with which each clip continues the one before.

    With `loop_carry` "latents" the last latent frames of a clip are taken in whole chunks, as the
    mask strategy's own syntax does, and are not encoded again.
    """
    length, files = request.condition_frame_length, len(reference_paths(request))
    groups = parse_mask_strategy(request.mask_strategy) + [
        Group(clip, files + clip - 1, END, 0, length, 0.0) for clip in range(1, request.loop)
    ]
    if request.loop_carry == "frames":
        return groups
    return [
        replace(g, ref_start=-g.length) if g.ref_start == END and g.ref >= files else g
        for g in groups
    ]


def inspect_reference(path: str, request: Request, *, allow_remote: Remote) -> Facts:
    """Check a reference and count its frames. An address is only checked by its text.

    Raises:
        UserError: the reference cannot be used, or the file is cut off.
    """
    from opensora_sp.media.frames import open_reference
    from opensora_sp.media.reader import check_reference

    notes = check_reference(path, allow_remote=allow_remote, fps=request.reference_fps)
    if is_address(path):
        return Facts(notes=tuple(notes))
    with open_reference(path, fps=request.reference_fps) as reference:
        return Facts(reference.count, tuple(notes))


def strategy_notes(
    request: Request, facts: Mapping[str, Facts], flags: Sequence[str] = ()
) -> list[str]:
    """Notes for the user about the conditioning frames that the strategy places.

    facts: of each reference, from `inspect_reference`. flags: the flag that each reference came
    from, such as --extend; empty where the mask strategy was written out.

    Raises:
        UserError: the strategy cannot be followed. The message names the flag where there is one.
    """
    paths = reference_paths(request)
    _require_named(request, paths)
    notes: list[str] = []
    for path in paths:
        notes += facts[path].notes
    own = parse_mask_strategy(request.mask_strategy)
    if paths and not own:
        return [
            *notes,
            f"{_names(paths)} not used, because no --mask-strategy says how: 0 begins the video "
            "with it (as --image does); --extend and --edit are the other short ways",
        ]
    for group in own:
        flag = flags[group.ref] if group.ref < len(flags) else None
        notes += _GroupNotes(request, paths, facts, group, flag).notes()
    named = {group.ref for group in own}
    unused = [path for number, path in enumerate(paths) if number not in named]
    if unused:
        notes.append(
            f"{_names(unused)} not used, because no group of the mask strategy "
            f"{shown(request.mask_strategy)} names it (the second value of a group, counted from 0)"
        )
    return notes


def _names(paths: Sequence[str]) -> str:
    names = ", ".join(without_secrets(path) for path in paths)
    return f"reference {names} is" if len(paths) == 1 else f"references {names} are"


def _require_named(request: Request, paths: Sequence[str]) -> None:
    for group in parse_mask_strategy(request.mask_strategy):
        # A later clip also has every clip before it as a reference.
        known = len(paths) + (group.loop if group.loop < request.loop else 0)
        if group.ref >= known:
            raise UserError(
                f"mask strategy {shown(request.mask_strategy)} asks for reference {group.ref}, but "
                f"the prompt has {len(paths)} (counted from 0): add it to --reference-path"
            )


class _GroupNotes:
    """One group of a strategy, the frames that it places, and the notes about them."""

    def __init__(
        self,
        request: Request,
        paths: Sequence[str],
        facts: Mapping[str, Facts],
        group: Group,
        flag: str | None,
    ) -> None:
        self._request, self._group, self._flag = request, group, flag
        self._layout = layout_of(request)
        files = [facts[path].frames for path in paths]
        known = files + [request.num_frames] * max(1, group.loop)
        self._known = known[group.ref]
        self._frames = [UNKNOWN_FRAMES if frames is None else frames for frames in known]
        self._path = without_secrets(paths[group.ref]) if group.ref < len(paths) else None

    def notes(self) -> Iterator[str]:
        group, request = self._group, self._request
        if group.loop >= request.loop:
            yield self._said(
                f"is for clip {group.loop}, but --loop {request.loop} makes none of that number "
                "(they are counted from 0)"
            )
            return
        if group.length == 0:
            yield self._said("has a length of 0 and keeps nothing")
            return
        placement = self._placed()
        if placement.length == 0:
            yield self._said(self._why_nothing(placement))
        elif self._flag is None:
            yield from self._of_syntax(placement)
        else:
            yield from self._of_flag(placement)

    def _said(self, what: str) -> str:
        g = self._group
        text = ",".join(str(v) for v in (g.loop, g.ref, g.ref_start, g.target_start, g.length))
        return f"mask strategy group {text},{g.edit_ratio:g} {what}: it has no effect"

    def _placed(self) -> Placement:
        """The frames that the group places. Raises UserError that names the flag."""
        group, request = self._group, self._request
        if self._flag == "--extend" and self._known is not None:
            self._require_end(self._flag, self._known)
        return plan_clip([group], group.loop, self._frames, self._layout, request.align)[0]

    def _require_end(self, flag: str, frames: int) -> None:
        length = min(self._group.length, self._layout.latents)
        needed = self._layout.frames_shown(0, length)
        if frames >= needed:
            return
        rate = self._request.reference_fps
        if frames == 1:
            raise UserError(
                f"{flag} {shown(self._path)} has one frame, but the last {needed} are continued: "
                "give a video, or start from a picture with --image"
            )
        fits = max(n for n in range(length) if self._layout.frames_shown(0, n) <= frames)
        raise UserError(
            f"{flag} {shown(self._path)} has {frames} frames"
            f"{'' if rate is None else f' at --reference-fps {rate:g}'}, but the last {needed} are "
            f"continued (--condition-frame-length {self._group.length}): give a longer video, or "
            f"--condition-frame-length {fits}, which needs {self._layout.frames_shown(0, fits)}"
        )

    def _why_nothing(self, placement: Placement) -> str:
        if placement.target_start >= self._layout.latents:
            return (
                f"begins at latent frame {placement.target_start} of the clip, which has "
                f"{self._layout.latents} (counted from 0)"
            )
        return (
            f"begins at latent frame {placement.ref_start} of "
            f"{self._path or 'the clip before'}, which has {self._latents_of_reference()} "
            "(counted from 0)"
        )

    def _latents_of_reference(self) -> int:
        return FrameLayout(self._frames[self._group.ref], self._layout.micro).latents

    def _of_syntax(self, placement: Placement) -> Iterator[str]:
        """Notes for a mask strategy that was written out."""
        group, layout = self._group, self._layout
        if group.ref_start != END and group.ref_start < 0 and self._known is not None:
            yield from self._lost_at_the_end(placement, group.ref_start, self._known)
        if group.target_start < 0:
            moved = layout.latents + group.target_start - placement.target_start
            if moved:
                end = layout.frames_before(placement.target_start + placement.length)
                yield (
                    f"mask strategy: target_start {group.target_start} counts from the clip's end, "
                    f"but starts are moved to multiples of --align {self._request.align} latent "
                    f"frames, so what is kept ends at frame {end} of {layout.frames}"
                )

    def _lost_at_the_end(self, placement: Placement, start: int, frames: int) -> Iterator[str]:
        reference = FrameLayout(frames, self._layout.micro)
        asked = min(reference.latents, reference.latents + start + self._group.length)
        end = placement.ref_start + placement.length
        if end >= asked or placement.length < self._group.length:
            return
        lost = reference.frames_before(asked) - reference.frames_before(end)
        what = self._path or "the clip before"
        yield (
            f"mask strategy: ref_start {start} counts from the end of {what}, but starts are moved "
            f"to multiples of --align {self._request.align} latent frames, so its frames "
            f"{reference.frames_before(placement.ref_start) + 1} to "
            f"{reference.frames_before(end)} of {frames} are kept and the {lost} after them are "
            f"not: write the ref_start as {END}, or use --extend, to end with the last frame"
        )

    def _of_flag(self, placement: Placement) -> Iterator[str]:
        """Notes for a flag such as --image or --extend."""
        name = f"{self._flag} {self._path}"
        frames, clip = self._known, self._layout
        if frames is None:
            return
        if self._flag in ("--image", "--last-image") and frames > 1:
            yield f"{name} is a video of {frames} frames: only its first one is used"
        if self._flag == "--last-image":
            at = clip.frames_before(placement.target_start + 1)
            if at < clip.frames:
                yield (
                    f"{name} is frame {at} of {clip.frames} and {clip.frames - at} follow it: a "
                    f"picture begins a chunk of {clip.micro} frames"
                )
        if self._flag == "--edit" and frames > clip.frames:
            yield f"{name} has {frames} frames: its first {clip.frames} are used"
        if self._flag == "--edit" and frames < clip.frames:
            yield (
                f"{name} has {plural(frames, 'frame')}: the {clip.frames - frames} after "
                f"them of the clip's {clip.frames} are made without it"
            )
