"""Where finished frames go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sink(Protocol):
    """Takes a video's frames as they are decoded; used on the leading rank only."""

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3], the next F frames."""
        ...


@dataclass
class Collector:
    """Keeps the frames in memory."""

    parts: list[NDArray[np.uint8]] = field(default_factory=list)

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames."""
        self.parts.append(frames)

    @property
    def frames(self) -> NDArray[np.uint8] | None:
        """uint8 [F,H,W,3], or None where nothing was decoded (ranks that do not lead)."""
        import numpy as np

        return np.concatenate(self.parts) if self.parts else None
