"""A velocity that is computed at some steps and follows from the last computed ones at the others.

It stands between the sampler and the model, and works on whatever the velocity is of: latents,
patches or a shard of patches. So a step left out computes no block and exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from opensora_sp.engine.sampling import VelocityFunction, joining_steps
from opensora_sp.engine.step_cache.policy import StepCache
from opensora_sp.request.step_schedule import FILLS, fill_weights


@dataclass(frozen=True)
class Computed:
    """The guided velocity of a step, float32 of z's shape."""

    step: int
    velocity: Tensor


class FilledVelocity:
    """A velocity function, as `opensora_sp.engine.sampling.sample` calls it: once a step, in order.

    velocity: the model's. times: of all steps. frame_mask: of the run, [B,T] or None. first_step:
    where the run begins. known: what `held` was before that step, for a run that goes on.

    A step is computed where the policy says so. The first is, and so is one at which other frames
    are generated than at the step before: kept frames run through the blocks with the modulation
    of time 0, so the velocities before it say nothing of the frames that join, and are forgotten.
    """

    def __init__(
        self,
        velocity: VelocityFunction,
        policy: StepCache,
        times: Sequence[float],
        frame_mask: Tensor | None = None,
        first_step: int = 0,
        known: Sequence[Computed] = (),
    ) -> None:
        self._velocity, self._times, self._fill = velocity, times, policy.fill
        self._joining = joining_steps(frame_mask, times)
        self._order = FILLS.index(policy.fill) + 1
        self._known = list(known)
        self._next = first_step
        # Where nothing is known to follow from, the first step of a run that goes on is computed.
        must = {0, *self._joining} | (set() if known else {first_step})
        self.computed = frozenset(
            step for step, t in enumerate(times) if step in must or policy.computes(step, t)
        )

    def __call__(self, z: Tensor, t: float, generate: Tensor | None = None) -> Tensor:
        """The velocity of the next step, float32 of z's shape."""
        step, self._next = self._next, self._next + 1
        if step not in self.computed:
            return self._filled(t)
        if step in self._joining:
            self._known.clear()
        velocity = self._velocity(z, t, generate)
        self._known = [*self._known, Computed(step, velocity)][-self._order :]
        return velocity

    def held(self) -> tuple[Computed, ...]:
        """The last computed velocities, in their order: what the following steps need."""
        return tuple(self._known)

    def _filled(self, t: float) -> Tensor:
        times = [self._times[one.step] for one in self._known]
        weights = fill_weights(self._fill, times, t)
        last = [one.velocity for one in self._known[-len(weights) :]]
        if len(last) == 1:
            return last[0]
        filled = last[0] * weights[0]
        for velocity, weight in zip(last[1:], weights[1:], strict=True):
            filled.add_(velocity, alpha=weight)
        return filled
