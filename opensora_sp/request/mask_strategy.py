"""Mask strategies: which frames of a clip are conditioning frames, and from which reference.

A strategy is groups `loop,ref,ref_start,target_start,length,edit_ratio` joined by `;`. This module
is arithmetic on frame counts and needs no torch; `engine.clips.apply_strategy` applies the result
to tensors. The rules are those of Open-Sora 1.2, with one addition: a ref_start of `end` means the
last frames of the reference, encoded by themselves. A negative ref_start can lose the last frames,
because a reference is encoded in chunks that begin at its first frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from opensora_sp.base import geometry
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural

_MOST_SIGNS = 20  # characters of one value; int() refuses more than 4300 digits
_FORM = (
    "groups are loop,ref,ref_start,target_start,length,edit_ratio joined by ';' "
    "(defaults 0,0,0,0,1,0)"
)

# A ref_start that means: the frames kept are the last ones of the reference.
END: Final = "end"


@dataclass(frozen=True)
class Group:
    """One group of a strategy, as written; counts are latent frames.

    The group applies to the clip number `loop`. It places `length` frames of reference number
    `ref`, from `ref_start` on, at `target_start` of the clip. Negative starts count from the end. A
    `ref_start` of `END` places the last frames of the reference. An `edit_ratio` of 0 keeps the
    frames unchanged, and 1 generates them anew.
    """

    loop: int = 0
    ref: int = 0
    ref_start: int | Literal["end"] = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Latent frames ref_start .. ref_start + length of a reference go to the clip at target_start.

    All counts are latent frames, none is negative, and both ranges lie inside reference and clip. A
    length of 0 means that the group begins after the end of the reference or the clip, so that it
    places nothing.

    frames: None, or (first, count) in frames of the reference. These frames are encoded by
    themselves, and `ref_start` is 0 in the result.
    """

    ref: int
    ref_start: int
    target_start: int
    length: int
    edit_ratio: float
    frames: tuple[int, int] | None = None


