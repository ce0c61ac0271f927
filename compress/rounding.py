"""Error-compensating weight rounding (GPTQ, arXiv:2210.17323).

Columns of a weight are rounded one after another; each column's error is made up for by the columns still to come,
as far as the inputs are correlated. `hessian` is the second moment of the product's inputs, sum over rows of x x^T.
"""

from __future__ import annotations

import numpy as np

from compress.checkpoint import Floats
from compress.linear import LEVELS, TINY, Int8

BLOCK = 128  # columns updated one by one, before their joint effect goes to the rest in one product
DAMPING = 0.01  # of the mean diagonal: keeps the inverse stable when few rows were seen


def round_compensating(weight: Floats, hessian: Floats) -> tuple[Int8, Floats]:
    """Weight [N, K] and hessian [K, K] -> int8 [N, K] and scale [N], symmetric per output channel."""
    num_inputs = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable")  # the inputs that matter most first, while all can make up
    rest = weight[:, order].astype(np.float32)  # what is still to be rounded, with the errors so far made up for
    factor = inverse_factor(hessian[np.ix_(order, order)])
    scale = np.maximum(np.abs(weight).max(axis=1), TINY) / LEVELS
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, num_inputs, BLOCK):
        end = min(start + BLOCK, num_inputs)
        errors = np.empty((len(weight), end - start), np.float32)
        for k in range(start, end):
            q = np.clip(np.rint(rest[:, k] / scale), -LEVELS, LEVELS)
            rounded[:, order[k]] = q
            errors[:, k - start] = (rest[:, k] - q * scale) / factor[k, k]
            rest[:, k + 1 : end] -= np.outer(errors[:, k - start], factor[k, k + 1 : end])
        rest[:, end:] -= errors @ factor[start:end, end:]
    return rounded, scale.astype(np.float32)


def inverse_factor(hessian: Floats) -> Floats:
    """Upper Cholesky factor of the damped inverse: row k tells how later columns make up for column k."""
    damped = hessian.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(damped).mean() + TINY
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
