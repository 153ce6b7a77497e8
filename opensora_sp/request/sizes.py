"""Sizes of Open-Sora 1.2: the table of resolutions, aspect ratios and durations.

Imports no torch, so that a wrong size is refused before a model is loaded.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import integer, shown
from opensora_sp.base.wording import plural

TABLE_FILE = Path(__file__).parents[1] / "assets" / "sizes.json"

SMALLEST_SIDE = 16  # one whole patch
LARGEST_SIDE = 16384  # the largest side of an H.264 picture
MOST_FRAMES = 100_000
LONGEST_TRAINED = 408  # 16 s at 24 fps
# What the embedded model has learnt (assets/embedded/README.md): sides in pixels, one size beyond
# them, height and width, and frames.
EMBEDDED_SIDES = (64, 144)
EMBEDDED_LARGEST = (144, 256)
EMBEDDED_FRAMES = 51

# Resolutions of the table that are larger than what the model was trained on.
UNTRAINED = frozenset({"1080p", "2k", "2048", "2880", "4k"})

SIDE = integer(SMALLEST_SIDE, LARGEST_SIDE)
_FRAMES = integer(1, MOST_FRAMES)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    return table


def resolutions() -> tuple[str, ...]:
    """The names of the resolutions, in the table's order."""
    return tuple(_table()["image_size_height_width"])


def aspect_ratios(resolution: str) -> dict[str, tuple[int, int]]:
    """Aspect ratio (height:width) → (height, width) in pixels, for one resolution."""
    sizes = _table()["image_size_height_width"][resolution]
    return {ratio: (size[0], size[1]) for ratio, size in sizes.items()}


def durations() -> dict[str, int]:
    """Name of a duration ("2s", "image", ...) → number of frames."""
    return dict(_table()["num_frames"])


def resolve_size(
    resolution: str, aspect_ratio: str, image_size: Sequence[int] | None = None
) -> tuple[int, int]:
    """(height, width) in pixels, as the model gets them.

    `image_size` overrides the table. Raises UserError that names the pair missing in the table.
    """
    if image_size is not None:
        if len(image_size) != 2:
            raise UserError(f"--image-size {shown(list(image_size))} is not a height and a width")
        for side in image_size:
            SIDE.check("--image-size", side)
        return image_size[0], image_size[1]
    name, ratio = resolution.strip().lower(), aspect_ratio.strip()
    if name not in resolutions():
        raise UserError(
            f"--resolution {shown(resolution)} is not in the size table, which has "
            f"{', '.join(resolutions())}"
        )
    sizes = aspect_ratios(name)
    if ratio not in sizes:
        legal = f"{name} has {', '.join(sizes) or 'no sizes'}"
        raise UserError(
            f"--resolution {name} with --aspect-ratio {shown(aspect_ratio)} is not in the size "
            f"table: {legal} (or give --image-size H W)"
        )
    return sizes[ratio]


def resolve_frames(frames: str | int) -> int:
    """Number of frames from a duration's name ("2s", "4x", "image") or a plain number.

    Raises UserError listing the names.
    """
    if isinstance(frames, int):
        _FRAMES.check("--num-frames", frames)
        return frames
    named = durations()
    key = frames.strip().lower()
    if key in named:
        return named[key]
    try:
        count = int(_FRAMES.read(key))
    except ValueError:
        count = 0
    if not _FRAMES.legal(count):
        words = ", ".join(name for name in named if not name.isdigit())
        raise UserError(f"--num-frames {shown(frames)} is not {_FRAMES.allowed} or one of {words}")
    return count


@cache
def _resolutions_of(height: int, width: int) -> frozenset[str]:
    return frozenset(
        name for name in resolutions() if (height, width) in aspect_ratios(name).values()
    )


def is_trained(height: int, width: int) -> bool:
    """Whether the model was trained on this size, according to the table."""
    return bool(_resolutions_of(height, width) - UNTRAINED)


def size_notes(height: int, width: int, frames: int, *, embedded: bool = False) -> list[str]:
    """Notes for the user about a size that is legal but unusual, a line each.

    embedded: the embedded model makes it, which has learnt other sizes than the published one.
    """
    if embedded:
        return _embedded_notes(height, width, frames)
    notes = []
    found = _resolutions_of(height, width)
    if not found:
        notes.append(
            f"{height}x{width} (height x width) is not in the size table: the model was not "
            "trained on it"
        )
    elif not is_trained(height, width):
        notes.append(
            f"{height}x{width} ({', '.join(sorted(found))}) is larger than anything the model "
            "was trained on"
        )
    if frames > LONGEST_TRAINED:
        notes.append(
            f"{frames} frames are more than the {LONGEST_TRAINED} (16 s) the model was trained on"
        )
    return notes


def _embedded_notes(height: int, width: int, frames: int) -> list[str]:
    smallest, largest = EMBEDDED_SIDES
    learnt = smallest <= min(height, width) and max(height, width) <= largest
    if (learnt or (height, width) == EMBEDDED_LARGEST) and frames <= EMBEDDED_FRAMES:
        return []
    return [
        f"{plural(frames, 'frame')} of {height}x{width} (height x width): the small "
        f"embedded model has learnt sides from {smallest} to {largest}, "
        f"{EMBEDDED_LARGEST[0]}x{EMBEDDED_LARGEST[1]}, and up to {EMBEDDED_FRAMES} frames; "
        "others look worse (--config embedded is a size that it knows)"
    ]
