"""Every constant of a decoder, written once into the data file under the names by which both graphs know it.

| name                                         | shape and type                                                   |
|----------------------------------------------|------------------------------------------------------------------|
| `{product}.weight`, float                    | float32 [K, N]; of a tied head [vocab, hidden]                   |
| `{product}.weight`, `.scale`, `.sums`, int8  | packed: docs/native.md                                           |
| `{product}.weight`, `.scale`, `.grid`, 4-bit | packed: docs/native.md                                           |
| weight-only: `.weight`, `.scale`, `.zero`    | as `MatMulNBits` reads them; scales float16 [N, blocks]          |
| `{product}.bias`                             | float32 [N]                                                      |
| `embedding.weight`, `.scale`                 | of an untied embedding: float32 [vocab, hidden], or packed int8  |
| `{norm}.weight`, `.bias`                     | float32 [hidden], or [head_size] of `layers.{i}.q_norm`, `k_norm` |
| `rope.cos`, `rope.sin`                       | float32 [context, head_size / 2]                                 |
| `positions.weight`                           | float32 [context, hidden]                                        |

Products are `layers.{i}.{qkv, o, gate_up or fc, down}` and `head`, the norms `layers.{i}.attention_norm`,
`layers.{i}.mlp_norm`, where the family has them `layers.{i}.attention_post_norm` and `layers.{i}.mlp_post_norm`, and
`final_norm`. Layers with a window may have tables of their own, `rope.local.cos` and `.sin`.
Where activations have 16 bits, all that is float32 here is of their type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from compress.blocks import WeightBlocks, dequantize_blocks, pack_blocks, round_blocks
from compress.checkpoint import Floats
from compress.families import Decoder
from compress.levels import STEPS, Weight4, Weight8, dequantize, round_by_group, round_to_nearest
from compress.packing import pack_groups, pack_int4, pack_int8, pad_rows
from compress.precisions import float_type, is_float, is_weight_only, precision_of
from compress.rope import tables
from compress.rotation import rotate
from compress.weight_file import WeightStore
from compress.weights import Tensors, Weights
from proto.manifest import Precision, Recipe

Rounded = Weight8 | Weight4 | WeightBlocks
# (product, weight [N, K] after migration and rotation) -> its levels and scales, or None for round to nearest
WeightHook = Callable[[str, Floats], Rounded | None]


def write_positions(file: WeightStore, decoder: Decoder, weights: Weights, max_context: int) -> None:
    """What tells positions apart: rotary tables, or learned embeddings."""
    d = decoder
    for name, rope in d.ropes.items():
        cos, sin = tables(rope, d.head_size, d.max_position, max_context)
        file.add(f"{name}.cos", cos)
        file.add(f"{name}.sin", sin)
    if d.family.positions:
        file.add("positions.weight", weights.positions(max_context))


def write_embedding(file: WeightStore, decoder: Decoder, weights: Weights, recipe: Recipe) -> None:
    """An untied embedding [vocab, hidden]: int8 or float: `is_float_embedding`. A tied one is the head's matrix."""
    if decoder.tied:
        return
    matrix = weights.embedding()
    if is_float_embedding(recipe):
        file.add("embedding.weight", matrix)
    else:
        levels, scale = round_to_nearest(matrix)
        file.add("embedding.weight", pack_int8(levels))
        file.add("embedding.scale", pad_rows(scale, fill=1))


def is_float_embedding(recipe: Recipe) -> bool:
    """Whether an untied embedding is float: on CUDA always, where its few rows a step cost nothing."""
    return is_float(recipe.default) or float_type(recipe.default) != "fp32"


def write_layer(
    file: WeightStore, decoder: Decoder, weights: Weights, recipe: Recipe, layer: int, hook: WeightHook | None
) -> None:
    """Read, round, pack and write one weight after the other; none is kept."""
    d = decoder
    _write_tensors(file, f"layers.{layer}.attention_norm", weights.attention_norm(layer))
    for kind, template in (("q_norm", d.family.q_norm), ("k_norm", d.family.k_norm)):
        if template:
            file.add(f"layers.{layer}.{kind}.weight", weights.head_norm(template, layer))
    _write_tensors(file, f"layers.{layer}.mlp_norm", weights.mlp_norm(layer))
    for kind, template in (("attention", d.family.attention_post_norm), ("mlp", d.family.mlp_post_norm)):
        if template:
            file.add(f"layers.{layer}.{kind}_post_norm.weight", weights.post_norm(template, layer))
    for role in d.roles:
        _write_product(file, decoder, weights, recipe, layer, role, hook)


