"""The confidence sequence: who looks after every observation is told what is not so as rarely as alpha says."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.sequential import _stakes, capital, interval

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]

STREAMS, LENGTH, ALPHA = 1000, 400, 0.1

# Of mean 0, from -1 to 1.
LAWS: dict[str, Draw] = {
    "thumbs": lambda random, n: random.integers(0, 2, n) - random.integers(0, 2, n) * 1.0,
    "rare": lambda random, n: (random.random(n) < 0.02) * 1.0 - (random.random(n) < 0.02),
    "skewed": lambda random, n: np.where(random.random(n) < 0.1, 0.9, -0.1),
    "narrow": lambda random, n: random.normal(0, 0.05, n).clip(-1, 1),
    "widening": lambda random, n: random.uniform(-1, 1, n) * np.linspace(0.05, 1, n),
}


def rich(values: NDArray[np.float64], mean: float, alpha: float) -> NDArray[np.bool_]:
    """[n]: whether `mean` lies outside the interval after each of the observations."""
    unit, middle = (values + 1) / 2, (mean + 1) / 2
    stakes = _stakes(unit, alpha)
    return np.maximum(capital(unit, stakes, middle), capital(1 - unit, stakes, 1 - middle)) >= math.log(2 / alpha)


@pytest.mark.parametrize("law", LAWS)
def test_the_mean_is_outside_at_any_time_as_rarely_as_alpha(law: str) -> None:
    random = np.random.default_rng(0)
    missed = sum(bool(rich(LAWS[law](random, LENGTH), 0.0, ALPHA).any()) for _ in range(STREAMS))
    assert missed / STREAMS <= ALPHA


def test_the_usual_interval_would_not_do() -> None:
    """So the simulation above can tell."""
    random = np.random.default_rng(0)
    counts = np.arange(1, LENGTH + 1)
    missed = 0
    for _ in range(STREAMS):
        sums = np.cumsum(LAWS["thumbs"](random, LENGTH))
        missed += bool((np.abs(sums / np.sqrt(counts * 0.5)) > 1.645)[20:].any())
    assert missed / STREAMS > 3 * ALPHA


@pytest.mark.parametrize("law", LAWS)
def test_the_bounds_are_where_the_bets_win(law: str) -> None:
    values = LAWS[law](np.random.default_rng(1), 60)
    low, high = interval(values, 1.0, ALPHA)
    assert -1 <= low < values.mean() < high <= 1
    for bound, outwards in ((low, -1e-6), (high, 1e-6)):
        if abs(bound) < 1:
            assert rich(values, bound + outwards, ALPHA)[-1]
            assert not rich(values, bound - outwards, ALPHA)[-1]


def test_it_narrows_with_what_was_seen_and_with_how_little_that_varies() -> None:
    random = np.random.default_rng(2)
    thumbs, narrow = LAWS["thumbs"](random, 5000), LAWS["narrow"](random, 5000)
    widths = [high - low for low, high in (interval(thumbs[:n], 1.0, ALPHA) for n in (0, 50, 500, 5000))]
    assert widths[0] == 2.0
    assert widths[1] > 2 * widths[2] > 4 * widths[3]
    low, high = interval(narrow, 1.0, ALPHA)
    assert high - low < widths[3] / 5


def test_bounds_scale_with_the_reach() -> None:
    values = LAWS["thumbs"](np.random.default_rng(3), 100)
    low, high = interval(values, 1.0, ALPHA)
    assert interval(values * 7, 7.0, ALPHA) == pytest.approx((7 * low, 7 * high))
    assert interval(-values, 1.0, ALPHA) == pytest.approx((-high, -low))
