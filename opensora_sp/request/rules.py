"""Rules on combinations of a request's fields. They hold for the flags and for the Python API.

A rule's text uses the names of flags. `in_python` replaces them by the names of fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opensora_sp.base.errors import UserError
from opensora_sp.request.mask_strategy import FrameLayout

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A combination of two features, and its outcome.

    meets: whether both features are in use. text: the note or the error. Names in braces are
    replaced by values.
    """

    features: str
    outcome: Literal["note", "refused"]
    meets: Callable[[Values], bool]
    text: str


def _repeated(values: Values) -> int:
    """Frames of a later clip that repeat the end of the clip before."""
    layout = FrameLayout(values["num_frames"], values["micro_frame_size"])
    return layout.frames_before(values["condition_frame_length"])


REQUEST_COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        features="one frame + --loop",
        outcome="refused",
        meets=lambda v: v["num_frames"] == 1 and v["loop"] > 1,
        text="--loop {loop} needs a video, but --num-frames is 1: choose --loop 1 or more frames",
    ),
    Combination(
        features="--loop + --condition-frame-length",
        outcome="refused",
        meets=lambda v: v["loop"] > 1 and v["condition_frame_length"] % 5 != 0,
        text="--condition-frame-length {condition_frame_length} is not a multiple of 5, which "
        "--loop {loop} needs: 5 latent frames are one chunk of 17 frames",
    ),
    Combination(
        features="--loop + --num-frames",
        outcome="refused",
        meets=lambda v: v["loop"] > 1 and _repeated(v) >= v["num_frames"],
        text="--loop {loop} with --condition-frame-length {condition_frame_length} repeats every "
        "one of {num_frames} frames: lower it (5 repeats 17 frames) or give more --num-frames",
    ),
)


def check_fields(values: Values) -> None:
    """Raise UserError for the first rule that a request's fields break, with names of fields."""
    for combination in REQUEST_COMBINATIONS:
        if combination.meets(values):
            raise UserError(in_python(combination.text.format(**values)))


def in_python(text: str) -> str:
    """A text about flags as a text about fields: --num-frames becomes num_frames."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)
