"""Conversion of a reference's colours to sRGB, the colour space of the training data.

Video frames and PNG, HEIC and AVIF pictures describe their colours by three numbers of ITU-T H.273
(primaries, transfer, matrix). Photographs have an ICC profile. High dynamic range (HLG, PQ) is
tone-mapped to standard range: diffuse white (75 % of HLG, 203 cd/m² of PQ, as in ITU-R BT.2408)
becomes white. Brighter light is compressed into the top of the range, and its hue is kept.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

# Transfer characteristics of H.273.
LINEAR, PQ, HLG = 8, 16, 18
HDR_NAMES = {PQ: "PQ", HLG: "HLG"}
# Primaries of H.273 that are wider than sRGB's: x and y of red, green, blue and white.
_D65 = (0.3127, 0.3290)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
_PRIMARIES = {
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),  # Display P3
}
# Matrices that FFmpeg's converter does not know: BT.2020 constant luminance, ICtCp, IPT.
UNKNOWN_MATRICES = {10: "BT.2020 constant luminance", 14: "ICtCp", 15: "IPT"}

_HLG_WHITE = 0.265  # scene light of HLG's 75 %
_PQ_WHITE = 203.0  # cd/m²
_PQ_BRIGHTEST = 1000.0  # cd/m²; brighter light is clipped
_KNEE = 0.8  # of linear light; below it nothing is compressed
_STRIP = 2**20  # pixels converted at a time, in float

Chromaticities = tuple[tuple[float, float], ...]


def frame_to_rgb(
    frame: Any,
    width: int | None = None,
    height: int | None = None,
    *,
    tags: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """A PyAV frame as sRGB uint8 `[H, W, 3]`, scaled to a size in pixels where one is given.

    Args:
        tags: primaries and transfer, where the container has other ones than the frame.
    """
    primaries, transfer = tags or (int(frame.color_primaries), int(frame.color_trc))
    size: dict[str, Any] = {}
    if (width, height) not in ((None, None), (frame.width, frame.height)):
        size = {"width": width, "height": height, "interpolation": "BICUBIC"}
    if is_plain(primaries, transfer):
        return frame.to_ndarray(format="rgb24", **size)
    return to_srgb(frame.to_ndarray(format="rgb48le", **size), primaries, transfer)


def is_plain(primaries: int, transfer: int) -> bool:
    """Whether these primaries and this transfer need no conversion to sRGB."""
    return primaries not in _PRIMARIES and transfer not in (LINEAR, PQ, HLG)


def to_srgb(
    rgb: NDArray[np.uint8] | NDArray[np.uint16], primaries: int, transfer: int
) -> NDArray[np.uint8]:
    """Full-range RGB `[H, W, 3]` with these primaries and this transfer (H.273) → sRGB uint8."""
    return _converted(
        rgb,
        _to_linear(transfer, rgb.dtype.itemsize),
        _PRIMARIES.get(primaries),
        _brightest(transfer),
    )


def from_gamma(
    rgb: NDArray[np.uint8], gamma: float, chromaticities: Chromaticities | None
) -> NDArray[np.uint8]:
    """RGB `[H, W, 3]` of a PNG with sample = light ** gamma → sRGB uint8 `[H, W, 3]`."""
    linear = (np.arange(256) / 255) ** (1 / gamma)
    return _converted(rgb, linear.astype(np.float32), chromaticities, 1.0)


def _converted(
    rgb: NDArray[Any],
    linear: NDArray[np.float32],
    chromaticities: Chromaticities | None,
    brightest: float,
) -> NDArray[np.uint8]:
    matrix = None if chromaticities is None else _matrix(chromaticities)
    out = np.empty(rgb.shape, np.uint8)
    rows = max(1, _STRIP // max(1, rgb.shape[1]))
    for top in range(0, len(rgb), rows):
        light = linear[rgb[top : top + rows]]
        if matrix is not None:
            light = light @ matrix.T
        np.maximum(light, 0, out=light)
        if brightest > 1:
            light *= _tone_mapping(light.max(axis=-1, keepdims=True), brightest)
        np.minimum(light, 1, out=light)
        out[top : top + rows] = _encoding()[(light * 16383 + 0.5).astype(np.uint16)]
    return out


def _tone_mapping(peak: NDArray[np.float32], brightest: float) -> NDArray[np.float32]:
    """The factor that brings a pixel's largest channel from [0, brightest] into [0, 1]."""
    over = np.clip((peak - _KNEE) / (1 - _KNEE), 0, None)
    most = (brightest - _KNEE) / (1 - _KNEE)
    # The curve has slope 1 at the knee, and reaches 1 at the brightest light.
    low = _KNEE + (1 - _KNEE) * np.minimum(over * (1 + over / most**2) / (1 + over), 1)
    return np.where(peak > _KNEE, low / np.maximum(peak, 1e-6), 1).astype(np.float32)


@lru_cache(maxsize=8)
def _to_linear(transfer: int, size: int) -> NDArray[np.float32]:
    """Linear light of every level of samples of `size` bytes. 1 is the white of standard range."""
    v = np.arange(256**size) / (256**size - 1)
    if transfer == LINEAR:
        light = v
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(v <= 0.5, v**2 / 3, (np.exp((v - c) / a) + b) / 12) / _HLG_WHITE
    elif transfer == PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        root = v ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
        light = np.minimum(light * 10_000, _PQ_BRIGHTEST) / _PQ_WHITE
    else:
        # Displays show all curves of standard range alike, so sRGB's curve is used for them.
        light = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def _brightest(transfer: int) -> float:
    return {HLG: 1 / _HLG_WHITE, PQ: _PQ_BRIGHTEST / _PQ_WHITE}.get(transfer, 1.0)


