"""Still pictures in HEIF files (HEIC, AVIF), composed of their tiles.

PyAV gives each item of such a file as a stream and ignores the grid that joins them. So this module
reads the boxes (ISO/IEC 14496-12 and 23008-12), and PyAV only decodes tiles. An unknown layout is
refused, because it could give a part of the picture only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from opensora_sp.base.errors import UserError
from opensora_sp.media.bounds import check_picture
from opensora_sp.media.colour import UNKNOWN_MATRICES, frame_to_rgb, hdr_notes
from opensora_sp.media.writer import FULL_RANGE, TV_RANGE

_STILL_BRANDS = (b"mif1", b"mif2", b"heic", b"heix", b"heim", b"heis", b"avif", b"miaf")
_SEQUENCE_BRANDS = (b"msf1", b"hevc", b"hevx", b"hevm", b"hevs", b"avis")
_MOST_META = 16 * 2**20  # bytes
_MOST_BOXES = 100_000
_MOST_TILES = 4096
# Item type → the box with the decoder's configuration, and the decoders to try.
_CODECS = {
    "hvc1": ("hvcC", ("hevc",)),
    "av01": ("av1C", ("libdav1d", "av1", "libaom-av1")),
    "avc1": ("avcC", ("h264",)),
    "jpeg": ("", ("mjpeg",)),
}
# Properties that are applied here, or do not change the picture. A file that marks another one as
# essential is refused.
_HARMLESS = {
    "ispe", "pixi", "pasp", "colr", "hvcC", "av1C", "avcC", "irot", "imir", "clap",
    "a1lx", "lsel", "clli", "mdcv", "cclv", "amve", "udes", "auxC", "rloc", "jpgC",
}  # fmt: skip


class _NotUnderstoodError(ValueError):
    """The layout is unknown to this reader, or damaged."""


@dataclass
class _Item:
    kind: str = ""
    properties: list[tuple[str, bytes]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)  # offset, length
    in_idat: bool = False
    parts: list[int] = field(default_factory=list)  # the items that this one is composed of

    def property(self, name: str) -> bytes | None:
        return next((body for kind, body in self.properties if kind == name), None)


@dataclass
class HeifPicture:
    """An upright picture. rgb: `[H, W, 3]` uint8. profile: its ICC profile. notes: for the user."""

    rgb: NDArray[np.uint8]
    profile: bytes | None
    notes: list[str]


def is_heif_still(file: IO[bytes]) -> bool:
    """Whether this is a still picture in a HEIF file. The position is 0 afterwards."""
    head = file.read(256)
    file.seek(0)
    if head[4:8] != b"ftyp" or head[8:12] in _SEQUENCE_BRANDS:
        return False
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[at : at + 4] for at in (8, *range(16, end - 3, 4))]
    return any(brand in _STILL_BRANDS for brand in brands)


def read_heif(file: IO[bytes], name: str | Path) -> HeifPicture:
    """The primary picture of a HEIF file, with all tiles, rotated and mirrored as the file says.

    Raises:
        UserError: the layout is unknown, or the picture is damaged or too large.
    """
    try:
        return _Reader(file, name).read()
    except UserError:
        raise
    except Exception as error:  # a damaged box may cause any exception, also of FFmpeg
        said = " ".join((getattr(error, "strerror", None) or str(error)).split())
        said = said or type(error).__name__
        raise UserError(
            f"reference {name} is a HEIF picture that cannot be read ({said}): save it as JPEG "
            "or PNG"
        ) from error


def heif_cicp(file: IO[bytes]) -> tuple[int, int] | None:
    """Primaries and transfer (H.273) of a HEIF file. The file's position stays the same."""
    at = file.tell()
    try:
        reader = _Reader(file, "")
        tags = reader.nclx(reader.items[reader.primary])
        return None if tags is None else tags[:2]
    except Exception:  # decoding the file will report the error
        return None
    finally:
        file.seek(at)


