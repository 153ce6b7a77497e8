"""Access to single frames of a reference, without decoding all of it.

The frames of a video are counted from its packets. Decoding begins at the keyframe before the first
wanted frame. Where the decoded frames disagree with the packets, the video is counted again by
decoding all of it. torch is imported only for reading frames.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import without_secrets
from opensora_sp.base.wording import plural
from opensora_sp.media import reader
from opensora_sp.media.bounds import MOST_RESAMPLED
from opensora_sp.media.decoding import (
    SourceFrames,
    TimedFrame,
    VideoPart,
    no_picture,
    opened,
    resampled,
    usual_length,
)
from opensora_sp.media.fetch import Remote, open_file
from opensora_sp.media.writer import exact_rate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# In these formats every packet is one displayed frame with a time. In others frames are counted by
# decoding.
_COUNTED_FORMATS = frozenset({"mov", "mp4", "matroska", "webm"})
_COUNTED_CODECS = frozenset(
    {"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg", "prores", "ffv1", "png", "rawvideo", "dnxhd"}
)


class Recounted(Exception):  # noqa: N818 (no error: the plan made from the old count is wrong)
    """Decoding gave another number of frames than the packets. The caller has to plan again."""


class _NotAsCounted(Exception):  # noqa: N818 (caught where it is raised for)
    """The decoded frames are not those that the packets announced."""


@dataclass(frozen=True)
class _Timeline:
    """A video's frames in the order of display, without pictures.

    keys: (number of a frame, its time in ticks of the stream) for each keyframe, where decoding can
    begin. exact: every frame was decoded, so the count is certain.
    """

    frames: Sequence[TimedFrame]
    keys: Sequence[tuple[int, int]] = ()
    exact: bool = True


class ReferenceFrames:
    """An open reference, made by `open_reference`.

    is_image: whether it is one picture and not a video or an animation. count: its frames, after
    resampling.
    """

    def __init__(self, file: IO[bytes], path: str | Path, fps: float | None) -> None:
        self._file, self._path = file, without_secrets(path)
        self._rate = None if fps is None else exact_rate(fps)
        self.is_image = False
        self._set_timeline(self._read_timeline(exact=False))

    @property
    def count(self) -> int:
        """The number of frames, at the requested rate."""
        return len(self._numbers)

    def read(self, parts: Sequence[tuple[int, int]], height: int, width: int) -> list[Tensor]:
        """The frames of each part (first, count), fitted to height × width pixels.

        Returns one float32 [3, count, height, width] in [-1, 1] for each part.

        Raises:
            UserError: the wanted frames are damaged or too many.
            Recounted: `count` was wrong and has been corrected.
        """
        import torch

        numbers = {n for first, count in parts for n in range(first, first + count)}
        wanted = sorted({self._numbers[n] for n in numbers})
        most = reader.MAX_REFERENCE_BYTES // (3 * height * width * 4)
        if len(wanted) > most:
            raise UserError(
                f"reference {self._path} is to give {len(wanted)} frames, more than the {most} "
                f"that fit at {height}x{width}: cut it shorter"
            )
        if self.is_image:
            fitted = {0: self._read_image(height, width)}
        else:
            fitted = self._read_frames(wanted, height, width)
        return [
            torch.stack([fitted[self._numbers[n]] for n in range(first, first + count)], dim=1)
            for first, count in parts
        ]

    def _read_image(self, height: int, width: int) -> Tensor:
        with self._reopened() as source:
            assert not isinstance(source, SourceFrames)
            return reader.fit_image(source, height, width)

    def _read_frames(self, wanted: Sequence[int], height: int, width: int) -> dict[int, Tensor]:
        def fit() -> dict[int, Tensor]:
            return {
                number: reader.fit_frame(picture, height, width)
                for number, picture in self._decode(wanted)
            }

        try:
            return fit()
        except (_NotAsCounted, UserError):
            if self._timeline.exact:
                raise
        before = self._numbers
        # Raises UserError where the file is damaged.
        self._set_timeline(self._read_timeline(exact=True))
        if self._numbers != before:
            raise Recounted
        return fit()

    def _decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number, picture) of the wanted frames, rising. Decodes as little as possible."""
        if not wanted:
            return
        times = self._timeline.frames
        chosen, starts = set(wanted), {times[number].start for number in wanted}
        number, begin = 0, None
        key = bisect_right([key for key, _ in self._timeline.keys], wanted[0]) - 1
        if key > 0:
            number, begin = self._timeline.keys[key]
        after = times[number].start
        with self._reopened() as source:
            assert isinstance(source, SourceFrames)
            for frame in source.frames(VideoPart(begin, lambda start: start in starts)):
                if begin is not None and frame.start < after:
                    continue  # it depends on frames before the keyframe, which were not decoded
                if number >= len(times) or frame.start != times[number].start:
                    raise _NotAsCounted
                if number in chosen:
                    yield number, frame.picture
                number += 1
                # If the very last frame is wanted, decode on, to check that none follows.
                if wanted[-1] < number < len(times):
                    return
        if number < len(times):
            raise _NotAsCounted

    def _set_timeline(self, timeline: _Timeline) -> None:
        self._timeline = timeline
        numbers: Iterator[Any] = iter(range(len(timeline.frames)))
        if self._rate is not None and not self.is_image:
            numbered = (
                frame._replace(picture=number)  # type: ignore[arg-type]
                for number, frame in enumerate(timeline.frames)
            )
            numbers = (frame.picture for frame in resampled(numbered, self._rate))
        self._numbers: list[int] = []
        for number in numbers:
            if len(self._numbers) == MOST_RESAMPLED:
                raise UserError(
                    f"reference {self._path} has more than {MOST_RESAMPLED} frames at the rate "
                    "asked for: cut it shorter or lower --reference-fps"
                )
            self._numbers.append(number)

    def _read_timeline(self, *, exact: bool) -> _Timeline:
        with self._reopened() as source:
            if not isinstance(source, SourceFrames):
                self.is_image = True
                still = TimedFrame(no_picture(), Fraction(0), Fraction(0), Fraction(1))
                return _Timeline([still])
            if not exact and source.video_stream is not None:
                counted = _count_packets(*source.video_stream, self._path)
                if counted is not None:
                    return counted
        with self._reopened() as source:  # counting has consumed the packets
            return _Timeline(list(source.frames(VideoPart(wanted=lambda start: False))))

    @contextmanager
    def _reopened(self) -> Iterator[Any]:
        self._file.seek(0)
        with opened(self._file, self._path) as source:
            yield source


