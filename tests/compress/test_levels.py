"""The integer grids: how near they are, and what they keep exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.levels import dequantize, round_by_group

WEIGHT = np.random.default_rng(1).normal(size=(20, 100)).astype(np.float32)


def test_the_whole_range_is_within_half_a_step() -> None:
    rounded = round_by_group(WEIGHT, 32, shrink=[1.0])
    step = np.repeat(rounded.scale.astype(np.float32), 32, axis=1)[:, :100]
    assert np.all(np.abs(dequantize(rounded, 32) - WEIGHT) <= 1.01 * step)  # half for the level, half for the zero
    assert (rounded.levels.max(), rounded.zero.max()) <= (15, 15)


def test_clipping_is_nearer() -> None:
    whole, clipped = (dequantize(round_by_group(WEIGHT, 32, shrink=s), 32) for s in ([1.0], [1.0, 0.9, 0.8]))
    assert np.square(clipped - WEIGHT).sum() < 0.98 * np.square(whole - WEIGHT).sum()


def test_important_inputs_decide_what_is_clipped() -> None:
    weight = WEIGHT.copy()
    weight[:, 7] *= 4
    importance = np.ones(100, np.float32)
    importance[7] = 1000
    plain, weighted = (dequantize(round_by_group(weight, 32, i), 32) for i in (None, importance))
    assert np.square(weighted - weight)[:, 7].sum() < 0.5 * np.square(plain - weight)[:, 7].sum()


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