class _Reader:
    def __init__(self, file: IO[bytes], name: str | Path) -> None:
        self._file, self._name = file, name
        self.items: dict[int, _Item] = {}
        self.primary = -1
        self._idat = b""
        self._profile: bytes | None = None
        self._notes: list[str] = []
        self._size = file.seek(0, os.SEEK_END)
        self._read_meta(self._meta())

    def read(self) -> HeifPicture:
        rgb = self._composed(self.primary, depth=0)
        return HeifPicture(np.ascontiguousarray(rgb), self._profile, self._notes)

    # -- boxes

    def _meta(self) -> bytes:
        at = 0
        for _ in range(_MOST_BOXES):
            self._file.seek(at)
            header = self._file.read(16)
            if len(header) < 8:
                break
            length, start = int.from_bytes(header[:4], "big"), 8
            if length == 1:
                length, start = int.from_bytes(header[8:16], "big"), 16
            if length == 0:
                length = self._size - at
            if length < start:
                break
            if header[4:8] == b"meta":
                if length > _MOST_META or at + length > self._size:
                    raise _NotUnderstoodError("its header is cut off or too large")
                self._file.seek(at + start)
                return self._file.read(length - start)
            at += length
        raise _NotUnderstoodError("it has no list of pictures")

    def _read_meta(self, meta: bytes) -> None:
        found = dict(_boxes(meta, 4))
        if "pitm" not in found:
            raise _NotUnderstoodError("it names no main picture")
        for needed in ("iinf", "iprp", "iloc"):
            if needed not in found:
                raise _NotUnderstoodError(f"it has no {needed} box")
        version, main = found["pitm"][0], found["pitm"][4:]
        self.primary = int.from_bytes(main[: 4 if version else 2], "big")
        self._idat = found.get("idat", b"")
        self._read_iinf(found["iinf"])
        self._read_iloc(_Bytes(found["iloc"]))
        self._read_iprp(found["iprp"])
        if "iref" in found:
            self._read_iref(found["iref"])
        if self.primary not in self.items:
            raise _NotUnderstoodError("its main picture is missing")

    def _item(self, number: int) -> _Item:
        return self.items.setdefault(number, _Item())

    def _read_iinf(self, body: bytes) -> None:
        for kind, entry in _boxes(body, 6 if body[0] == 0 else 8):
            if kind == "infe" and entry[0] >= 2:
                wide = 4 if entry[0] >= 3 else 2
                number = int.from_bytes(entry[4 : 4 + wide], "big")
                self._item(number).kind = entry[6 + wide : 10 + wide].decode("latin-1")

    def _read_iloc(self, body: _Bytes) -> None:
        version = body.number(4) >> 24
        sizes = body.number(2)
        offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        for _ in range(body.number(2 if version < 2 else 4)):
            item = self._item(body.number(2 if version < 2 else 4))
            method = body.number(2) & 15 if version else 0
            item.in_idat = method == 1
            body.number(2)  # the data reference; data in another file will be missing here
            start = body.number(base)
            for _ in range(body.number(2)):
                if version and index:
                    body.number(index)
                item.extents.append((start + body.number(offset), body.number(length)))
            if method > 1:
                item.extents = []

    def _read_iprp(self, body: bytes) -> None:
        properties: list[tuple[str, bytes]] = []
        for kind, content in _boxes(body, 0):
            if kind == "ipco":
                properties = list(_boxes(content, 0))
            elif kind == "ipma":
                entries = _Bytes(content)
                head = entries.number(4)
                for _ in range(entries.number(4)):
                    item = self._item(entries.number(2 if head >> 24 < 1 else 4))
                    for _ in range(entries.number(1)):
                        wide = 2 if head & 1 else 1
                        value = entries.number(wide)
                        number = value & (0x7FFF if wide == 2 else 0x7F)
                        if number == 0:
                            continue
                        named, content_of = properties[number - 1]
                        if value >> (8 * wide - 1) and named not in _HARMLESS:
                            item.properties.append(("unknown", named.encode("latin-1")))
                        item.properties.append((named, content_of))

    def _read_iref(self, body: bytes) -> None:
        wide = 4 if body[0] else 2
        for kind, content in _boxes(body, 4):
            if kind == "dimg":
                entry = _Bytes(content)
                item = self._item(entry.number(wide))
                item.parts = [entry.number(wide) for _ in range(entry.number(2))]

    # -- pictures

    def _composed(self, number: int, *, depth: int) -> NDArray[np.uint8]:
        item = self.items.get(number)
        if item is None or depth > 4:
            raise _NotUnderstoodError("a part of it is missing")
        unknown = item.property("unknown")
        if unknown is not None:
            raise _NotUnderstoodError(f"it needs {unknown.decode('latin-1')!r}")
        if item.kind == "grid":
            rgb = self._grid(item, depth)
        elif item.kind == "iden" and len(item.parts) == 1:
            rgb = self._composed(item.parts[0], depth=depth + 1)
        elif item.kind in _CODECS:
            rgb = self._decoded(item)
        else:
            raise _NotUnderstoodError(f"its main picture is of the kind {item.kind!r}")
        self._profile = self._profile or _icc(item)
        return _turned(rgb, item)

    def _grid(self, item: _Item, depth: int) -> NDArray[np.uint8]:
        body = _Bytes(self._data(item))
        body.number(1)
        wide = 4 if body.number(1) & 1 else 2
        rows, columns = body.number(1) + 1, body.number(1) + 1
        width, height = body.number(wide), body.number(wide)
        check_picture(self._name, width, height)
        if len(item.parts) != rows * columns or rows * columns > _MOST_TILES:
            raise _NotUnderstoodError(f"its grid of {rows}x{columns} tiles has {len(item.parts)}")
        out = np.zeros((height, width, 3), np.uint8)
        size: tuple[int, int] | None = None
        for place, number in enumerate(item.parts):
            part = self.items.get(number)
            # The colours of the grid hold for tiles without colours of their own.
            if part is not None and self.nclx(part) is None and (nclx := _colr(item, b"nclx")):
                part.properties.append(("colr", b"nclx" + nclx))
            tile = self._composed(number, depth=depth + 1)
            size = size or (tile.shape[0], tile.shape[1])
            if tile.shape[:2] != size:
                raise _NotUnderstoodError("its tiles differ in size")
            if rows * size[0] < height or columns * size[1] < width:
                raise _NotUnderstoodError("its tiles do not cover it")
            top, left = place // columns * size[0], place % columns * size[1]
            target = out[top : top + size[0], left : left + size[1]]
            target[:] = tile[: target.shape[0], : target.shape[1]]
        return out

    def _decoded(self, item: _Item) -> NDArray[np.uint8]:
        spatial = item.property("ispe")
        if spatial is None:
            raise _NotUnderstoodError("a picture in it does not tell its size")
        width, height = (int.from_bytes(spatial[at : at + 4], "big") for at in (4, 8))
        check_picture(self._name, width, height)
        configuration, decoders = _CODECS[item.kind]
        extra = item.property(configuration) if configuration else b""
        if extra is None:
            raise _NotUnderstoodError(f"a picture in it has no {configuration} box")
        frame = _decode(decoders, extra, self._data(item), width * height)
        if (frame.width, frame.height) != (width, height):
            raise _NotUnderstoodError(
                f"a picture in it is {frame.width}x{frame.height}, not {width}x{height}"
            )
        return self._to_rgb(item, frame)

    def _to_rgb(self, item: _Item, frame: Any) -> NDArray[np.uint8]:
        tags = self.nclx(item)
        if tags is None:
            primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
        else:
            primaries, transfer, matrix, full = tags
            frame.colorspace, frame.color_range = matrix, FULL_RANGE if full else TV_RANGE
            if matrix in UNKNOWN_MATRICES:
                raise _NotUnderstoodError(f"its colours are {UNKNOWN_MATRICES[matrix]}")
        if _icc(item) is not None:
            primaries, transfer = 2, 2  # unspecified: the profile has the colours
        for note in hdr_notes(transfer):
            if note not in self._notes:
                self._notes.append(note)
        return frame_to_rgb(frame, tags=(primaries, transfer))

    def nclx(self, item: _Item) -> tuple[int, int, int, bool] | None:
        """Primaries, transfer, matrix and whether the range is full."""
        body = _colr(item, b"nclx")
        if body is None or len(body) < 7:
            return None
        numbers = (int.from_bytes(body[at : at + 2], "big") for at in (0, 2, 4))
        primaries, transfer, matrix = numbers
        return primaries, transfer, matrix, bool(body[6] >> 7)

    def _data(self, item: _Item) -> bytes:
        if not item.extents:
            raise _NotUnderstoodError("a picture in it has no data")
        found = b""
        for offset, length in item.extents:
            if item.in_idat:
                block = self._idat[offset : offset + length]
            else:
                length = length or self._size - offset
                if not 0 <= length <= self._size - offset:
                    raise _NotUnderstoodError("the file is cut off")
                self._file.seek(offset)
                block = self._file.read(length)
            if len(block) != length:
                raise _NotUnderstoodError("the file is cut off")
            found += block
            if len(found) > self._size:
                raise _NotUnderstoodError("its data overlap")
        return found


