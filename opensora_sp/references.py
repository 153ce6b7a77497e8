"""Reference pictures and videos on their way in: read, fitted to a size, scaled to [-1, 1].

Geometry and resampling are those of Open-Sora 1.2. What a file is, is decided by its content:
Pillow reads images and animations, PyAV everything else. Both, and torch, are imported inside
the functions that need them, so that `check_reference` is cheap enough for validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from opensora_sp.errors import UserError
from opensora_sp.fetch import Remote, check_address, open_file, said
from opensora_sp.media import BT709, FULL_RANGE, exact_rate
from opensora_sp.redaction import is_address, without_secrets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

# More than any clip of the model at any size: reached by a film given as reference by mistake.
MAX_REFERENCE_BYTES = 16 * 2**30
# An elongated picture is enlarged until its short side fills the target.
_MOST_PIXELS = 2**27

# Only formats with a clear signature: Pillow also claims MPEG streams and files that merely look
# like TGA. What is not in the list goes to PyAV.
_IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "JPEG2000")
_ANIMATED_FORMATS = ("PNG", "GIF", "WEBP", "AVIF")
# FFmpeg would draw a text file as a video of its letters.
_NOT_PICTURES = ("tty",)


@dataclass(frozen=True)
class Reference:
    """One reference: `video` `[3, F, H, W]` float32 in [-1, 1] on the CPU; F is 1 for an image."""

    video: Tensor
    is_image: bool


class _TimedFrame(NamedTuple):
    picture: NDArray[np.uint8]  # [H, W, 3]
    start: Fraction  # seconds
    length: Fraction  # seconds
    tick: Fraction  # seconds; how coarsely the file tells time


class _Part(NamedTuple):
    """What of a video is decoded: from the keyframe at `begin` on, in ticks of the stream.

    Only frames whose start `wanted` accepts are converted; the others have empty pictures.
    """

    begin: int | None = None
    wanted: Callable[[Fraction], bool] = lambda start: True


def fit_image(rgb: NDArray[np.uint8] | Image, height: int, width: int) -> Tensor:
    """Enlarge or shrink a picture until it fills the target, crop the middle.

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
    # round() to even here, but plain halving for videos: the reference differs between the two.
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().div_(255).mul_(2).sub_(1)


