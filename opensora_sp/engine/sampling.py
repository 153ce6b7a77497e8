"""Rectified flow, as plain functions over an explicit list of timesteps.

Layout-blind: everything is pointwise in z, so z may be latents, patches or a shard of patches.
Source: Open-Sora 1.2's RFlow scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opensora_sp.base.transfer import to_device
from opensora_sp.request.step_times import TRAINING_TIMESTEPS

# velocity(z, t, generate): generate is bool [B,T] or None when no frame is kept.
VelocityFunction = Callable[[Tensor, float, Tensor | None], Tensor]


def sample(
    z: Tensor,
    times: Sequence[float],
    velocity: VelocityFunction,
    frame_mask: Tensor | None = None,
    noise_at: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_step: int = 0,
) -> Tensor:
    """Integrate z from the first time to 0 in len(times) Euler steps.

    z: noise, with the latents of kept frames in place, [B,T,...] float32. frame_mask [B,T] in
    0..1 on the CPU: 1 generates a frame, 0 keeps it, a fraction edits it from that time on.
    noise_at(step): fresh noise of z's shape for frames that join then. Without a frame_mask, or
    with one of ones, it is a plain run. on_step(step, z) sees z after every step. first_step: z is
    what on_step saw after the step before; nothing else is needed to go on from there.
    """
    if frame_mask is not None and bool((frame_mask == 1).all()):
        frame_mask = None
    joined = None if frame_mask is None else _joined_before(frame_mask, times, first_step)
    for i in range(first_step, len(times)):
        t = times[i]
        following = times[i + 1] if i + 1 < len(times) else 0.0
        if frame_mask is None or joined is None:
            z = z + velocity(z, t, None) * ((t - following) / TRAINING_TIMESTEPS)
        else:
            if noise_at is None:
                raise ValueError("a run with a frame mask needs noise_at")
            generate = generated_at(frame_mask, t)
            z = _masked_step(z, t, following, velocity, generate, generate & ~joined, noise_at, i)
            joined = generate
        if on_step is not None:
            on_step(i, z)
    return z


def joining_steps(frame_mask: Tensor | None, times: Sequence[float]) -> frozenset[int]:
    """The steps from 1 on at which other frames are generated than at the step before.

    frame_mask [B,T] as for `sample`.
    """
    if frame_mask is None:
        return frozenset()
    sets = [generated_at(frame_mask, t) for t in times]
    return frozenset(i for i in range(1, len(sets)) if not torch.equal(sets[i], sets[i - 1]))


def generated_at(frame_mask: Tensor, t: float) -> Tensor:
    """The frames of a mask [B,T], as for `sample`, that are generated at time t: bool [B,T]."""
    return frame_mask.float() * TRAINING_TIMESTEPS >= torch.tensor(t)


def _joined_before(frame_mask: Tensor, times: Sequence[float], step: int) -> Tensor:
    """The frames that had joined when a step begins, bool [B,T]."""
    return generated_at(frame_mask, times[step - 1]) if step else frame_mask == 1


def _masked_step(
    z: Tensor,
    t: float,
    following: float,
    velocity: VelocityFunction,
    generate: Tensor,
    joining: Tensor,
    noise_at: Callable[[int], Tensor],
    step: int,
) -> Tensor:
    """One step in which some frames are kept; generate and joining are bool [B,T] on the CPU."""
    kept = z
    if bool(joining.any()):
        level = t / TRAINING_TIMESTEPS
        noised = (1 - level) * z + level * noise_at(step)
        z = torch.where(_over_frames(joining, z), noised, z)
    moved = z + velocity(z, t, generate) * ((t - following) / TRAINING_TIMESTEPS)
    return torch.where(_over_frames(generate, z), moved, kept)


def _over_frames(mask: Tensor, z: Tensor) -> Tensor:
    """A [B,T] mask, moved to z's device and shaped to broadcast over [B,T,...]."""
    return to_device(mask, z.device).reshape(*mask.shape, *([1] * (z.ndim - 2)))
