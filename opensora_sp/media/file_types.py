"""File types that are not read as a reference, recognised by their first bytes.

Without this check FFmpeg and Pillow would call most of these files damaged, or read a small preview
out of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO

from opensora_sp.base.errors import UserError

_HEAD = 4096
_AS_PICTURE = "save it as PNG or JPEG"

# Signature at the start of the file, its type, what to do.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"8BPS", "Photoshop", _AS_PICTURE),
    (b"\xff\x0a", "JPEG XL", _AS_PICTURE),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL", _AS_PICTURE),
    (b"%PDF", "PDF or Illustrator", _AS_PICTURE),
    (b"%!PS", "PostScript or Illustrator", _AS_PICTURE),
    (b"\xc5\xd0\xd3\xc6", "PostScript or Illustrator", _AS_PICTURE),
    (b"gimp xcf", "GIMP", _AS_PICTURE),
    (b"v/1\x01", "OpenEXR", _AS_PICTURE),
    (b"#?RADIANCE", "Radiance HDR", _AS_PICTURE),
    (b"#?RGBE", "Radiance HDR", _AS_PICTURE),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile", _AS_PICTURE),
    (b"FUJIFILMCCD-RAW", "camera raw", _AS_PICTURE),
    (b"IIU\x00", "camera raw", _AS_PICTURE),
    (b"IIRO", "camera raw", _AS_PICTURE),
    (b"IIRS", "camera raw", _AS_PICTURE),
    (b"MMOR", "camera raw", _AS_PICTURE),
    (b"FOVb", "camera raw", _AS_PICTURE),
    (b"\x00MRM", "camera raw", _AS_PICTURE),
    (b"PK\x03\x04", "ZIP", "unpack it first"),
    (b"PK\x05\x06", "ZIP", "unpack it first"),
    (b"Rar!\x1a\x07", "RAR", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it first"),
    (b"\x1f\x8b\x08", "gzip", "unpack it first"),
    (b"BZh", "bzip2", "unpack it first"),
    (b"\xfd7zXZ\x00", "xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it first"),
)
_TEXT_SIGNATURES: tuple[tuple[str, str, str], ...] = (
    (r"<!doctype html|<html|<head|<body", "HTML, a web page", "download the picture itself"),
    (r"(<\?xml.*?\?>)?\s*(<!--.*?-->\s*|<!doctype svg.*?>\s*)*<(\w+:)?svg\b", "SVG", _AS_PICTURE),
    (r"<", "XML", "give an image or a video"),
    (r"#EXTM3U|ffconcat ", "a playlist", "give the video itself"),
)
# These formats have text headers, and are read: PNM, YUV4MPEG, XPM, XBM, FITS.
_TEXT_PICTURES = re.compile(rb"P[1-7fFH][\s#]|YUV4MPEG2 |/\* XPM|#define |SIMPLE  =")


def refuse_unread_kind(file: IO[bytes], name: str | Path) -> None:
    """Refuse a file of a known type that is not read. The file's position is 0 afterwards.

    Raises:
        UserError: one line that says what the file is and what to do.
    """
    head = file.read(_HEAD)
    file.seek(0)
    if head.startswith(b"version https://git-lfs."):
        raise UserError(
            f"reference {name} is a Git LFS pointer, not the picture: fetch it with `git lfs pull`"
        )
    found = _kind(head)
    if found is not None:
        kind, advice = found
        raise UserError(f"reference {name} is not a kind that is read ({kind}): {advice}")


def refuse_camera_raw(tags: object, name: str | Path) -> None:
    """Raise UserError where a TIFF's tags say that it is a camera's raw file.

    The first picture of such a file is a small preview and not the photograph.
    """
    get = getattr(tags, "get", None)
    if get is None:
        return
    preview = bool(int(get(254, 0) or 0) & 1) and 330 in tags  # type: ignore[operator]
    if get(50706) is not None or get(262) in (32803, 34892) or preview:
        raise UserError(f"reference {name} is not a kind that is read (camera raw): {_AS_PICTURE}")


def _kind(head: bytes) -> tuple[str, str] | None:
    for signature, kind, advice in _SIGNATURES:
        if head.startswith(signature):
            return kind, advice
    if head[:4] in (b"II*\0", b"MM\0*") and head[8:10] == b"CR":
        return "camera raw", _AS_PICTURE
    if head[4:12] == b"ftypcrx ":
        return "camera raw", _AS_PICTURE
    text = _as_text(head)
    if text is None or _TEXT_PICTURES.match(head):
        return None
    for pattern, kind, advice in _TEXT_SIGNATURES:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return kind, advice
    return "text", "give an image or a video"


def _as_text(head: bytes) -> str | None:
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = head.decode(encoding, errors="strict")
    except UnicodeDecodeError as error:
        if error.end < len(head) - 4 or error.start == 0:
            return None
        text = head[: error.start].decode(encoding, errors="ignore")
    if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
        return None
    return text.lstrip()
