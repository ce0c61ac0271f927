"""The pieces of the training benchmark that need no model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.training import peak_of, rate
from bench.transformers_trainer import IGNORE, conversations, group_texts
from tests.train.tiny import make_tokenizer


def test_rate_is_tokens_by_seconds() -> None:
    assert rate([(100, 2.0), (300, 2.0)]) == 100


def test_peak_is_the_childs() -> None:
    assert 200e6 < peak_of([sys.executable, "-c", "x = bytearray(200_000_000)"]) < 400e6
    with pytest.raises(subprocess.CalledProcessError):
        peak_of([sys.executable, "-c", "raise SystemExit(3)"])


def test_their_rows_are_full_and_their_answers_alone_are_learnt() -> None:
    tokenizer = make_tokenizer()
    rows = group_texts(tokenizer, iter([{"text": "abc"}, {"text": "defgh"}]), 4, 2)
    assert [tokenizer.decode(row["input_ids"]) for row in rows.rows] == ["abc<|end|>", "defg"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (row,) = conversations(tokenizer, iter([{"messages": messages}]), 64, 1).rows
    learnt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE]
    assert tokenizer.decode(learnt) == "Ho<|end|>"
