"""Measures of frames and latents against calculations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from opensora_sp.media import metrics


def pair(
    frames: int, height: int, width: int, noise: int = 30
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Smooth frames and the same with noise, each channel with another amount of it."""
    rng = np.random.default_rng(7)
    down, across = np.mgrid[0:height, 0:width]
    phases = rng.uniform(0, 6, (frames, 1, 1, 3))
    wave = np.sin(down[..., None] / 5 + phases) + np.cos(across[..., None] / 3 - phases)
    a = np.clip(128 + 60 * wave, 0, 255).astype(np.uint8)
    off = rng.integers(-noise, noise + 1, a.shape) * [1, 2, 0.3]
    return a, np.clip(a + off, 0, 255).astype(np.uint8)


def plain_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """SSIM of one frame [H, W, 3] by its definition, window by window: 8×8, 4 pixels apart."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for top in range(0, a.shape[0] // 4 * 4 - 7, 4):
        for left in range(0, a.shape[1] // 4 * 4 - 7, 4):
            for channel in range(3):
                x, y = (
                    v[top : top + 8, left : left + 8, channel].ravel().astype(float) for v in (a, b)
                )
                (vx, vxy), (_, vy) = np.cov(x, y)
                mx, my = x.mean(), y.mean()
                shape = (2 * vxy + c2) / (vx + vy + c2)
                found.append((2 * mx * my + c1) / (mx**2 + my**2 + c1) * shape)
    return float(np.mean(found))


@pytest.mark.parametrize(("height", "width"), [(24, 32), (21, 35), (8, 8)])
def test_ssim_is_its_definition_on_every_frame(height: int, width: int) -> None:
    a, b = pair(3, height, width)
    expected = [plain_ssim(x, y) for x, y in zip(a, b, strict=True)]
    # FFmpeg rounds c1 and c2 to whole numbers and its result to six places.
    np.testing.assert_allclose(metrics.ssim(a, b), expected, atol=3e-5)
    assert min(expected) < 0.98
    assert metrics.ssim(a, a).tolist() == [1.0] * 3
    assert np.isnan(metrics.ssim(a[:, :7], b[:, :7])).all()


def test_psnr_is_that_of_the_mean_error_and_not_the_mean_of_psnrs() -> None:
    a = np.zeros((2, 2, 2, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0, 0], b[1, 0, 0] = 255, (255, 255, 255)  # 1 and 3 of 12 values are as wrong as can be
    np.testing.assert_allclose(metrics.squared_error(a, b), [255**2 / 12, 255**2 / 4])
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(6))
    assert metrics.psnr(b, a) == metrics.psnr(a, b)
    assert metrics.psnr(a, a) == math.inf


def test_the_error_of_motion_sees_flicker_and_no_constant_shift() -> None:
    a = np.full((4, 3, 5, 3), 100, np.uint8)
    shifted = a + 20
    assert metrics.motion_squared_error(a, shifted).tolist() == [0, 0, 0]
    flicker = a.copy()
    flicker[1] += 10
    flicker[2] -= 10
    assert metrics.motion_squared_error(a, flicker).tolist() == [100, 400, 100]
    x, y = pair(5, 9, 11, noise=120)
    by_hand = np.square(np.diff(x.astype(float), axis=0) - np.diff(y.astype(float), axis=0))
    np.testing.assert_allclose(metrics.motion_squared_error(x, y), by_hand.mean((1, 2, 3)))
    assert metrics.motion_squared_error(x[:1], y[:1]).shape == (0,)


def test_the_relative_error_is_of_norms() -> None:
    a = np.zeros((4, 3, 1, 1), np.float32)
    b = a.copy()
    a[0, 0], a[1, 2], b[0, 0], b[1, 2] = 3, 4, 3, 4.5
    assert metrics.relative_error(a, b) == pytest.approx(0.1)
    assert metrics.relative_errors_by_frame(a, b).tolist() == [0, 0, 0.125]
    b[2, 1] = 1  # a frame that is all 0 in the reference
    assert metrics.relative_errors_by_frame(a, b)[1] == math.inf


def test_other_shapes_are_no_comparison() -> None:
    a, b = pair(2, 8, 8)
    for measure in (metrics.squared_error, metrics.motion_squared_error, metrics.ssim):
        with pytest.raises(ValueError, match="shapes differ"):
            measure(a, b[:1])
        with pytest.raises(ValueError, match="uint8"):
            measure(a.astype(np.float32), b)  # type: ignore[arg-type]