def _decode(decoders: tuple[str, ...], extra: bytes, data: bytes, pixels: int) -> Any:
    import av

    for decoder in decoders:
        try:
            context: Any = av.CodecContext.create(decoder, "r")
        except (ValueError, av.FFmpegError):  # not in this build of FFmpeg
            continue
        # A stream that is larger than its box says must not be decoded.
        context.options = {"max_pixels": str(max(pixels, 64 * 64) * 2)}
        context.thread_count = 1
        if extra:
            context.extradata = extra
        frames = [*context.decode(av.Packet(data)), *context.decode(None)]
        if len(frames) != 1:
            raise _NotUnderstoodError(f"a picture in it gives {len(frames)} frames")
        return frames[0]
    raise _NotUnderstoodError(f"this FFmpeg has no decoder {decoders[0]}")


def _turned(rgb: NDArray[np.uint8], item: _Item) -> NDArray[np.uint8]:
    """Crop, rotate and mirror, in the order of the file's properties."""
    for kind, body in item.properties:
        if kind == "irot":
            rgb = np.rot90(rgb, body[0] & 3)  # counter-clockwise
        elif kind == "imir":
            rgb = np.fliplr(rgb) if body[0] & 1 else np.flipud(rgb)
        elif kind == "clap":
            rgb = _cropped(rgb, _Bytes(body))
    return rgb


