"""How a layer of the checkpoint enters an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from compress.checkpoint import Floats
from compress.constants import WeightHook


class Treatment(NamedTuple):
    """Of one layer, or of the head, which has a hook alone."""

    scales: Mapping[str, Floats] = {}  # migration from activations into weights: compress/weights.py
    hook: WeightHook | None = None  # replaces round to nearest
    accuracy_levels: Mapping[str, int] = {}  # of weight-only products; those not named have int8 activations
    kv_scales: tuple[Floats, Floats] | None = None  # int8 steps of keys and values, [1] or [kv_heads, head_size]


# Asked for each layer, from the first to the last, when it is about to be read and written; then for the head (None).
Treat = Callable[[int | None], Treatment]


def leave(layer: int | None) -> Treatment:
    """Rounds to nearest; caches stay float."""
    del layer
    return Treatment()
