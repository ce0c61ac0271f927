"""How `MatMulNBits` computes: with activations rounded to int8, block by block, or as they are.

Its accuracy level 4 rounds the inputs of each block to int8 by their largest one, and is by far the fastest where
rows are few (weights of 8 bits have no other usable kernel). On inputs with outliers that costs quality without a word:
so it is chosen product by product, by what it does to the output on the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.checkpoint import Floats
from compress.families import Decoder
from compress.levels import LEVELS, TINY
from compress.precisions import float_type, is_weight_only, precision_of
from compress.weights import Weights
from proto.manifest import Recipe

FLOAT_PRODUCT = 0
INT8_PRODUCT = 4
MOST_ERROR = 0.01  # of the output's size: what int8 activations may add; 4-bit weights alone cost several times that


def round_inputs(x: Floats, block: int) -> Floats:
    """Rows [R, K] as accuracy level 4 sees them."""
    num_rows, num_inputs = x.shape
    apart = np.pad(x, ((0, 0), (0, -num_inputs % block))).reshape(num_rows, -1, block)
    scale = np.maximum(np.abs(apart).max(axis=-1, keepdims=True), TINY) / LEVELS
    rounded: Floats = (np.rint(apart / scale) * scale).reshape(num_rows, -1)[:, :num_inputs]
    return rounded


def accuracy_level(x: Floats, weight: Floats, block: int) -> int:
    """For inputs x [R, K] and a weight [N, K]: 4 if that adds at most `MOST_ERROR` to the output, else 0."""
    exact = x @ weight.T
    error = (round_inputs(x, block) - x) @ weight.T
    return INT8_PRODUCT if np.square(error).sum() <= MOST_ERROR**2 * np.square(exact).sum() else FLOAT_PRODUCT


def choose(
    decoder: Decoder, weights: Weights, layer: int, inputs: Mapping[str, Floats], recipe: Recipe
) -> dict[str, int]:
    """Of a layer's weight-only products; `inputs` holds rows of what each reads. Those for CUDA have none to choose."""
    levels = {}
    for role in decoder.roles:
        product = f"layers.{layer}.{role}"
        precision = precision_of(recipe, product)
        if is_weight_only(precision) and float_type(precision) == "fp32":
            weight, _ = weights.product(layer, role)
            levels[product] = accuracy_level(inputs[product], weight, precision.group)
    return levels
