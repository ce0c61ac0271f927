"""How much of a budget a recipe uses, and how much KL the next one may have for it to be used up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compress.budget import SIGNS, Budget, parse
from compress.measurements import Judged

PERFECT = {"perplexity_ratio": 1.0, "kl": 0.0, "greedy_agreement": 1.0}  # what can be budgeted: its value for float
TARGET = 0.97  # what the next build aims at
ENOUGH = 0.93  # who uses so much is not improved on
LEAST = 1e-3  # artifacts may be better than their reference


def parse_budget(text: str) -> Budget:
    """Raises ValueError for limits on what cannot be traded for speed, or that only the float model meets."""
    budget = parse(text)
    for name, limit in budget.thresholds.items():
        if name not in PERFECT:
            raise ValueError(f"--budget {text!r} limits {name}; search can spend {', '.join(PERFECT)}")
        if limit <= PERFECT[name] if SIGNS[name] == "<=" else limit >= PERFECT[name]:
            raise ValueError(f"--budget {text!r} leaves nothing to spend; allow more than the float model has")
    return budget


def use_of(budget: Budget, judged: Judged) -> float:
    """The largest share that the figures use of their limits; within the budget if at most 1.

    As in the gate, a figure's whole interval counts. What is missing or not a number uses infinitely much.
    """
    shares = []
    for name, limit in budget.thresholds.items():
        values = [judged.metrics.get(name, math.nan)]
        if name in judged.intervals:
            values += [judged.intervals[name].low, judged.intervals[name].high]
        shares += [(value - PERFECT[name]) / (limit - PERFECT[name]) for value in values]
    return max((share if math.isfinite(share) else math.inf for share in shares), default=0.0)


def next_limit(points: Sequence[tuple[float, float]]) -> float:
    """The predicted KL at which TARGET of the budget should be used, from (predicted KL, use) of what was built.

    Use grows as a power of the KL between two neighbours, and in proportion beyond the first and the last.
    """
    kl, use = np.array(sorted(points)).T
    kl, use = np.log(kl), np.maximum.accumulate(np.log(np.clip(use, LEAST, 1 / LEAST)))
    wanted = math.log(TARGET)
    if wanted <= use[0]:
        return math.exp(kl[0] + wanted - use[0])
    if wanted >= use[-1]:
        return math.exp(kl[-1] + wanted - use[-1])
    return math.exp(float(np.interp(wanted, use, kl)))
