"""The times of a run's steps: rectified flow goes from 1000, noise, to 0, the video. No torch."""

from __future__ import annotations

import math

from opensora_sp.request.request import Request

TRAINING_TIMESTEPS = 1000.0


def timesteps(
    steps: int, *, height: int, width: int, frames: int, transform: bool = True
) -> list[float]:
    """The times of a run, 1000 first and falling; the run ends at 0.

    height, width in pixels and frames in pixels' time: with the transform larger videos spend
    more of their steps near the noise. Source: Open-Sora 1.2's RFlow scheduler.
    """
    times = [(1.0 - i / steps) * TRAINING_TIMESTEPS for i in range(steps)]
    if not transform:
        return times
    temporal = 1 if frames == 1 else 5 * max(1, frames // 17)
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(temporal)
    shifted = (t / TRAINING_TIMESTEPS for t in times)
    times = [ratio * u / (1 + (ratio - 1) * u) * TRAINING_TIMESTEPS for u in shifted]
    # Exactly 1000 whatever rounding says, or a frame with mask 1 misses its first step.
    return [min(TRAINING_TIMESTEPS, t) if i else TRAINING_TIMESTEPS for i, t in enumerate(times)]


def times_of(request: Request) -> list[float]:
    """The times of a request's steps."""
    return timesteps(
        request.steps,
        height=request.height,
        width=request.width,
        frames=request.num_frames,
        transform=request.timestep_transform,
    )
