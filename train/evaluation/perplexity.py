"""Perplexity per token, and bits per byte, by which models with different tokenizers can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.errors import DataError
from train.evaluation.intervals import interval
from train.evaluation.judgement import Judgement
from train.evaluation.options import Options
from train.evaluation.targets import Passage, Target
from train.evaluation.task_files import Example, prompt_of


def judge(target: Target, examples: Sequence[Example], options: Options) -> Judgement:
    """Raises DataError if there is nothing to foretell, Unable if the target does not tell."""
    passages = [passages_of(example, chat=options.chat) for example in examples]
    found = iter(target.log_likelihoods([passage for group in passages for passage in group]))
    rows = []
    for group in passages:
        parts = [next(found) for _ in group]
        nats = -sum(part.log_probability for part in parts)
        rows.append((nats, sum(part.tokens for part in parts), sum(part.num_bytes for part in parts)))
    sums = np.sum(rows, axis=0)
    if not sums[1] or not sums[2]:
        raise DataError("no text has a second token, or no conversation an answer; give longer texts")
    rows_with_tokens = [row for row in rows if row[1]]
    figures = {"perplexity": perplexity, "bits_per_byte": bits_per_byte}
    return Judgement(
        metrics={name: figure(sums) for name, figure in figures.items()},
        intervals={name: interval(rows_with_tokens, figure, seed=options.seed) for name, figure in figures.items()},
        counts={"tokens": int(sums[1]), "bytes": int(sums[2])},
        answers=[dict(zip(("nats", "tokens", "bytes"), row, strict=True)) for row in rows],
    )


def perplexity(sums: NDArray[np.float64]) -> float:
    """Of (nats, tokens, bytes)."""
    return float(np.exp(sums[0] / sums[1]))


def bits_per_byte(sums: NDArray[np.float64]) -> float:
    """Of (nats, tokens, bytes)."""
    return float(sums[0] / sums[2] / np.log(2))


def passages_of(example: Example, *, chat: bool) -> list[Passage]:
    """A whole text, the completion after its prompt, or each of the assistant's answers after what went before."""
    if "text" in example:
        return [Passage("", example["text"])]
    if "completion" in example:
        return [Passage(prompt_of(example, chat=chat), example["completion"])]
    messages = example["messages"]
    return [
        Passage(messages[:number], message["content"])
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
