"""One product at each precision, against integer arithmetic in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from compress.constants import WeightHook, write_weight
from compress.graph import GraphBuilder
from compress.levels import LEVELS, TINY, Weight8, dequantize, round_by_group, round_to_nearest
from compress.linear import multiply
from compress.operands import load
from compress.precisions import FLOAT, W4A8, W4A8_GROUP64, W8A8, W8A16
from compress.weight_file import WeightFile
from proto.manifest import GRAPH, Precision

K, N = 96, 40
WEIGHT = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)


def make_rows(*leading: int) -> np.ndarray:
    """Rows [..., K] of very different sizes, one of them zero, one with an outlier."""
    x = np.random.default_rng(2).normal(size=(*leading, K)).astype(np.float32)
    rows = x.reshape(-1, K)
    rows *= 10.0 ** np.linspace(-6, 4, len(rows), dtype=np.float32)[:, None]
    rows[1] = 0
    rows[2, 5] *= 100
    return x


@pytest.fixture
def run(tmp_path: Path):
    def run(
        x: np.ndarray,
        precision: Precision,
        hook: WeightHook | None = None,
        weight: np.ndarray = WEIGHT,
        parts: int = 1,
    ) -> np.ndarray:
        with WeightFile(tmp_path) as file:
            write_weight(file, "product", weight, precision, hook, parts)
            graph = GraphBuilder(file)
            graph.input("x", np.float32, [f"axis{i}" for i in range(x.ndim)])
            graph.output("y", np.float32, [f"axis{i}" for i in range(x.ndim - 1)] + [len(weight)])
            operand = load(graph, "product", precision, weight.shape, parts)
            multiply(graph, "product", "x", operand, precision, weight.shape, output="y")
            graph.save(GRAPH)
        session = ort.InferenceSession(tmp_path / GRAPH, providers=["CPUExecutionProvider"])
        return session.run(["y"], {"x": x})[0]

    return run


def row_scale(x: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(TINY))


@pytest.mark.parametrize("leading", [(7,), (1, 9), (3, 5)])
def test_int8_product_is_exact_integer_arithmetic(leading, run):
    x = make_rows(*leading)
    quantized, scale = round_to_nearest(WEIGHT)
    step = np.float32(1 / LEVELS)
    levels = np.rint(x / row_scale(x) / step).astype(np.int64)
    expected = (levels @ quantized.T.astype(np.int64)) * (step * scale) * row_scale(x)
    np.testing.assert_allclose(run(x, W8A8), expected, rtol=1e-6)


@pytest.mark.parametrize("leading", [(7,), (1, 9), (3, 5)])
def test_two_planes_are_nearly_float_activations(leading, run):
    x = make_rows(*leading)
    quantized, scale = round_to_nearest(WEIGHT)
    exact = x.astype(np.float64) @ (quantized * scale[:, None].astype(np.float64)).T
    size = row_scale(x) * np.sqrt(K)

    def error(precision: Precision) -> float:
        return float(np.abs((run(x, precision) - exact) / size).max())

    assert error(W8A16) < 5e-5
    assert error(W8A16) < error(W8A8) / 100


@pytest.mark.parametrize("precision", [W8A8, W8A16])
def test_a_row_does_not_depend_on_the_rows_beside_it(precision, run):
    x = make_rows(33)
    together = run(x, precision)
    alone = np.concatenate([run(x[i : i + 1], precision) for i in range(0, 33, 8)])
    np.testing.assert_array_equal(together[::8], alone)


def test_float_product(run):
    x = make_rows(2, 4)
    np.testing.assert_allclose(run(x, FLOAT), x @ WEIGHT.T, rtol=1e-3, atol=1e-3)


def test_round_to_nearest_is_within_half_a_step():
    weight = WEIGHT.copy()
    weight[3] = 0
    quantized, scale = round_to_nearest(weight)
    assert quantized.min() >= -LEVELS  # symmetric: -128 is never used
    assert np.all(np.abs(quantized * scale[:, None] - weight) <= 0.5001 * scale[:, None])


def test_a_weight_hook_replaces_round_to_nearest(run):
    seen = []

    def hook(name: str, weight: np.ndarray) -> Weight8:
        seen.append((name, weight.shape))
        return Weight8(np.ones(weight.shape, np.int8), np.ones(len(weight), np.float32))

    x = np.full((1, K), 0.5, np.float32)
    np.testing.assert_allclose(run(x, W8A8, hook), K * 0.5, rtol=1e-5)
    assert seen == [("product", (N, K))]
    np.testing.assert_array_equal(run(x, W8A8, lambda *_: None), run(x, W8A8))


def test_a_weight_hook_of_the_wrong_shape_is_refused(run):
    def turned(_: str, weight: np.ndarray) -> Weight8:
        return Weight8(weight.T.astype(np.int8), np.ones(len(weight), np.float32))

    with pytest.raises(
        ValueError, match=r"gave int8 \[96, 40\], .* for product; it must give int8 \[40, 96\], float32"
    ):
        run(make_rows(3), W8A8, turned)


ODD = np.random.default_rng(3).normal(size=(2 * 23, 100)).astype(np.float32)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("precision", [W8A16, W4A8, W4A8_GROUP64], ids=["int8", "group 32", "group 64"])
def test_sizes_that_do_not_fill_the_tiles(precision, parts, run):
    """`parts` tells how the weight is stored, padded; the product is the same."""
    x = np.random.default_rng(4).normal(size=(5, 100)).astype(np.float32)
    is_int8 = precision.weight_bits == 8
    rounded = round_to_nearest(ODD) if is_int8 else round_by_group(ODD, precision.group)
    expected = x @ dequantize(rounded, precision.group).T
    # With 4-bit weights ONNX Runtime rounds the activations to 8 bits.
    np.testing.assert_allclose(run(x, precision, weight=ODD, parts=parts), expected, atol=1e-3 if is_int8 else 0.5)


def test_packed_weights_are_turned_once_at_load(run, tmp_path):
    for precision in (W8A8, W8A16, W4A8):
        run(make_rows(3), precision)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(tmp_path / GRAPH, options, providers=["CPUExecutionProvider"])
        left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert not left & {"Transpose", "Reshape", "Slice", "Cast", "BitShift"}
