"""Choosing tokens, against plain definitions of each parameter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.request import SamplingParams
from serve.sampler import Sampler

VOCABULARY = 50
random = np.random.default_rng(0)
LOGITS = (random.standard_normal(VOCABULARY) * 3).astype(np.float32)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()


def sampler(prompt: list[int] | None = None, stop_ids: tuple[int, ...] = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt or [], VOCABULARY, stop_ids)


def draws(count: int = 4000, **params: Any) -> Counter[int]:
    chooser = sampler(seed=1, **params)
    return Counter(chooser.choose(LOGITS, 0)[0] for _ in range(count))


def test_greedy_is_the_arg_max() -> None:
    assert sampler(temperature=0).choose(LOGITS, 0)[0] == LOGITS.argmax()


def test_frequencies_follow_the_probabilities() -> None:
    found = draws(20000)
    for token in range(VOCABULARY):
        assert found[token] / 20000 == pytest.approx(PROBABILITIES[token], abs=0.02)


def test_temperature_sharpens() -> None:
    sharp = np.exp(LOGITS.astype(np.float64) / 0.5)
    found = draws(20000, temperature=0.5)
    assert found[int(LOGITS.argmax())] / 20000 == pytest.approx((sharp / sharp.sum()).max(), abs=0.02)


def test_top_k_keeps_the_k_best() -> None:
    assert set(draws(top_k=3)) == set(np.argsort(-LOGITS)[:3].tolist())


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    order = np.argsort(-PROBABILITIES)
    kept = int(np.searchsorted(PROBABILITIES[order].cumsum(), 0.7)) + 1
    assert set(draws(20000, top_p=0.7)) == set(order[:kept].tolist())


def test_top_p_over_a_flat_large_vocabulary() -> None:
    flat = np.zeros(5000, np.float32)
    chooser = Sampler(SamplingParams(top_p=0.9, seed=0), [], 5000, ())
    assert len({chooser.choose(flat, 0)[0] for _ in range(3000)}) > 1024


def test_min_p_is_relative_to_the_best() -> None:
    allowed = set(np.flatnonzero(0.2 * PROBABILITIES.max() <= PROBABILITIES).tolist())
    assert set(draws(20000, min_p=0.2)) == allowed


@given(st.integers(-(2**31), 2**31), st.floats(0.1, 2))
def test_a_seed_gives_the_same_tokens(seed: int, temperature: float) -> None:
    first, second = (sampler(seed=abs(seed), temperature=temperature) for _ in range(2))
    assert [first.choose(LOGITS, 0) for _ in range(5)] == [second.choose(LOGITS, 0) for _ in range(5)]


def test_logit_bias_forces_and_forbids() -> None:
    assert sampler(temperature=0, logit_bias=((7, 100.0),)).choose(LOGITS, 0)[0] == 7
    best = int(LOGITS.argmax())
    assert sampler(temperature=0, logit_bias=((best, -100.0),)).choose(LOGITS, 0)[0] != best


def test_penalties_follow_their_definitions() -> None:
    best, second = (int(i) for i in np.argsort(-LOGITS)[:2])
    gap = float(LOGITS[best] - LOGITS[second])
    for params in ({"frequency_penalty": gap}, {"presence_penalty": gap * 1.01}):
        chooser = sampler(temperature=0, **params)
        tokens = [chooser.choose(LOGITS, i)[0] for i in range(2)]
        assert tokens[0] == best
    chooser = sampler(temperature=0, presence_penalty=gap * 1.01)
    assert [chooser.choose(LOGITS, i)[0] for i in range(2)] == [best, second]
    assert sampler([best], temperature=0, repetition_penalty=2.0).choose(LOGITS, 0)[0] == second


def test_min_tokens_forbids_stop_tokens() -> None:
    best = int(LOGITS.argmax())
    chooser = sampler(stop_ids=(best,), temperature=0, min_tokens=2)
    assert [chooser.choose(LOGITS, n)[0] == best for n in range(3)] == [False, False, True]


def test_logprobs_are_those_of_the_model() -> None:
    token, found = sampler(temperature=0, logprobs=3, logit_bias=((7, 100.0),)).choose(LOGITS, 0)
    assert found is not None
    assert token == found.token_id == 7
    assert found.logprob == pytest.approx(np.log(PROBABILITIES[7]), abs=1e-5)
    assert [t for t, _ in found.top] == np.argsort(-LOGITS)[:3].tolist()
    assert found.top[0][1] == pytest.approx(np.log(PROBABILITIES.max()), abs=1e-5)
