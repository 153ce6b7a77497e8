"""Colours of references: profiles, tags of pictures and videos, high dynamic range."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media.colour import to_srgb
from opensora_sp.media.reader import check_reference

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (235, 235, 235)
COLOURS = (RED, GREEN, BLUE, WHITE)
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1775, 0.0], [0.0332, 0.9668, 0.0], [0.0171, 0.0724, 0.9105]])


def quadrants(colours: tuple[Any, ...] = COLOURS, dtype: Any = np.uint8) -> NDArray[Any]:
    picture = np.zeros((64, 96, 3), dtype)
    for place, colour in enumerate(colours):
        top, left = place // 2 * 32, place % 2 * 48
        picture[top : top + 32, left : left + 48] = colour
    return picture


def seen(path: Path, **options: Any) -> list[tuple[int, ...]]:
    """The colours of the quadrants of the first frame."""
    video = read_reference(path, 64, 96, **options).video[:, 0]
    levels = ((video + 1) * 127.5).round().int()
    return [tuple(levels[:, y, x].tolist()) for y in (16, 48) for x in (24, 72)]


def off(found: list[tuple[int, ...]], wanted: tuple[Any, ...] = COLOURS) -> int:
    return int(np.abs(np.array(found) - np.array(wanted)).max())


def decoded(levels: Any) -> NDArray[np.float64]:
    v = np.array(levels) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def coded(light: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


# The shares of red and blue in luma; what is not tagged is BT.601.
LUMA = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}


def yuv_frame(rgb: NDArray[Any], pix_fmt: str, matrix: int, full: bool) -> av.VideoFrame:
    """By the definitions of H.273, not by FFmpeg, which is under test."""
    red, green, blue = np.moveaxis(rgb / np.iinfo(rgb.dtype).max, -1, 0)
    kr, kb = LUMA.get(matrix, (0.299, 0.114))
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    depth = next((n for n in (10, 12) if f"p{n}" in pix_fmt), 8)
    unit, top = 2 ** (depth - 8), 2**depth - 1
    luma = y * top if full else (16 + 219 * y) * unit
    chroma = [c * (top if full else 224 * unit) + 128 * unit for c in (cb, cr)]
    # Every quadrant is of one colour, so leaving samples out is exact.
    down, across = {"420": (2, 2), "422": (1, 2), "444": (1, 1)}[pix_fmt[3:6]]
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], pix_fmt)
    for plane, values in zip(
        frame.planes, [luma, *(c[::down, ::across] for c in chroma)], strict=True
    ):
        kind: Any = np.uint8 if depth == 8 else np.dtype("<u2")
        rows = np.zeros((plane.height, plane.line_size // np.dtype(kind).itemsize), kind)
        rows[:, : plane.width] = np.clip(np.round(values), 0, top)
        plane.update(rows.tobytes())
    return frame


def write_video(
    path: Path,
    rgb: NDArray[Any],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    matrix: int = 2,
    full: bool | None = None,
    primaries: int = 2,
    transfer: int = 2,
) -> None:
    """A film of one picture with these tags of H.273."""
    frame = yuv_frame(rgb, pix_fmt, matrix, full is True)
    frame.colorspace, frame.color_range = matrix, 0 if full is None else 2 if full else 1
    options = {"libx264": {"crf": "1"}, "libx265": {"crf": "1", "x265-params": "log-level=none"}}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24, options=options.get(codec, {}))
        stream.height, stream.width, stream.pix_fmt = rgb.shape[0], rgb.shape[1], pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 0 if full is None else 2 if full else 1
        context.color_primaries, context.color_trc = primaries, transfer
        for index in range(3):
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


MATRICES = {"709": 1, "470bg": 5, "170m": 6, "untagged": 2, "2020": 9}
KINDS = {"limited": ("", False), "full": ("", True), "10 bit": ("10le", False)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("chroma", ["420", "422", "444"])
def test_every_matrix_range_depth_and_chroma(
    tmp_path: Path, matrix: str, kind: str, chroma: str
) -> None:
    path = tmp_path / "film.mp4"
    depth, full = KINDS[kind]
    write_video(
        path, quadrants(), pix_fmt=f"yuv{chroma}p{depth}", matrix=MATRICES[matrix], full=full
    )
    with av.open(str(path)) as made:
        context: Any = made.streams.video[0].codec_context
        assert context.colorspace == MATRICES[matrix]
        assert (context.color_range == 2) == full
    assert off(seen(path)) <= 4
    assert check_reference(path) == []


@pytest.mark.parametrize("full", [True, False])
def test_ten_bits_of_full_range_and_other_containers(tmp_path: Path, full: bool) -> None:
    for name, codec, pix_fmt in (
        ("a.mkv", "libx264", "yuv420p10le"),
        ("b.mkv", "ffv1", "yuv444p"),
        ("c.mov", "libx265", "yuv422p10le"),
    ):
        path = tmp_path / name
        write_video(path, quadrants(), codec=codec, pix_fmt=pix_fmt, matrix=9, full=full)
        assert off(seen(path)) <= 4, name


# --- high dynamic range, wide gamut ------------------------------------------------------------


def hlg(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of light of which 1 is diffuse white."""
    e = light * 0.265
    return np.where(
        e <= 1 / 12,
        np.sqrt(3 * e),
        0.17883277 * np.log(np.maximum(12 * e - 0.28466892, 1e-9)) + 0.55991073,
    )


