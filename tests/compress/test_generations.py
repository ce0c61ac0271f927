"""Greedy answers, and how long they stay those of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from compress.generations import LENGTH, PROMPT, figures, generate, identical_lengths, prompts_of
from tests.compress.table_runner import TableRunner, reference_of, streams

PROMPTS = [[3, 1], [7], [40, 2, 9], [11, 12], [30]]


def greedy(runner: TableRunner, prompt: list[int], length: int) -> list[int]:
    tokens = prompt[-1:]
    for _ in range(length):
        tokens.append(int(runner.table[tokens[-1]].argmax()))
    return tokens[1:]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_answers_are_the_most_probable_tokens(count: int) -> None:
    runner = TableRunner()
    found = generate(streams(runner, count), PROMPTS, [])
    assert found == [greedy(runner, prompt, LENGTH) for prompt in PROMPTS]


def test_an_answer_ends_with_its_end_of_sequence_token() -> None:
    runner = TableRunner()
    whole = [greedy(runner, prompt, LENGTH) for prompt in PROMPTS]
    eos = whole[0][3]
    wanted = [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in whole]
    assert generate(streams(runner), PROMPTS, [eos]) == wanted
    assert len(set(map(len, wanted))) > 1


def test_an_answer_ends_where_the_cache_does() -> None:
    assert list(map(len, generate(streams(TableRunner(), capacity=10), PROMPTS, []))) == [8, 9, 7, 8, 9]


def test_the_length_is_up_to_the_first_token_that_the_reference_would_not_choose() -> None:
    runner = TableRunner()
    exact = greedy(runner, PROMPTS[0], 20)
    other = (exact[7] + 1) % len(runner.table)
    answers = [exact, [*exact[:7], other, *exact[8:]], [other + 1], exact[:1]]
    assert exact[0] != other + 1
    pairs = [(PROMPTS[0], answer) for answer in answers]
    assert identical_lengths(reference_of(runner), pairs) == [20, 7, 0, 1]


def test_the_reference_generates_what_was_called_identical() -> None:
    """Teacher forcing tells what two greedy generations side by side would."""
    reference, candidate = TableRunner(), TableRunner(0.8)
    answers = generate(streams(candidate), PROMPTS, [])
    found = identical_lengths(reference_of(reference), list(zip(PROMPTS, answers, strict=True)))
    for prompt, answer, length in zip(PROMPTS, answers, found, strict=True):
        own = greedy(reference, prompt, LENGTH)
        assert answer[:length] == own[:length]
        assert length == LENGTH or answer[length] != own[length]
    assert min(found) < LENGTH


def test_figures_are_mean_median_and_share() -> None:
    found = figures([(10, 10), (0, 10), (5, 5), (5, 6)])
    assert found.metrics == {"identical_length": 5, "identical_median": 5, "identical_share": 0.5}
    assert found.intervals.keys() == {"identical_length", "identical_share"}


def test_prompts_leave_half_a_short_window() -> None:
    windows = np.arange(600).reshape(2, 300).tolist()
    assert [len(prompt) for prompt in prompts_of(windows)] == [PROMPT, PROMPT]
    assert prompts_of([list(range(20))]) == [list(range(10))]
