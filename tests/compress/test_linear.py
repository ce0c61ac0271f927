"""One product at each precision, against integer arithmetic in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from compress.levels import LEVELS, TINY, Weight8, dequantize, round_by_group, round_to_nearest
from compress.precisions import FLOAT, W4A8, W4A8_GROUP64, W4A8_ROTATED, W8A8, W8A8_ROTATED
from compress.rotation import rotate
from proto.manifest import GRAPH, Precision
from tests.compress.conftest import WEIGHT

N, K = WEIGHT.shape


def make_rows(*leading: int) -> np.ndarray:
    """Rows [..., K] of very different sizes, one of them zero, one with an outlier."""
    x = np.random.default_rng(2).normal(size=(*leading, K)).astype(np.float32)
    rows = x.reshape(-1, K)
    rows *= 10.0 ** np.linspace(-6, 4, len(rows), dtype=np.float32)[:, None]
    rows[1] = 0
    rows[2, 5] *= 100
    return x


def row_scale(x: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(TINY))


@pytest.mark.parametrize("leading", [(7,), (1, 9), (3, 5)])
def test_int8_product_is_exact_integer_arithmetic(leading, run_product):
    x = make_rows(*leading)
    quantized, scale = round_to_nearest(WEIGHT)
    step = np.float32(1 / LEVELS)
    levels = np.rint(x / row_scale(x) / step).astype(np.int64)
    expected = (levels @ quantized.T.astype(np.int64)) * (step * scale) * row_scale(x)
    np.testing.assert_allclose(run_product(x, W8A8), expected, rtol=1e-6)


@pytest.mark.parametrize("leading", [(7,), (1, 9), (3, 5)])
def test_a_rotated_product_is_that_of_the_rotated_operands(leading, run_product):
    x = make_rows(*leading)
    quantized, scale = round_to_nearest(rotate(WEIGHT))
    rotated = rotate(x)
    step = row_scale(rotated) / LEVELS
    levels = np.rint(rotated / step).astype(np.int64)
    assert (quantized.shape, levels.shape) == ((N, 128), (*leading, 128))
    # In steps of the row. A value halfway between two levels may be rounded to either.
    found, expected = run_product(x, W8A8_ROTATED) / step, levels @ quantized.T.astype(np.int64) * scale
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.1 * scale.max() * LEVELS)


def test_rotated_inputs_with_outliers_are_far_nearer_to_float(run_product):
    x = np.random.default_rng(5).normal(size=(64, K)).astype(np.float32)
    x[np.arange(64), np.arange(64)] *= 100

    def error(precision: Precision, turn: Callable[[np.ndarray], np.ndarray]) -> float:
        """Of the activations alone."""
        expected = turn(x) @ dequantize(round_to_nearest(turn(WEIGHT)), 0).T
        return float(np.square(run_product(x, precision) - expected).mean() ** 0.5)

    assert error(W8A8_ROTATED, rotate) < error(W8A8, np.asarray) / 4


@pytest.mark.parametrize("precision", [W8A8, W8A8_ROTATED])
def test_a_row_does_not_depend_on_the_rows_beside_it(precision, run_product):
    x = make_rows(33)
    together = run_product(x, precision)
    alone = np.concatenate([run_product(x[i : i + 1], precision) for i in range(0, 33, 8)])
    np.testing.assert_array_equal(together[::8], alone)


def test_float_product(run_product):
    x = make_rows(2, 4)
    np.testing.assert_allclose(run_product(x, FLOAT), x @ WEIGHT.T, rtol=1e-3, atol=1e-3)


def test_round_to_nearest_is_within_half_a_step():
    weight = WEIGHT.copy()
    weight[3] = 0
    quantized, scale = round_to_nearest(weight)
    assert quantized.min() >= -LEVELS  # symmetric: -128 is never used
    assert np.all(np.abs(quantized * scale[:, None] - weight) <= 0.5001 * scale[:, None])


def test_a_weight_hook_replaces_round_to_nearest(run_product):
    seen = []

    def hook(name: str, weight: np.ndarray) -> Weight8:
        seen.append((name, weight.shape))
        return Weight8(np.ones(weight.shape, np.int8), np.ones(len(weight), np.float32))

    x = np.full((1, K), 0.5, np.float32)
    np.testing.assert_allclose(run_product(x, W8A8, hook), K * 0.5, rtol=1e-5)
    assert seen == [("product", (N, K))]
    np.testing.assert_array_equal(run_product(x, W8A8, lambda *_: None), run_product(x, W8A8))


def test_a_weight_hook_of_the_wrong_shape_is_refused(run_product):
    def turned(_: str, weight: np.ndarray) -> Weight8:
        return Weight8(weight.T.astype(np.int8), np.ones(len(weight), np.float32))

    with pytest.raises(
        ValueError, match=r"gave int8 \[96, 40\], .* for product; it must give int8 \[40, 96\], float32"
    ):
        run_product(make_rows(3), W8A8, turned)


ODD = np.random.default_rng(3).normal(size=(2 * 23, 100)).astype(np.float32)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "precision",
    [W8A8, W8A8_ROTATED, W4A8, W4A8_ROTATED, W4A8_GROUP64],
    ids=["int8", "int8 rotated", "group 32", "group 32 rotated", "group 64"],
)
def test_sizes_that_do_not_fill_the_tiles(precision, parts, run_product):
    """`parts` tells how the weight is stored, padded; the product is the same."""
    x = np.random.default_rng(4).normal(size=(5, 100)).astype(np.float32)
    turn = rotate if precision.rotated else np.asarray
    is_int8 = precision.weight_bits == 8
    rounded = round_to_nearest(turn(ODD)) if is_int8 else round_by_group(turn(ODD), precision.group)
    expected = turn(x) @ dequantize(rounded, precision.group).T
    np.testing.assert_allclose(
        run_product(x, precision, weight=ODD, parts=parts), expected, atol=0.5
    )  # x is rounded to 8 bits


def test_packed_weights_are_turned_once_at_load(run_product, tmp_path):
    for precision in (W8A8, W8A8_ROTATED, W4A8, W4A8_ROTATED):
        run_product(make_rows(3), precision)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(tmp_path / GRAPH, options, providers=["CPUExecutionProvider"])
        left = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert left.count("Reshape") == 2 * precision.rotated  # of the rows
        assert not {*left} & {"Transpose", "Slice", "Cast", "BitShift"}
