"""The embedded model's checkpoints."""

from __future__ import annotations

from pathlib import Path

from opensora_sp.request.request import Checkpoints

EMBEDDED = Path(__file__).parents[1] / "assets" / "embedded"


def embedded_checkpoints() -> Checkpoints:
    """The small model inside the package, in the four-directory layout of the published one."""
    return Checkpoints(
        dit=EMBEDDED / "dit", t5=EMBEDDED / "t5", vae2d=EMBEDDED / "vae2d", vae3d=EMBEDDED / "vae3d"
    )
