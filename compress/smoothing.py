"""Scale migration (SmoothQuant, arXiv:2211.10438) with the strength chosen per product.

`s = max|x|^alpha / max|w|^(1 - alpha)` per input channel moves outliers from activations, which are quantized per row,
into weights, which are quantized per output channel. `alpha` is searched for each product: the one whose quantized
output is nearest to the exact one on the calibration rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compress.checkpoint import Floats
from compress.families import Decoder
from compress.levels import LEVELS, TINY, dequantize, round_by_group, round_to_nearest
from compress.precisions import W8A8, precision_of
from compress.weights import Weights, share_over_groups
from proto.manifest import Precision, Recipe

UNCLIPPED = (1.0,)  # the search for what to clip would take most of the time, and favours none
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def quantize_rows(x: Floats) -> Floats:
    """Rows of x as symmetric int8 would hold them, dequantized."""
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), TINY) / LEVELS
    rounded: Floats = np.rint(x / scale) * scale
    return rounded


def output_error(x: Floats, weight: Floats, scale: Floats, exact: Floats, precision: Precision = W8A8) -> float:
    """Relative squared error of the product of int8 x [R, K] and weight [N, K] after migration by `scale` [K]."""
    group = precision.group
    migrated = weight * scale
    is_int8 = precision.weight_bits == 8
    rounded = round_to_nearest(migrated) if is_int8 else round_by_group(migrated, group, shrink=UNCLIPPED)
    found = quantize_rows(x / scale) @ dequantize(rounded, group).T
    return float(np.square(found - exact).sum() / np.square(exact).sum())


def search_scale(
    decoder: Decoder,
    product: str,
    x: Floats,
    weight: Floats,
    precision: Precision = W8A8,
    alphas: Sequence[float] = ALPHAS,
) -> Floats:
    """The scale [K] of the best strength; ones if no migration is better than all of them."""
    exact = x @ weight.T
    best = np.ones(x.shape[1], np.float32)
    error = output_error(x, weight, best, exact, precision)
    peak_x = np.maximum(np.abs(x).max(axis=0), 1e-5)
    peak_w = np.maximum(np.abs(weight).max(axis=0), 1e-5)
    for alpha in alphas:
        scale = (peak_x**alpha / peak_w ** (1 - alpha)).astype(np.float32)
        if product.endswith(".o"):
            scale = share_over_groups(decoder, scale)
        scale /= np.exp(np.log(scale).mean())  # only the ratios matter: keep norms and rows near their size
        if (found := output_error(x, weight, scale, exact, precision)) < error:
            best, error = scale, found
    return best


def search_layer(
    decoder: Decoder, weights: Weights, layer: int, inputs: Mapping[str, Floats], recipe: Recipe
) -> dict[str, Floats]:
    """Scales of a layer's products that read 8-bit activations as they are; rotated ones need no migration."""
    scales: dict[str, Floats] = {}
    for role in ("qkv", "o", decoder.up, "down"):
        product = f"layers.{layer}.{role}"
        foldable = role != "down" or decoder.family.gated
        precision = precision_of(recipe, product)
        if foldable and precision.activation_bits == 8 and not precision.rotated:
            weight, _ = weights.product(layer, role)
            scales[product] = search_scale(decoder, product, inputs[product], weight, precision)
    return scales
