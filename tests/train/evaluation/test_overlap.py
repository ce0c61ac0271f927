"""BLEU and ROUGE against sacrebleu's own corpus score and values worked out by hand."""

from __future__ import annotations

import pytest
import sacrebleu

from train.evaluation.overlap import compare

ANSWERS = [
    "The dog bit the man.",
    "It was not unexpected that nobody came!",
    "The man bit him first, as far as we know.",
    "",
]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised that nobody came."],
    ["The man bit him first.", "The man had bitten the dog."],
    ["Something", "else"],
]


@pytest.mark.parametrize("num_references", [1, 2])
def test_bleu_is_sacrebleus_corpus_score(num_references: int) -> None:
    references = [each[:num_references] for each in REFERENCES]
    ours = compare(ANSWERS, references, seed=0)
    wanted = sacrebleu.corpus_bleu(ANSWERS, [list(stream) for stream in zip(*references, strict=True)])
    assert ours.metrics["bleu"] == pytest.approx(wanted.score)
    low, high = ours.intervals["bleu"]
    assert low < ours.metrics["bleu"] < high


def test_a_known_corpus() -> None:
    # From sacrebleu's README.
    system = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert compare(system, references, seed=0).metrics["bleu"] == pytest.approx(48.530827, abs=1e-5)


def test_rouge_by_hand() -> None:
    found = compare(["the cat sat on the mat"], [["the cat lay on a mat"]], seed=0).metrics
    # 4 of 6 words in common (the, cat, on, mat); one pair (the cat); in order: the cat on mat.
    assert found["rouge1"] == pytest.approx(4 / 6)
    assert found["rouge2"] == pytest.approx(1 / 5)
    assert found["rougeL"] == pytest.approx(4 / 6)
    assert found["exact_match"] == 0


def test_the_best_reference_counts_and_blanks_at_the_ends_do_not() -> None:
    found = compare(["  yes \n", "no"], [["no", "yes"], ["never"]], seed=0).metrics
    assert found["exact_match"] == 0.5
    assert found["rouge1"] == 0.5
