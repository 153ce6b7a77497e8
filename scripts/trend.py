"""The slope of a series of samples, and how sure it is where neighbouring samples are alike.

Ordinary least squares gives the slope. Its usual error counts every sample as independent, which
samples of one process a minute apart are not. So the number of samples n is replaced by an
effective one, n (1 - r) / (1 + r), with r the correlation of neighbouring residuals, both in the
variance of the residuals and in the degrees of freedom of Student's t (Santer et al. 2000,
doi:10.1029/1999JD901105, section 3). r is first raised by (1 + 4 r) / n, as a short series shows
less of its correlation than there is (Marriott and Pope 1954); below zero it counts as zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Fewer effective samples than this say nothing about a slope.
LEAST_EFFECTIVE = 4.0


@dataclass(frozen=True)
class Trend:
    """A fitted line. Slopes are in units of y for one unit of x.

    slope, at_zero: y = at_zero + slope x. low, high: the ends of the 95 % interval of the slope;
    None where the samples are too few or too alike to tell. effective: how many independent samples
    the series is worth. correlation: of neighbouring residuals, r above.
    """

    slope: float
    at_zero: float
    low: float | None
    high: float | None
    effective: float
    correlation: float


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """Fit a line to samples that are taken at about equal distances.

    Raises:
        ValueError: fewer than 3 samples, or all at one x.
    """
    n = len(x)
    if n != len(y) or n < 3 or min(x) == max(x):
        raise ValueError(f"a slope needs 3 samples at different times, not {n}")
    middle, mean = math.fsum(x) / n, math.fsum(y) / n
    spread = math.fsum((a - middle) ** 2 for a in x)
    slope = math.fsum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / spread
    rest = [b - mean - slope * (a - middle) for a, b in zip(x, y, strict=True)]
    squares = math.fsum(e * e for e in rest)
    at_zero = mean - slope * middle
    if squares <= n * (1e-12 * max(map(abs, y))) ** 2:  # the samples lie on the line
        return Trend(slope, at_zero, slope, slope, n, 0.0)
    alike = math.fsum(a * b for a, b in itertools.pairwise(rest)) / squares
    alike = min(0.99, max(0.0, alike + (1 + 4 * alike) / n))
    effective = n * (1 - alike) / (1 + alike)
    if effective < LEAST_EFFECTIVE:
        return Trend(slope, at_zero, None, None, effective, alike)
    error = math.sqrt(squares / (effective - 2) / spread) * student_95(effective - 2)
    return Trend(slope, at_zero, slope - error, slope + error, effective, alike)


def student_95(freedom: float) -> float:
    """Student's t within which 95 % lie, for 2 degrees of freedom or more.

    Fisher and Cornish's expansion about the normal value (Abramowitz and Stegun 26.7.5); off by
    under 1 % at 2 degrees, less above.
    """
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