def pq(light: NDArray[np.float64]) -> NDArray[np.float64]:
    y = (light * 203 / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


HDR = {"HLG": (18, hlg), "PQ": (16, pq)}


def hdr_quadrants(kind: str, scale: float = 1) -> NDArray[np.uint16]:
    light = decoded(COLOURS) @ TO_2020.T * scale
    return quadrants(tuple(np.round(HDR[kind][1](light) * 65535)), np.uint16)


@pytest.mark.parametrize("kind", HDR)
@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx265", "yuv420p10le", "mp4"),
        ("libx264", "yuv422p10le", "mkv"),
        ("ffv1", "yuv444p12le", "mkv"),
    ],
)
def test_hdr_is_brought_to_standard_range(
    tmp_path: Path, kind: str, codec: str, pix_fmt: str, suffix: str
) -> None:
    path = tmp_path / f"hdr.{suffix}"
    write_video(
        path,
        hdr_quadrants(kind),
        codec=codec,
        pix_fmt=pix_fmt,
        matrix=9,
        full=False,
        primaries=9,
        transfer=HDR[kind][0],
    )
    assert off(seen(path)) <= 8
    assert check_reference(path) == [
        f"reference {path} is HDR ({kind}) and is brought to standard range"
    ]


@pytest.mark.parametrize("kind", HDR)
def test_what_is_brighter_than_white_keeps_its_hue(kind: str) -> None:
    levels = hdr_quadrants(kind, scale=3)
    found = to_srgb(levels, 9, HDR[kind][0]).astype(int)
    red, green, blue, white = (found[y, x] for y in (16, 48) for x in (24, 72))
    assert white.min() >= 240
    assert white.max() - white.min() <= 2
    assert red[0] - max(red[1:]) > 150
    assert green[1] - max(green[0], green[2]) > 150
    assert blue[2] - max(blue[:2]) > 150
    ramp = np.linspace(0, 65535, 500).astype(np.uint16)
    grey = to_srgb(np.repeat(ramp[None, :, None], 3, -1), 9, HDR[kind][0])[0, :, 0].astype(int)
    assert (np.diff(grey) >= 0).all()
    assert (grey[0], grey[-1]) == (0, 255)


@pytest.mark.parametrize(("primaries", "matrix"), [(12, TO_P3), (9, TO_2020)])
def test_wide_gamut_of_standard_range(
    tmp_path: Path, primaries: int, matrix: NDArray[np.float64]
) -> None:
    wide = np.round(coded(decoded(COLOURS) @ matrix.T) * 65535)
    path = tmp_path / "wide.mkv"
    write_video(
        path,
        quadrants(tuple(wide), np.uint16),
        codec="ffv1",
        pix_fmt="yuv444p12le",
        matrix=1,
        full=False,
        primaries=primaries,
        transfer=1,
    )
    assert off(seen(path)) <= 4


