"""A model of time is found again in the times that it gives."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.errors import DeployError
from deploy.step_model import LEAST_TURNS, StepModel, fit, terms
from serve.request import Request
from serve.scheduler import Step

EACH = [0.007, 0.0009, 0.0007, 4e-7, 1e-8, 3e-4, 1e-3]


def turns(count: int, seed: int = 0) -> list[list[float]]:
    """Steps of decode rows, of prompts, and of both."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        step, rows = Step(), int(random.integers(0, 33))
        for _ in range(rows):
            step.plan.add([], int(random.integers(1, 1500)), [0])
        if not rows or random.random() < 0.4:
            past = int(random.integers(0, 1000))
            step.plan.add(
                [], past, [0] * int(random.integers(2, 500)), want="last" if random.random() < 0.5 else "none"
            )
            step.admitted += [Request.__new__(Request)] * int(random.integers(0, 3))
        found.append(terms(step))
    return found


def test_terms_of_a_step() -> None:
    step = Step()
    for past in (10, 20):
        step.plan.add([], past, [0])
    step.plan.add([], 64, [0] * 100, want="none")
    step.admitted.append(Request.__new__(Request))
    assert terms(step) == [1, 32, 70, 11 + 21, 100 * (64 + 50.5), 2, 1]
    assert StepModel(seconds_each=EACH, spread=[1.0]).seconds(step) == pytest.approx(
        0.007 + 32 * 0.0009 + 70 * 0.0007 + 32 * 4e-7 + 11450 * 1e-8 + 2 * 3e-4 + 1e-3
    )


def test_a_fit_finds_the_times_again() -> None:
    x = np.array(turns(3000))
    noise = np.random.default_rng(1).gamma(100, 0.01, len(x))  # 10 % around 1
    model, quality = fit(x, x @ EACH * noise)
    assert quality.median_error < 0.08
    assert quality.largest_bias < 0.05
    assert x @ model.seconds_each == pytest.approx(x @ EACH, rel=0.05)
    draws = np.interp(np.random.default_rng(2).random(20_000), np.linspace(0, 1, len(model.spread)), model.spread)
    assert draws.mean() == pytest.approx(1, abs=0.01)
    assert draws.std() == pytest.approx(0.1, abs=0.015)


def test_a_turn_that_was_held_up_does_not_count_much() -> None:
    x = np.array(turns(3000))
    seconds = x @ EACH
    seconds[::200] *= 20
    model, _ = fit(x, seconds)
    assert x @ model.seconds_each == pytest.approx(x @ EACH, rel=0.03)


def test_the_unlucky_take_longer() -> None:
    step = Step()
    step.plan.add([], 10, [0])
    model = StepModel(seconds_each=EACH, spread=[0.5, 1.0, 2.5])
    expected = StepModel(seconds_each=EACH, spread=[1.0]).seconds(step)
    assert [model.seconds(step, share) / expected for share in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0.5, 0.75, 1, 1.75, 2.5]
    )


def test_a_slower_machine() -> None:
    step = Step()
    step.plan.add([], 10, [0])
    model = StepModel(seconds_each=EACH, spread=[1.0])
    slow = model.scaled(1.3)
    assert slow.seconds(step) == pytest.approx(1.3 * model.seconds(step))
    assert model.slower([terms(step)] * 3, [slow.seconds(step)] * 3) == pytest.approx(1.3)


def test_too_few_turns_are_refused() -> None:
    x = turns(LEAST_TURNS - 1)
    with pytest.raises(DeployError, match="measure for longer"):
        fit(x, [1.0] * len(x))


@pytest.mark.parametrize(
    ("each", "spread"),
    [(EACH[:-1], [1.0]), ([0.0] * 7, [1.0]), ([*EACH[:-1], -1.0], [1.0]), (EACH, []), (EACH, [-1.0])],
)
def test_what_no_fit_gives_is_refused(each: list[float], spread: list[float]) -> None:
    with pytest.raises(ValueError, match=r"must|all 0"):
        StepModel(seconds_each=each, spread=spread)
