"""Accuracy and macro F1 of what a target chooses: in its answer, by likelihood, or by a head for classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.errors import DataError
from train.evaluation.intervals import interval, mean_interval
from train.evaluation.judgement import Judgement
from train.evaluation.options import Options
from train.evaluation.targets import Classifier, Passage, Sampling, Target
from train.evaluation.task_files import Example, prompt_of


def judge(target: Target, examples: Sequence[Example], options: Options) -> Judgement:
    """An answer in which no choice occurs is wrong and counted as unmatched. Raises DataError for odd labels."""
    if any("text" in example and "prompt" not in example and "messages" not in example for example in examples):
        raise DataError("{text, label} is for a checkpoint with a classification head; give prompt or messages instead")
    labels = [str(example["label"]) for example in examples]
    of_file = sorted(set(labels))
    choices = [example.get("choices", of_file) for example in examples]
    for number, (label, among) in enumerate(zip(labels, choices, strict=True)):
        if label not in among:
            raise DataError(f"example {number}: label {label!r} is none of its choices {among}; they must hold it")
    prompts = [prompt_of(example, chat=options.chat) for example in examples]
    if options.choose == "likelihood":
        passages = [
            Passage(prompt, _joined(prompt, choice))
            for prompt, among in zip(prompts, choices, strict=True)
            for choice in among
        ]
        likelihoods = iter(target.log_likelihoods(passages))
        said = [max(among, key=lambda _: next(likelihoods).log_probability) for among in choices]
        return _score(said, labels, said, options.seed)
    answers = target.generate(prompts, Sampling(options.max_tokens, options.temperature, options.seed, options.stop))
    chosen = [first_choice(answer, among) for answer, among in zip(answers, choices, strict=True)]
    return _score(chosen, labels, answers, options.seed)


def judge_classifier(target: Classifier, examples: Sequence[Example], options: Options) -> Judgement:
    """Of {text, label}: a label by its name, or its number among the checkpoint's."""
    if any("text" not in example for example in examples):
        raise DataError("a checkpoint with a classification head takes {text, label}; add the text")
    labels = [_label(example["label"], target.labels) for example in examples]
    chosen = target.classify([example["text"] for example in examples])
    return _score(chosen, labels, chosen, options.seed)


def first_choice(answer: str, choices: Sequence[str]) -> str:
    """The choice that occurs first as words of their own, in any case; of two at one place the longer. Or ""."""
    longest_first = sorted(choices, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    if not (found := re.search(pattern, answer, re.IGNORECASE)):
        return ""
    said = found[0].lower()
    return found[0] if found[0] in choices else next(choice for choice in choices if choice.lower() == said)


def macro_f1(sums: NDArray[np.float64]) -> float:
    """Of (right, chosen, wanted) [3 * classes]: the mean of each class's F1, of those that occur at all."""
    right, chosen, wanted = sums.reshape(3, -1)
    occurs = chosen + wanted > 0
    return float(np.mean(2 * right[occurs] / (chosen + wanted)[occurs]))


def _score(chosen: Sequence[str], labels: Sequence[str], answers: Sequence[str], seed: int) -> Judgement:
    classes = sorted(set(labels) | set(chosen) - {""})
    hits = [float(choice == label) for choice, label in zip(chosen, labels, strict=True)]
    statistics = [
        [
            *(float(choice == label == name) for name in classes),
            *(float(choice == name) for name in classes),
            *(float(label == name) for name in classes),
        ]
        for choice, label in zip(chosen, labels, strict=True)
    ]
    return Judgement(
        metrics={"accuracy": sum(hits) / len(hits), "macro_f1": macro_f1(np.sum(statistics, axis=0))},
        intervals={
            "accuracy": mean_interval(hits, seed=seed),
            "macro_f1": interval(statistics, macro_f1, seed=seed),
        },
        counts={"classes": len(set(labels)), "unmatched": sum(choice == "" for choice in chosen)},
        answers=[
            {"answer": answer, "chosen": choice, "label": label}
            for answer, choice, label in zip(answers, chosen, labels, strict=True)
        ],
    )


def _joined(prompt: object, choice: str) -> str:
    """After a text that does not end in a blank, a choice begins with one, as a word does."""
    apart = isinstance(prompt, str) and prompt and not prompt[-1].isspace()
    return " " + choice if apart else choice


def _label(value: str | int, names: Sequence[str]) -> str:
    if str(value) in names:
        return str(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    raise DataError(f"label {value!r} is none of the checkpoint's {list(names)}; rename it, or give its number")