def _write_product(
    file: WeightStore,
    decoder: Decoder,
    weights: Weights,
    recipe: Recipe,
    layer: int,
    role: str,
    hook: WeightHook | None,
) -> None:
    product = f"layers.{layer}.{role}"
    weight, bias = weights.product(layer, role)
    write_weight(file, product, weight, precision_of(recipe, product), hook, decoder.parts(role))
    if bias is not None:
        file.add(f"{product}.bias", bias)


def write_final_norm(file: WeightStore, weights: Weights) -> None:
    _write_tensors(file, "final_norm", weights.final_norm())


def write_head(file: WeightStore, decoder: Decoder, weights: Weights, recipe: Recipe, hook: WeightHook | None) -> None:
    """The head's matrix [vocab, hidden], which is the embedding too where they are tied."""
    precision = precision_of(recipe, "head")
    if not decoder.tied:
        write_weight(file, "head", weights.head(), precision, hook)
    elif is_float(precision):
        file.add("head.weight", weights.embedding())
    else:
        write_weight(file, "head", weights.embedding(), precision, hook)


def write_weight(
    file: WeightStore, product: str, weight: Floats, precision: Precision, hook: WeightHook | None, parts: int = 1
) -> None:
    """Write the weight [N, K] of a product. Raises ValueError if the hook gives something else."""
    if is_float(precision):
        file.add(f"{product}.weight", weight.T)
        return
    if precision.rotated:
        weight = rotate(weight)
    rounded = round_weight(product, weight, precision, hook)
    if isinstance(rounded, Weight8):
        file.add(f"{product}.scale", pad_rows(rounded.scale, parts, fill=1))
        file.add(f"{product}.weight", pack_int8(rounded.levels, parts))
        file.add(f"{product}.sums", pad_rows(rounded.levels.sum(axis=1, dtype=np.int32), parts))
    elif isinstance(rounded, WeightBlocks):
        levels, zero = pack_blocks(rounded, precision.group, precision.weight_bits)
        file.add(f"{product}.weight", levels)
        file.add(f"{product}.scale", rounded.scale)
        file.add(f"{product}.zero", zero)
    else:
        num_inputs, group = weight.shape[1], precision.group
        file.add(f"{product}.weight", pack_int4(rounded.levels, rounded.zero, group, parts))
        file.add(f"{product}.scale", pad_rows(rounded.scale, parts, fill=1))
        grid = rounded.step - STEPS[0] << 4 | rounded.zero
        file.add(f"{product}.grid", pack_groups(grid, num_inputs, group, parts))


def round_weight(product: str, weight: Floats, precision: Precision, hook: WeightHook | None) -> Rounded:
    """By the hook, or to nearest where it gives nothing. Raises ValueError if it gives something else."""
    rounded = (hook(product, weight) if hook else None) or nearest(weight, precision)
    _check(product, weight.shape, precision, rounded)
    return rounded


def meant(rounded: Rounded, precision: Precision) -> Floats:
    """The weight [N, K] that the levels mean."""
    if isinstance(rounded, WeightBlocks):
        return dequantize_blocks(rounded, precision.group)
    return dequantize(rounded, precision.group)


def nearest(weight: Floats, precision: Precision) -> Rounded:
    """The weight [N, K] rounded to the nearest level."""
    if is_weight_only(precision):
        return round_blocks(weight, precision.group, precision.weight_bits)
    return round_to_nearest(weight) if precision.weight_bits == 8 else round_by_group(weight, precision.group)


def _write_tensors(file: WeightStore, name: str, tensors: Tensors) -> None:
    for kind, tensor in zip(("weight", "bias"), tensors, strict=True):
        if tensor is not None:
            file.add(f"{name}.{kind}", tensor)


def _check(product: str, shape: tuple[int, ...], precision: Precision, rounded: Rounded) -> None:
    found: list[tuple[Any, tuple[int, ...]]] = [(array.dtype, array.shape) for array in rounded]
    wanted: list[tuple[Any, tuple[int, ...]]]
    if precision.group == 0:
        wanted = [(np.int8, shape), (np.float32, shape[:1])]
    else:
        groups = (shape[0], -(-shape[1] // precision.group))
        is_native = not is_weight_only(precision)
        scales = [(np.float32, shape[:1]), (np.uint8, groups)] if is_native else [(np.float16, groups)]
        wanted = [(np.uint8, shape), *scales, (np.uint8, groups)]
    if found != wanted:
        raise ValueError(f"the weight hook gave {_text(found)} for {product}; it must give {_text(wanted)}")


def _text(arrays: list[tuple[Any, tuple[int, ...]]]) -> str:
    return ", ".join(f"{np.dtype(dtype)} {list(shape)}" for dtype, shape in arrays)
