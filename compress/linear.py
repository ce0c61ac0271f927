"""One matrix product in the stock graph, at the precision that the recipe asks for.

With int8 weights, activations are quantized per row and symmetrically, so the integer sums are exact and a row's result
does not depend on the rows beside it. With 16-bit activations a row is held in two int8 planes, the second being what
the first rounded away; both go through one integer product, which reads the weight once. With 4-bit weights, ONNX
Runtime's own operator quantizes the activations, by blocks of a row.
"""

from __future__ import annotations

import numpy as np

from compress.graph import MICROSOFT, GraphBuilder
from compress.levels import LEVELS, TINY
from compress.operands import Operand
from compress.precisions import FLOAT
from proto.manifest import Precision

SECOND_PLANE = 2 * LEVELS  # the second plane's step is this much finer: it spans half a step of the first
INT8_PRODUCT = 4  # MatMulNBits' accuracy level that computes with int8 activations


def multiply(
    graph: GraphBuilder,
    name: str,
    x: str,
    operand: Operand,
    precision: Precision,
    shape: tuple[int, int],
    output: str | None = None,
) -> str:
    """x [..., K] times a weight of the shape [N, K] -> [..., N], without the bias; named as the product by default."""
    output = output or name
    if precision == FLOAT:
        return graph.node("MatMul", [x, operand.weight], output)
    if precision.weight_bits == 4:
        sizes = {"N": shape[0], "K": shape[1], "bits": 4, "block_size": precision.group}
        return graph.node("MatMulNBits", [x, *operand], output, domain=MICROSOFT, accuracy_level=INT8_PRODUCT, **sizes)
    step = graph.shared("int8.step", np.array(1 / LEVELS, np.float32))
    zero = graph.shared("int8.zero", np.array(128, np.uint8))
    last = graph.shared("axis.last", np.array([-1], np.int64))
    tiny = graph.shared("int8.tiny", np.array(TINY, np.float32))

    def product(rows: str, result: str) -> str:
        inputs = [rows, operand.weight, step, operand.scale, zero]
        return graph.node("MatMulIntegerToFloat", inputs, result, domain=MICROSOFT)

    largest = graph.node("ReduceMax", [graph.node("Abs", [x], f"{name}.abs"), last], f"{name}.largest", keepdims=1)
    largest = graph.node("Max", [largest, tiny], f"{name}.row_scale")  # a row of zeros is not divided by zero
    unit = graph.node("Div", [x, largest], f"{name}.unit")  # in [-1, 1]
    first = graph.node("QuantizeLinear", [unit, step, zero], f"{name}.plane1")
    if precision.activation_bits == 8:
        return graph.node("Mul", [product(first, f"{name}.y"), largest], output)

    fine_step = graph.shared("int8.fine_step", np.array(1 / LEVELS / SECOND_PLANE, np.float32))
    finer = graph.shared("int8.finer", np.array(1 / SECOND_PLANE, np.float32))
    rounded = graph.node("DequantizeLinear", [first, step, zero], f"{name}.rounded")
    rest = graph.node("Sub", [unit, rounded], f"{name}.rest")
    second = graph.node("QuantizeLinear", [rest, fine_step, zero], f"{name}.plane2")
    # A new leading axis, not more rows: ONNX Runtime's planner is slow on sizes that it cannot name.
    front = graph.shared("axis.first", np.array([0], np.int64))
    planes = [graph.node("Unsqueeze", [plane, front], f"{plane}.apart") for plane in (first, second)]
    y = product(graph.node("Concat", planes, f"{name}.planes", axis=0), f"{name}.y")  # [2, ..., N]
    coarse, fine = graph.nodes("Split", [y], [f"{name}.y1", f"{name}.y2"], axis=0, num_outputs=2)
    fine = graph.node("Mul", [fine, finer], f"{name}.y2_scaled")
    y = graph.node("Mul", [graph.node("Add", [coarse, fine], f"{name}.sum"), largest], f"{name}.apart")
    return graph.node("Squeeze", [y, front], output)
