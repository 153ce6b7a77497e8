"""Which lists of computed steps are tried by whole runs, and which become schedules. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from opensora_sp.benchmark.calibration.search import MOST_STEPS, Floats, Stretches, best_paths
from opensora_sp.request.step_schedule import FILLS

_NEAR = 3.0  # dB between the predictions of two fills from which on only the better one is tried
_LOWEST = 1e-12  # of a mean square error: far below the rounding of latents


@dataclass(frozen=True)
class Level:
    """What a list has to reach, in dB: the mean over the prompts, and the worst prompt."""

    mean: float
    worst: float

    def holds(self, found: Sequence[float]) -> bool:
        """Whether decibels by prompt reach it."""
        return fmean(found) >= self.mean and min(found) >= self.worst


LEVELS: Mapping[str, Level] = {
    "near-lossless": Level(52.0, 46.0),
    "fast": Level(43.0, 37.0),
    "draft": Level(34.0, 24.0),
}


@dataclass(frozen=True)
class Candidate:
    """A list of computed steps and its fill. predicted: dB of the latents, by the path search."""

    computed: tuple[int, ...]
    fill: str
    predicted: float

    @property
    def count(self) -> int:
        """How many steps are computed."""
        return len(self.computed)


# By number of computed steps: the candidates, the best prediction first.
Candidates = Mapping[int, Sequence[Candidate]]
# Decibels of each prompt's frames against its full run.
Measure = Callable[[Candidate], Sequence[float]]


def candidates_of(grams: Sequence[Floats], times: Sequence[float]) -> dict[int, list[Candidate]]:
    """The best list of every number of computed steps and every fill.

    grams: of each prompt's full run, as `Trajectory.inner_products`. Prompts count alike: costs
    differ by a factor of ten between them, and the dearest would choose alone. So each is divided
    by what it costs itself to leave half of the steps out.
    """
    steps = len(times)
    shares = []
    for gram in grams:
        half = best_paths(gram, times, "hold")[max(2, steps // 2)].cost
        shares.append(gram / max(half, _LOWEST))
    together = sum(shares[1:], start=shares[0]) / len(shares)
    found: dict[int, list[Candidate]] = {count: [] for count in range(1, steps)}
    for fill in FILLS:
        if steps > MOST_STEPS[fill]:
            continue
        paths = best_paths(together, times, fill)
        own = [Stretches(gram, times, fill) for gram in grams]
        for count in found:
            computed = paths[count].computed
            errors = [max(one.cost(computed), _LOWEST) for one in own]
            predicted = fmean(-10 * math.log10(error) for error in errors)
            found[count].append(Candidate(computed, fill, predicted))
    for several in found.values():
        several.sort(key=lambda one: -one.predicted)
    return found


@dataclass
class Curve:
    """The candidates of a model and size, and what whole runs have shown of them.

    measure: makes the whole runs; what it returned is kept in `measured`.
    """

    candidates: Candidates
    measure: Measure
    measured: dict[Candidate, tuple[float, ...]] = field(default_factory=dict)

    def run(self, one: Candidate) -> tuple[float, ...]:
        """Decibels of each prompt; measured once."""
        if one not in self.measured:
            self.measured[one] = tuple(self.measure(one))
        return self.measured[one]

    def best(self, count: int) -> Candidate:
        """The candidate of the best prediction."""
        return self.candidates[count][0]

    def estimate(self, one: Candidate) -> float | None:
        """Decibels of the frames: the prediction, moved by what the nearest measured one missed."""
        if not self.measured:
            return None
        near = min(
            self.measured, key=lambda other: (abs(other.count - one.count), other.fill != one.fill)
        )
        return one.predicted + fmean(self.measured[near]) - near.predicted

    def holding(self, count: int, level: Level) -> Candidate | None:
        """The first candidate of a number of steps that holds a level, by whole runs.

        Those are tried that are predicted nearly as good as the best one: the search cannot tell
        how a run goes on from a wrong place, and extrapolating amplifies what holding does not.
        """
        best = self.best(count)
        for one in self.candidates[count]:
            if one.predicted > best.predicted - _NEAR and level.holds(self.run(one)):
                return one
        return None

    def fewest(self, level: Level) -> Candidate | None:
        """A candidate of the fewest computed steps that hold a level; None where none does.

        Numbers of steps are halved in between, from where the prediction expects the border.
        """
        fails, holds = 1, max(self.candidates) + 1
        found: Candidate | None = None
        if not self.measured:
            self.run(self.best(max(2, holds // 2)))
        while holds - fails > 1:
            count = self._expected(level, fails + 1, holds - 1)
            one = self.holding(count, level)
            if one is None:
                fails = count
            else:
                found, holds = one, count
        return found

    def _expected(self, level: Level, low: int, high: int) -> int:
        """The fewest steps from low to high that are estimated to hold a level."""
        for count in range(low, high + 1):
            estimate = self.estimate(self.best(count))
            if estimate is not None and estimate >= level.mean:
                return count
        return high
