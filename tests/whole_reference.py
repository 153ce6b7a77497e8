"""All of a reference: as the program reads it, and decoded once from beginning to end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opensora_sp.media.decoding import SourceFrames, opened, resampled
from opensora_sp.media.fetch import Remote, open_file
from opensora_sp.media.frames import open_reference
from opensora_sp.media.reader import fit_frame
from opensora_sp.media.writer import exact_rate


@dataclass(frozen=True)
class Reference:
    """video: float32 [3, F, H, W] in [-1, 1] on the CPU; F is 1 for an image."""

    video: Tensor
    is_image: bool


def read_reference(
    path: str | Path,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    allow_remote: Remote = False,
) -> Reference:
    """Every frame, fitted to a size, as the program reads them. As for `open_reference`."""
    with open_reference(path, fps=fps, allow_remote=allow_remote) as reference:
        (video,) = reference.read([(0, reference.count)], height, width)
        return Reference(video, reference.is_image)


def decoded_whole(path: Path, height: int, width: int, fps: float | None) -> Tensor:
    """The same [3, F, H, W] of a video or an animation, without a count or a keyframe."""
    with open_file(path) as file, opened(file, path) as source:
        assert isinstance(source, SourceFrames)
        frames = source.frames()
        shown = frames if fps is None else resampled(frames, exact_rate(fps))
        return torch.stack([fit_frame(each.picture, height, width) for each in shown], dim=1)
