"""HEIC and AVIF pictures: all tiles at their places, turned as the file says, or one line."""

import contextlib
import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageCms, features
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media.heif import heif_cicp, is_heif_still, read_heif
from opensora_sp.media.reader import check_reference

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (235, 235, 235)
TILE = 64


def quadrants(height: int, width: int) -> NDArray[np.uint8]:
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:] = RED, GREEN
    picture[top:, :left], picture[top:, left:] = BLUE, WHITE
    return picture


@cache
def encoded(content: bytes, height: int, width: int, codec: str) -> tuple[bytes, bytes]:
    """A picture's decoder configuration and data, as an mp4 holds them."""
    picture = np.frombuffer(content, np.uint8).reshape(height, width, 3)
    options = {
        "libx265": {"crf": "1", "x265-params": "log-level=none:bframes=0:frame-threads=1"},
        "libsvtav1": {"crf": "1", "preset": "8"},
    }[codec]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 24)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file.seek(0)
    made: Any
    with av.open(file) as made:
        extra = made.streams.video[0].codec_context.extradata
        return bytes(extra or b""), b"".join(bytes(packet) for packet in made.demux(video=0))


def box(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind.encode()) + body


def full(kind: str, version: int, flags: int, *parts: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def heif(
    pictures: Sequence[NDArray[np.uint8]],
    *,
    grid: tuple[int, int, int, int] | None = None,
    properties: Sequence[bytes] = (),
    codec: str = "libx265",
    primary: int | None = None,
    parts: Sequence[int] | None = None,
    thumbnail_first: bool = False,
) -> bytes:
    """A HEIF file of pictures, items 1, 2, ...; with a grid (rows, columns, height, width) after.

    properties: of the primary item, such as irot.
    """
    configuration, kind, brand = {
        "libx265": ("hvcC", b"hvc1", b"heic"),
        "libsvtav1": ("av1C", b"av01", b"avif"),
    }[codec]
    streams = [encoded(p.tobytes(), *p.shape[:2], codec) for p in pictures]
    main = primary or (len(pictures) + 1 if grid else 1)
    payloads = [data for _, data in streams]
    kinds = [kind] * len(pictures)
    if grid:
        rows, columns, height, width = grid
        payloads.append(struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height))
        kinds.append(b"grid")
    store: list[bytes] = []
    owns: list[list[int]] = []
    for (extra, _), picture in zip(streams, pictures, strict=True):
        size = struct.pack(">II", picture.shape[1], picture.shape[0])
        store += [box(configuration, extra), full("ispe", 0, 0, size)]
        owns.append([len(store) - 1, len(store)])
    if grid:
        store.append(full("ispe", 0, 0, struct.pack(">II", grid[3], grid[2])))
        owns.append([len(store)])
    for each in properties:
        store.append(each)
        owns[main - 1].append(len(store))
    infe = [
        full("infe", 2, 0, struct.pack(">HH4sB", n + 1, 0, each, 0)) for n, each in enumerate(kinds)
    ]
    references = b""
    if grid:
        listed = list(parts if parts is not None else range(1, len(pictures) + 1))
        references += box("dimg", struct.pack(f">HH{len(listed)}H", main, len(listed), *listed))
    if thumbnail_first:
        references += box("thmb", struct.pack(">HHH", 1, 1, main))
    associated = b"".join(
        struct.pack(">HB", n + 1, len(own)) + bytes(0x80 | each for each in own)
        for n, own in enumerate(owns)
    )

    def meta(start: int) -> bytes:
        places = b""
        for n, data in enumerate(payloads):
            places += struct.pack(">HHHII", n + 1, 0, 1, start, len(data))
            start += len(data)
        return full(
            "meta",
            0,
            0,
            full("hdlr", 0, 0, b"\0\0\0\0pict", b"\0" * 13),
            full("pitm", 0, 0, struct.pack(">H", main)),
            full("iinf", 0, 0, struct.pack(">H", len(infe)), *infe),
            full("iref", 0, 0, references) if references else b"",
            box(
                "iprp",
                box("ipco", *store),
                full("ipma", 0, 0, struct.pack(">I", len(owns)), associated),
            ),
            full("iloc", 0, 0, struct.pack(">HH", 0x4400, len(payloads)), places),
        )

    head = box("ftyp", brand, b"\0\0\0\0", b"mif1", brand)
    start = len(head) + len(meta(0)) + 8
    return head + meta(start) + box("mdat", *payloads)


