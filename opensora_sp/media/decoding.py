"""Opening and decoding of reference files: an upright sRGB picture, or the frames of a video.

The content of a file decides its type: Pillow reads images and animations, and PyAV everything
else. Both are imported inside the functions that need them, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from opensora_sp.base.errors import UserError
from opensora_sp.base.wording import plural
from opensora_sp.media.bounds import (
    MOST_FRAME_PIXELS,
    BoundedReads,
    CutOffError,
    check_animation,
    check_frame,
    check_picture,
    check_video,
    check_whole,
    scan_gif,
)
from opensora_sp.media.fetch import said
from opensora_sp.media.file_types import refuse_camera_raw, refuse_unread_kind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

# Only formats with a clear signature, because Pillow also accepts MPEG streams and files that look
# like TGA. PyAV reads other files.
_IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "JPEG2000")
_ANIMATED_FORMATS = ("PNG", "GIF", "WEBP", "AVIF")
# FFmpeg would read a text file as a video of its characters.
_NOT_PICTURES = ("tty",)


class TimedFrame(NamedTuple):
    """A frame, and when it is on screen."""

    picture: NDArray[np.uint8]  # [H, W, 3]
    start: Fraction  # seconds
    length: Fraction  # seconds
    tick: Fraction  # seconds; the resolution of the file's times


class VideoPart(NamedTuple):
    """The part of a video to decode.

    begin: the time of the keyframe to begin at, in ticks of the stream; None for the start. wanted:
    whether a frame with this start, in seconds, is converted. Other frames have empty pictures.
    """

    begin: int | None = None
    wanted: Callable[[Fraction], bool] = lambda start: True


def resampled(frames: Iterable[TimedFrame], rate: Fraction) -> Iterator[TimedFrame]:
    """The frame on screen at 0, 1/rate, 2/rate ... seconds after the first one appears.

    A frame counts as on screen one tick early. Otherwise, in containers that round times to
    milliseconds, frames would be doubled and dropped at an unchanged rate.
    """
    slot = 0
    shown: TimedFrame | None = None
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


class SourceFrames:
    """An open video or animation. `frames()` decodes it and gives at least one frame.

    video_stream: the container of a video, and its stream that is decoded. seconds: its length as
    its header gives it. rate: its frames per second. Each is None where it is unknown.
    """

    def __init__(
        self,
        name: str | Path,
        decode: Callable[[VideoPart], Iterator[TimedFrame]],
        *,
        video_stream: tuple[Any, Any] | None = None,
        seconds: Fraction | None = None,
        rate: Fraction | None = None,
    ) -> None:
        self._name = name
        self._decode = decode
        self.video_stream = video_stream
        self.seconds, self.rate = seconds, rate

    def frames(self, part: VideoPart | None = None) -> Iterator[TimedFrame]:
        """Decode the frames of a part, or all of them. Raises UserError for a damaged file."""
        count = 0
        try:
            for frame in self._decode(part or VideoPart()):
                count += 1
                yield frame
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"reference {self._name} is damaged after {plural(count, 'frame')} "
                f"({said(error)}): give a whole file"
            ) from error
        if not count:
            raise UserError(f"reference {self._name} has no frame: give an image or a video")


@contextmanager
def opened(
    file: IO[bytes], name: str | Path, notes: list[str] | None = None
) -> Iterator[Image | SourceFrames]:
    """An upright sRGB image, or the frames of a video or an animation.

    Args:
        notes: notes for the user are added here, without the reference's name.

    Raises:
        UserError: the file cannot be read, or is larger than `opensora_sp.media.bounds` allows.
    """
    notes = [] if notes is None else notes
    refuse_unread_kind(file, name)
    image = _identified(file, name)
    if image is None:
        if _is_heif_still(file):
            yield _heif(file, name, notes)
            return
        check_whole(file, name)
        with _opened_video(file, name, notes) as source:
            yield source
        return
    with image:
        frames = _frame_count(image, file, name)
        if frames > 1:
            check_animation(name, image.width, image.height, frames)
            yield SourceFrames(name, lambda part: _animation_frames(image, name, part))
        else:
            check_picture(name, image.width, image.height)
            yield _loaded(image, name, _cicp(image, file), notes)


def _identified(file: IO[bytes], name: str | Path) -> Image | None:
    import warnings

    from PIL import Image, UnidentifiedImageError

    Image.init()
    known = [each for each in _IMAGE_FORMATS if each in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Pillow warns about large and odd pictures. This module checks the size itself.
            warnings.simplefilter("ignore")
            return Image.open(file, formats=known)
    except UnidentifiedImageError:
        file.seek(0)
        return None
    except Image.DecompressionBombError as error:
        raise UserError(
            f"reference {name} has too many pixels ({said(error)}): make it smaller"
        ) from error
    except Exception as error:  # a plugin may raise any exception on a damaged header
        raise UserError(f"cannot read reference {name}: {said(error)}") from error


def _frame_count(image: Image, file: IO[bytes], name: str | Path) -> int:
    """The number of frames of an animation; 1 for a picture. Decodes nothing."""
    if image.format not in _ANIMATED_FORMATS:
        return 1
    try:
        if image.format != "GIF":
            return int(getattr(image, "n_frames", 1))
        at = file.tell()
        width, height, frames = scan_gif(file)
        file.seek(at)
    except CutOffError as error:
        raise UserError(f"reference {name} is damaged ({error}): give a whole file") from error
    except Exception as error:  # as in _identified
        raise UserError(
            f"reference {name} is damaged ({said(error)}): give a whole file"
        ) from error
    # A GIF's frame may be larger than the size in its header, so one frame is checked as well.
    check_animation(name, width, height, frames)
    return frames


def _cicp(image: Image, file: IO[bytes]) -> tuple[int, int] | None:
    """Primaries and transfer (H.273) of a PNG or an AVIF; None where it has none."""
    from opensora_sp.media.colour import png_cicp
    from opensora_sp.media.heif import heif_cicp

    if image.format == "PNG":
        return png_cicp(file)
    if image.format == "AVIF" and not image.info.get("icc_profile"):
        return heif_cicp(file)
    return None


def _is_heif_still(file: IO[bytes]) -> bool:
    from opensora_sp.media.heif import is_heif_still

    return is_heif_still(file)


def _heif(file: IO[bytes], name: str | Path, notes: list[str]) -> Image:
    from PIL import Image

    from opensora_sp.media.colour import picture_to_srgb
    from opensora_sp.media.heif import read_heif

    found = read_heif(file, name)
    image = Image.fromarray(found.rgb)
    notes += found.notes
    if found.profile:
        image.info["icc_profile"] = found.profile
        image, more = picture_to_srgb(image, image, None)
        notes += more
    return image


def _loaded(
    image: Image, name: str | Path, cicp: tuple[int, int] | None, notes: list[str]
) -> Image:
    from PIL import ImageOps

    from opensora_sp.media.colour import picture_to_srgb

    if image.format == "TIFF":
        refuse_camera_raw(getattr(image, "tag_v2", None), name)
    try:
        file_format = image.format
        # Some profiles are known only after the picture has been decoded.
        image.load()
        image = ImageOps.exif_transpose(image)
        image, more = picture_to_srgb(image, _to_rgb(image, file_format), cicp)
        notes += more
        return image
    except UserError:
        raise
    except Exception as error:  # a plugin may raise any exception on damaged data
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


def _animation_frames(image: Image, name: str | Path, part: VideoPart) -> Iterator[TimedFrame]:
    import numpy as np
    from PIL import ImageSequence

    start = Fraction(0)
    for frame in ImageSequence.Iterator(image):
        check_frame(name, frame.width, frame.height)
        frame.load()  # a WebP's duration is known only after this
        picture = np.asarray(frame.convert("RGB")) if part.wanted(start) else no_picture()
        milliseconds = Fraction(frame.info.get("duration") or 100)  # players show 0 as 100
        yield TimedFrame(picture, start, milliseconds / 1000, Fraction(1, 1000))
        start += milliseconds / 1000


@contextmanager
def _opened_video(
    file: IO[bytes], name: str | Path, notes: list[str]
) -> Iterator[Image | SourceFrames]:
    import av

    try:
        # No protocol is allowed, so that a playlist cannot make FFmpeg open files or addresses.
        # A frame that is too large must not be decoded, not even to find its format.
        options = {"protocol_whitelist": "none", "max_pixels": str(MOST_FRAME_PIXELS)}
        container = av.open(BoundedReads(file), options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"reference {name} is neither an image nor a video that can be read: {said(error)}"
        ) from error
    with container:
        if container.format.name in _NOT_PICTURES:
            raise UserError(f"reference {name} has no picture in it: give an image or a video")
        stream = _video_stream(container, name, notes)
        # The same limit for the decoder, because its stream may have another size.
        stream.codec_context.options = {"max_pixels": str(MOST_FRAME_PIXELS)}
        seconds, rate = _length_and_rate(container, stream, name, notes)
        source = SourceFrames(
            name,
            lambda part: _video_frames(container, stream, part),
            video_stream=(container, stream),
            seconds=seconds,
            rate=rate,
        )
        if "image2" in container.format.name or container.format.name.endswith("_pipe"):
            from PIL import Image

            yield Image.fromarray(next(source.frames()).picture)
        else:
            yield source


def no_picture() -> NDArray[np.uint8]:
    """What stands for the pixels of a frame that is not converted."""
    import numpy as np

    return np.empty((0, 0, 3), np.uint8)


def _video_stream(container: Any, name: str | Path, notes: list[str]) -> Any:
    """The video stream to read: not cover art, preferably the default one, then the largest."""
    from av.stream import Disposition

    beside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [each for each in container.streams.video if each.codec_context is not None]
    candidates = [each for each in streams if not each.disposition & beside]
    if not candidates:
        if streams:
            raise UserError(
                f"reference {name} has no video, only cover art: give an image or a video"
            )
        raise UserError(f"reference {name} has no picture in it: give an image or a video")

    def rank(stream: Any) -> tuple[bool, bool, int]:
        # A stream of one frame beside a video is cover art without its mark.
        lasting = stream.frames != 1
        return lasting, bool(stream.disposition & Disposition.default), _area(stream)

    chosen = max(candidates, key=rank)
    if len(candidates) > 1:
        notes.append(
            f"has {len(candidates)} videos in it; stream {chosen.index} "
            f"({chosen.codec_context.width}x{chosen.codec_context.height}) is used"
        )
    return chosen


def _area(stream: Any) -> int:
    return int(stream.codec_context.width * stream.codec_context.height)


def _length_and_rate(
    container: Any, stream: Any, name: str | Path, notes: list[str]
) -> tuple[Fraction | None, Fraction | None]:
    """A stream's length in seconds and its frames per second, None where unknown. Checks limits."""
    from opensora_sp.media.colour import UNKNOWN_MATRICES, hdr_notes

    codec = stream.codec_context
    rate = Fraction(stream.average_rate) if stream.average_rate else None
    lengths = []  # headers may contradict each other, so the longest counts
    if stream.duration and stream.time_base:
        lengths.append(stream.duration * Fraction(stream.time_base))
    elif container.duration:
        lengths.append(Fraction(container.duration, 1_000_000))
    if stream.frames and rate:
        lengths.append(stream.frames / rate)
    seconds = max(lengths, default=None)
    width, height = _shown_size(codec.width, codec.height, stream.sample_aspect_ratio)
    check_video(name, width, height, frames=stream.frames, seconds=seconds, rate=rate)
    notes += hdr_notes(int(codec.color_trc))
    if unknown := UNKNOWN_MATRICES.get(int(codec.colorspace)):
        raise UserError(
            f"reference {name} has colours as {unknown}, which cannot be converted: save it as "
            "BT.709 first"
        )
    return seconds, rate