# --- profiles ----------------------------------------------------------------------------------


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A small ICC profile of version 2 for a display."""
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642) + s15(1) + s15(0.8249)
    return head + b"\0" * (128 - len(head)) + table + body


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + s15(x) + s15(y) + s15(z)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(columns: list[tuple[float, float, float]], power: float) -> bytes:
    named = {b"rXYZ": columns[0], b"gXYZ": columns[1], b"bXYZ": columns[2]}
    tags = {name: xyz(*values) for name, values in named.items()}
    tags |= {name: gamma(power) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(b"RGB ", tags | {b"wtpt": xyz(0.9642, 1, 0.8249)})


# Adapted to D50, as published with the colour spaces.
P3 = rgb_profile(
    [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)], 2.2
)
ADOBE = rgb_profile(
    [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 2.2
)
GREY = profile(b"GRAY", {b"kTRC": gamma(1.0), b"wtpt": xyz(0.9642, 1, 0.8249)})


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_profiles_are_honoured(tmp_path: Path, suffix: str) -> None:
    # sRGB (240, 0, 0), as Display P3 and Adobe RGB write it.
    for name, given, red in (("p3", P3, (220, 48, 34)), ("adobe", ADOBE, (206, 0, 0))):
        path = tmp_path / f"{name}.{suffix}"
        picture = Image.fromarray(quadrants((red, WHITE, (128,) * 3, (0, 0, 0))))
        options: dict[str, Any] = {"quality": 100} if suffix != "tiff" else {}
        if suffix == "jpg":
            options["subsampling"] = 0
        picture.save(path, icc_profile=given, **options)
        assert check_reference(path) == []
        wanted = ((240, 0, 0), WHITE, (128,) * 3, (0, 0, 0))
        assert off(seen(path), wanted) <= 5, (name, seen(path))


def test_grey_and_other_modes_with_profiles(tmp_path: Path) -> None:
    shades = quadrants(tuple((v,) * 3 for v in (0, 55, 128, 255)))
    grey = Image.fromarray(shades).convert("L")
    wanted = tuple((round(float(coded(np.array(v / 255))) * 255),) * 3 for v in (0, 55, 128, 255))
    for name, picture in (("l", grey), ("la", grey.convert("LA"))):
        picture.save(tmp_path / f"{name}.png", icc_profile=GREY)
        assert off(seen(tmp_path / f"{name}.png"), wanted) <= 3
    red = Image.fromarray(quadrants(((220, 48, 34),) * 4))
    for name, picture in (("p", red.quantize(4)), ("rgba", red.convert("RGBA"))):
        picture.save(tmp_path / f"{name}.png", icc_profile=P3)
        assert off(seen(tmp_path / f"{name}.png"), ((240, 0, 0),) * 4) <= 5


def test_an_srgb_profile_moves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    given = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, extra in (("with.png", given), ("without.png", None)):
        Image.fromarray(noise).save(tmp_path / name, icc_profile=extra)
    with_, without = (read_reference(tmp_path / n, 64, 96) for n in ("with.png", "without.png"))
    assert bool((with_.video == without.video).all())


def test_a_profile_that_cannot_be_used_is_told_of(tmp_path: Path) -> None:
    picture = Image.fromarray(quadrants())
    for name, given, said in (
        ("broken", b"no profile at all", "broken colour profile"),
        ("cut", P3[:200], "broken colour profile"),
        ("grey", GREY, "a colour profile for GRAY, which is ignored"),
    ):
        path = tmp_path / f"{name}.png"
        picture.save(path, icc_profile=given)
        (note,) = check_reference(path)
        assert said in note
        assert str(path) in note
        assert "\n" not in note
        assert off(seen(path)) == 0


def test_inks_by_profile() -> None:
    """Pillow has no CMYK profile to make, so the call is judged by one of grey ink."""
    from opensora_sp.media.colour import picture_to_srgb

    inks = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    inks.info["icc_profile"] = P3
    converted, notes = picture_to_srgb(inks, inks.convert("RGB"), None)
    assert notes == ["has a colour profile for RGB, which is ignored"]
    assert converted.getpixel((0, 0)) == (255, 0, 0)


# --- PNG's own words ---------------------------------------------------------------------------


def png(picture: NDArray[np.uint8], *chunks: tuple[bytes, bytes]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG")
    content, added = data.getvalue(), b""
    for kind, body in chunks:
        added += struct.pack(">I", len(body)) + kind + body
        added += struct.pack(">I", zlib.crc32(kind + body))
    return content[:33] + added + content[33:]


def test_png_tells_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    linear = np.round(decoded(COLOURS) * 255)
    p3 = np.round(coded(decoded(COLOURS) @ TO_P3.T) * 255)
    p3_chrm = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    hlg_levels = np.round(hlg(decoded(COLOURS) @ TO_2020.T) * 255)
    srgb_gamma = (b"gAMA", struct.pack(">I", 45455))
    cases: list[tuple[Any, list[tuple[bytes, bytes]], int]] = [
        (COLOURS, [srgb_gamma], 0),
        (COLOURS, [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))], 0),
        (linear, [(b"gAMA", struct.pack(">I", 100_000))], 8),
        (p3, [srgb_gamma, (b"cHRM", p3_chrm)], 8),
        (p3, [(b"cICP", bytes([12, 13, 0, 1]))], 4),
        (hlg_levels, [(b"cICP", bytes([9, 18, 0, 1]))], 8),
        (COLOURS, [(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", struct.pack(">I", 100_000))], 0),
        (COLOURS, [(b"gAMA", struct.pack(">I", 0))], 0),
        (COLOURS, [srgb_gamma, (b"cHRM", b"\0" * 32)], 0),
    ]
    for colours, chunks, most in cases:
        path.write_bytes(png(quadrants(tuple(colours)), *chunks))
        assert off(seen(path)) <= most, (chunks, seen(path))
        assert len(check_reference(path)) == (colours is hlg_levels)


def test_colours_that_are_not_known_are_refused(tmp_path: Path) -> None:
    for matrix, name in ((14, "ICtCp"), (10, "BT.2020 constant luminance")):
        path = tmp_path / "x.mkv"
        write_video(path, quadrants(), codec="ffv1", pix_fmt="yuv444p", matrix=matrix, full=False)
        with pytest.raises(UserError, match=f"has colours as {name}, which cannot be converted"):
            check_reference(path)
