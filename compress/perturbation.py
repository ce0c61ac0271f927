"""What a precision does to one product: the errors that it makes in the product's inputs and in its weight.

Rotated and migrated operands are turned back, so that both errors are those of the float model's own operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.calibration import Activations
from compress.checkpoint import Checkpoint, Floats
from compress.constants import WeightHook
from compress.families import Decoder
from compress.levels import Weight4, Weight8, dequantize
from compress.product_errors import quantize_rows
from compress.quantize import compensating_hook
from compress.rotation import rotate
from compress.smoothing import balance_layer
from compress.weights import Weights
from proto.manifest import Precision, Recipe

SAMPLED_ROWS = 192  # of a weight, whose outputs are rounded one by one and alike; the head is taken whole


class Perturbation(NamedTuple):
    """Of one product by one precision, which has 8-bit activations."""

    precision: Precision
    scale: Floats  # [K], of the migration
    rows: NDArray[np.intp]  # [n], the outputs that `weight_error` is of
    weight_error: Floats  # [n, K]

    def input_error(self, x: Floats) -> Floats:
        """x [R, K] -> [R, K]: what rounding its rows adds."""
        moved = x / self.scale
        if self.precision.rotated:
            moved = rotate(moved)
        error: Floats = quantize_rows(moved) - moved
        if self.precision.rotated:
            error = rotate(error)[:, : x.shape[1]]
        return error * self.scale


def perturb(
    product: str, weight: Floats, rows: NDArray[np.intp], precision: Precision, scale: Floats, hook: WeightHook
) -> Perturbation:
    """Of a weight [N, K], rounded as `quantize` would."""
    exact = weight[rows]
    moved = exact * scale
    if precision.rotated:
        moved = rotate(moved)
    levels = hook(product, moved)
    assert isinstance(levels, Weight8 | Weight4)
    rounded = dequantize(levels, precision.group)
    if precision.rotated:
        rounded = rotate(rounded)[:, : exact.shape[1]]
    return Perturbation(precision, scale, rows, rounded / scale - exact)


def perturb_layer(
    checkpoint: Checkpoint, decoder: Decoder, layer: int, activations: Activations, precisions: Sequence[Precision]
) -> dict[str, list[Perturbation]]:
    """Of every product of a layer by every precision, in that order."""
    weights = Weights(checkpoint, decoder, {})
    found: dict[str, list[Perturbation]] = {}
    for precision in precisions:
        recipe = Recipe(name="uniform", default=precision)
        scales = balance_layer(decoder, weights, layer, activations.moments, recipe)
        hook = compensating_hook(recipe, activations.moments, scales)
        for role in decoder.roles:
            product = f"layers.{layer}.{role}"
            weight, _ = weights.product(layer, role)
            rows = np.random.default_rng(layer).permutation(len(weight))[:SAMPLED_ROWS]
            scale = scales.get(product, np.ones(weight.shape[1], np.float32))
            found.setdefault(product, []).append(perturb(product, weight, rows, precision, scale, hook))
    return found


def perturb_head(
    checkpoint: Checkpoint, decoder: Decoder, moment: Floats, precisions: Sequence[Precision]
) -> list[Perturbation]:
    """Of the head by every precision; `moment` [hidden, hidden] is that of its inputs."""
    weights = Weights(checkpoint, decoder, {})
    weight = weights.embedding() if decoder.tied else weights.head()
    rows, scale = np.arange(len(weight)), np.ones(weight.shape[1], np.float32)
    return [
        perturb("head", weight, rows, p, scale, compensating_hook(Recipe(name="", default=p), {"head": moment}, {}))
        for p in precisions
    ]
