"""Error-compensating weight rounding (GPTQ, arXiv:2210.17323).

Columns of a weight are rounded one after another; each column's error is made up for by the columns still to come,
as far as the inputs are correlated. `hessian` is the second moment of the product's inputs, sum over rows of x x^T.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compress.checkpoint import Floats
from compress.levels import LEVELS, TINY, Weight4, Weight8, nearest_levels, round_by_group

BLOCK = 128  # columns updated one by one, before their joint effect goes to the rest in one product
DAMPING = 0.01  # of the mean diagonal: keeps the inverse stable when few rows were seen

# (k, column [N] of what is still to be rounded) -> the value [N] that the grid has for it; keeps the levels
Rounder = Callable[[int, Floats], Floats]


def round_compensating(weight: Floats, hessian: Floats) -> Weight8:
    """Weight [N, K] and hessian [K, K] -> symmetric int8 per output channel."""
    scale = (np.maximum(np.abs(weight).max(axis=1), TINY) / LEVELS).astype(np.float32)
    levels = np.empty(weight.shape, np.int8)

    def to_grid(k: int, column: Floats) -> Floats:
        q = np.clip(np.rint(column / scale), -LEVELS, LEVELS)
        levels[:, k] = q
        value: Floats = q * scale
        return value

    compensate(weight, hessian, to_grid)
    return Weight8(levels, scale)


def round_by_group_compensating(weight: Floats, hessian: Floats, group: int) -> Weight4:
    """Weight [N, K] and hessian [K, K] -> 4 bits by group of inputs.

    The grids are chosen beforehand, for the weight as it was: so the columns may be rounded in any order.
    """
    nearest = round_by_group(weight, group, np.diag(hessian))
    levels = nearest.levels

    def to_grid(k: int, column: Floats) -> Floats:
        scale, zero = nearest.scale[:, k // group], nearest.zero[:, k // group]
        q = nearest_levels(column, scale, zero)
        levels[:, k] = q
        value: Floats = (q - zero) * scale
        return value

    compensate(weight, hessian, to_grid)
    return nearest


def compensate(weight: Floats, hessian: Floats, to_grid: Rounder) -> None:
    """Give the columns to `to_grid`, one after the other, with the errors so far made up for."""
    num_inputs = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable")  # the inputs that matter most first, while all can make up
    rest = np.ascontiguousarray(weight.T[order], np.float32)  # [K, N]: a column of the weight lies together
    factor = inverse_factor(hessian[np.ix_(order, order)])
    for start in range(0, num_inputs, BLOCK):
        end = min(start + BLOCK, num_inputs)
        errors = np.empty((end - start, len(weight)), np.float32)
        for k in range(start, end):
            errors[k - start] = (rest[k] - to_grid(int(order[k]), rest[k])) / factor[k, k]
            rest[k + 1 : end] -= np.outer(factor[k, k + 1 : end], errors[k - start])
        rest[end:] -= factor[start:end, end:].T @ errors


def inverse_factor(hessian: Floats) -> Floats:
    """Upper Cholesky factor of the damped inverse: row k tells how later columns make up for column k."""
    damped = hessian.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(damped).mean() + TINY
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
