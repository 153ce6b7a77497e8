"""Reading of reference pictures and videos: fit to a size, scale to [-1, 1].

Geometry and resampling are those of Open-Sora 1.2. Pillow and torch are imported inside the
functions that need them, so that `check_reference` is fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import is_address, without_secrets
from opensora_sp.media.bounds import check_resampled
from opensora_sp.media.decoding import SourceFrames, TimedFrame, opened, resampled
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


@dataclass(frozen=True)
class Reference:
    """A reference. video: float32 [3, F, H, W] in [-1, 1] on the CPU; F is 1 for an image."""

    video: Tensor
    is_image: bool


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


def read_reference(
    path: str | Path,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    allow_remote: Remote = False,
) -> Reference:
    """Read one reference and fit it to a size.

    Images are rotated by their EXIF tag and converted to sRGB by their colour profile. An alpha
    channel is dropped, and 16-bit grey keeps its upper eight bits. Animations and videos give their
    frames one for one. With `fps` they give the frame that is on screen at every multiple of 1/fps
    seconds. A video's rotation and the shape of its pixels are applied, cover art is skipped, and
    high dynamic range is converted to standard range.

    Args:
        path: a file, or with `allow_remote` an http(s) address, within the limits of `fetch`.
        height, width: target in pixels.

    Raises:
        UserError: one line that says why this file or address cannot be used.
    """
    rate = None if fps is None else exact_rate(fps)
    name = without_secrets(path)
    with open_file(path, allow_remote) as file, opened(file, name) as source:
        if not isinstance(source, SourceFrames):
            return Reference(fit_image(source, height, width)[:, None], is_image=True)
        check_resampled(name, source.seconds, rate)
        pictures = source.frames() if rate is None else resampled(source.frames(), rate)
        return Reference(_fitted(pictures, height, width, name), is_image=False)


def check_reference(
    path: str | Path, *, allow_remote: Remote = False, fps: float | None = None
) -> list[str]:
    """Check that a reference can be read, by decoding an image or the first frame of a video.

    Of an address only the text is checked, and nothing is fetched. Does not import torch.

    Args:
        fps: as for `read_reference`. Without it there is a note if a video's rate is not about 24.

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


def _fitted(pictures: Iterable[TimedFrame], height: int, width: int, path: str | Path) -> Tensor:
    import torch

    most = MAX_REFERENCE_BYTES // (3 * height * width * 4)
    fitted: list[Tensor] = []  # of [3, H, W]
    for frame in pictures:
        if len(fitted) == most:
            raise UserError(
                f"reference {path} has more than {most} frames, too many at {height}x{width}: "
                "cut it shorter"
            )
        fitted.append(fit_frame(frame.picture, height, width))
    return torch.stack(fitted, dim=1)
