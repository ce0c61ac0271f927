"""How far a figure would move if other examples of the same kind had been drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
SHARE = 0.95

Figure = Callable[[NDArray[np.float64]], float]
Interval = tuple[float, float]


def interval(statistics: Sequence[Sequence[float]], figure: Figure, *, seed: int) -> Interval:
    """The bootstrap's 95 % percentile interval of figure(sum of the examples' statistics [examples, numbers]).

    Examples are drawn with replacement. The draws depend on the seed and the number of examples alone, so that two
    targets judged by the same examples are resampled alike.
    """
    table = np.asarray(statistics, dtype=np.float64)
    generator = np.random.default_rng(seed)
    figures = [figure(table[generator.integers(len(table), size=len(table))].sum(0)) for _ in range(RESAMPLES)]
    low, high = np.quantile(figures, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, seed: int) -> Interval:
    return interval([[value] for value in values], lambda total: float(total[0]) / len(values), seed=seed)
