"""The precisions that the graphs offer, and which of them a recipe gives to a product."""

from __future__ import annotations

from proto.manifest import Precision, Recipe

FLOAT = Precision(weight_bits=32, activation_bits=32)
W8A8 = Precision(weight_bits=8, activation_bits=8)
W8A8_ROTATED = Precision(weight_bits=8, activation_bits=8, rotated=True)
W4A8 = Precision(weight_bits=4, activation_bits=8, group=32)
W4A8_ROTATED = Precision(weight_bits=4, activation_bits=8, group=32, rotated=True)
W4A8_GROUP64 = Precision(weight_bits=4, activation_bits=8, group=64)
PRECISIONS = (FLOAT, W8A8, W8A8_ROTATED, W4A8, W4A8_ROTATED, W4A8_GROUP64)


def precision_of(recipe: Recipe, product: str) -> Precision:
    return recipe.products.get(product, recipe.default)


def name_of(precision: Precision) -> str:
    """For people."""
    if precision == FLOAT:
        return "fp32"
    return f"W{precision.weight_bits}A{precision.activation_bits}{' rotated' if precision.rotated else ''}"
