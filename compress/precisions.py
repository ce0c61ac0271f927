"""The precisions that the graphs offer, and which of them a recipe gives to a product."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np

from proto.manifest import Precision, Recipe

FloatType = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[FloatType, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}

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
# Of 16-bit floats, for CUDA.
HALF = Precision(weight_bits=16, activation_bits=16)
BFLOAT = msgspec.structs.replace(HALF, bfloat=True)
W8A16, W4A16 = (msgspec.structs.replace(precision, activation_bits=16) for precision in (W8, W4))
HALF_WEIGHT_ONLY = tuple(
    msgspec.structs.replace(precision, activation_bits=16, bfloat=bfloat)
    for precision in WEIGHT_ONLY
    for bfloat in (False, True)
)
PRECISIONS = (
    *(FLOAT, W8A8, W8A8_ROTATED, W4A8, W4A8_ROTATED, W4A8_GROUP64, *WEIGHT_ONLY),
    *(HALF, BFLOAT, *HALF_WEIGHT_ONLY),
)


def precision_of(recipe: Recipe, product: str) -> Precision:
    return recipe.products.get(product, recipe.default)


def is_float(precision: Precision) -> bool:
    """Whether nothing is rounded to integers."""
    return precision.weight_bits >= 16


def is_weight_only(precision: Precision) -> bool:
    """Whether weights are integers and activations are floats."""
    return not is_float(precision) and precision.activation_bits >= 16 and precision.group > 0


def float_type(precision: Precision) -> FloatType:
    """What is not an integer: activations, norms, biases, tables."""
    if precision.activation_bits != 16:
        return "fp32"
    return "bf16" if precision.bfloat else "fp16"


def name_of(precision: Precision) -> str:
    """For people."""
    floats = float_type(precision)
    if is_float(precision):
        return floats
    if is_weight_only(precision):
        return f"W{precision.weight_bits}{'' if floats == 'fp32' else f' {floats}'} by {precision.group}"
    return f"W{precision.weight_bits}A{precision.activation_bits}{' rotated' if precision.rotated else ''}"
