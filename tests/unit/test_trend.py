"""The slope of scripts/soak.py and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.trend import student_95, trend


def test_a_slope_is_that_of_least_squares_and_student_is_the_tables() -> None:
    draw = np.random.default_rng(1)
    x = np.arange(40) / 60
    y = 400 + 3 * x + draw.normal(size=40)
    found = trend(list(x), list(y))
    assert (found.slope, found.at_zero) == pytest.approx(tuple(np.polyfit(x, y, 1)))
    flat = trend([1, 2, 3, 4], [7.0, 7.0, 7.0, 7.0])
    assert (flat.slope, flat.low, flat.high) == (0, 0, 0)
    # From the printed tables of Student's distribution.
    for freedom, value in ((2, 4.303), (5, 2.571), (30, 2.042), (1000, 1.962)):
        assert student_95(freedom) == pytest.approx(value, rel=0.01)
    with pytest.raises(ValueError, match="3 samples"):
        trend([1, 2], [1, 2])


@pytest.mark.parametrize("alike", [0.0, 0.6])
def test_the_interval_holds_the_slope_as_often_as_it_says(alike: float) -> None:
    """Series of known slope 2 and noise of known correlation, as samples a minute apart have."""
    draw = np.random.default_rng(7)
    x, held, told = np.arange(120) / 60, 0, 0
    for _ in range(400):
        noise = draw.normal(size=120)
        for i in range(1, 120):
            noise[i] += alike * noise[i - 1]
        found = trend(list(x), list(500 + 2 * x + noise))
        told += found.low is not None
        held += found.low is not None and found.low <= 2 <= (found.high or 0)
    assert told == 400
    assert 0.9 <= held / told <= 0.985