def fit_video(frames: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Fit every frame as `fit_image` does, but bilinearly in float, as Open-Sora 1.2 does.

    Args:
        frames: `[F, H, W, 3]` uint8.
        height, width: target in pixels.

    Returns:
        `[3, F, height, width]` float32 in [-1, 1]. Works frame by frame: the source is never
        held in float as a whole.

    Raises:
        UserError: the frames are too elongated for the target.
    """
    import torch

    video = torch.empty(3, len(frames), height, width)
    for index, frame in enumerate(frames):
        video[:, index] = _fit_frame(frame, height, width)
    return video


def _fit_frame(frame: NDArray[np.uint8], height: int, width: int) -> Tensor:
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

    Images of any mode are turned upright by their EXIF tag and converted to RGB (an alpha channel
    is dropped, 16-bit grey keeps its upper eight bits). Animations and videos give their frames
    as they are, one for one; with `fps`, the frame that is on screen at every multiple of 1/fps
    seconds. A video's rotation tag is honoured.

    Args:
        path: a file, or with `allow_remote` an http(s) address, fetched within the bounds
            of `fetch`.
        height, width: target in pixels.

    Raises:
        UserError: one line that says why this file or address cannot be used.
    """
    rate = None if fps is None else exact_rate(fps)
    name = without_secrets(path)
    with open_file(path, allow_remote) as file, _opened(file, name) as source:
        if not isinstance(source, _Frames):
            return Reference(fit_image(source, height, width)[:, None], is_image=True)
        pictures = source.frames() if rate is None else _resampled(source.frames(), rate)
        return Reference(_fitted(pictures, height, width, name), is_image=False)


def check_reference(path: str | Path, *, allow_remote: Remote = False) -> list[str]:
    """Prove cheaply that a reference can be read: an image is decoded, of a video its first frame.

    Of an address only what it says is judged; nothing is fetched. Does not import torch. Returns
    what is worth telling a person.

    Raises:
        UserError: one line that says why this file or address cannot be used.
    """
    if is_address(path):
        check_address(path, allow_remote)
        return []
    with open_file(path, allow_remote) as file, _opened(file, path) as source:
        if isinstance(source, _Frames):
            next(source.frames())
    return []


def _fitted(pictures: Iterable[_TimedFrame], height: int, width: int, path: str | Path) -> Tensor:
    import torch

    most = MAX_REFERENCE_BYTES // (3 * height * width * 4)
    fitted: list[Tensor] = []  # of [3, H, W]
    for frame in pictures:
        if len(fitted) == most:
            raise UserError(
                f"reference {path} has more than {most} frames, too many at {height}x{width}: "
                "cut it shorter"
            )
        fitted.append(_fit_frame(frame.picture, height, width))
    return torch.stack(fitted, dim=1)


def _resampled(frames: Iterable[_TimedFrame], rate: Fraction) -> Iterator[_TimedFrame]:
    """The frame on screen at 0, 1/rate, 2/rate ... seconds after the first one appears.

    A frame counts as on screen one tick early: containers that round times to milliseconds would
    otherwise double and drop frames at an unchanged rate.
    """
    slot = 0
    shown: _TimedFrame | None = None
    origin = Fraction(0)
    for frame in frames:
        if shown is None:
            origin = frame.start
        else:
            while slot / rate + frame.tick < frame.start - origin:
                yield shown
                slot += 1
        shown = frame
    if shown is not None:
        end = shown.start - origin + shown.length
        while slot == 0 or slot / rate + shown.tick < end:
            yield shown
            slot += 1


class _Frames:
    """A video or an animation that is open: `frames()` decodes it, at least one frame.

    film: of a video, the container and the stream that is decoded.
    """

    def __init__(
        self,
        name: str | Path,
        decode: Callable[[_Part], Iterator[_TimedFrame]],
        *,
        film: tuple[Any, Any] | None = None,
    ) -> None:
        self._name = name
        self._decode = decode
        self.film = film

    def frames(self, part: _Part | None = None) -> Iterator[_TimedFrame]:
        count = 0
        try:
            for frame in self._decode(part or _Part()):
                count += 1
                yield frame
        except Exception as error:
            raise UserError(
                f"reference {self._name} is damaged after {count} frames ({said(error)}): "
                "give a whole file"
            ) from error
        if not count:
            raise UserError(f"reference {self._name} has no frame: give an image or a video")


@contextmanager
def _opened(file: IO[bytes], name: str | Path) -> Iterator[Image | _Frames]:
    """An upright RGB image, or frames to come."""
    image = _identified(file, name)
    if image is None:
        with _opened_video(file, name) as source:
            yield source
        return
    with image:
        if image.format in _ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1:
            yield _Frames(name, lambda part: _animation_frames(image, part))
        else:
            yield _loaded(image, name)


def _identified(file: IO[bytes], name: str | Path) -> Image | None:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    known = [each for each in _IMAGE_FORMATS if each in Image.OPEN]
    try:
        return Image.open(file, formats=known)
    except UnidentifiedImageError:
        file.seek(0)
        return None
    except Exception as error:  # a plugin may raise anything on a damaged header
        raise UserError(f"cannot read reference {name}: {said(error)}") from error


def _loaded(image: Image, name: str | Path) -> Image:
    from PIL import ImageOps

    try:
        return _to_rgb(ImageOps.exif_transpose(image), image.format)
    except UserError:
        raise
    except Exception as error:  # a plugin may raise anything on damaged data
        raise UserError(
            f"reference {name} is damaged ({said(error)}): give a whole file"
        ) from error


def _to_rgb(image: Image, file_format: str | None) -> Image:
    import numpy as np
    from PIL import Image

    # convert() would clip 16-bit grey at 255 and give white.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels of unknown range; save it with 8 or 16 bits")
    return image.convert("RGB")


def _animation_frames(image: Image, part: _Part) -> Iterator[_TimedFrame]:
    import numpy as np
    from PIL import ImageSequence

    start = Fraction(0)
    for frame in ImageSequence.Iterator(image):
        frame.load()  # only then is a WebP's duration known
        picture = np.asarray(frame.convert("RGB")) if part.wanted(start) else _no_picture()
        milliseconds = Fraction(frame.info.get("duration") or 100)  # 0: what players show
        yield _TimedFrame(picture, start, milliseconds / 1000, Fraction(1, 1000))
        start += milliseconds / 1000


@contextmanager
def _opened_video(file: IO[bytes], name: str | Path) -> Iterator[Image | _Frames]:
    import av

    try:
        # No protocol at all: a playlist must not make FFmpeg open further files or addresses.
        container = av.open(file, options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"reference {name} is neither an image nor a video that can be read: {said(error)}"
        ) from error
    with container:
        if container.format.name in _NOT_PICTURES or not container.streams.video:
            raise UserError(f"reference {name} has no picture in it: give an image or a video")
        film = container, container.streams.video[0]
        source = _Frames(name, lambda part: _video_frames(*film, part), film=film)
        if "image2" in container.format.name or container.format.name.endswith("_pipe"):
            from PIL import Image

            yield Image.fromarray(next(source.frames()).picture)
        else:
            yield source


def _no_picture() -> NDArray[np.uint8]:
    import numpy as np

    return np.empty((0, 0, 3), np.uint8)


def _video_frames(container: Any, stream: Any, part: _Part) -> Iterator[_TimedFrame]:
    usual = usual_length(stream)
    if part.begin is not None:
        container.seek(part.begin, stream=stream)
    for index, frame in enumerate(_decoded(container, stream)):
        tick = Fraction(frame.time_base or stream.time_base)
        start = index * usual if frame.pts is None else frame.pts * tick
        length = (getattr(frame, "duration", 0) or 0) * tick or usual
        picture = _picture(frame) if part.wanted(start) else _no_picture()
        yield _TimedFrame(picture, start, length, tick)


def usual_length(stream: Any) -> Fraction:
    """Seconds that a frame of a video stream is shown where its own length is not known."""
    return 1 / Fraction(stream.average_rate or 24)


def _picture(frame: Any) -> NDArray[np.uint8]:
    import numpy as np

    picture = frame.to_ndarray(format="rgb24", **_conversion(frame))
    # The tag's angle is counter-clockwise, as rot90's is.
    return np.rot90(picture, round(getattr(frame, "rotation", 0) / 90))


def _conversion(frame: Any) -> dict[str, str]:
    """What PyAV before 17 must be told: it ignores the colour tags and converts as BT.601."""
    if frame.colorspace != BT709 or not frame.format.name.startswith("yuv"):
        return {}
    source = "JPEG" if frame.color_range == FULL_RANGE else "MPEG"
    return {"src_colorspace": "ITU709", "src_color_range": source, "dst_color_range": "JPEG"}


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    # Decoding with frame threads would swallow the error at a cut, but only sometimes.
    for packet in container.demux(stream):
        # Broadcast streams, which declare no frame count, may rightly begin in mid-picture.
        if packet.is_corrupt and stream.frames:
            raise ValueError("the file is cut off")
        yield from packet.decode()
