"""The rotation: exact, its own inverse, and by docs/native.md's matrix."""

from __future__ import annotations

import numpy as np
import pytest

from compress.rotation import MATRIX, rotate


def test_the_matrix_is_the_documents() -> None:
    expected = [[(-1) ** (i & j).bit_count() / 8 for j in range(64)] for i in range(64)]
    np.testing.assert_array_equal(MATRIX, np.array(expected, np.float32))
    np.testing.assert_array_equal(MATRIX @ MATRIX, np.eye(64, dtype=np.float32))


@pytest.mark.parametrize("shape", [(64,), (3, 128), (2, 3, 100), (5, 1), (0, 70)])
def test_rotating_again_gives_the_inputs_and_zeros_behind(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).integers(-100, 100, shape).astype(np.float32)  # whole numbers: every sum is exact
    rotated = rotate(x)
    assert rotated.shape == (*shape[:-1], -(-shape[-1] // 64) * 64)
    again = rotate(rotated)
    np.testing.assert_array_equal(again[..., : shape[-1]], x)
    assert not again[..., shape[-1] :].any()


def test_products_of_rotated_operands_are_the_same() -> None:
    random = np.random.default_rng(2)
    x, weight = random.normal(size=(7, 150)), random.normal(size=(20, 150))
    np.testing.assert_allclose(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=0, atol=1e-12)


def test_an_outlier_is_spread_over_its_64() -> None:
    x = np.zeros(128, np.float32)
    x[70] = 80
    np.testing.assert_array_equal(np.abs(rotate(x)), np.repeat(np.float32([0, 10]), 64))
