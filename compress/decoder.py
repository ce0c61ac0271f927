"""From a checkpoint straight to ONNX: the constants of a decoder, written once, and the graphs over them.

compress/constants.py writes the weights, compress/stock.py the graph that runs on any ONNX Runtime, and
compress/native.py the one on our own operators, which a recipe with integer weights alone has.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from compress.checkpoint import Checkpoint, CheckpointError, Floats
from compress.constants import write_embedding, write_final_norm, write_head, write_layer, write_positions
from compress.families import Decoder, describe
from compress.native import NativeGraph, has_native_form
from compress.precisions import DTYPES, PRECISIONS, float_type, name_of, precision_of
from compress.stock import ACTIVATIONS, StockGraph
from compress.treatment import Treat, leave
from compress.weight_file import WeightFile
from compress.weights import Weights
from proto.manifest import Architecture, Recipe

MAX_CONTEXT = 8192  # tokens, where neither the caller nor the checkpoint asks for less


def build(
    checkpoint: Checkpoint,
    directory: Path,
    recipe: Recipe,
    *,
    treat: Treat = leave,
    max_context: int | None = None,
) -> Architecture:
    """Write the graphs and `model.onnx.data` into the directory, and return the numbers that a server needs.

    `treat` says how each layer is treated, one after the other. The stock graph's caches are int8 if it gives steps for
    them.
    """
    decoder = describe(checkpoint)
    limit = max_context or min(decoder.max_position, MAX_CONTEXT)
    if limit > decoder.max_position:
        raise ValueError(f"max_context {limit} is more than the {decoder.max_position} of the checkpoint; ask for less")
    if decoder.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"activation {decoder.activation!r} is not supported. Supported are {', '.join(ACTIVATIONS)}."
        )
    check_recipe(recipe, decoder)
    weights = Weights(checkpoint, decoder, {})
    kv_scales: list[tuple[Floats, Floats]] = []
    accuracy_levels: dict[str, int] = {}
    with WeightFile(directory, DTYPES[float_type(recipe.default)]) as file:
        write_positions(file, decoder, weights, limit)
        write_embedding(file, decoder, weights, recipe)
        for layer in tqdm(range(decoder.num_layers), desc=recipe.name, unit="layer", disable=None):
            treatment = treat(layer)
            migrated = Weights(checkpoint, decoder, treatment.scales)
            write_layer(file, decoder, migrated, recipe, layer, treatment.hook)
            accuracy_levels |= treatment.accuracy_levels
            kv_scales += [treatment.kv_scales] if treatment.kv_scales else []
        write_final_norm(file, weights)
        write_head(file, decoder, weights, recipe, treat(None).hook)
        if len(kv_scales) not in (0, decoder.num_layers):
            raise ValueError(
                f"{len(kv_scales)} of {decoder.num_layers} layers have kv_scales: give all of them or none"
            )
        StockGraph(file, decoder, recipe, kv_scales, accuracy_levels).write(directory)
        if has_native_form(decoder, recipe):
            NativeGraph(file, decoder, recipe).write(directory)
    return decoder.architecture(limit)


def check_recipe(recipe: Recipe, decoder: Decoder) -> None:
    """Raises ValueError for a product or a precision that the decoder has not."""
    for name, precision in (("default", recipe.default), *recipe.products.items()):
        if name != "default" and name not in decoder.products:
            raise ValueError(f"recipe {recipe.name} names product {name}; there are {', '.join(decoder.products)}")
        if precision not in PRECISIONS:
            offered = ", ".join(dict.fromkeys(map(name_of, PRECISIONS)))
            raise ValueError(f"recipe {recipe.name} gives {name} {name_of(precision)}; there are {offered}")
        if float_type(precision) != (floats := float_type(recipe.default)):
            raise ValueError(
                f"recipe {recipe.name} gives {name} {name_of(precision)} beside {floats}: use one float type"
            )
    if decoder.tied and precision_of(recipe, "head").weight_bits == 4:
        raise ValueError(f"recipe {recipe.name} gives the head 4-bit weights, which are the embedding too: give it 8")
