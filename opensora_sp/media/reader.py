"""Fitting of reference pictures and frames to a size, in [-1, 1]; the check of a reference.

Geometry and resampling are those of Open-Sora 1.2. Pillow and torch are imported inside the
functions that need them, so that `check_reference` is fast.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import is_address
from opensora_sp.media.bounds import check_resampled
from opensora_sp.media.decoding import SourceFrames, opened
from opensora_sp.media.fetch import Remote, check_address, open_file
from opensora_sp.media.writer import exact_rate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

# More than any clip of the model needs. A whole film given by mistake exceeds it.
MAX_REFERENCE_BYTES = 16 * 2**30
# Pixels after scaling. A very elongated picture becomes large, because its short side fills the
# target. Four times the pixels of the largest size of the table.
_MOST_PIXELS = 2**25

# Rates that are treated as the model's 24 frames per second without a note, such as 25 and 23.976.
_ABOUT_24 = (Fraction(22), Fraction(26))


def fit_image(rgb: NDArray[np.uint8] | Image, height: int, width: int) -> Tensor:
    """Scale a picture until it fills the target, and crop the middle.

    Args:
        rgb: `[H, W, 3]` uint8, or a Pillow image of mode RGB.
        height, width: target in pixels.

    Returns:
        `[3, height, width]` float32 in [-1, 1]; Pillow's bicubic on uint8, as in Open-Sora 1.2.

    Raises:
        UserError: the picture is too elongated for the target.
    """
    import numpy as np
    import torch
    from PIL import Image

    image = Image.fromarray(rgb) if isinstance(rgb, np.ndarray) else rgb
    new_height, new_width = _filling_size(image.height, image.width, height, width)
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    # Open-Sora 1.2 rounds to even for pictures, and rounds down for videos.
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().div_(255).mul_(2).sub_(1)


def fit_video(frames: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Fit every frame as `fit_image` does, but bilinearly and in float, as Open-Sora 1.2 does.

    Args:
        frames: `[F, H, W, 3]` uint8.
        height, width: target in pixels.

    Returns:
        `[3, F, height, width]` float32 in [-1, 1]. It works frame by frame, so the source is never
        in float as a whole.

    Raises:
        UserError: the frames are too elongated for the target.
    """
    import torch

    video = torch.empty(3, len(frames), height, width)
    for index, frame in enumerate(frames):
        video[:, index] = fit_frame(frame, height, width)
    return video


def fit_frame(frame: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """One frame of `fit_video`: uint8 [H,W,3] → float32 [3,height,width] in [-1, 1]."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    new_height, new_width = _filling_size(frame.shape[0], frame.shape[1], height, width)
    pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))  # [3, H, W]
    pixels = pixels[None].float().div_(255)  # [1, 3, H, W]
    pixels = F.interpolate(
        pixels, size=(new_height, new_width), mode="bilinear", align_corners=False
    )
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return pixels[0, :, top : top + height, left : left + width].mul(2).sub_(1)


def _filling_size(
    source_height: int, source_width: int, height: int, width: int
) -> tuple[int, int]:
    by_height, by_width = height / source_height, width / source_width
    if by_height > by_width:
        size = height, round(source_width * by_height)
    else:
        size = round(source_height * by_width), width
    if size[0] * size[1] > _MOST_PIXELS:
        raise UserError(
            f"a picture of {source_height}x{source_width} is too elongated to fill "
            f"{height}x{width}: crop it nearer to that shape first"
        )
    return size


def check_reference(
    path: str | Path, *, allow_remote: Remote = False, fps: float | None = None
) -> list[str]:
    """Check that a reference can be read, by decoding an image or the first frame of a video.

    Of an address only the text is checked, and nothing is fetched. Does not import torch.

    Args:
        fps: the rate to which a video is resampled. Without it there is a note if its rate is not
            about 24.

    Returns:
        Notes for the user, a sentence each, with the reference's name.

    Raises:
        UserError: one line that says why this file or address cannot be used.
    """
    if is_address(path):
        check_address(path, allow_remote)
        return []
    notes: list[str] = []
    with open_file(path, allow_remote) as file, opened(file, path, notes) as source:
        if isinstance(source, SourceFrames):
            rate = None if fps is None else exact_rate(fps)
            check_resampled(path, source.seconds, rate)
            first = next(source.frames())
            if rate is None:
                own = source.rate or (1 / first.length if first.length else None)
                notes += _rate_notes(own)
    return [f"reference {path} {note}" for note in dict.fromkeys(notes)]


def _rate_notes(rate: Fraction | None) -> list[str]:
    if rate is None or _ABOUT_24[0] <= rate <= _ABOUT_24[1]:
        return []
    way = "slower" if rate > 24 else "faster"
    times = max(rate / 24, 24 / rate)
    return [
        f"has {float(rate):.4g} frames a second, which are taken one for one as 24: what moves is "
        f"{float(times):.2g} times {way}; --reference-fps 24 keeps its speed"
    ]
