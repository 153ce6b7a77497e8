"""Sinks: what takes the decoded frames of a video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sink(Protocol):
    """Takes the frames of a video as they are decoded. Only the leading rank writes to it."""

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3], the next F frames."""
        ...


@dataclass
class Collector:
    """A sink that keeps the frames in memory."""

    parts: list[NDArray[np.uint8]] = field(default_factory=list)

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames."""
        self.parts.append(frames)

    @property
    def frames(self) -> NDArray[np.uint8] | None:
        """All frames, uint8 [F,H,W,3]; None on ranks that do not lead, where nothing is decoded."""
        import numpy as np

        return np.concatenate(self.parts) if self.parts else None
