"""Learning rate by the share of a run that is done."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "wsd", "constant")
COSINE_FLOOR = 0.1  # of the peak, at the end


def factor(schedule: str, step: int, steps: int, *, warmup: float, decay: float) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0) of `steps`: in (0, 1].

    All rise linearly over the first `warmup` share. `cosine` then falls to a tenth; `wsd` (warmup, stable, decay:
    Hu et al. 2024, MiniCPM) stays, and falls linearly towards 0 over the last `decay` share.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    if schedule == "cosine":
        done = (step - rising) / max(1, steps - rising)
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
    if schedule == "wsd":
        falling = max(1, round(decay * steps))
        return min(1.0, (steps - step) / falling)
    return 1.0
