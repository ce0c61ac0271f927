"""One product at each precision, against integer arithmetic in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from compress.graph import GraphBuilder
from compress.linear import FLOAT, LEVELS, TINY, WeightHook, multiply, round_to_nearest, store
from proto.manifest import Precision

W8A8 = Precision(weight_bits=8, activation_bits=8)
W8A16 = Precision(weight_bits=8, activation_bits=16)
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
    def run(x: np.ndarray, precision: Precision, hook: WeightHook | None = None) -> np.ndarray:
        with GraphBuilder(tmp_path) as graph:
            graph.input("x", np.float32, [f"axis{i}" for i in range(x.ndim - 1)] + [K])
            graph.output("y", np.float32, [f"axis{i}" for i in range(x.ndim - 1)] + [N])
            store(graph, "product", WEIGHT, precision, hook)
            multiply(graph, "product", "x", precision, output="y")
            graph.save()
        session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
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

    def hook(name: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append((name, weight.shape))
        return np.ones(weight.shape, np.int8), np.ones(len(weight), np.float32)

    x = np.full((1, K), 0.5, np.float32)
    np.testing.assert_allclose(run(x, W8A8, hook), K * 0.5, rtol=1e-5)
    assert seen == [("product", (N, K))]
    np.testing.assert_array_equal(run(x, W8A8, lambda *_: None), run(x, W8A8))


def test_a_weight_hook_of_the_wrong_shape_is_refused(run):
    with pytest.raises(ValueError, match="the weight hook gave int8"):
        run(make_rows(3), W8A8, lambda _, weight: (weight.T.astype(np.int8), np.ones(len(weight), np.float32)))