def _shown_size(width: int, height: int, pixel_shape: Fraction | None) -> tuple[int, int]:
    """Width and height after stretching to square pixels. One side is enlarged."""
    if not pixel_shape or pixel_shape <= 0:
        return width, height
    if pixel_shape > 1:
        return round(width * pixel_shape), height
    return width, round(height / pixel_shape)


def _video_frames(container: Any, stream: Any, part: VideoPart) -> Iterator[TimedFrame]:
    usual = usual_length(stream)
    if part.begin is not None:
        container.seek(part.begin, stream=stream)
    for index, frame in enumerate(_decoded(container, stream)):
        tick = Fraction(frame.time_base or stream.time_base)
        start = index * usual if frame.pts is None else frame.pts * tick
        length = (getattr(frame, "duration", 0) or 0) * tick or usual
        picture = _picture(frame, stream) if part.wanted(start) else no_picture()
        yield TimedFrame(picture, start, length, tick)


def usual_length(stream: Any) -> Fraction:
    """Seconds that a frame of a stream is shown, if its own length is unknown."""
    return 1 / Fraction(stream.average_rate or 24)


def _picture(frame: Any, stream: Any) -> NDArray[np.uint8]:
    """A decoded frame in sRGB, with square pixels, upright."""
    from opensora_sp.media.colour import frame_to_rgb

    width, height = _shown_size(frame.width, frame.height, stream.sample_aspect_ratio)
    if width * height > MOST_FRAME_PIXELS:  # the size may change within a stream
        raise ValueError(f"a frame of {width}x{height}")
    return _upright(frame_to_rgb(frame, width, height), frame)


def _upright(picture: NDArray[np.uint8], frame: Any) -> NDArray[np.uint8]:
    """Rotate and mirror by the frame's display matrix, to the nearest right angle."""
    import numpy as np
    from av.sidedata.sidedata import Type

    tag = frame.side_data.get(Type.DISPLAYMATRIX)
    if tag is None:
        return picture
    # (x, y) goes to (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(tag), np.int32)[:5].astype(float)
    if max(abs(a), abs(d)) < max(abs(b), abs(c)):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return picture


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    import av

    sized = stream.codec_context.width > 0
    # No frame threads: with them the error of a file that is cut off is sometimes lost.
    for packet in container.demux(stream):
        # Broadcast streams have no count of frames, and may begin in the middle of a picture.
        if packet.is_corrupt and stream.frames:
            raise ValueError("the file is cut off")
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if sized:
                raise
            # FFmpeg reports no size where it exceeds the limit.
            most = MOST_FRAME_PIXELS // 10**6
            raise ValueError(f"{said(error)}, or frames of over {most} million pixels") from error
        yield from frames
