"""Who comes when and asks for how much: Poisson arrivals, and lengths drawn from a distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deploy.errors import DeployError

FORMS = "N, LOW-HIGH (uniform), exp:MEAN or lognormal:MEDIAN:SIGMA"


@dataclass(frozen=True, slots=True)
class Visit:
    """One request: seconds after the start, tokens of its prompt, and of its answer."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `kind` and its parameters."""

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises DeployError with the forms that are understood."""
        kind, *parts = text.split(":")
        if kind not in KINDS:
            kind, parts = ("uniform", text.split("-")) if "-" in text else ("fixed", [text])
        try:
            numbers = tuple(float(part) for part in parts)
        except ValueError:
            numbers = ()
        positive = all(math.isfinite(number) and number > 0 for number in numbers)
        if len(numbers) != KINDS[kind] or not positive or (kind == "uniform" and numbers[0] > numbers[1]):
            raise DeployError(f"{text!r} is no length in tokens; give {FORMS}, with positive numbers")
        return cls(kind, numbers)

    def draw(self, count: int, most: int, random: np.random.Generator) -> list[int]:
        """`count` lengths from 1 to `most` tokens."""
        if self.kind == "fixed":
            values = np.full(count, self.numbers[0])
        elif self.kind == "uniform":
            values = np.floor(random.uniform(self.numbers[0], self.numbers[1] + 1, count))
        elif self.kind == "exp":
            values = random.exponential(self.numbers[0], count)
        else:
            values = self.numbers[0] * np.exp(self.numbers[1] * random.standard_normal(count))
        return [int(value) for value in np.clip(np.round(values), 1, most)]


KINDS = {"fixed": 1, "uniform": 2, "exp": 1, "lognormal": 2}  # and how many numbers each has


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked. The same seed gives the same requests at any rate: only the time between them is another."""

    prompt: Lengths
    output: Lengths
    seed: int = 0

    def visits(self, count: int, rate: float, capacity: int, every: int = 1) -> list[Visit]:
        """`count` requests at `rate` a second in all, of at most `capacity` tokens each.

        They are every `every`-th of a Poisson stream `every` times as dense: one replica's part where so many take
        turns. A prompt and an answer that do not fit together are cut, the answer first.
        """
        random = np.random.default_rng(self.seed)
        gaps = random.gamma(every, 1 / (every * rate), count)
        prompts = self.prompt.draw(count, capacity - 1, random)
        outputs = self.output.draw(count, capacity, random)
        return [
            Visit(float(arrival), prompt, min(output, capacity - prompt))
            for arrival, prompt, output in zip(np.cumsum(gaps), prompts, outputs, strict=True)
        ]
