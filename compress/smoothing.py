"""Scale migration in closed form: SmoothQuant (arXiv:2211.10438) for inputs and weights that are rotated.

After the rotation no input stands out, and rounding to steps of the largest one is noise of the same size everywhere.
So rounding the inputs costs |x / s|^2 |s W|^2, x / s being the migrated inputs, and rounding the weights costs as much.
By Cauchy and Schwarz it is least with s = (rms of x / rms of W's column)^(1/2): there is nothing to search.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.checkpoint import Floats
from compress.families import Decoder
from compress.levels import TINY
from compress.precisions import precision_of
from compress.weights import Weights, share_over_groups
from proto.manifest import Recipe

# weight_bits -> the exponent of the inputs' rms; the columns' has this less 1. The error of 4-bit weights is far larger
# than that of 8-bit inputs, and error-compensating rounding sees the inputs' sizes anyway.
STRENGTH = {8: 0.5, 4: 0.25}
FLOOR = 1e-6  # of the mean square: channels that are all but dead keep a scale of ordinary size


def balance(power: Floats, columns: Floats, strength: float) -> Floats:
    """Mean squares of a product's inputs and of its weight's columns, each [K] in any unit -> scale [K]."""
    x, w = (np.maximum(square, FLOOR * square.mean() + TINY) for square in (power, columns))
    logarithm = 0.5 * (strength * np.log(x) - (1 - strength) * np.log(w))
    scale: Floats = np.exp(logarithm - logarithm.mean()).astype(np.float32)  # norms and rows keep near their size
    return scale


def balance_layer(
    decoder: Decoder, weights: Weights, layer: int, moments: Mapping[str, Floats], recipe: Recipe
) -> dict[str, Floats]:
    """Scales of a layer's products that read 8-bit activations; `moments` are those of compress/calibration.py."""
    scales: dict[str, Floats] = {}
    for role in decoder.roles:
        product = f"layers.{layer}.{role}"
        foldable = role != "down" or decoder.family.gated
        precision = precision_of(recipe, product)
        if foldable and precision.activation_bits == 8:
            weight, _ = weights.product(layer, role)
            power, columns = np.diag(moments[product]), np.square(weight).mean(axis=0)
            if role == "o":
                power, columns = share_over_groups(decoder, power), share_over_groups(decoder, columns)
            scales[product] = balance(power, columns, STRENGTH[precision.weight_bits])
    return scales
