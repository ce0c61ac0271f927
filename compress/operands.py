"""Packed weights as the stock operators want them.

The data file holds weights in the tiles of docs/native.md. Here they are transposed, reshaped and cut to size by nodes
over constants, which ONNX Runtime computes once, when it loads the graph. Weight-only products have no native form, and
lie in the file as the stock operator reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from compress.graph import GraphBuilder
from compress.levels import STEPS, TOP
from compress.packing import DEPTH, TILE, pad
from compress.precisions import float_type, is_float, is_weight_only
from proto.manifest import Precision

COLUMNS = (1, 3, 0, 2)  # of a tiled weight [B, C, 16, 4]: [K, N]
ROWS = (0, 2, 1, 3)  # [N, K]
FOUR = np.array(4, np.uint8)  # bits of half a byte
SCALES = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}  # what float16 scales become


class Operand(NamedTuple):
    """Names of the values that a stock product reads; "" for those that its precision does not have."""

    weight: str  # float [K, N]; int8 [K, N]; or uint8 [N, groups, group * bits / 8]
    scale: str = ""  # float [N] or [N, groups], of the type of the activations
    zero: str = ""  # uint8 [N, ceil(groups * bits / 8)]: of 4 bits, two in a byte


def load(graph: GraphBuilder, name: str, precision: Precision, shape: tuple[int, int], parts: int = 1) -> Operand:
    """The stored weight [N, K] of a product, or of the padded K where it is rotated. Call it once for each."""
    if is_float(precision):
        return Operand(f"{name}.weight")
    if is_weight_only(precision):
        scale = f"{name}.scale"
        if (floats := float_type(precision)) != "fp16":
            scale = graph.node("Cast", [scale], f"{scale}.float", to=SCALES[floats])
        return Operand(f"{name}.weight", scale, f"{name}.zero")
    num_outputs, num_inputs = shape
    if precision.rotated:
        num_inputs = pad(num_inputs, DEPTH)
    if precision.weight_bits == 8:
        return Operand(
            int8_columns(graph, name, (num_outputs, num_inputs), parts),
            row_values(graph, f"{name}.scale", num_outputs, parts),
        )
    group = precision.group
    groups, padded_groups = -(-num_inputs // group), pad(num_inputs, DEPTH) // group
    rows = pad(num_outputs // parts, TILE)

    def by_group(value: str, perm: Sequence[int], *inner: int) -> str:
        """[parts, rows, groups, ...] of a transposed constant, without the padding: [N, groups, ...]."""
        value = graph.node("Transpose", [value], f"{value}.turned", perm=perm)
        padded, cut = (parts, rows, padded_groups, *inner), (parts, num_outputs // parts, groups, *inner)
        return _cut(graph, value, padded, cut, (num_outputs, groups, *inner))

    weight = by_group(f"{name}.weight", ROWS, group // 2)
    grid = by_group(f"{name}.grid", (0, 2, 1))
    high = graph.node("BitShift", [grid, graph.shared("four", FOUR)], f"{name}.step.half", direction="RIGHT")
    step = graph.node("Cast", [high], f"{name}.step.above", to=TensorProto.FLOAT)
    step = graph.node("Add", [step, graph.shared("steps.least", np.array(STEPS[0], np.float32))], f"{name}.step")
    scale = row_values(graph, f"{name}.scale", num_outputs, parts)
    scale = graph.node("Reshape", [scale, _sizes(graph, (num_outputs, 1))], f"{name}.scale.column")
    zero = graph.node("BitwiseAnd", [grid, graph.shared("half", np.array(TOP, np.uint8))], f"{name}.zero")
    return Operand(
        weight,
        graph.node("Mul", [step, scale], f"{name}.scale.groups"),
        _join_halves(graph, zero, num_outputs, groups),
    )


def int8_columns(graph: GraphBuilder, name: str, shape: tuple[int, int], parts: int = 1) -> str:
    """A packed int8 weight of the shape [N, K] as [K, N]."""
    num_outputs, num_inputs = shape
    rows = num_outputs // parts
    turned = graph.node("Transpose", [f"{name}.weight"], f"{name}.weight.turned", perm=COLUMNS)
    padded = (pad(num_inputs, DEPTH), parts, pad(rows, TILE))
    return _cut(graph, turned, padded, (num_inputs, parts, rows), (num_inputs, num_outputs))


def int8_rows(graph: GraphBuilder, name: str, shape: tuple[int, int]) -> str:
    """A packed int8 weight of the shape [N, K] as [N, K]."""
    turned = graph.node("Transpose", [f"{name}.weight"], f"{name}.weight.turned", perm=ROWS)
    return _cut(graph, turned, (pad(shape[0], TILE), pad(shape[1], DEPTH)), shape, shape)


def row_values(graph: GraphBuilder, name: str, size: int, parts: int = 1) -> str:
    """A constant of a value for each output, without the padding: [N]."""
    rows = size // parts
    if rows % TILE == 0:
        return name
    return _cut(graph, name, (parts, pad(rows, TILE)), (parts, rows), (size,))


def _cut(graph: GraphBuilder, value: str, padded: Sequence[int], cut: Sequence[int], shape: Sequence[int]) -> str:
    """Reshape to `padded`, keep the first `cut` of each axis, and reshape to `shape`."""
    if padded != cut:
        value = graph.node("Reshape", [value, _sizes(graph, padded)], f"{value}.padded")
        value = graph.node("Slice", [value, _sizes(graph, [0] * len(cut)), _sizes(graph, cut)], f"{value}.cut")
    return graph.node("Reshape", [value, _sizes(graph, shape)], f"{value}.ready")


def _join_halves(graph: GraphBuilder, zero: str, num_outputs: int, groups: int) -> str:
    """uint8 [N, groups], 0 to 15 -> [N, ceil(groups / 2)], the first of two in the low half."""
    if groups % 2:
        zero = graph.node("Pad", [zero, _sizes(graph, (0, 0, 0, 1))], f"{zero}.even")
    pairs = graph.node("Reshape", [zero, _sizes(graph, (num_outputs, -1, 2))], f"{zero}.pairs")
    low, high = graph.nodes("Split", [pairs], [f"{zero}.low", f"{zero}.high"], axis=2, num_outputs=2)
    high = graph.node("BitShift", [high, graph.shared("four", FOUR)], f"{zero}.shifted", direction="LEFT")
    joined = graph.node("BitwiseOr", [low, high], f"{zero}.joined")
    return graph.node("Reshape", [joined, _sizes(graph, (num_outputs, -1))], f"{zero}.halves")


def _sizes(graph: GraphBuilder, sizes: Sequence[int]) -> str:
    return graph.shared(f"sizes.{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))
