"""The estimate of a step's seconds."""

from __future__ import annotations

import numpy as np
import pytest

from serve.step_cost import StepCost

FIXED, PER_TOKEN = 0.003, 0.0001


def taught(sizes: list[int], noise: float = 0.0, per_token: float = PER_TOKEN) -> StepCost:
    random, cost = np.random.default_rng(0), StepCost()
    for size in sizes:
        cost.observe(size, (FIXED + per_token * size) * (1 + noise * random.standard_normal()))
    return cost


def test_nothing_is_claimed_before_two_sizes_were_seen() -> None:
    cost = taught([4] * 50)
    assert not cost.known
    assert (cost.tokens_within(2.0, 4), cost.price(4)) == (0, 0.0)


def test_the_line_is_found() -> None:
    cost = taught([1, 40, 1, 200])
    assert cost.seconds(100) == pytest.approx(FIXED + 100 * PER_TOKEN)
    # Twice as long as one token: 0.0031 s more.
    assert cost.tokens_within(2.0, 1) in (30, 31)
    assert cost.price(10) == pytest.approx(10 * PER_TOKEN / (FIXED + 10 * PER_TOKEN))


def test_noise_averages_out_and_outliers_hardly_count() -> None:
    cost = taught([1, 30, 150, 500] * 100, noise=0.1)
    cost.observe(1, 1.0)
    for size in (1, 100, 500):
        assert cost.seconds(size) == pytest.approx(FIXED + PER_TOKEN * size, rel=0.25)


def test_the_first_slow_step_of_a_size_is_forgotten() -> None:
    cost = StepCost()
    for size in (1, 100):
        cost.observe(size, 0.5)  # it allocates
        cost.observe(size, FIXED + PER_TOKEN * size)
    assert cost.seconds(50) == pytest.approx(FIXED + 50 * PER_TOKEN)


def test_many_steps_of_one_size_do_not_wash_out_the_others() -> None:
    cost = taught([1, 100, *[1] * 5000], noise=0.05)
    assert cost.seconds(100) == pytest.approx(FIXED + 100 * PER_TOKEN, rel=0.1)


def test_a_change_is_followed() -> None:
    cost = taught([1, 100] * 20)
    for _ in range(60):
        for size in (1, 100):
            cost.observe(size, 2 * (FIXED + PER_TOKEN * size))
    assert cost.seconds(50) == pytest.approx(2 * (FIXED + 50 * PER_TOKEN), rel=0.05)


def test_neither_part_is_negative_and_the_line_is_not_trusted_far_out() -> None:
    falling = StepCost()
    falling.observe(1, 0.010)
    falling.observe(17, 0.009)
    assert falling.price(1) == 0
    assert falling.tokens_within(2.0, 1) == 4 * 17 - 1
    through_zero = taught([10, 1000], per_token=1.0)
    assert through_zero.seconds(0) >= 0


def test_a_prompts_tokens_beside_others_have_a_price_of_their_own() -> None:
    cost = taught([1, 8, 1, 8, 130])
    step = cost.seconds(8)
    for _ in range(20):  # deep in a long prompt a token costs four times as much
        cost.observe(8 + 10, step + 10 * 4 * PER_TOKEN, 10)
    assert cost.tokens_within(2.0, 8) == pytest.approx(step / (4 * PER_TOKEN), abs=1)
    assert cost.price(8) == pytest.approx(8 * PER_TOKEN / step), "drafts cost what they did"


def test_tokens_whose_logits_are_wanted_have_a_price_of_their_own_too() -> None:
    cost = taught([1, 8, 1, 8, 130])
    step = cost.seconds(8)
    assert cost.tokens_within(2.0, 8, scored=True) == pytest.approx(cost.tokens_within(2.0, 8) / 2, abs=1), "a guess"
    for _ in range(20):
        cost.observe(8 + 10, step + 10 * 3 * PER_TOKEN, 10, scored=True)
        cost.observe(8 + 10, step + 10 * PER_TOKEN, 10)
    assert cost.tokens_within(2.0, 8, scored=True) == pytest.approx(step / (3 * PER_TOKEN), abs=1)
    assert cost.tokens_within(2.0, 8) == pytest.approx(step / PER_TOKEN, abs=1)
