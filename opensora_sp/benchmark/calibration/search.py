"""The path search: the best list of computed steps of every length, from full runs' velocities.

A stretch goes from a computed step to the next computed one. The steps between are left out: their
velocities are filled from the last computed ones. Its cost is what that moves the latents wrongly,
‖Σ Δt_i (v_i − v̂_i)‖² over the steps left out, on a full run's own velocities v and their fills v̂.
Costs of stretches are added: that a wrong place changes the velocities after it is ignored. Every
cost is a quadratic form in the velocities, so their inner products are all that is needed. numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from opensora_sp.request.step_schedule import FILLS, fill_weights

Floats = NDArray[np.float64]

# A search with quadratic fills looks at n⁴/24 stretches: seconds for 30 steps, minutes beyond 50.
MOST_STEPS = {"hold": 1000, "linear": 120, "quadratic": 40}


@dataclass(frozen=True)
class Path:
    """A list of computed steps, ascending from 0, and the sum of its stretches' costs."""

    computed: tuple[int, ...]
    cost: float


class Stretches:
    """The costs of stretches, from the inner products of a full run's velocities.

    gram [n,n] float64: inner products of the velocities of n steps. times: of the steps, falling;
    the run ends at 0. fill: one of FILLS.
    """

    def __init__(self, gram: Floats, times: Sequence[float], fill: str) -> None:
        self.steps, self.reads = len(times), FILLS.index(fill) + 1
        self._fill = fill
        if gram.shape != (self.steps, self.steps):
            raise ValueError(f"inner products {gram.shape} of {self.steps} steps")
        self._gram = np.asarray(gram, dtype=np.float64)
        self._times = tuple(times)
        self.moves = -np.diff(np.array([*times, 0.0]))
        # [i,j]: the inner product of velocity j with the sum of the moves of the steps before i.
        self._moved = np.zeros((self.steps + 1, self.steps))
        np.cumsum(self.moves[:, None] * self._gram, axis=0, out=self._moved[1:])
        self._whole = np.zeros((self.steps + 1, self.steps + 1))
        np.cumsum(self._moved * self.moves, axis=1, out=self._whole[:, 1:])

    def costs(self, known: tuple[int, ...]) -> Floats:
        """Costs of the stretches from a computed step to each later one and to the end.

        known: the computed steps that a fill reads, ascending; the last one begins the stretch.
        Returns [n - last]: entry k is of the stretch to step last + 1 + k, n being the end.
        """
        last, at = known[-1], [self._times[step] for step in known]
        filled = np.array(
            [
                self.moves[i] * np.array(fill_weights(self._fill, at, self._times[i]))
                for i in range(last + 1, self.steps)
            ]
        ).reshape(-1, len(known))
        weights = np.zeros((self.steps - last, len(known)))
        np.cumsum(filled, axis=0, out=weights[1:])
        ends = np.arange(last + 1, self.steps + 1)
        whole, begin = self._whole, last + 1
        exact = whole[ends, ends] - 2 * whole[ends, begin] + whole[begin, begin]
        crossed = self._moved[ends][:, known] - self._moved[begin, list(known)]
        gram = self._gram[np.ix_(known, known)]
        costs = exact - 2 * (weights * crossed).sum(1) + ((weights @ gram) * weights).sum(1)
        # Rounding may leave the cost of a stretch without steps just below zero.
        costs = np.maximum(costs, 0.0)
        costs[0] = 0.0
        return costs

    def cost(self, computed: Sequence[int]) -> float:
        """The cost of a whole list of computed steps, which begins with step 0."""
        total = 0.0
        for place, last in enumerate(computed):
            known = tuple(computed[max(0, place + 1 - self.reads) : place + 1])
            following = computed[place + 1] if place + 1 < len(computed) else self.steps
            total += float(self.costs(known)[following - last - 1])
        return total


def best_paths(gram: Floats, times: Sequence[float], fill: str) -> dict[int, Path]:
    """For every number of computed steps, 1 to n, the list of the smallest cost.

    Dynamic programming. The state is what the next stretch's cost depends on: the last computed
    step where velocities are held, the last two or three where they are extrapolated. Arguments as
    for `Stretches`. A fill that reads k velocities looks at about n^(k+1) / (k+1)! stretches.
    """
    stretches = Stretches(gram, times, fill)
    steps, reads = stretches.steps, stretches.reads
    # By state: the smallest cost to be there with k computed steps, and the state before it.
    best: dict[tuple[int, ...], Floats] = {(0,): _only_at(steps, 1, 0.0)}
    before: dict[tuple[int, ...], list[tuple[int, ...] | None]] = {(0,): [None] * (steps + 1)}
    ends = np.full(steps + 1, np.inf)
    last_state: list[tuple[int, ...]] = [(0,)] * (steps + 1)
    for last in range(steps):
        for state in _states(last, reads):
            if state not in best:
                continue
            mine, costs = best[state], stretches.costs(state)
            for following in range(last + 1, steps):
                then = (*state, following)[-reads:]
                if then not in best:
                    best[then] = np.full(steps + 1, np.inf)
                    before[then] = [None] * (steps + 1)
                reached = mine[:-1] + costs[following - last - 1]
                better = reached < best[then][1:]
                best[then][1:][better] = reached[better]
                for count in map(int, np.flatnonzero(better)):
                    before[then][count + 1] = state
            total = mine + costs[-1]
            for count in map(int, np.flatnonzero(total < ends)):
                ends[count], last_state[count] = total[count], state
    found = {}
    for count in range(1, steps + 1):
        computed: list[int] = []
        state, left = last_state[count], count
        while left > 0:
            computed.append(state[-1])
            came_from = before[state][left]
            left -= 1
            if came_from is None:
                break
            state = came_from
        found[count] = Path(tuple(reversed(computed)), float(ends[count]))
    return found


def _states(last: int, reads: int) -> list[tuple[int, ...]]:
    """The states whose last computed step is `last`: up to `reads` computed steps, the first 0."""
    full = [(*rest, last) for rest in combinations(range(last), reads - 1)]
    # Near the beginning fewer steps are computed than a fill could read; all of them are there.
    short = [
        (0, *rest, last)
        for size in range(reads - 2)
        for rest in combinations(range(1, last), size)
        if last > 0
    ]
    return [*short, *full] if last > 0 else [(0,)]


def _only_at(steps: int, count: int, cost: float) -> Floats:
    costs = np.full(steps + 1, np.inf)
    costs[count] = cost
    return costs
