"""Perplexity and bits per byte: what is foretold of each kind of example."""

from __future__ import annotations

import math

import pytest

from tests.train.evaluation.fake_target import FakeTarget
from train.errors import DataError
from train.evaluation.options import Options
from train.evaluation.perplexity import judge, passages_of
from train.evaluation.targets import Likelihood, Passage

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def test_answers_alone_are_foretold() -> None:
    assert passages_of({"text": "a"}, chat=True) == [Passage("", "a")]
    assert passages_of({"prompt": "a", "completion": "b"}, chat=False) == [Passage("a", "b")]
    in_chat = Passage([{"role": "user", "content": "a"}], "b")
    assert passages_of({"prompt": "a", "completion": "b"}, chat=True) == [in_chat]
    assert passages_of({"messages": CHAT}, chat=False) == [Passage(CHAT[:2], "b"), Passage(CHAT[:4], "d")]


def test_the_figures_are_of_all_tokens_and_bytes() -> None:
    told = {"a": Likelihood(-6, 3, 4), "b": Likelihood(-1, 1, 8), "d": Likelihood(-2, 2, 2)}
    target = FakeTarget(likelihood=lambda passage: told[passage.text])
    found = judge(target, [{"text": "a"}, {"messages": CHAT}], Options())
    assert found.metrics["perplexity"] == pytest.approx(math.exp(9 / 6))
    assert found.metrics["bits_per_byte"] == pytest.approx(9 / 14 / math.log(2))
    assert found.counts == {"tokens": 6, "bytes": 14}
    assert found.intervals["perplexity"] == pytest.approx((math.exp(1), math.exp(2)))
    assert list(found.answers) == [{"nats": 6, "tokens": 3, "bytes": 4}, {"nats": 3, "tokens": 3, "bytes": 10}]


def test_texts_too_short_to_be_foretold() -> None:
    empty = FakeTarget(likelihood=lambda passage: Likelihood(0, 0, 0))
    with pytest.raises(DataError, match="no text has a second token"):
        judge(empty, [{"text": "a"}], Options())
    with pytest.raises(DataError, match="or no conversation an answer"):
        judge(empty, [{"messages": CHAT[:2]}], Options())
    some = FakeTarget(likelihood=lambda passage: Likelihood(-1, 1, 1) if passage.text == "a" else Likelihood(0, 0, 0))
    assert judge(some, [{"text": "a"}, {"text": "b"}], Options()).metrics["perplexity"] == pytest.approx(math.e)
