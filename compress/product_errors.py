"""How far each product of the artifact is from the exact one, measured as its weight is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from compress.checkpoint import Floats
from compress.constants import Rounded, WeightHook, meant, nearest
from compress.levels import LEVELS, TINY
from compress.precisions import precision_of
from compress.rotation import rotate
from proto.manifest import Precision, Recipe


@dataclass(frozen=True, slots=True)
class ProductError:
    """Relative errors: 0.01 is one percent of the exact size."""

    weight: float  # of the rounded weight, in the Frobenius norm
    output: float | None  # of what the rounded product gives, mean over rows of inputs; None without any


class ErrorMeter:
    """`errors` by product, of those that went through a hook that is watched."""

    def __init__(self, recipe: Recipe) -> None:
        self.errors: dict[str, ProductError] = {}
        self._recipe = recipe

    def watch(
        self,
        hook: WeightHook | None = None,
        inputs: Mapping[str, Floats] = MappingProxyType({}),
        scales: Mapping[str, Floats] = MappingProxyType({}),
    ) -> WeightHook:
        """A hook that does what `hook` does, or rounds to nearest without one, and measures that.

        `inputs` holds rows [R, K] of products' inputs before their migration by `scales`.
        """

        def round_weight(product: str, weight: Floats) -> Rounded:
            precision = precision_of(self._recipe, product)
            rounded = (hook(product, weight) if hook else None) or nearest(weight, precision)
            rows = inputs.get(product)
            if rows is not None:
                rows = rows / scales.get(product, np.float32(1))
            self.errors[product] = measure(weight, rounded, precision, rows)
            return rounded

        return round_weight


def measure(weight: Floats, rounded: Rounded, precision: Precision, inputs: Floats | None) -> ProductError:
    """Of the weight [N, K], as it is rounded, and of its product with `inputs` [R, K] as the graphs compute it.

    The inputs are migrated as the weight is, and not rotated.
    """
    found = meant(rounded, precision)
    of_weight = float(np.linalg.norm(found - weight) / (np.linalg.norm(weight) + TINY))
    if inputs is None:
        return ProductError(of_weight, None)
    rows = rotate(inputs) if precision.rotated else inputs
    exact = rows @ weight.T
    held = quantize_rows(rows) if precision.activation_bits == 8 else rows
    norms = np.linalg.norm(held @ found.T - exact, axis=1) / (np.linalg.norm(exact, axis=1) + TINY)
    return ProductError(of_weight, float(norms.mean()))


def quantize_rows(x: Floats) -> Floats:
    """Rows of x [R, K] as symmetric int8 would hold them, dequantized."""
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), TINY) / LEVELS
    rounded: Floats = np.rint(x / scale) * scale
    return rounded
