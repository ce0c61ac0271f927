"""A confidence interval for a mean that may be looked at as often as one likes.

The usual 95 % interval holds at one number of observations, fixed beforehand; who looks again and again until it says
something will in the end be told what is not so. A confidence sequence holds at all times at once: with probability
1 - alpha the true mean is never outside, so a decision may be made at the first look that allows it.

This one is from betting: Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting",
JRSS B 86(1), the hedged capital of their section 4.4. A gambler bets on each observation before seeing it that it
lies above m, another one that it lies below. If m is the mean neither can expect to gain, so by Ville's inequality
the one or the other multiplies its money by 2 / alpha with probability alpha at most; a value of m that made one of
them so rich is left out. It assumes bounds and the same mean given the past; no distribution, no least number.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MOST_AT_STAKE = 0.75  # of the money on one observation; the paper's c, which may be anything below 1
STEPS = 40  # of the bisection: bounds to 1e-12 of the range

Values = NDArray[np.float64]


def interval(values: Values, reach: float, alpha: float) -> tuple[float, float]:
    """Bounds on the mean of observations [n] from -reach to reach, in the order they came."""
    if not len(values):
        return -reach, reach
    unit = (values / reach + 1) / 2  # 0 to 1
    stakes = _stakes(unit, alpha)
    low, high = _lower(unit, stakes, alpha), 1 - _lower(1 - unit, stakes, alpha)
    return (2 * low - 1) * reach, (2 * high - 1) * reach


def capital(unit: Values, stakes: Values, mean: float) -> Values:
    """[n]: the logarithm of what who bets on more than `mean` has after each of the observations [n], 0 to 1."""
    return np.cumsum(np.log1p(np.minimum(stakes, MOST_AT_STAKE / mean) * (unit - mean)))


def _stakes(unit: Values, alpha: float) -> Values:
    """[n]: the paper's predictable plug-in (its equation 26), each from the observations before."""
    count = np.arange(1, len(unit) + 1)
    means = (0.5 + np.cumsum(unit)) / (count + 1)
    variances = (0.25 + np.cumsum((unit - means) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    return np.sqrt(2 * math.log(2 / alpha) / (before * count * np.log1p(count)))


def _lower(unit: Values, stakes: Values, alpha: float) -> float:
    """The least mean that does not make who bets on more rich. The capital falls as the mean rises."""
    out, kept = 0.0, 1.0
    for _ in range(STEPS):
        middle = (out + kept) / 2
        if capital(unit, stakes, middle)[-1] >= math.log(2 / alpha):
            out = middle
        else:
            kept = middle
    return out
