"""Which steps of a batch are computed: those of its schedule, and those at which frames join.

For plans, progress and reports, which have no frame masks. `FilledVelocity` has them, and decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from itertools import accumulate

from opensora_sp.base.errors import UserError
from opensora_sp.request.conditions import UNKNOWN_FRAMES, all_groups, layout_of
from opensora_sp.request.mask_strategy import plan_clip
from opensora_sp.request.request import Request
from opensora_sp.request.step_schedule import StepSchedule
from opensora_sp.request.step_times import TRAINING_TIMESTEPS, times_of


def computed_steps(
    requests: Sequence[Request], schedule: StepSchedule | None, clip: int
) -> tuple[int, ...]:
    """The steps of a clip of a batch that are computed, ascending.

    requests: of the batch, which differ in their references and strategies only. schedule: of all
    of them; None computes every step. A step at which frames of any of them join is computed.
    References are taken to be as long as the strategies want them.
    """
    steps = range(requests[0].steps)
    if schedule is None:
        return tuple(steps)
    must = {0, *schedule.computed}
    for request in requests:
        must |= _joins(request, clip)
    return tuple(step for step in steps if step in must)


def most_computed(requests: Sequence[Request], schedule: StepSchedule | None) -> int:
    """How many steps are computed of that clip of a batch that computes most of them."""
    return max(len(computed_steps(requests, schedule, n)) for n in range(requests[0].loop))


def heaviest_batch(
    batches: Sequence[Sequence[Request]], schedule: StepSchedule | None
) -> Sequence[Request]:
    """The batch of most requests; of several of them the one of which most steps are computed."""
    return max(batches, key=lambda batch: (len(batch), most_computed(batch, schedule)))


def computed_before(requests: Sequence[Request]) -> list[int]:
    """How many steps of a batch are computed before each one, over all clips, and in all at last.

    Every step counts where their step cache is not settled yet.
    """
    first = requests[0]
    schedule = first.step_cache if isinstance(first.step_cache, StepSchedule) else None
    found = [0]
    for clip in range(first.loop):
        computed = set(computed_steps(requests, schedule, clip))
        found += [found[-1] + n for n in accumulate(int(s in computed) for s in range(first.steps))]
    return found


def _joins(request: Request, clip: int) -> set[int]:
    """The steps from 1 on at which a clip's frames join, as `joining_steps` finds them."""
    times = times_of(request)
    found: set[int] = set()
    for ratio in _ratios(request, clip):
        # A frame is generated from this time on, in the arithmetic of `generated_at`: float32.
        level = _float32(_float32(ratio) * TRAINING_TIMESTEPS)
        generated = [level >= _float32(t) for t in times]
        found |= {i for i in range(1, len(times)) if generated[i] != generated[i - 1]}
    return found


def _ratios(request: Request, clip: int) -> set[float]:
    """The edit ratios between 0 and 1 that frames of a clip have."""
    groups = [group for group in all_groups(request) if group.loop == clip]
    if not any(0 < group.edit_ratio < 1 for group in groups):
        return set()
    layout = layout_of(request)
    frames = [UNKNOWN_FRAMES] * (1 + max(group.ref for group in groups))
    mask = [1.0] * layout.latents
    try:
        placements = plan_clip(groups, clip, frames, layout, request.align)
    except UserError:  # said where the references are looked at
        return set()
    for one in placements:
        mask[one.target_start : one.target_start + one.length] = [one.edit_ratio] * one.length
    return {ratio for ratio in mask if 0 < ratio < 1}


def _float32(value: float) -> float:
    return c_float(value).value
