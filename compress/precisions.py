"""The precisions that the graphs offer, and which of them a recipe gives to a product."""

from __future__ import annotations

import msgspec

from proto.manifest import Precision, Recipe

FLOAT = Precision(weight_bits=32, activation_bits=32)
W8A8 = Precision(weight_bits=8, activation_bits=8)
W8A8_ROTATED = Precision(weight_bits=8, activation_bits=8, rotated=True)
W4A8 = Precision(weight_bits=4, activation_bits=8, group=32)
W4A8_ROTATED = Precision(weight_bits=4, activation_bits=8, group=32, rotated=True)
W4A8_GROUP64 = Precision(weight_bits=4, activation_bits=8, group=64)
# Weight-only, for the portable graph alone.
BLOCKS = (32, 64, 128)
W4, W8 = (Precision(weight_bits=bits, activation_bits=32, group=32) for bits in (4, 8))
WEIGHT_ONLY = tuple(msgspec.structs.replace(precision, group=block) for precision in (W4, W8) for block in BLOCKS)
PRECISIONS = (FLOAT, W8A8, W8A8_ROTATED, W4A8, W4A8_ROTATED, W4A8_GROUP64, *WEIGHT_ONLY)


def precision_of(recipe: Recipe, product: str) -> Precision:
    return recipe.products.get(product, recipe.default)


def is_weight_only(precision: Precision) -> bool:
    """Whether weights are integers and activations are not part of the recipe."""
    return precision.weight_bits < 32 and precision.activation_bits == 32


def name_of(precision: Precision) -> str:
    """For people."""
    if precision == FLOAT:
        return "fp32"
    if is_weight_only(precision):
        return f"W{precision.weight_bits} by {precision.group}"
    return f"W{precision.weight_bits}A{precision.activation_bits}{' rotated' if precision.rotated else ''}"