@contextmanager
def open_reference(
    path: str | Path, *, fps: float | None = None, allow_remote: Remote = False
) -> Iterator[ReferenceFrames]:
    """Open a reference and count its frames. An address is fetched once.

    Images are rotated by their EXIF tag and converted to sRGB by their colour profile. An alpha
    channel is dropped, and 16-bit grey keeps its upper eight bits. A video's rotation and the shape
    of its pixels are applied, cover art is skipped, and high dynamic range is converted to standard
    range.

    Args:
        path: a file, or with `allow_remote` an http(s) address, within the limits of `fetch`.
        fps: animations and videos give the frame that is on screen at every multiple of 1/fps
            seconds; None gives their frames one for one.

    Raises:
        UserError: one line that says why this file or address cannot be used.
    """
    with open_file(path, allow_remote) as file:
        yield ReferenceFrames(file, path, fps)


def _count_packets(container: Any, stream: Any, path: str | Path) -> _Timeline | None:
    """The frames according to the packets; None where the packets are not reliable."""
    if not _COUNTED_FORMATS & set(container.format.name.split(",")):
        return None
    if (
        stream.codec_context.name not in _COUNTED_CODECS
        and stream.codec.name not in _COUNTED_CODECS
    ):
        return None
    tick, usual = Fraction(stream.time_base), usual_length(stream)
    found: list[tuple[int, int, bool]] = []  # start and length in ticks, whether a keyframe
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt and stream.frames:
            raise UserError(
                f"reference {path} is damaged after {plural(len(found), 'frame')} "
                "(the file is cut off): give a whole file"
            )
        if packet.is_discard:
            continue
        if packet.pts is None:
            return None
        found.append((packet.pts, packet.duration or 0, packet.is_keyframe))
    found.sort()
    starts = [start for start, _, _ in found]
    if not found or not found[0][2] or len(set(starts)) < len(starts):
        return None
    return _Timeline(
        [
            TimedFrame(no_picture(), start * tick, length * tick or usual, tick)
            for start, length, _ in found
        ],
        [(number, start) for number, (start, _, key) in enumerate(found) if key],
        exact=False,
    )
