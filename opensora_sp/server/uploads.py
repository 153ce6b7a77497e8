"""Files that come with a request: stored under our own names, told by their content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from opensora_sp.base.errors import UserError
from opensora_sp.media.file_types import refuse_unread_kind
from opensora_sp.server.protocol import BadRequest

_HEADS: tuple[tuple[bytes, int, str], ...] = (
    (b"\x89PNG", 0, ".png"),
    (b"\xff\xd8\xff", 0, ".jpg"),
    (b"GIF8", 0, ".gif"),
    (b"BM", 0, ".bmp"),
    (b"II*\x00", 0, ".tif"),
    (b"MM\x00*", 0, ".tif"),
    (b"WEBP", 8, ".webp"),
    (b"ftypheic", 4, ".heic"),
    (b"ftypheix", 4, ".heic"),
    (b"ftypmif1", 4, ".heic"),
    (b"ftypavif", 4, ".avif"),
    (b"\x00\x00\x00\x0cjP  ", 0, ".jp2"),
    (b"\x1aE\xdf\xa3", 0, ".mkv"),
    (b"ftyp", 4, ".mp4"),
    (b"AVI ", 8, ".avi"),
    (b"\x00\x00\x01\xba", 0, ".mpg"),
    (b"G", 0, ".ts"),
)
_PICTURES = {".png", ".jpg", ".bmp", ".tif", ".webp", ".heic", ".avif", ".jp2"}


def save_upload(file: IO[bytes], folder: Path, number: int) -> Path:
    """Store a file that came along. Its name is its number and what its content says it is.

    Raises BadRequest for an empty file and for what is no picture or video that is read.
    """
    file.seek(0)
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise BadRequest("a file that came along is empty", "input_reference")
    try:
        refuse_unread_kind(file, "that came along")
    except UserError as error:
        raise BadRequest(str(error), "input_reference") from None
    suffix = next((end for mark, at, end in _HEADS if head[at : at + len(mark)] == mark), None)
    if suffix is None:
        raise BadRequest(
            "a file that came along is no picture or video that is read: send PNG, JPEG, WebP, "
            "GIF, TIFF, AVIF, HEIC, MP4, WebM, MKV or AVI",
            "input_reference",
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number}{suffix}"
    with path.open("xb") as target:
        shutil.copyfileobj(file, target, 1 << 20)
    return path


def picture_or_video(path: Path) -> str:
    """Whether it is a "picture" or a "video", as `save_upload` found; a GIF is a video."""
    return "picture" if path.suffix in _PICTURES else "video"
