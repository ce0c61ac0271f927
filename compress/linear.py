"""One matrix product in the graph, at the precision that the recipe asks for.

Activations are quantized per row and symmetrically, so the integer sums are exact and a row's result does not depend
on the rows beside it. With 16-bit activations a row is held in two int8 planes, the second being what the first
rounded away; both go through one integer product, which reads the weight once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Floats
from compress.graph import MICROSOFT, GraphBuilder
from proto.manifest import Precision

FLOAT = Precision(weight_bits=32, activation_bits=32)
W8A8 = Precision(weight_bits=8, activation_bits=8)
W8A16 = Precision(weight_bits=8, activation_bits=16)
PRECISIONS = (FLOAT, W8A8, W8A16)

LEVELS = 127  # the largest magnitude of a symmetric int8
SECOND_PLANE = 2 * LEVELS  # the second plane's step is this much finer: it spans half a step of the first
TINY = 1e-30  # replaces the largest magnitude of a row of zeros, far below any real one
ROWS = 1024  # weight rows quantized at a time, so that the temporaries stay small

Int8 = NDArray[np.int8]
# (product, weight [N, K] after migration) -> int8 weight [N, K] and scale [N], or None for round to nearest
WeightHook = Callable[[str, Floats], tuple[Int8, Floats] | None]


def round_to_nearest(weight: Floats) -> tuple[Int8, Floats]:
    """Symmetric int8 by output channel: [N, K] -> int8 [N, K], scale [N]."""
    quantized = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        block = weight[rows]
        scale[rows] = np.maximum(np.abs(block).max(axis=1), TINY) / LEVELS
        quantized[rows] = np.rint(block / scale[rows, None])
    return quantized, scale


def store(graph: GraphBuilder, name: str, weight: Floats, precision: Precision, hook: WeightHook | None) -> None:
    """Write the weight [N, K] of a product: `{name}.weight` [K, N], and for int8 `{name}.scale` [N]."""
    if precision == FLOAT:
        graph.constant(f"{name}.weight", weight.T)
        return
    quantized, scale = (hook(name, weight) if hook else None) or round_to_nearest(weight)
    if quantized.dtype != np.int8 or quantized.shape != weight.shape or scale.shape != weight.shape[:1]:
        raise ValueError(
            f"the weight hook gave {quantized.dtype} {quantized.shape} with scales {scale.shape} for {name}, "
            f"which is {weight.shape}: it must give int8 [N, K] and scales [N]"
        )
    graph.constant(f"{name}.weight", quantized.T)
    graph.constant(f"{name}.scale", scale.astype(np.float32, copy=False))


def multiply(graph: GraphBuilder, name: str, x: str, precision: Precision, output: str | None = None) -> str:
    """x [..., K] times the stored weight -> [..., N], without the bias; named as the product by default."""
    output = output or name
    if precision == FLOAT:
        return graph.node("MatMul", [x, f"{name}.weight"], output)
    step = graph.shared("int8.step", np.array(1 / LEVELS, np.float32))
    zero = graph.shared("int8.zero", np.array(128, np.uint8))
    last = graph.shared("axis.last", np.array([-1], np.int64))
    tiny = graph.shared("int8.tiny", np.array(TINY, np.float32))

    def product(rows: str, result: str) -> str:
        inputs = [rows, f"{name}.weight", step, f"{name}.scale", zero]
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
