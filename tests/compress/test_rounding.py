"""Error-compensating rounding against round to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from compress.levels import LEVELS, Weight4, dequantize, round_by_group, round_to_nearest
from compress.rounding import BLOCK, round_by_group_compensating, round_compensating

N = 24


def correlated_rows(num_inputs: int) -> np.ndarray:
    """Rows [R, K] that mix a few causes, as activations do, with channels of different sizes."""
    random = np.random.default_rng(3)
    causes = random.normal(size=(4 * num_inputs, num_inputs // 8)) @ random.normal(size=(num_inputs // 8, num_inputs))
    rows = causes + 0.3 * random.normal(size=causes.shape)
    return (rows * np.geomspace(0.2, 5, num_inputs)).astype(np.float32)


def make_weight(num_inputs: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(N, num_inputs)).astype(np.float32)


def output_error(x: np.ndarray, weight: np.ndarray, levels: np.ndarray, scale: np.ndarray) -> float:
    return float(np.square(x @ (levels * scale[:, None] - weight).T).sum())


@pytest.mark.parametrize("num_inputs", [BLOCK // 2, BLOCK, 2 * BLOCK + 24])
def test_errors_cancel_on_correlated_inputs(num_inputs: int) -> None:
    x, weight = correlated_rows(num_inputs), make_weight(num_inputs)
    nearest = output_error(x, weight, *round_to_nearest(weight))
    assert output_error(x, weight, *round_compensating(weight, x.T @ x)) < 0.5 * nearest


def test_they_cancel_on_rows_that_were_not_seen() -> None:
    x, weight = correlated_rows(BLOCK), make_weight(BLOCK)
    seen, unseen = x[::2], x[1::2]
    nearest = output_error(unseen, weight, *round_to_nearest(weight))
    assert output_error(unseen, weight, *round_compensating(weight, seen.T @ seen)) < 0.6 * nearest


def test_the_grid_is_that_of_nearest_and_symmetric() -> None:
    x, weight = correlated_rows(BLOCK), make_weight(BLOCK)
    levels, scale = round_compensating(weight, x.T @ x)
    assert (levels.dtype, scale.dtype) == (np.int8, np.float32)
    np.testing.assert_allclose(scale, round_to_nearest(weight)[1], rtol=1e-6)
    assert levels.min() >= -LEVELS
    assert levels.max() <= LEVELS


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_uncorrelated_inputs_give_nearest(size: float) -> None:
    weight = make_weight(BLOCK + 8)
    levels, _ = round_compensating(weight, size * np.eye(BLOCK + 8, dtype=np.float32))
    np.testing.assert_array_equal(levels, round_to_nearest(weight)[0])


def test_inputs_that_were_never_active_do_no_harm() -> None:
    x, weight = correlated_rows(64), make_weight(64)
    x[:, [3, 40]] = 0
    levels, scale = round_compensating(weight, x.T @ x)
    assert output_error(x, weight, levels, scale) < output_error(x, weight, *round_to_nearest(weight))
    np.testing.assert_array_equal(levels[:, 3], round_to_nearest(weight)[0][:, 3])


def test_rows_of_zeros_stay_zeros() -> None:
    x, weight = correlated_rows(64), make_weight(64)
    weight[5] = 0
    levels, scale = round_compensating(weight, x.T @ x)
    assert not levels[5].any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("num_inputs", [BLOCK // 2, 2 * BLOCK + 24])
def test_errors_of_4_bits_cancel_too(num_inputs: int, group: int) -> None:
    x, weight = correlated_rows(num_inputs), make_weight(num_inputs)

    def error(rounded: Weight4) -> float:
        return float(np.square(x @ (dequantize(rounded, group) - weight).T).sum())

    assert error(round_by_group_compensating(weight, x.T @ x, group)) < 0.4 * error(round_by_group(weight, group))


def test_with_uncorrelated_inputs_4_bits_are_nearest() -> None:
    weight = make_weight(BLOCK + 8)
    found = round_by_group_compensating(weight, np.eye(BLOCK + 8, dtype=np.float32), 32)
    for array, expected in zip(found, round_by_group(weight, 32), strict=True):
        np.testing.assert_array_equal(array, expected)
