"""Which precision each product gets: a knapsack with one choice for each product, solved exactly by HiGHS."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from compress.candidates import Candidates, Doubles, Objective

FRONT_POINTS = 12
TIE = 1e-4  # how much of the objective the KL may weigh, to prefer the better of two recipes that cost the same
GAP = 1e-4  # of the least cost: how near to it is near enough
SLACK = 1e-9  # of the limit: sums of floats


def allocate(kl: Doubles, cost: Doubles, limit: float) -> list[int] | None:
    """For each product (row) the column with the least cost in sum whose KL is at most `limit` in sum.

    Entries that are infinite are never chosen. None if no choice is within the limit.
    """
    is_open = np.isfinite(kl) & np.isfinite(cost)
    least = np.where(is_open, kl, np.inf).min(axis=1).sum()
    if not least <= limit * (1 + SLACK):
        return None
    num_products, num_choices = kl.shape
    kl, cost = np.where(is_open, kl, 0.0), np.where(is_open, cost, 0.0)
    share = kl / max(limit, 1e-300)
    objective = cost / max(cost.max(axis=1).sum(), 1e-300) + TIE / num_products * share / max(share.max(), 1e-300)
    each = np.repeat(np.arange(num_products), num_choices)
    one = csr_array((np.ones(kl.size), (each, np.arange(kl.size))), shape=(num_products, kl.size))
    rows = vstack([one, csr_array(share.reshape(1, -1))])
    low, high = np.ones(num_products + 1), np.ones(num_products + 1)
    low[-1], high[-1] = -np.inf, 1 + SLACK
    found = milp(
        objective.ravel(),
        integrality=np.ones(kl.size),
        bounds=Bounds(0, is_open.ravel().astype(float)),
        constraints=LinearConstraint(rows, low, high),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise RuntimeError(f"the knapsack was not solved: {found.message}")
    return [int(i) for i in found.x.reshape(kl.shape).argmax(axis=1)]


def front(candidates: Candidates, objective: Objective, num_points: int = FRONT_POINTS) -> list[list[int]]:
    """Choices from the least KL to the least cost, each the cheapest within its KL."""
    kl, cost = candidates.kl, candidates.costs[objective]
    rows = range(len(kl))
    least = kl.min(axis=1).sum()
    most = kl[rows, np.lexsort((kl, cost), axis=1)[:, 0]].sum()
    choices: list[list[int]] = []
    for limit in np.geomspace(least, max(most, least), num_points):
        choice = allocate(kl, cost, float(limit))
        if choice is not None and choice not in choices:
            choices.append(choice)
    return choices
