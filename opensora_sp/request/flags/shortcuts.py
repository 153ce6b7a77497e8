"""--image, --last-image, --extend and --edit, written as a reference path and a mask strategy."""

from collections.abc import Mapping
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.request.mask_strategy import END

# The typed flags of references, in the order in which they become references 0, 1, ...
TYPED = ("image", "extend", "edit", "last_image")


def compose(values: Mapping[str, Any], latent_frames: int) -> tuple[str, str]:
    """The (reference path, mask strategy) that the typed flags stand for; empty without any.

    A group is loop,ref,ref_start,target_start,length,edit_ratio in latent frames; a ref_start of
    `end` ends with the video's last frame. `latent_frames` is T, the length of a clip; the
    pictures and videos themselves are not looked at.
    """
    paths: list[str] = []
    groups: list[str] = []

    def add(
        path: str, ref_start: int | str, target_start: int, length: int, ratio: float = 0
    ) -> None:
        if ";" in path:
            raise UserError(f"{shown(path)}: a ';' in a name separates references; rename the file")
        groups.append(f"0,{len(paths)},{ref_start},{target_start},{length},{ratio:g}")
        paths.append(path)

    if values["image"] is not None:
        add(values["image"], 0, 0, 1)
    if values["extend"] is not None:
        length = min(values["condition_frame_length"], latent_frames)
        add(values["extend"], END, 0, length)
    if _edits(values):
        add(values["edit"], 0, 0, latent_frames, values["edit_strength"])
    if values["last_image"] is not None:
        add(values["last_image"], 0, -1, 1)
    return ";".join(paths), ";".join(groups)


def flags_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The flag, such as --extend, of each reference that `compose` writes, by its number."""
    given = [k for k in TYPED if values[k] is not None and (k != "edit" or _edits(values))]
    return tuple(f"--{key.replace('_', '-')}" for key in given)


def _edits(values: Mapping[str, Any]) -> bool:
    # Strength 1 makes everything anew: nothing is left for the reference to say.
    return values["edit"] is not None and values["edit_strength"] < 1
