"""A target whose answers a test gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from train.evaluation.targets import Likelihood, Passage, Prompt, Sampling


class FakeTarget:
    def __init__(
        self,
        answer: Callable[[Prompt], str] = lambda prompt: "",
        likelihood: Callable[[Passage], Likelihood] = lambda passage: Likelihood(-1, 1, 1),
    ) -> None:
        self.answer = answer
        self.likelihood = likelihood
        self.prompts: list[Prompt] = []
        self.sampling: Sampling | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake"}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        self.prompts += prompts
        self.sampling = sampling
        return [self.answer(prompt) for prompt in prompts]

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[Likelihood]:
        return [self.likelihood(passage) for passage in passages]


class FakeClassifier:
    labels = ("bad", "good")

    def describe(self) -> dict[str, Any]:
        return {"kind": "classifier"}

    def classify(self, texts: Sequence[str]) -> list[str]:
        return ["good" if "!" in text else "bad" for text in texts]