@dataclass(frozen=True)
class FrameLayout:
    """The layout of a video's frames in its latent frames, in chunks of `micro` frames."""

    frames: int
    micro: int = geometry.MICRO_FRAME_SIZE

    @property
    def latents(self) -> int:
        """Latent frames of the video."""
        return geometry.latent_frames(self.frames, self.micro)

    def frames_before(self, latent: int) -> int:
        """Frames of the video that its first `latent` latent frames show."""
        chunks, rest = divmod(latent, -(-self.micro // geometry.TIME_FACTOR))
        before = chunks * self.micro
        if rest:
            # Each latent frame of a chunk shows four frames, but the first shows the remainder.
            length = max(0, min(self.micro, self.frames - before))
            before += geometry.TIME_FACTOR * rest - -length % geometry.TIME_FACTOR
        return min(before, self.frames)

    def frames_shown(self, start: int, count: int) -> int:
        """How many frames `count` latent frames from `start` on represent.

        That many frames, encoded by themselves, give exactly `count` latent frames.
        """
        if start % -(-self.micro // geometry.TIME_FACTOR):
            # Inside a chunk: as many frames as the same count needs at the start of a video.
            return FrameLayout(count * self.micro, self.micro).frames_before(count)
        return self.frames_before(start + count) - self.frames_before(start)


def parse_mask_strategy(text: str) -> list[Group]:
    """The groups of a strategy; an empty text has none.

    Raises:
        UserError: an empty group, too many fields, or a value that is not a number in its range.
    """
    if not text.strip():
        return []
    return [_parse_group(group, text) for group in text.split(";")]


def _parse_group(group: str, text: str) -> Group:
    fields = group.split(",")
    if len(fields) > 6:
        raise _malformed(text, f"group {shown(group)} has {len(fields)} values, at most 6")
    from_end = len(fields) > 2 and fields[2].strip().lower() == END
    if from_end:
        fields[2] = "0"
    try:
        if any(len(field) > _MOST_SIGNS for field in fields):
            raise ValueError(group)
        numbers = [int(field) for field in fields[:5]]
        ratio = [float(field) for field in fields[5:]]
    except ValueError:
        raise _malformed(
            text,
            f"in {shown(group)} five values must be whole numbers (ref_start may be 'end') and the "
            "sixth a number",
        ) from None
    parsed = Group(*numbers, *ratio)
    if from_end:
        parsed = replace(parsed, ref_start=END)
    if min(parsed.loop, parsed.ref, parsed.length) < 0:
        raise _malformed(text, f"loop, ref and length in {shown(group)} must not be negative")
    if not 0.0 <= parsed.edit_ratio <= 1.0:
        raise _malformed(
            text, f"edit_ratio in {shown(group)} must be from 0 (keep) to 1 (generate)"
        )
    return parsed


def _malformed(text: str, problem: str) -> UserError:
    return UserError(f"mask strategy {shown(text)}: {problem}; {_FORM}")


def align_to(value: int, align: int, maximum: int) -> int:
    """The multiple of `align` nearest to `value`. It rounds up only if a whole `align` is left.

    With the frame counts of Open-Sora 1.2 a start is then at the beginning of a micro-frame chunk
    (5 latent frames). `maximum`: latent frames of the reference or the clip that the start is in.
    """
    multiple, rest = divmod(value, align)
    if 2 * rest > align and multiple < maximum // align - 1:
        multiple += 1
    return multiple * align


def plan_strategy(
    groups: Sequence[Group],
    clip: int,
    reference_lengths: Sequence[int],
    latent_frames: int,
    align: int | None,
) -> list[Placement]:
    """The placements of the groups for clip number `clip`, in the order of the groups.

    Args:
        reference_lengths: latent frames of each reference of the prompt.
        latent_frames: T, latent frames of the clip.
        align: starts move to a multiple of this many latent frames; None leaves them.

    Raises:
        UserError: a reference does not exist, or a start is before the first frame.
    """
    placements = []
    for group in groups:
        if group.loop != clip:
            continue
        _require_reference(group, clip, len(reference_lengths))
        if group.ref_start == END:
            raise ValueError("a group from the end needs the frames: plan_clip")
        available = reference_lengths[group.ref]
        ref_start = _start("ref_start", group.ref_start, available, align)
        target_start = _start("target_start", group.target_start, latent_frames, align)
        remains = min(available - ref_start, latent_frames - target_start)
        length = max(0, min(group.length, remains))
        placements.append(Placement(group.ref, ref_start, target_start, length, group.edit_ratio))
    return placements


def plan_clip(
    groups: Sequence[Group],
    clip: int,
    reference_frames: Sequence[int],
    layout: FrameLayout,
    align: int | None,
) -> list[Placement]:
    """As `plan_strategy`, also for groups with `END`, from the references' counts of frames.

    Args:
        reference_frames: frames of each reference of the prompt. Only those of references that a
            group of this clip names are used.
        layout: the clip's layout. References are encoded in chunks of the same length.

    Raises:
        UserError: as `plan_strategy`, or a reference is shorter than the end to be kept.
    """
    placements = []
    for group in groups:
        if group.loop != clip:
            continue
        if group.ref_start == END:
            placements.append(_at_the_end(group, clip, reference_frames, layout, align))
        else:
            lengths = [geometry.latent_frames(frames, layout.micro) for frames in reference_frames]
            placements += plan_strategy([group], clip, lengths, layout.latents, align)
    return placements


def _at_the_end(
    group: Group, clip: int, reference_frames: Sequence[int], layout: FrameLayout, align: int | None
) -> Placement:
    _require_reference(group, clip, len(reference_frames))
    available = reference_frames[group.ref]
    start = _start("target_start", group.target_start, layout.latents, align)
    length = max(0, min(group.length, layout.latents - start))

    frames = layout.frames_shown(start, length)
    if frames > available:
        fits = [n for n in range(length) if layout.frames_shown(start, n) <= available]
        raise UserError(
            f"reference {group.ref} has {plural(available, 'frame')}, but its last "
            f"{frames} are to be kept ({length} latent frames): give a longer video, or a length "
            f"of {fits[-1]} (--condition-frame-length {fits[-1]} with --extend)"
        )
    return Placement(
        group.ref, 0, start, length, group.edit_ratio, frames=(available - frames, frames)
    )


def _require_reference(group: Group, clip: int, known: int) -> None:
    if group.ref >= known:
        raise UserError(
            f"mask strategy asks for reference {group.ref} in clip {clip}, but the prompt has "
            f"{known} (counted from 0): add it to the reference path"
        )


def _start(name: str, value: int, total: int, align: int | None) -> int:
    """A start as a frame number of `total`, aligned. Negative ones count from the end."""
    start = value + total if value < 0 else value
    if start < 0:
        raise UserError(
            f"mask strategy: {name} {value} lies before the first of {total} latent frames; "
            f"give -{total} or more"
        )
    return start if align is None else align_to(start, align, total)
