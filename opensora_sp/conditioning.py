"""What of a clip is kept from references and what is generated: conditioning strategies.

A strategy is groups `loop,ref,ref_start,target_start,length,edit_ratio` joined by `;`. Parsing
and planning are plain arithmetic on latent frame counts and need no torch; only `apply_strategy`
touches tensors. Rules of Open-Sora 1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opensora_sp.errors import UserError
from opensora_sp.validate import shown

if TYPE_CHECKING:
    from torch import Tensor

_MOST_SIGNS = 20  # of one value; no clip has so many frames, and int() ends at 4300 digits
_FORM = (
    "groups are loop,ref,ref_start,target_start,length,edit_ratio joined by ';' "
    "(defaults 0,0,0,0,1,0)"
)


@dataclass(frozen=True)
class Group:
    """One group of a strategy, as written; counts are latent frames.

    The group is for the clip number `loop`. It keeps `length` frames of reference number `ref`,
    from `ref_start` on, at `target_start` of the clip; negative starts count from the end.
    `edit_ratio` 0 keeps the frames as they are, 1 generates them anew.
    """

    loop: int = 0
    ref: int = 0
    ref_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Frames ref_start .. ref_start + length of a reference go to the clip at target_start.

    All counts are latent frames, none is negative, and both ranges lie inside. A length of 0
    means that the group began behind the end of the reference or the clip: it places nothing.
    """

    ref: int
    ref_start: int
    target_start: int
    length: int
    edit_ratio: float


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
    try:
        if any(len(field) > _MOST_SIGNS for field in fields):
            raise ValueError(group)
        numbers = [int(field) for field in fields[:5]]
        ratio = [float(field) for field in fields[5:]]
    except ValueError:
        raise _malformed(
            text, f"in {shown(group)} five values must be whole numbers and the sixth a number"
        ) from None
    parsed = Group(*numbers, *ratio)
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
    """The multiple of `align` nearest to `value`: below it, or above while a whole one remains.

    With the frame counts of Open-Sora 1.2 this keeps starts on the chunks that the temporal VAE
    encodes by themselves (5 latent frames each). `maximum` is the length that the start lies in.
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
    """Where the groups that are for clip number `clip` put which frames, in their order.

    Args:
        reference_lengths: latent frames of each reference of the prompt.
        latent_frames: T, latent frames of the clip.
        align: starts move to a multiple of this many frames; None leaves them.

    Raises:
        UserError: a reference that is not there, or a start before the first frame.
    """
    placements = []
    for group in groups:
        if group.loop != clip:
            continue
        if group.ref >= len(reference_lengths):
            raise UserError(
                f"mask strategy asks for reference {group.ref} in clip {clip}, but the prompt has "
                f"{len(reference_lengths)} (counted from 0): add it to the reference path"
            )
        available = reference_lengths[group.ref]
        ref_start = _start("ref_start", group.ref_start, available, align)
        target_start = _start("target_start", group.target_start, latent_frames, align)
        remains = min(available - ref_start, latent_frames - target_start)
        length = max(0, min(group.length, remains))
        placements.append(Placement(group.ref, ref_start, target_start, length, group.edit_ratio))
    return placements


def _start(name: str, value: int, total: int, align: int | None) -> int:
    """A start as a frame number of `total`: negative ones count from the end, then aligned."""
    start = value + total if value < 0 else value
    if start < 0:
        raise UserError(
            f"mask strategy: {name} {value} lies before the first of {total} latent frames; "
            f"give -{total} or more"
        )
    return start if align is None else align_to(start, align, total)


def apply_strategy(
    z: Tensor, references: Sequence[Tensor], placements: Sequence[Placement]
) -> Tensor:
    """Copy the placed reference frames into z, in place, and return the frame mask [T].

    Args:
        z: the clip's noise [4, T, H, W].
        references: normalised latents of the prompt's references, each [4, T_ref, H, W].
        placements: from `plan_strategy` with these lengths.

    Returns:
        float32 [T] on the CPU: the edit ratio where a reference was placed and 1 elsewhere. All
        ones means a plain run.

    Raises:
        ValueError: a reference whose channels, height or width are not z's.
    """
    import torch

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
