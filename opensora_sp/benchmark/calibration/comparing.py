"""Frames of a full run on disk, and sinks that compare another run with them as it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.media.metrics import decibels

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_DB = 100.0  # of frames that are equal, whose ratio would be infinite


@dataclass
class FrameFile:
    """A sink that writes frames into a file, value after value."""

    file: IO[bytes]

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]."""
        self.file.write(np.ascontiguousarray(frames).tobytes())


@contextmanager
def frames_written(path: Path) -> Iterator[FrameFile]:
    """A sink whose file appears whole when the block ends."""
    with atomic_output(path) as temporary, reported(path), temporary.open("wb") as file:
        yield FrameFile(file)


@dataclass
class Comparison:
    """A sink that compares frames with those of a `FrameFile`, in their order.

    file: open for reading; None on ranks that are given no frames.
    """

    file: IO[bytes] | None
    squares: float = 0.0
    values: int = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]. Raises ValueError where the file has fewer frames, or others."""
        assert self.file is not None
        expected = np.frombuffer(self.file.read(frames.size), dtype=np.uint8)
        if expected.size != frames.size:
            raise ValueError("the frames of the full run are not all there")
        for frame, other in zip(frames, expected.reshape(frames.shape), strict=True):
            self.squares += float(((frame.astype(np.float64) - other) ** 2).sum())
        self.values += frames.size

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB over all frames written; at most MOST_DB."""
        return min(MOST_DB, decibels(self.squares / self.values if self.values else 0.0))
