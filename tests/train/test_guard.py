from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.errors import TrainError
from train.guard import Guard, GuardOptions

OPTIONS = GuardOptions(spike_factor=4.0, spike_window=8, spike_warmup=3, max_rejected=1000)
NORMS = st.lists(st.one_of(st.floats(0, 100), st.sampled_from([math.inf, math.nan, 1e6])), max_size=60)


def show(guard: Guard, norms: list[float]) -> list[bool]:
    return [guard.accepts(step, 1.0, norm) for step, norm in enumerate(norms)]


@given(NORMS)
def test_takes_what_the_definition_says(norms: list[float]) -> None:
    taken: list[float] = []
    guard = Guard(OPTIONS)
    for accepted, norm in zip(show(guard, norms), norms, strict=True):
        window = taken[-8:]
        spike = len(window) >= 3 and 0 < 4 * statistics.median(window) < norm
        assert accepted == (math.isfinite(norm) and not spike)
        taken += [norm] * accepted
    assert guard.rejected == len(norms) - len(taken)


@given(NORMS, st.integers(0, 60))
def test_a_resumed_guard_decides_the_same(norms: list[float], cut: int) -> None:
    whole, first, second = Guard(OPTIONS), Guard(OPTIONS), Guard(OPTIONS)
    decisions = show(first, norms[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert decisions + show(second, norms[cut:]) == show(whole, norms)
    assert second.state_dict() == whole.state_dict()


@given(st.floats(1e-3, 1e3), st.lists(st.floats(1, 3), min_size=20, max_size=40))
def test_ordinary_noise_is_taken_at_any_scale(scale: float, noise: list[float]) -> None:
    assert all(show(Guard(GuardOptions()), [scale * factor for factor in noise]))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_taken(loss: float) -> None:
    assert not Guard(OPTIONS).accepts(0, loss, 1.0)


def test_stops_after_so_many_in_succession() -> None:
    guard = Guard(GuardOptions(spike_warmup=2, max_rejected=3))
    for norm in (1.0, 1.0, 50.0, 50.0, 1.0, 50.0, 50.0):  # never three in succession
        guard.accepts(0, 2.5, norm)
    with pytest.raises(TrainError, match=r"step 7: .* 50 times the median .*loss 2.5.*50\); 3 steps.*learning rate"):
        guard.accepts(7, 2.5, 50.0)
