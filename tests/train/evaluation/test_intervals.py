"""The bootstrap against the normal approximation, where that holds."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.intervals import interval, mean_interval


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = mean_interval(values.tolist(), seed=0)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_a_ratio_is_resampled_as_one() -> None:
    rows = [(3.0 * count, count) for count in (1.0, 10.0, 100.0)]
    assert interval(rows, lambda sums: float(sums[0] / sums[1]), seed=0) == pytest.approx((3, 3))


def test_the_draws_depend_on_the_seed_alone() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    shifted = mean_interval([value + 1 for value in values], seed=3)
    assert shifted == pytest.approx([end + 1 for end in mean_interval(values, seed=3)])
