"""What a step cache is: a policy that says which steps are computed, and what fills the others.

Neighbouring steps have nearly the same velocity. A step left out takes one that follows from the
last computed ones. That changes the result: what it saves in time it costs in exactness.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_cache import OFF
from opensora_sp.request.step_schedule import FILLS, StepSchedule


@runtime_checkable
class StepCache(Protocol):
    """A policy. One object serves all videos and keeps no state of any of them.

    Every rank of a video asks its own object before the first step. So ranks compute the same steps
    as long as the answers follow from the arguments alone.
    """

    @property
    def name(self) -> str:
        """The policy with its settings. Ranks compare it: equal names must answer alike."""
        ...

    @property
    def fill(self) -> str:
        """What fills the steps left out: one of `opensora_sp.request.step_schedule.FILLS`."""
        ...

    def computes(self, step: int, t: float) -> bool:
        """Whether a step is computed. step: counted from 0 within a clip. t: its time, 1000 to 0.

        A clip's first step is computed whatever this says, and so is one at which other frames are
        generated than at the step before.
        """
        ...


def policy_of(request: Request, runtime: Runtime) -> StepCache | None:
    """The policy of a request, else the runtime's; None where every step is computed.

    Raises UserError where both have one, where the runtime's is none, and where the request's is
    still a level or a file: see `opensora_sp.engine.step_cache.settle`.
    """
    policy = runtime.step_cache
    if policy is not None:
        check_policy(policy)
    asked = request.step_cache
    if asked == OFF:
        return policy  # type: ignore[return-value]
    if policy is not None:
        raise UserError(
            f"step_cache {shown(_name(asked))} of the request meets step_cache "
            f"{shown(policy.name)} of the runtime: leave one of them out"
        )
    if not isinstance(asked, StepSchedule):
        raise UserError(
            f"step_cache {shown(asked)} of a request is not a schedule yet: call "
            "Pipeline.generate, which looks up what levels and files mean, or give a StepSchedule"
        )
    return asked if asked.left_out else None


def check_policy(policy: object) -> None:
    """Raise UserError for what is no policy, or one with a fill that there is not."""
    if isinstance(policy, type) or not isinstance(policy, StepCache):
        raise UserError(
            f"step_cache {shown(policy)} is not a StepCache: give an object with name, fill and "
            "computes(step, t), such as a StepSchedule, or leave it out"
        )
    if policy.fill not in FILLS:
        raise UserError(
            f"step_cache {policy.name}: its fill {shown(policy.fill)} is not one of "
            f"{', '.join(FILLS)}"
        )


def _name(asked: object) -> object:
    return asked.name if isinstance(asked, StepSchedule) else asked
