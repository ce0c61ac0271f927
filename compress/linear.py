"""One matrix product in the stock graph, at the precision that the recipe asks for.

With int8 weights, activations are quantized per row and symmetrically, so the integer sums are exact and a row's result
does not depend on the rows beside it. With weights in groups, ONNX Runtime's own operator quantizes the activations, by
blocks of a row, or leaves them as they are (compress/accuracy_levels.py). All but weight-only products may read their
inputs rotated (compress/rotation.py).
"""

from __future__ import annotations

import numpy as np

from compress.accuracy_levels import INT8_PRODUCT
from compress.graph import MICROSOFT, GraphBuilder
from compress.levels import LEVELS, TINY
from compress.operands import Operand
from compress.packing import DEPTH, pad
from compress.precisions import is_float
from compress.rotation import MATRIX
from proto.manifest import Precision


def multiply(
    graph: GraphBuilder,
    name: str,
    x: str,
    operand: Operand,
    precision: Precision,
    shape: tuple[int, int],
    output: str | None = None,
    accuracy_level: int = INT8_PRODUCT,
) -> str:
    """x [..., K] times a weight of the shape [N, K] -> [..., N], without the bias; named as the product by default."""
    output = output or name
    if is_float(precision):
        return graph.node("MatMul", [x, operand.weight], output)
    num_outputs, num_inputs = shape
    if precision.rotated:
        x, num_inputs = rotate_value(graph, name, x, num_inputs), pad(num_inputs, DEPTH)
    if precision.group:
        sizes = {"N": num_outputs, "K": num_inputs, "bits": precision.weight_bits, "block_size": precision.group}
        inputs = [x, *operand]
        return graph.node("MatMulNBits", inputs, output, domain=MICROSOFT, accuracy_level=accuracy_level, **sizes)
    step = graph.shared("int8.step", np.array(1 / LEVELS, np.float32))
    zero = graph.shared("int8.zero", np.array(128, np.uint8))
    last = graph.shared("axis.last", np.array([-1], np.int64))
    tiny = graph.shared("int8.tiny", np.array(TINY, np.float32))
    largest = graph.node("ReduceMax", [graph.node("Abs", [x], f"{name}.abs"), last], f"{name}.largest", keepdims=1)
    largest = graph.node("Max", [largest, tiny], f"{name}.row_scale")  # a row of zeros is not divided by zero
    unit = graph.node("Div", [x, largest], f"{name}.unit")  # in [-1, 1]
    rows = graph.node("QuantizeLinear", [unit, step, zero], f"{name}.levels")
    inputs = [rows, operand.weight, step, operand.scale, zero]
    y = graph.node("MatMulIntegerToFloat", inputs, f"{name}.y", domain=MICROSOFT)
    return graph.node("Mul", [y, largest], output)


def rotate_value(graph: GraphBuilder, name: str, x: str, size: int) -> str:
    """x [..., size] -> [..., ceil(size / 64) 64], rotated."""
    if missing := -size % DEPTH:
        last = graph.shared("axis.last", np.array([-1], np.int64))
        behind = graph.shared(f"pad.{missing}", np.array([0, missing], np.int64))
        x = graph.node("Pad", [x, behind, "", last], f"{name}.filled")
    rows = graph.shared("rotation.rows", np.array([-1, DEPTH], np.int64))
    apart = graph.node("Reshape", [x, rows], f"{name}.apart")
    rotated = graph.node("MatMul", [apart, graph.shared("rotation", MATRIX)], f"{name}.rotated_apart")
    return graph.node("Reshape", [rotated, graph.node("Shape", [x], f"{name}.shape")], f"{name}.rotated", allowzero=1)
