"""Choices: found in answers, by likelihood, by a head; accuracy and F1 against scikit-learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.train.evaluation.fake_target import FakeClassifier, FakeTarget
from train.errors import DataError
from train.evaluation.classification import first_choice, judge, judge_classifier
from train.evaluation.options import Options
from train.evaluation.targets import Likelihood

LABELS = ["red", "green", "blue"]


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_scikit_learns(seed: int) -> None:
    draw = random.Random(seed)
    examples = [{"prompt": draw.choice(LABELS), "label": draw.choice(LABELS)} for _ in range(50)]
    found = judge(FakeTarget(lambda prompt: f"It is {prompt}."), examples, Options())
    said, wanted = [e["prompt"] for e in examples], [e["label"] for e in examples]
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(wanted, said))
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(wanted, said, average="macro"))
    for name, (low, high) in found.intervals.items():
        assert low < found.metrics[name] < high


def test_an_answer_without_a_choice_is_wrong_and_counted() -> None:
    examples = [{"prompt": "a", "label": "yes"}, {"prompt": "b", "label": "no"}, {"prompt": "c", "label": "no"}]
    answers = {"a": "Yes, sure.", "b": "perhaps", "c": "no"}
    found = judge(FakeTarget(lambda prompt: answers[str(prompt)]), examples, Options())
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert found.metrics["macro_f1"] == pytest.approx(np.mean([1, 2 / 3]))
    assert found.counts == {"classes": 2, "unmatched": 1}
    assert [answer["chosen"] for answer in found.answers] == ["yes", "", "no"]


@pytest.mark.parametrize(
    ("answer", "choices", "wanted"),
    [
        ("I say B, not A", ["A", "B"], "B"),
        ("nothing, now", ["no", "yes"], ""),
        ("NO.", ["no", "yes"], "no"),
        ("very positive", ["positive", "very positive"], "very positive"),
        ("(b) or (a)", ["(a)", "(b)"], "(b)"),
        ("a A", ["A", "a"], "a"),
        ("c++ it is", ["c", "c++"], "c++"),
        ("", ["a"], ""),
    ],
)
def test_the_first_choice_that_stands_by_itself(answer: str, choices: list[str], wanted: str) -> None:
    assert first_choice(answer, choices) == wanted


def test_choices_by_likelihood_begin_as_words_do() -> None:
    seen = []

    def likelihood(passage: object) -> Likelihood:
        seen.append((passage.context, passage.text))  # type: ignore[attr-defined]
        return Likelihood(-len(passage.text), 1, 1)  # type: ignore[attr-defined]

    examples = [
        {"prompt": "Answer:", "choices": ["long", "no"], "label": "no"},
        {"prompt": "Answer: ", "choices": ["long", "no"], "label": "long"},
    ]
    found = judge(FakeTarget(likelihood=likelihood), examples, Options(choose="likelihood"))
    assert found.metrics["accuracy"] == 0.5
    assert seen == [("Answer:", " long"), ("Answer:", " no"), ("Answer: ", "long"), ("Answer: ", "no")]


def test_a_label_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(DataError, match=r"example 0: label 'c' is none of its choices \['a', 'b'\]"):
        judge(FakeTarget(), [{"prompt": "p", "choices": ["a", "b"], "label": "c"}], Options())
    with pytest.raises(DataError, match="is for a checkpoint with a classification head"):
        judge(FakeTarget(), [{"text": "p", "label": "c"}], Options())


def test_a_head_is_judged_by_names_or_numbers_of_labels() -> None:
    examples = [{"text": "oh!", "label": "good"}, {"text": "oh", "label": 0}, {"text": "oh", "label": 1}]
    found = judge_classifier(FakeClassifier(), examples, Options())
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="label 2 is none of the checkpoint's"):
        judge_classifier(FakeClassifier(), [{"text": "oh", "label": 2}], Options())
    with pytest.raises(DataError, match="add the text"):
        judge_classifier(FakeClassifier(), [{"prompt": "oh", "label": 2}], Options())
