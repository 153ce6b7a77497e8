"""The mark of generated pictures: where it is, that it can be read, that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from opensora_sp.media.sinks import Collector
from opensora_sp.media.watermark import Watermarked, fits

SIZES = [(32, 64), (96, 160), (144, 256), (240, 424), (424, 240), (720, 1280), (40, 2000)]


def marked(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames after the sink, written in two parts."""
    collector = Collector()
    sink = Watermarked(collector, *frames.shape[1:3])
    sink.write(frames[:1])
    sink.write(frames[1:])
    assert collector.frames is not None
    return collector.frames


def plain(height: int, width: int, grey: int) -> NDArray[np.uint8]:
    return np.full((2, height, width, 3), grey, np.uint8)


def box(height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that change on black or on white."""
    changed = marked(plain(height, width, 0))[0] != 0
    changed |= marked(plain(height, width, 255))[0] != 255
    rows, columns = np.flatnonzero(changed.any((1, 2))), np.flatnonzero(changed.any((0, 2)))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_small_in_the_corner_and_all_else_is_as_it_was(height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    before = frames.copy()
    after = marked(frames)
    np.testing.assert_array_equal(frames, before)
    assert (after.shape, after.dtype) == (frames.shape, np.uint8)
    rows, columns = box(height, width)
    assert 7 <= rows.stop - rows.start <= height / 3
    assert 10 <= columns.stop - columns.start <= width / 5
    assert 0 < height - rows.stop <= height / 16
    assert 0 < width - columns.stop <= width / 16
    for a, b in zip(before, after, strict=True):
        assert (a[rows, columns] != b[rows, columns]).any()
        a[rows, columns] = b[rows, columns] = 0
        np.testing.assert_array_equal(a, b)


def luminance(values: NDArray[np.uint8]) -> float:
    """Relative luminance of greys, 0 to 1, as WCAG 2 defines it for sRGB; their mean."""
    x = values.astype(np.float64) / 255
    return float(np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).mean())


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("ground", [0, 64, 128, 192, 255])
def test_it_can_be_read_on_any_ground_and_the_ground_shows_through(
    height: int, width: int, ground: int
) -> None:
    where = box(height, width)
    dark, light = (marked(plain(height, width, grey))[0][where] for grey in (0, 255))
    here = marked(plain(height, width, ground))[0][where]
    letters = dark > 180
    plate = (dark == 0) & (light < 128)
    assert letters.mean() > 0.02
    assert plate.mean() > 0.25
    contrast = (luminance(here[letters]) + 0.05) / (luminance(here[plate]) + 0.05)
    assert contrast >= 4.5
    assert (light[plate].astype(int) - dark[plate]).min() >= 60


def test_a_larger_picture_says_more() -> None:
    """The letters' share of ink grows in steps: AI; AI generated; with the model's name."""
    runs = []
    for height, width in ((96, 160), (240, 424), (720, 1280)):
        rows, columns = box(height, width)
        letters = marked(plain(height, width, 0))[0][rows, columns, 0] > 100
        # Every stroke that the eye meets from left to right, over all rows.
        runs.append(int((np.diff(letters.astype(int), axis=1) == 1).sum() / len(letters)))
    assert runs[0] < runs[1] < runs[2]


@pytest.mark.parametrize(("height", "width"), [(24, 640), (31, 64), (32, 63), (16, 16)])
def test_too_small_a_picture_passes_as_it_is(height: int, width: int) -> None:
    assert not fits(height, width)
    frames = np.random.default_rng(1).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(marked(frames), frames)