def tiles(picture: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    return [
        np.ascontiguousarray(padded[y : y + TILE, x : x + TILE])
        for y in range(0, padded.shape[0], TILE)
        for x in range(0, padded.shape[1], TILE)
    ]


def tiled(picture: NDArray[np.uint8], **options: Any) -> bytes:
    height, width = picture.shape[:2]
    grid = (-(-height // TILE), -(-width // TILE), height, width)
    return heif(tiles(picture), grid=grid, **options)


def irot(turns: int) -> bytes:
    return box("irot", bytes([turns]))


def imir(axis: int) -> bytes:
    return box("imir", bytes([axis]))


def read(data: bytes) -> NDArray[np.uint8]:
    return read_heif(io.BytesIO(data), "x.heic").rgb


def near(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> bool:
    return found.shape == wanted.shape and bool(
        np.median(np.abs(found.astype(int) - wanted), axis=(0, 1)).max() <= 3
        and np.abs(found.astype(int) - wanted).mean() <= 3
    )


CODECS = ["libx265", "libsvtav1"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(128, 192), (100, 150), (64, 200), (200, 64)])
def test_tiles_are_joined(codec: str, size: tuple[int, int]) -> None:
    picture = quadrants(*size)
    assert near(read(tiled(picture, codec=codec)), picture)


@pytest.mark.parametrize("codec", CODECS)
def test_turned_and_mirrored(codec: str) -> None:
    picture = quadrants(100, 150)
    for turns in range(4):
        turned = read(tiled(picture, codec=codec, properties=[irot(turns)]))
        assert near(turned, np.rot90(picture, turns)), turns  # counter-clockwise
    for axis, wanted in ((0, picture[::-1]), (1, picture[:, ::-1])):
        assert near(read(tiled(picture, codec=codec, properties=[imir(axis)])), wanted), axis
    both = read(tiled(picture, codec=codec, properties=[irot(1), imir(1)]))
    assert near(both, np.rot90(picture)[:, ::-1])


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_another_reader_of_avif_agrees(tmp_path: Path) -> None:
    """libavif, in Pillow, turns and joins as this reader does."""
    picture = quadrants(128, 192)
    cases: list[list[bytes]] = [[], *([irot(n)] for n in (1, 2, 3)), [imir(0)], [imir(1)]]
    for properties in cases:
        data = tiled(picture, codec="libsvtav1", properties=properties)
        path = tmp_path / "x.avif"
        path.write_bytes(data)
        own = read(data)
        check_reference(path)
        shown = read_reference(path, *own.shape[:2]).video[:, 0]
        other = ((shown + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        assert near(own, other), properties


def test_one_picture_and_a_thumbnail_before_it(tmp_path: Path) -> None:
    picture, small = quadrants(96, 128), np.full((64, 64, 3), 90, np.uint8)
    assert near(read(heif([picture])), picture)
    assert near(read(heif([picture], properties=[irot(3)])), np.rot90(picture, 3))
    assert near(read(heif([small, picture], primary=2, thumbnail_first=True)), picture)
    assert near(read(heif([small, picture, small], primary=2)), picture)
    tiles_after_thumbnail = heif(
        [small, *tiles(quadrants(128, 128))], grid=(2, 2, 128, 128), parts=[2, 3, 4, 5]
    )
    assert near(read(tiles_after_thumbnail), quadrants(128, 128))
    path = tmp_path / "photo.jpg"  # the name does not matter
    path.write_bytes(tiled(quadrants(128, 192), properties=[irot(1)]))
    assert check_reference(path) == []
    reference = read_reference(path, 192, 128)
    assert reference.is_image
    corner = ((reference.video[:, 0, 10, 10] + 1) * 127.5).tolist()
    assert corner == pytest.approx(GREEN, abs=3)


def test_a_crop_is_cut_out() -> None:
    picture = quadrants(96, 128)
    clap = box("clap", struct.pack(">IIIIiIiI", 40, 1, 30, 1, 10, 1, -5, 1))
    top, left = round((96 - 30) / 2 - 5), round((128 - 40) / 2 + 10)
    wanted = picture[top : top + 30, left : left + 40]
    assert near(read(heif([picture], properties=[clap])), wanted)


def test_colours_of_the_file_go_before_those_of_the_stream() -> None:
    picture = quadrants(64, 64)
    full_range = box("colr", b"nclx", struct.pack(">HHHB", 1, 13, 6, 0x80))
    grey = read(heif([picture], properties=[full_range]))[48, 48]
    # Limited range was written: taken as full, white is 16 + 219 * 235 / 255.
    assert grey.tolist() == pytest.approx([218] * 3, abs=2)
    assert heif_cicp(io.BytesIO(heif([picture], properties=[full_range]))) == (1, 13)
    hlg = box("colr", b"nclx", struct.pack(">HHHB", 9, 18, 9, 0))
    found = read_heif(io.BytesIO(tiled(quadrants(128, 128), properties=[hlg])), "x")
    assert found.notes == ["is HDR (HLG) and is brought to standard range"]


def test_a_profile_is_honoured(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colr = box("colr", b"prof", profile)
    found = read_heif(io.BytesIO(tiled(quadrants(128, 128), properties=[colr])), "x")
    assert found.profile == profile
    (tmp_path / "x.heic").write_bytes(heif([quadrants(64, 64)], properties=[box("colr", b"profX")]))
    assert "broken colour profile" in check_reference(tmp_path / "x.heic")[0]


def test_what_is_not_understood_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = quadrants(128, 128)
    pieces = tiles(whole)
    cases = {
        "has 3": heif(pieces[:3], grid=(2, 2, 128, 128)),
        "do not cover": heif(pieces, grid=(2, 2, 128, 300)),
        "differ in size": heif([*pieces[:3], quadrants(96, 96)], grid=(2, 2, 128, 128)),
        "missing": heif(pieces, grid=(2, 2, 128, 128), parts=[1, 2, 3, 99]),
        "needs 'abcd'": heif(pieces, grid=(2, 2, 128, 128), properties=[box("abcd", b"1")]),
        "kind 'iovl'": heif(pieces, grid=(2, 2, 128, 128)).replace(b"grid", b"iovl", 1),
        "cut off": heif(pieces, grid=(2, 2, 128, 128))[:-40],
        "data in it|no data": heif([whole]).replace(b"hvcC", b"hvcD"),
    }
    for said, data in cases.items():
        path = tmp_path / "photo.heic"
        path.write_bytes(data)
        for use in (check_reference, lambda path: read_reference(path, 16, 16)):
            with pytest.raises(UserError, match=r"save it as JPEG or PNG|damaged") as caught:
                use(path)
            assert "\n" not in str(caught.value), said
        if "|" not in said:
            assert said in str(caught.value)


def test_a_huge_grid_is_refused_before_anything_is_decoded() -> None:
    data = heif([quadrants(64, 64)], grid=(1, 1, 60_000, 60_000))
    with pytest.raises(UserError, match="60000x60000 pixels, but at most 134 million"):
        read(data)


def test_a_grid_within_itself_ends() -> None:
    data = heif(tiles(quadrants(128, 128)), grid=(2, 2, 128, 128), parts=[5, 5, 5, 5])
    with pytest.raises(UserError, match="a part of it is missing"):
        read(data)


def test_mutations_never_crash() -> None:
    whole = tiled(quadrants(100, 100))
    assert is_heif_still(io.BytesIO(whole))
    random = np.random.default_rng(5)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            data[random.integers(0, len(data))] = random.integers(0, 256)
        data = data[: random.integers(1, len(data) + 1)] if random.random() < 0.3 else data
        with contextlib.suppress(UserError):
            read_heif(io.BytesIO(bytes(data)), "x.heic")