@lru_cache(maxsize=1)
def _encoding() -> NDArray[np.uint8]:
    light = np.arange(16384) / 16383
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(coded * 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _matrix(chromaticities: Chromaticities) -> NDArray[np.float32]:
    """The 3×3 matrix from linear light of these primaries to sRGB's. White stays white."""
    return (np.linalg.inv(_to_xyz(_SRGB)) @ _to_xyz(chromaticities)).astype(np.float32)


def _to_xyz(chromaticities: Chromaticities) -> NDArray[np.float64]:
    red, green, blue, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in chromaticities)
    columns = np.stack([red, green, blue], axis=1)
    # Another white than D65 is adapted by scaling, which suffices for DCI's white.
    target = np.array([_D65[0] / _D65[1], 1, (1 - sum(_D65)) / _D65[1]])
    scaled = columns * np.linalg.solve(columns, white)
    return scaled * (target / white)[:, None]


# --- pictures ----------------------------------------------------------------------------------


def picture_to_srgb(
    image: Image, rgb: Image, cicp: tuple[int, int] | None
) -> tuple[Image, list[str]]:
    """A picture in sRGB, and notes about it, without its name.

    Args:
        image: upright, in the mode of its file, with the file's info.
        rgb: the same picture in mode RGB, without a conversion of colours.
        cicp: primaries and transfer of H.273, where the file has them. They have precedence.
    """
    from PIL import Image

    if cicp is not None:
        if is_plain(*cicp):
            return rgb, []
        return Image.fromarray(to_srgb(np.asarray(rgb), *cicp)), hdr_notes(cicp[1])
    if profile := image.info.get("icc_profile"):
        return _by_profile(image, rgb, profile)
    gamma = image.info.get("gamma")
    if image.info.get("srgb") is None and isinstance(gamma, float) and 0.1 <= gamma <= 10:
        chromaticities = _chromaticities(image.info.get("chromaticity"))
        if abs(gamma * 2.2 - 1) > 0.05 or chromaticities is not None:
            return Image.fromarray(from_gamma(np.asarray(rgb), gamma, chromaticities)), []
    return rgb, []


def hdr_notes(transfer: int) -> list[str]:
    """The note for a transfer (H.273) of high dynamic range; none for others."""
    if transfer not in HDR_NAMES:
        return []
    return [f"is HDR ({HDR_NAMES[transfer]}) and is brought to standard range"]


def _chromaticities(values: object) -> Chromaticities | None:
    """A PNG's cHRM chunk in the order red, green, blue, white; None if about sRGB's or unusable."""
    if not isinstance(values, tuple) or len(values) != 8:
        return None
    white, red, green, blue = ((float(values[i]), float(values[i + 1])) for i in range(0, 8, 2))
    found = (red, green, blue, white)
    if any(not (0 < x < 1 and 0 < y < 1) for x, y in found):
        return None
    if np.abs(np.array(found) - np.array(_SRGB)).max() < 0.005:
        return None
    try:
        matrix = _matrix(found)
    except np.linalg.LinAlgError:
        return None
    return found if np.isfinite(matrix).all() and np.abs(matrix).max() < 10 else None


def _by_profile(image: Image, rgb: Image, profile: bytes) -> tuple[Image, list[str]]:
    from PIL import Image, ImageCms

    space = {"L": "L", "LA": "L", "1": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    source = rgb
    if space == "L" or image.mode.startswith("I"):
        space, source = "L", rgb.convert("L")  # the three channels are the same
    elif space == "CMYK":
        source = image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        kind = given.profile.xcolor_space.strip()
        if {"GRAY": "L"}.get(kind, kind) != space:
            return rgb, [f"has a colour profile for {kind}, which is ignored"]
        transform = ImageCms.buildTransform(
            given,
            ImageCms.createProfile("sRGB"),
            space,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if space != "CMYK":
            # A profile that is equivalent to sRGB must not change values by rounding.
            levels = np.array([0, 32, 64, 96, 128, 160, 192, 224, 255], np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
            if space == "L":
                grid = np.repeat(grid[..., :1], 3, axis=-1)
            probe = Image.fromarray(grid).convert(space)
            moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
            if np.abs(moved - grid).max() <= 2:
                return rgb, []
        converted = ImageCms.applyTransform(source, transform)
        assert converted is not None
        return converted, []
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        return rgb, [f"has a broken colour profile ({said}), which is ignored"]


def png_cicp(file: IO[bytes]) -> tuple[int, int] | None:
    """Primaries and transfer of a PNG's cICP chunk. The file's position stays the same."""
    at = file.tell()
    try:
        file.seek(8)
        for _ in range(1000):
            header = file.read(8)
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if kind == b"cICP" and length == 4:
                primaries, transfer = file.read(2)
                return primaries, transfer
            if len(header) < 8 or kind in (b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, 1)
        return None
    except ValueError:  # the file is cut off inside the chunk
        return None
    finally:
        file.seek(at)
