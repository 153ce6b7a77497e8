"""The clean latents as they are estimated in the middle of a run, for a preview."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from opensora_sp.engine.sampling import VelocityFunction
from opensora_sp.request.step_times import TRAINING_TIMESTEPS


class Previews(Protocol):
    """Who sees a video while it is denoised. Every rank calls both, in the same order."""

    def due(self) -> bool:
        """Whether this rank wants an estimate after this step."""

    def show(self, latents: Tensor | None) -> None:
        """The estimate [B,4,T,H,W] on the leading rank, None on the others."""


class CleanEstimate:
    """A velocity function that remembers its last answer.

    Rectified flow moves in a straight line from noise to video: z_t = (1 - u) * clean + u * noise
    with u = t / 1000, and the model's velocity is clean - noise. So clean = z_t + u * velocity.
    """

    def __init__(self, velocity: VelocityFunction) -> None:
        self._velocity = velocity
        self._last: Tensor | None = None
        self._generate: Tensor | None = None

    def __call__(self, z: Tensor, t: float, generate: Tensor | None) -> Tensor:
        """The velocity, as `sample` asks for it."""
        self._last = self._velocity(z, t, generate)
        self._generate = generate
        return self._last

    def clean(self, z: Tensor, t: float) -> Tensor:
        """What z at time t leads to by the last velocity; of z's shape, sharded as z is.

        Kept frames are clean already. Before the first velocity it is z.
        """
        if self._last is None:
            return z
        level = t / TRAINING_TIMESTEPS
        if self._generate is None:
            return z + self._last * level
        generated = self._generate.to(z.device, z.dtype)
        return z + self._last * level * generated.reshape(
            *generated.shape, *([1] * (z.ndim - generated.ndim))
        )
