"""Limits of a reference's size, checked from its headers before anything is decoded."""

from __future__ import annotations

import mmap
import os
from fractions import Fraction
from pathlib import Path
from typing import IO

from opensora_sp.base.errors import UserError

# A photograph of 100 megapixels. A larger one would take gigabytes.
MOST_PICTURE_PIXELS = 2**27
# One frame: a little more than 8192x4320. A decoder holds several frames at once.
MOST_FRAME_PIXELS = 36_000_000
# All frames of a video: about two hours of 1920x1080.
MOST_VIDEO_PIXELS = 2**39
# All frames of an animation, which one thread decodes from its start: 4000 of 1920x1080.
MOST_ANIMATION_PIXELS = 2**33
MOST_ANIMATION_FRAMES = 20_000
# A day. A longer length comes from a damaged table of times.
MOST_SECONDS = 86_400
# Frames after resampling: over an hour at 24 frames a second.
MOST_RESAMPLED = 100_000


class CutOffError(ValueError):
    """A file is shorter than its own headers say."""


def check_picture(name: str | Path, width: int, height: int) -> None:
    """Raise UserError where a still picture has too many pixels."""
    _check_pixels(name, width, height, MOST_PICTURE_PIXELS)


def check_frame(name: str | Path, width: int, height: int) -> None:
    """Raise UserError where a frame of a video or an animation has too many pixels."""
    _check_pixels(name, width, height, MOST_FRAME_PIXELS)


