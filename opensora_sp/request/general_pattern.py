"""A step schedule for a model that has none of its own, from the times of the steps. No torch.

On the embedded model the second derivative of a run's velocity in time is about
4 / (1.02 − t)² + 0.5 / t², t from 1, the noise, to 0: at every size that was tried, and with the
step times of sizes up to 720p and 16 s (docs/step_cache.md). So which steps matter follows from
their times. At small sizes the steps near the noise do. At large ones most steps lie near the
noise, close to one another, and those that come after them do. 1.005 stands here for 1.02: what is
wrong near the noise also changes what comes after it, and single prompts became other videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from opensora_sp.request.step_cache import LEVELS
from opensora_sp.request.step_schedule import fill_weights
from opensora_sp.request.step_times import TRAINING_TIMESTEPS

FEWEST_STEPS = 10  # of which any is left out
FILL = "linear"  # of the steps left out
LONGEST = 8  # steps from a computed one to the next, at most
MOST_STEPS = 100  # that are looked at one by one; of more, groups: the search is quadratic
SHARES = dict(zip(LEVELS, (2 / 3, 1 / 2), strict=True))  # of the steps that are computed


@lru_cache(maxsize=64)
def general_steps(level: str, times: tuple[float, ...]) -> tuple[int, ...]:
    """The computed steps of a level, ascending from 0, for the fill of FILL.

    level: one of LEVELS. times: of all steps, falling from 1000; the run ends at 0.
    The list of that many steps with the smallest sum of squared errors of what moves the latents,
    each stretch of steps left out on its own. Of more than MOST_STEPS steps, neighbours are
    computed or left out together.
    """
    steps = len(times)
    together = math.ceil(steps / MOST_STEPS)
    if together == 1:
        return _best_list(level, times)
    groups = _best_list(level, times[::together])
    starts = (group * together for group in groups)
    return tuple(step for at in starts for step in range(at, min(at + together, steps)))


def _best_list(level: str, times: Sequence[float]) -> tuple[int, ...]:
    """By dynamic programming over the last two computed steps."""
    import numpy as np

    steps, count = len(times), math.ceil(SHARES[level] * len(times))
    # [k]: the smallest cost of being at a pair of computed steps with k steps computed so far.
    best: dict[tuple[int | None, int], Any] = {(None, 0): np.full(count + 1, np.inf)}
    best[None, 0][1] = 0.0
    came: dict[tuple[int | None, int], list[int | None]] = {}
    for last in range(steps - 1):
        for pair in [(before, last) for before in (None, *range(last)) if (before, last) in best]:
            for following, cost in enumerate(_stretches(times, *pair), last + 1):
                reached = best[pair][:-1] + cost
                then = (last, following)
                if then not in best:
                    best[then] = np.full(count + 1, np.inf)
                    came[then] = [None] * (count + 1)
                better = reached < best[then][1:]
                best[then][1:][better] = reached[better]
                for computed in map(int, np.flatnonzero(better)):
                    came[then][computed + 1] = pair[0]
    # The last step is computed: what it would leave out goes to the end of the run.
    ends = [pair for pair in came if pair[1] == steps - 1]
    pair = min(ends, key=lambda end: float(best[end][count]))
    found = [pair[1]]
    for left in range(count, 1, -1):
        before = pair[0]
        assert before is not None, "only the first step has none before it"
        found.append(before)
        pair = (came[pair][left], before)
    return tuple(reversed(found))


def _stretches(times: Sequence[float], before: int | None, last: int) -> list[float]:
    """Costs of the stretches from a computed step to each of those that may be the next."""
    known = [times[step] for step in (before, last) if step is not None]
    velocities = [_velocity(time) for time in known]
    error, costs = 0.0, [0.0]
    for step in range(last + 1, min(last + LONGEST, len(times) - 1)):
        weights = fill_weights(FILL, known, times[step])
        filled = sum(w * v for w, v in zip(weights, velocities, strict=True))
        error += (times[step] - times[step + 1]) * (_velocity(times[step]) - filled)
        costs.append(error**2)
    return costs


def _velocity(time: float) -> float:
    """What has the second derivative above."""
    t = time / TRAINING_TIMESTEPS
    return -4 * math.log(1.005 - t) - 0.5 * math.log(t)
