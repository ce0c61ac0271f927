"""Choosing tokens, against plain definitions of each parameter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.plan import Floats, Output
from serve.request import SamplingParams, TokenLogprob
from serve.sampler import Sampler, _largest, draw, logprob, prompt_logprobs, token_logprob

VOCABULARY = 50
random = np.random.default_rng(0)
LOGITS = (random.standard_normal(VOCABULARY) * 3).astype(np.float32)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()


def sampler(prompt: list[int] | None = None, stop_ids: tuple[int, ...] = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt or [], VOCABULARY, stop_ids)


def choose(chooser: Sampler, logits: Floats, num_output: int = 0) -> tuple[int, TokenLogprob | None]:
    """As with a runner that gives logits alone."""
    return chooser.choose(Output(logits[None], np.zeros((0, 1), np.float32), [0]), 0, num_output)


def draws(count: int = 4000, **params: Any) -> Counter[int]:
    chooser = sampler(seed=1, **params)
    return Counter(choose(chooser, LOGITS, number)[0] for number in range(count))


def test_greedy_is_the_arg_max() -> None:
    assert choose(sampler(temperature=0), LOGITS)[0] == LOGITS.argmax()


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
    assert len({choose(chooser, flat, number)[0] for number in range(3000)}) > 1024


def test_min_p_is_relative_to_the_best() -> None:
    allowed = set(np.flatnonzero(0.2 * PROBABILITIES.max() <= PROBABILITIES).tolist())
    assert set(draws(20000, min_p=0.2)) == allowed


@given(st.integers(-(2**31), 2**31), st.floats(0.1, 2))
@settings(deadline=None)
def test_a_seed_gives_the_same_tokens(seed: int, temperature: float) -> None:
    first, second = (sampler(seed=abs(seed), temperature=temperature) for _ in range(2))
    assert [choose(first, LOGITS, n) for n in range(5)] == [choose(second, LOGITS, n) for n in range(5)]


def test_logit_bias_forces_and_forbids() -> None:
    assert choose(sampler(temperature=0, logit_bias=((7, 100.0),)), LOGITS)[0] == 7
    best = int(LOGITS.argmax())
    assert choose(sampler(temperature=0, logit_bias=((best, -100.0),)), LOGITS)[0] != best


def test_penalties_follow_their_definitions() -> None:
    best, second = (int(i) for i in np.argsort(-LOGITS)[:2])
    gap = float(LOGITS[best] - LOGITS[second])
    for params in ({"frequency_penalty": gap}, {"presence_penalty": gap * 1.01}):
        chooser = sampler(temperature=0, **params)
        tokens = [choose(chooser, LOGITS, i)[0] for i in range(2)]
        assert tokens[0] == best
    chooser = sampler(temperature=0, presence_penalty=gap * 1.01)
    assert [choose(chooser, LOGITS, i)[0] for i in range(2)] == [best, second]
    assert choose(sampler([best], temperature=0, repetition_penalty=2.0), LOGITS)[0] == second


def test_min_tokens_forbids_stop_tokens() -> None:
    best = int(LOGITS.argmax())
    chooser = sampler(stop_ids=(best,), temperature=0, min_tokens=2)
    assert [choose(chooser, LOGITS, n)[0] == best for n in range(3)] == [False, False, True]


def test_logprobs_are_those_of_the_model() -> None:
    token, found = choose(sampler(temperature=0, logprobs=3, logit_bias=((7, 100.0),)), LOGITS)
    assert found is not None
    assert token == found.token_id == 7
    assert found.logprob == pytest.approx(np.log(PROBABILITIES[7]), abs=1e-5)
    assert [t for t, _ in found.top] == np.argsort(-LOGITS)[:3].tolist()
    assert found.top[0][1] == pytest.approx(np.log(PROBABILITIES.max()), abs=1e-5)


def best_first(logits: Floats, temperature: float) -> Output:
    """As with a runner that finds the best 64 itself: ties by id, the sum in float32."""
    order = np.lexsort((np.arange(len(logits)), -logits))[:64].astype(np.int32)
    total = np.exp((logits - logits.max()) / np.float32(temperature or 1)).sum(dtype=np.float32)
    return Output(logits[None], np.zeros((0, 1), np.float32), [0], order[None], np.array([total]))


ways = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0])},
    optional={
        "top_k": st.sampled_from([1, 20, 64, 65, 500, 2000]),
        "top_p": st.sampled_from([0.1, 0.8, 0.99]),
        "min_p": st.sampled_from([0.001, 0.3]),
        "frequency_penalty": st.just(0.5),
        "logit_bias": st.just(((3, 4.0),)),
        "min_tokens": st.just(3),
        "logprobs": st.just(2),
    },
)


@given(ways, st.integers(0, 2**32), st.sampled_from([40, 64, 1500]), st.sampled_from([0.1, 1.0, 8.0]))
@settings(deadline=None)
def test_candidates_change_nothing_but_the_work(ways: dict[str, Any], seed: int, size: int, spread: float) -> None:
    """Whatever the draw needs of the row, the first 64, the first 1024 or all; with many equal logits, too."""
    rows = np.random.default_rng(seed).standard_normal((6, size)) * spread
    rows = rows.round(1).astype(np.float32)
    alone, helped = (Sampler(SamplingParams(seed=seed, **ways), [1, 2], size, (5,)) for _ in range(2))
    for number, logits in enumerate(rows):
        expected = choose(alone, logits, number)
        assert helped.choose(best_first(logits, ways["temperature"]), 0, number) == expected


@given(st.integers(0, 2**32), st.sampled_from([3, 64, 1500]), st.integers(0, 20), st.sampled_from([0.1, 8.0]))
@settings(deadline=None)
def test_a_prompts_log_probabilities_are_the_same_with_candidates(
    seed: int, size: int, top: int, spread: float
) -> None:
    chance = np.random.default_rng(seed)
    logits = (chance.standard_normal((4, size)) * spread).round(1).astype(np.float32)
    tokens = chance.integers(0, size, 3).tolist()
    rows = [2, 0, 3]
    parts = [best_first(row, 1.0) for row in logits]
    found, total = ([getattr(part, name) for part in parts] for name in ("candidates", "total"))
    helped = Output(logits, logits[:0], rows, np.concatenate(found), np.concatenate(total))
    plain = Output(logits, logits[:0], rows)
    expected = [logprob(logits[row], token, top) for row, token in zip(rows, tokens, strict=True)]
    assert prompt_logprobs(plain, rows, tokens, top) == expected
    for mine, theirs in zip(prompt_logprobs(helped, rows, tokens, top), expected, strict=True):
        assert (mine.token_id, [id for id, _ in mine.top]) == (theirs.token_id, [id for id, _ in theirs.top])
        expected_values = [theirs.logprob, *(p for _, p in theirs.top)]
        assert [mine.logprob, *(p for _, p in mine.top)] == pytest.approx(expected_values, abs=1e-5)
        assert all(p == mine.logprob for id, p in mine.top if id == mine.token_id), "clients compare the two"


def test_a_draw_walks_by_falling_probability_and_then_by_id() -> None:
    logits = np.array([0, 1, 0, 1], np.float32)
    chooser = sampler(seed=7)
    shares = np.random.Generator(np.random.PCG64(7)).random(200)
    heavy, light = (np.exp([1, 0]) / np.exp([1, 1, 0, 0]).sum()).tolist()
    edges = np.cumsum([heavy, heavy, light])
    assert [choose(chooser, logits, n)[0] for n in range(len(shares))] == [
        [1, 3, 0, 2][i] for i in edges.searchsorted(shares)
    ]


def test_a_greedy_choice_does_not_look_at_the_row() -> None:
    unread = np.full((1, VOCABULARY), np.nan, np.float32)
    output = Output(unread, unread, [0], np.array([[9, 4]], np.int32), np.ones(1, np.float32))
    assert sampler(temperature=0).choose(output, 0, 0) == (9, None)


special = st.sampled_from([0.0, -0.0, float("-inf"), 1e-40, -1e-40])


@given(st.lists(st.floats(width=32, allow_nan=False) | special, min_size=1, max_size=60), st.integers(0, 60))
@settings(deadline=None)
def test_the_largest_come_first_and_equal_ones_by_id(values: list[float], count: int) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert _largest(np.array(values, np.float32), count).tolist() == expected


@given(st.lists(ways, min_size=1, max_size=9), st.integers(0, 2**32), st.sampled_from([40, 64, 1500]), st.booleans())
@settings(deadline=None)
def test_draws_in_one_go_are_those_of_each_alone(
    asked: list[dict[str, Any]], seed: int, size: int, candidates: bool
) -> None:
    chance = np.random.default_rng(seed)
    logits = (chance.standard_normal((len(asked), size)) * chance.choice([0.1, 1, 8])).round(1).astype(np.float32)
    asked = [params | {"temperature": params["temperature"] or 0.7} for params in asked]
    together, alone = (
        [Sampler(SamplingParams(seed=seed + i, **params), [1, 2], size, (5,)) for i, params in enumerate(asked)]
        for _ in range(2)
    )
    parts = [best_first(row, params["temperature"]) for row, params in zip(logits, asked, strict=True)]
    found = [np.concatenate([part.candidates for part in parts]), np.concatenate([part.total for part in parts])]
    output = Output(logits, logits[:0], range(len(asked)), *(found if candidates else ()))
    rows = chance.permutation(len(asked)).tolist()
    tokens = draw(output, rows, [together[row] for row in rows], [3] * len(rows))
    assert tokens == [draw(output, [row], [alone[row]], [3])[0] for row in rows]
    assert all(0 <= token < size for token in tokens)


@given(st.integers(0, 2**32), st.sampled_from([40, 1500]), st.booleans())
@settings(deadline=None)
def test_a_watched_tokens_log_probability_is_that_of_the_whole_row(seed: int, size: int, on_device: bool) -> None:
    logits = (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)
    output = best_first(logits, 1.0)
    assert output.candidates is not None
    if on_device:
        output = replace(output, candidate_logits=logits[output.candidates[0]][None])
    order = np.argsort(-logits)
    for token in (int(order[0]), int(order[5]), int(order[-1])):
        expected = logprob(logits, token, 0).logprob
        assert token_logprob(output, 0, token, 1.0) == pytest.approx(expected, abs=1e-5)
        assert token_logprob(output, 0, token, 0.7) == expected
