"""Error-compensating weight rounding (GPTQ, arXiv:2210.17323; in the form of LDLQ, arXiv:2307.13304).

Columns of a weight are rounded one after another; each column makes up for the errors of those before it, as far as the
inputs are correlated. `hessian` is the second moment of the product's inputs, sum over rows of x x^T.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Floats
from compress.levels import LEVELS, TINY, Weight4, Weight8, nearest_levels, round_by_group

BLOCK = 128  # columns that make up one by one for each other's errors, and together for those of all before
ROWS = 4096  # rows at a time: they do not depend on each other, and the head has as many as the vocabulary
DAMPING = 0.03  # of the mean diagonal: what the calibration text correlates by chance

# (rows, k, column of what is to be rounded) -> the value that the grid has for it; keeps the levels
Rounder = Callable[[slice, int, Floats], Floats]


def round_compensating(weight: Floats, hessian: Floats) -> Weight8:
    """Weight [N, K] and hessian [K, K] -> symmetric int8 per output channel."""
    scale = (np.maximum(np.abs(weight).max(axis=1), TINY) / LEVELS).astype(np.float32)
    levels = np.empty(weight.shape, np.int8)

    def to_grid(rows: slice, k: int, column: Floats) -> Floats:
        q = np.clip(np.rint(column / scale[rows]), -LEVELS, LEVELS)
        levels[rows, k] = q
        value: Floats = q * scale[rows]
        return value

    compensate(weight, hessian, to_grid)
    return Weight8(levels, scale)


def round_by_group_compensating(weight: Floats, hessian: Floats, group: int) -> Weight4:
    """Weight [N, K] and hessian [K, K] -> 4 bits by group of inputs.

    The grids are chosen beforehand, for the weight as it was: so the columns may be rounded in any order.
    """
    nearest = round_by_group(weight, group)
    steps = nearest.scale[:, None] * nearest.step

    def to_grid(rows: slice, k: int, column: Floats) -> Floats:
        step, zero = steps[rows, k // group], nearest.zero[rows, k // group]
        q = nearest_levels(column, step, zero)
        nearest.levels[rows, k] = q
        value: Floats = (q - zero) * step
        return value

    compensate(weight, hessian, to_grid)
    return nearest


def compensate(weight: Floats, hessian: Floats, to_grid: Rounder) -> None:
    """Give the columns to `to_grid`, one after the other, with the errors so far made up for."""
    order = np.argsort(-np.diag(hessian), kind="stable")  # the inputs that matter most first, while all can make up
    factor = feedback(hessian[np.ix_(order, order)])
    for first in range(0, len(weight), ROWS):
        rows = slice(first, min(first + ROWS, len(weight)))
        exact = np.ascontiguousarray(weight[rows].T[order], np.float32)  # [K, rows]: a column lies together
        errors = np.empty_like(exact)
        for start in range(0, len(order), BLOCK):
            end = min(start + BLOCK, len(order))
            wanted = exact[start:end] + factor[:start, start:end].T @ errors[:start]
            for k in range(start, end):
                column = wanted[k - start] + factor[start:k, k] @ errors[start:k]
                errors[k] = exact[k] - to_grid(rows, int(order[k]), column)


def feedback(hessian: Floats) -> Floats:
    """How much of the error of input j the input k > j makes up for: [j, k], the rest is not used.

    The unit upper factor U of the damped hessian U D U^T.
    """
    upper = np.linalg.cholesky(damped(hessian, DAMPING)[::-1, ::-1])[::-1, ::-1]
    return (upper / np.diag(upper)).astype(np.float32)


def damped(moment: Floats, share: float) -> NDArray[np.float64]:
    """float64, with a share of the mean diagonal added to it."""
    wide = moment.astype(np.float64)
    wide[np.diag_indices_from(wide)] += share * np.diag(wide).mean() + TINY
    return wide