def _cropped(rgb: NDArray[np.uint8], body: _Bytes) -> NDArray[np.uint8]:
    """Crop to a clean aperture: width, height, and horizontal and vertical offset, as fractions."""
    values = []
    for _ in range(4):
        above, below = body.number(4), body.number(4)
        above -= (above >> 31) << 32
        if below == 0:
            raise _NotUnderstoodError("its crop is damaged")
        values.append(above / below)
    width, height = round(values[0]), round(values[1])
    left = round((rgb.shape[1] - width) / 2 + values[2])
    top = round((rgb.shape[0] - height) / 2 + values[3])
    if not (0 < width <= rgb.shape[1] - left and 0 < height <= rgb.shape[0] - top):
        raise _NotUnderstoodError("its crop is damaged")
    if left < 0 or top < 0:
        raise _NotUnderstoodError("its crop is damaged")
    return rgb[top : top + height, left : left + width]


def _colr(item: _Item, *kinds: bytes) -> bytes | None:
    for name, body in item.properties:
        if name == "colr" and body[:4] in kinds:
            return body[4:]
    return None


def _icc(item: _Item) -> bytes | None:
    return _colr(item, b"prof", b"rICC")


class _Bytes:
    """A reader of big-endian numbers."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, size: int) -> int:
        end = self._at + size
        if end > len(self._data):
            raise _NotUnderstoodError("a box in it is cut off")
        value = int.from_bytes(self._data[self._at : end], "big")
        self._at = end
        return value


def _boxes(data: bytes, at: int) -> Iterator[tuple[str, bytes]]:
    for _ in range(_MOST_BOXES):
        if at + 8 > len(data):
            return
        length, start = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:
            length, start = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if length == 0:
            length = len(data) - at
        if length < start or at + length > len(data):
            raise _NotUnderstoodError("a box in it is cut off")
        yield data[at + 4 : at + 8].decode("latin-1"), data[at + start : at + length]
        at += length
