"""--image, --last-image, --extend and --edit, written as a reference path and a mask strategy."""

from collections.abc import Mapping
from typing import Any

from opensora_sp.errors import UserError


def compose(values: Mapping[str, Any], latent_frames: int) -> tuple[str, str]:
    """The (reference path, mask strategy) that the typed flags stand for; empty without any.

    A group is loop,ref,ref_start,target_start,length,edit_ratio in latent frames. `latent_frames`
    is T, the length of a clip; the pictures and videos themselves are not looked at.
    """
    paths: list[str] = []
    groups: list[str] = []

    def add(path: str, ref_start: int, target_start: int, length: int, ratio: float = 0) -> None:
        if ";" in path:
            raise UserError(f"{path!r}: a ';' in a name separates references; rename the file")
        groups.append(f"0,{len(paths)},{ref_start},{target_start},{length},{ratio:g}")
        paths.append(path)

    if values["image"] is not None:
        add(values["image"], 0, 0, 1)
    if values["extend"] is not None:
        length = min(values["condition_frame_length"], latent_frames)
        add(values["extend"], -length, 0, length)
    # Strength 1 makes everything anew: nothing is left for the reference to say.
    if values["edit"] is not None and values["edit_strength"] < 1:
        add(values["edit"], 0, 0, latent_frames, values["edit_strength"])
    if values["last_image"] is not None:
        add(values["last_image"], 0, -1, 1)
    return ";".join(paths), ";".join(groups)
