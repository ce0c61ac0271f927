"""From a checkpoint straight to ONNX: the constants of a decoder, written once, and the graphs over them.

compress/constants.py writes the weights, compress/stock.py the graph that runs on any ONNX Runtime, and
compress/native.py the one on our own operators, which a recipe with integer weights alone has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.checkpoint import Checkpoint, CheckpointError, Floats
from compress.constants import WeightHook, write_constants
from compress.families import Decoder, describe
from compress.native import NativeGraph, has_native_form
from compress.precisions import PRECISIONS, name_of, precision_of
from compress.stock import ACTIVATIONS, StockGraph, Tap
from compress.weight_file import WeightFile
from compress.weights import Weights
from proto.manifest import Architecture, KvCacheType, Recipe

MAX_CONTEXT = 8192  # tokens, where neither the caller nor the checkpoint asks for less


def build(
    checkpoint: Checkpoint,
    directory: Path,
    recipe: Recipe,
    *,
    kv: KvCacheType = "fp32",
    kv_scales: Sequence[tuple[Floats, Floats]] | None = None,
    scales: Mapping[str, Floats] | None = None,
    weight_hook: WeightHook | None = None,
    taps: Tap | None = None,
    max_context: int | None = None,
) -> Architecture:
    """Write the graphs and `model.onnx.data` into the directory, and return the numbers that a server needs.

    `kv_scales` gives each layer's key and value step for int8 caches of the stock graph, [1] or [kv_heads, head_size];
    `scales` migrates magnitude from activations into weights (see compress/weights.py); `weight_hook` replaces round to
    nearest; `taps` are of the stock graph.
    """
    decoder = describe(checkpoint)
    limit = max_context or min(decoder.max_position, MAX_CONTEXT)
    if limit > decoder.max_position:
        raise ValueError(f"max_context {limit} is more than the {decoder.max_position} of the checkpoint; ask for less")
    if decoder.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"activation {decoder.activation!r} is not supported. Supported are {', '.join(ACTIVATIONS)}."
        )
    _check_recipe(recipe, decoder)
    if (kv == "int8") != (kv_scales is not None) or (kv_scales is not None and len(kv_scales) != decoder.num_layers):
        raise ValueError(
            f"kv_scales must be given for kv='int8' alone, one pair for each of {decoder.num_layers} layers"
        )
    weights = Weights(checkpoint, decoder, scales or {})
    with WeightFile(directory) as file:
        write_constants(file, decoder, weights, recipe, weight_hook, limit)
        StockGraph(file, decoder, recipe, taps, kv_scales).write()
        if has_native_form(decoder, recipe):
            NativeGraph(file, decoder, recipe).write()
    return decoder.architecture(limit)


def _check_recipe(recipe: Recipe, decoder: Decoder) -> None:
    for name, precision in (("default", recipe.default), *recipe.products.items()):
        if name != "default" and name not in decoder.products:
            raise ValueError(f"recipe {recipe.name} names product {name}; there are {', '.join(decoder.products)}")
        if precision not in PRECISIONS:
            offered = ", ".join(dict.fromkeys(map(name_of, PRECISIONS)))
            raise ValueError(f"recipe {recipe.name} gives {name} {name_of(precision)}; there are {offered}")
    if decoder.tied and precision_of(recipe, "head").weight_bits == 4:
        raise ValueError(f"recipe {recipe.name} gives the head 4-bit weights, which are the embedding too: give it 8")