def check_animation(name: str | Path, width: int, height: int, frames: int) -> None:
    """Raise UserError where an animation's frames are too large or too many."""
    check_frame(name, width, height)
    if frames > MOST_ANIMATION_FRAMES or frames * width * height > MOST_ANIMATION_PIXELS:
        most = min(MOST_ANIMATION_FRAMES, MOST_ANIMATION_PIXELS // max(1, width * height))
        raise UserError(
            f"reference {name} has {frames} frames of {width}x{height}, but at most {most} of "
            "this size are read from an animation: cut it shorter or save it as mp4"
        )


def check_video(
    name: str | Path,
    width: int,
    height: int,
    *,
    frames: int,
    seconds: Fraction | None,
    rate: Fraction | None,
) -> None:
    """Raise UserError where a video is too large.

    Args:
        width, height: as shown, in pixels.
        frames: from the header; 0 where it has no count.
        seconds: its length; None where unknown.
        rate: frames a second; None where unknown.
    """
    check_frame(name, width, height)
    if seconds is not None and seconds > MOST_SECONDS:
        raise UserError(
            f"reference {name} says that it lasts {float(seconds):.0f} s, but at most "
            f"{MOST_SECONDS} s are read: cut it shorter, or write it anew if that is wrong"
        )
    if not frames and seconds is not None and rate is not None:
        frames = int(seconds * rate)
    if frames * width * height > MOST_VIDEO_PIXELS:
        raise UserError(
            f"reference {name} has {frames} frames of {width}x{height}, but at most "
            f"{MOST_VIDEO_PIXELS // (width * height)} of this size are read: cut it shorter"
        )


def check_resampled(name: str | Path, seconds: Fraction | None, rate: Fraction | None) -> None:
    """Raise UserError where a length in seconds at a rate gives too many frames."""
    if seconds is None or rate is None or seconds * rate <= MOST_RESAMPLED:
        return
    raise UserError(
        f"reference {name} lasts {float(seconds):g} s, which is {int(seconds * rate)} frames at "
        f"--reference-fps {float(rate):g}, but at most {MOST_RESAMPLED} are made: cut it shorter "
        "or lower --reference-fps"
    )


def _check_pixels(name: str | Path, width: int, height: int, most: int) -> None:
    if width * height > most:
        raise UserError(
            f"reference {name} has {width}x{height} pixels, but at most {most // 10**6} million "
            "are read: make it smaller"
        )


class BoundedReads:
    """A seekable file, none of whose reads asks for more than is left.

    FFmpeg asks for as many bytes as a header names, and a file of Python's takes memory for all of
    them before it reads.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # Formats without a signature, such as TGA, are known by it.
        self.name = str(getattr(file, "name", ""))
        at = file.tell()
        self._size = file.seek(0, os.SEEK_END)
        self.seek, self.tell = file.seek, file.tell  # as PyAV calls them
        file.seek(at)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; all that are left for -1."""
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


def check_whole(file: IO[bytes], name: str | Path) -> None:
    """Raise UserError where a container's own sizes say that the file is cut off.

    Knows mp4 and its relatives, and Matroska. Leaves the file at its start.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    needed = _iso_end(file, size) or _matroska_end(file, size)
    file.seek(0)
    if needed is not None and needed > size:
        raise UserError(
            f"reference {name} is damaged: the file is cut off, {size} of {needed} bytes are "
            "there: give a whole file"
        )


_ISO_START = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp")


def _iso_end(file: IO[bytes], size: int) -> int | None:
    """The offset at which the last known top-level box of an mp4 ends; None for other files."""
    if file.read(8)[4:] not in _ISO_START:
        return None
    start = end = 0
    for _ in range(100_000):
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            break
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        # Length 0 means up to the end of the file. A smaller length than a header, or an unknown
        # name, is data after the last box.
        if length < 8 or kind not in (*_ISO_START, b"moof", b"meta", b"mfra", b"uuid", b"sidx"):
            break
        start += length
        if kind not in (b"free", b"skip", b"wide"):
            end = start
        if start >= size:
            break
    return end or None


def _matroska_end(file: IO[bytes], size: int) -> int | None:
    """The offset at which a Matroska file's first segment ends; None for others or if unknown.

    Where its header ends behind the file, that is the offset.
    """
    file.seek(0)
    head = file.read(4096)
    if not head.startswith(b"\x1a\x45\xdf\xa3"):
        return None
    length, width = _vint(head, 4)
    if length is None:
        return None
    start = 4 + width + length
    if start > size:
        return start
    file.seek(start)
    head = file.read(16)
    if not head.startswith(b"\x18\x53\x80\x67"):
        return None
    length, width = _vint(head, 4)
    return None if length is None else start + 4 + width + length


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """A variable-length number of EBML, None for "unknown", and its width in bytes."""
    if at >= len(data) or data[at] == 0:
        return None, 1
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << (7 * width)) - 1)
    return (None if value == (1 << (7 * width)) - 1 else value), width


def scan_gif(file: IO[bytes]) -> tuple[int, int, int]:
    """Width, height and frames of a GIF, from its block headers. Leaves the file at its start.

    Raises:
        CutOffError: the file ends inside a block.
    """
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _scan_gif(data)
    except IndexError:
        raise CutOffError("the file is cut off") from None


def _scan_gif(data: mmap.mmap) -> tuple[int, int, int]:
    """Width, height and frames. Counting stops at one frame over the limit."""
    size = len(data)
    width, height = _two(data, 6), _two(data, 8)
    at = 13 + _table(data[10])
    frames = 0
    while at < size and frames <= MOST_ANIMATION_FRAMES:
        mark = data[at]
        if mark == 0x3B:
            break
        if mark == 0x21:
            at = _past_blocks(data, at + 2)
        elif mark == 0x2C:
            left, top, across, down = (_two(data, at + 1 + 2 * i) for i in range(4))
            width, height = max(width, left + across), max(height, top + down)
            at = _past_blocks(data, at + 10 + _table(data[at + 9]) + 1)
            frames += 1
        else:  # data between blocks, which players skip
            at = min(
                (p for p in (data.find(m, at) for m in (b"!", b",", b";")) if p > 0), default=size
            )
    return width, height, frames


def _two(data: mmap.mmap, at: int) -> int:
    return data[at] | data[at + 1] << 8


def _table(flags: int) -> int:
    """The size in bytes of a colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _past_blocks(data: mmap.mmap, at: int) -> int:
    while length := data[at]:
        at += 1 + length
    return at + 1
