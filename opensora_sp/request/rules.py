"""Rules on fields of one request that meet: for a `Request` made in Python and for the flags.

The text is written with the flags' names; `in_python` says the same of the fields.
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
    """Two features that meet, and what then happens.

    `text` is printed or raised with the values' names in braces filled in.
    """

    features: str
    outcome: Literal["note", "refused"]
    meets: Callable[[Values], bool]
    text: str


def _repeated(values: Values) -> int:
    """Frames of a later clip that are the end of the one before."""
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
    """Raise UserError at the first rule that a request's fields break, in the fields' names."""
    for combination in REQUEST_COMBINATIONS:
        if combination.meets(values):
            raise UserError(in_python(combination.text.format(**values)))


def in_python(text: str) -> str:
    """Words about flags as words about fields: --num-frames is num_frames."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)
