"""What the program wrote into an output, as it reads it itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora_sp.media.output_frames import open_output_frames


def settings_in(path: Path) -> dict[str, Any]:
    """The settings in a video or a picture."""
    with open_output_frames(path) as found:
        assert found.settings is not None
        return found.settings
