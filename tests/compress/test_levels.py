"""The integer grids: how near they are, and what they keep exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.levels import Weight4, dequantize, round_by_group

WEIGHT = np.random.default_rng(1).normal(size=(20, 100)).astype(np.float32)


def steps_of(rounded: Weight4) -> np.ndarray:
    """The real step of each input, [N, K]."""
    return np.repeat(rounded.scale[:, None] * rounded.step, 32, axis=1)[:, : rounded.levels.shape[1]]


def test_what_is_not_clipped_is_within_a_step() -> None:
    rounded = round_by_group(WEIGHT, 32)
    inside = (rounded.levels > 0) & (rounded.levels < 15)
    assert inside.mean() > 0.8
    error = np.abs(dequantize(rounded, 32) - WEIGHT)
    assert np.all(error[inside] <= 0.501 * steps_of(rounded)[inside])
    assert (rounded.levels.max(), rounded.zero.max()) <= (15, 15)


def test_steps_are_half_a_byte_and_the_largest_spans_the_widest_group() -> None:
    weight = WEIGHT.copy()
    weight[:, 40] = 100  # widens the second group: the others then have the least step
    rounded = round_by_group(weight, 32)
    assert (rounded.step.min(), rounded.step.max()) >= (16, 16)
    assert rounded.step.max() <= 31
    assert (rounded.step[:, [0, 2]] == 16).all()
    np.testing.assert_allclose(dequantize(rounded, 32)[:, 40], 100, rtol=0.04)


def test_the_step_is_the_one_of_least_error() -> None:
    rounded = round_by_group(WEIGHT, 32)
    chosen = np.square(dequantize(rounded, 32) - WEIGHT).sum()
    widest = np.full_like(rounded.step, 31)
    step = np.repeat(rounded.scale[:, None] * widest, 32, axis=1)[:, :100]
    nearest = np.square(np.rint(WEIGHT / step) * step - WEIGHT).sum()
    assert chosen < 0.8 * nearest
    assert len(np.unique(rounded.step)) > 5


@pytest.mark.parametrize("sign", [1, -1])
@settings(deadline=None)
@given(size=st.floats(-6, 6))
def test_zeros_stay_zeros_whatever_is_beside_them(sign: int, size: float) -> None:
    weight = sign * 10**size * np.abs(WEIGHT)
    weight[3] = 0
    weight[:, 50:60] = 0
    exact = dequantize(round_by_group(weight.astype(np.float32), 32), 32)
    assert not exact[3].any()
    assert not exact[:, 50:60].any()
    assert np.isfinite(exact).all()
