"""What a step cache is: a policy that says at which steps the blocks' last residual is reused.

Neighbouring denoising steps compute nearly the same in most blocks. With a step cache the first
pair of blocks is computed at every step. The policy then decides whether the other pairs are
computed too, or whether the residual that they added at the last computed step is added again.
That changes the result: what it saves in time it costs in exactness.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.request.runtime import Runtime


@runtime_checkable
class StepCache(Protocol):
    """A policy. One object serves all videos and keeps no state of any of them.

    Every rank of a video asks its own object at the same steps with the same arguments. So ranks
    decide alike as long as the answer follows from the arguments alone.
    """

    @property
    def name(self) -> str:
        """The policy with its settings. Ranks compare it: equal names must decide alike."""
        ...

    def reuse(self, step: int, t: float, change: float) -> bool:
        """Whether to reuse the last residual at this step instead of computing the blocks.

        step: counted from 0 within a clip. t: the step's time, 1000 is noise and 0 the video.
        change: how much the first pair's residual of the conditional branch has changed since the
        last computed step: the mean absolute difference, relative to the mean absolute value
        then, over all tokens of all ranks. A clip's first step is computed without asking, and so
        is the first one after another set of frames is generated.
        """
        ...


class NoCache:
    """Every step is computed: the default. Nothing is kept, compared or exchanged for it."""

    name = "none"

    def reuse(self, step: int, t: float, change: float) -> bool:
        """Never."""
        return False


def policy_of(runtime: Runtime) -> StepCache:
    """The policy that a runtime names. Raises UserError where its step_cache is none."""
    policy = NoCache() if runtime.step_cache is None else runtime.step_cache
    if isinstance(policy, type) or not isinstance(policy, StepCache):
        raise UserError(
            f"step_cache {shown(policy)} is not a StepCache: give a policy such as "
            "FirstBlockCache(threshold=0.1), or leave it out"
        )
    return policy
