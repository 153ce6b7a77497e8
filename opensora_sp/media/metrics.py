"""Measures of how far frames or latents are from those of a reference: PSNR, SSIM, relative error.

Pure functions of arrays. The first argument is always the reference. numpy is imported inside the
functions, and PyAV by `ssim` alone, so that a command line is checked without them.
"""

from __future__ import annotations

import gc
import math
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The largest value of a pixel, which PSNR is relative to.
PEAK = 255.0
# SSIM compares windows of this many pixels a side, 4 pixels apart.
SSIM_WINDOW = 8


def squared_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared error of each frame, over its pixels and channels.

    Args:
        a, b: `[F, H, W, C]` uint8 of one shape.

    Returns:
        `[F]` float64, in squared steps of a byte; exactly 0 for equal frames.
    """
    import numpy as np

    _require_frames(a, b)
    found = np.empty(len(a))
    for index in range(len(a)):
        off = np.subtract(a[index], b[index], dtype=np.int16).astype(np.int32)
        found[index] = int(np.square(off).sum(dtype=np.int64)) / max(off.size, 1)
    return found


def motion_squared_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared error of what changes from each frame to the next.

    Differences of neighbouring frames are compared. What is wrong alike in both frames cancels, so
    flicker and wrong motion count and a constant shift of colour does not.

    Args:
        a, b: `[F, H, W, C]` uint8 of one shape.

    Returns:
        `[F - 1]` float64, empty for less than two frames.
    """
    import numpy as np

    _require_frames(a, b)
    found = np.empty(max(len(a) - 1, 0))
    before = None
    for index in range(len(a)):
        off = np.subtract(a[index], b[index], dtype=np.int16).astype(np.int32)
        if before is not None:
            # (a1 - a0) - (b1 - b0) is (a1 - b1) - (a0 - b0).
            found[index - 1] = int(np.square(off - before).sum(dtype=np.int64)) / max(off.size, 1)
        before = off
    return found


def decibels(squared_error: float) -> float:
    """PSNR in dB of a mean squared error of bytes, 0 or more; infinite for 0.

    Of a whole video the error is the mean over its frames.
    """
    return 10 * math.log10(PEAK * PEAK / squared_error) if squared_error > 0 else math.inf


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """PSNR in dB of a whole video, by the mean squared error of all its pixels.

    Args:
        a, b: `[F, H, W, C]` uint8 of one shape with at least one frame. Infinite where they are
            equal.
    """
    return decibels(float(squared_error(a, b).mean()))


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of each frame, by FFmpeg's filter of that name.

    It is the index of Wang et al. 2004 with even windows of 8×8 pixels that are 4 apart, instead of
    Gaussian ones around every pixel. The three channels R, G and B count alike.

    Args:
        a, b: `[F, H, W, 3]` uint8 of one shape.

    Returns:
        `[F]` float64, at most 1, in steps of 1e-6; NaN for frames with a side below 8 pixels.
    """
    import numpy as np

    _require_frames(a, b)
    count, height, width = a.shape[:3]
    if min(height, width) < SSIM_WINDOW or not count:
        return np.full(count, np.nan)
    # Not every PyAV shows what a filter notes on its frames, so the filter's own file is read.
    with tempfile.TemporaryDirectory(prefix="opensora-sp-ssim-") as folder:
        path = Path(folder) / "frames"
        _filter_ssim(a, b, path)
        gc.collect()  # PyAV 19's graph and its filters hold each other, and the file with them
        lines = path.read_text(encoding="ascii").splitlines()
    found = np.array([float(line.split("All:")[1].split()[0]) for line in lines])
    if len(found) != count:
        raise RuntimeError(f"FFmpeg compared {len(found)} of {count} frames")
    return found


def _filter_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8], path: Path) -> None:
    """Write FFmpeg's line for each frame; the file is complete when the graph is freed."""
    from av.filter import Graph

    graph: Any = Graph()
    _, height, width, _ = a.shape
    source = f"video_size={width}x{height}:pix_fmt=gbrp:time_base=1/1:pixel_aspect=1/1"
    inputs = [graph.add("buffer", source, name=name) for name in ("a", "b")]
    compare, sink = graph.add("ssim", stats_file=str(path)), graph.add("buffersink")
    for number, each in enumerate(inputs):
        each.link_to(compare, 0, number)
    compare.link_to(sink)
    graph.configure()
    for index in range(len(a)):
        for each, frames in zip(inputs, (a, b), strict=True):
            each.push(_planar(frames[index], index))
        _drain(sink)
    for each in inputs:
        each.push(None)
    _drain(sink)


def _planar(frame: NDArray[np.uint8], index: int) -> Any:
    """An RGB frame as FFmpeg's three planes."""
    import av
    import numpy as np

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture = picture.reformat(format="gbrp")
    picture.pts, picture.time_base = index, Fraction(1)
    return picture


def _drain(sink: Any) -> None:
    """Take the frames that are ready, so that they do not pile up."""
    import av

    while True:
        try:
            sink.pull()
        except (BlockingIOError, av.EOFError):
            return


def relative_error(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The norm of b - a over the norm of a: 0 for equal latents, infinite where only a is all 0.

    Args:
        a, b: any floating arrays of one shape, such as latents `[4, T, H, W]`.
    """
    import numpy as np

    _require_one_shape(a, b)
    off = float(np.linalg.norm(np.subtract(b, a, dtype=np.float64)))
    whole = float(np.linalg.norm(np.asarray(a, dtype=np.float64)))
    if off == 0:
        return 0.0
    return off / whole if whole > 0 else math.inf


def relative_errors_by_frame(
    a: NDArray[np.floating], b: NDArray[np.floating]
) -> NDArray[np.float64]:
    """`relative_error` of each latent frame, `[T]`, of latents `[4, T, H, W]`."""
    import numpy as np

    _require_one_shape(a, b)
    return np.array([relative_error(a[:, t], b[:, t]) for t in range(a.shape[1])])


def _require_frames(a: NDArray[Any], b: NDArray[Any]) -> None:
    _require_one_shape(a, b)
    if a.ndim != 4 or a.dtype.name != "uint8" or b.dtype.name != "uint8":
        raise ValueError(f"frames are uint8 [F, H, W, C], not {a.dtype} {list(a.shape)}")


def _require_one_shape(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
