"""What a step costs: seconds = fixed + per_token * tokens, learned from the steps themselves.

Steps are averaged by size, powers of two apart, and the line is fitted to the averages by least squares of relative
errors. So a long stretch of steps of one size does not wash out what was learned about the others.

A prompt's tokens cost the more the further into the prompt they are. So what they cost beside rows that decode is an
average of its own, over the last few such steps; and another one if their logits are wanted, which costs the head too.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 0.1  # of a new step in the average of its size
FIRST = 3  # steps of a size of which the fastest counts: the very first ones also allocate
OUTLIER = 3.0  # times the average: beyond, something else had the processor
REACH = 4.0  # times the largest size seen: how far the line is trusted
RECENT = 0.3  # weight of a new step in what a prompt's token costs
HEAD = 2.0  # times the cost of a prompt's token if its logits are wanted, until it is known: the head is half a model


@dataclass(slots=True)
class Average:
    tokens: float
    seconds: float
    steps: int = 1


class StepCost:
    """Knows nothing until it has seen steps of two sizes: `known`."""

    def __init__(self) -> None:
        self._sizes: dict[int, Average] = {}
        self._stale = False
        self._fixed = 0.0  # seconds
        self._per_token = 0.0  # seconds
        self._largest = 0.0  # tokens
        # Seconds of a prompt's token beside rows that decode, by whether its logits are wanted; 0 before any such step.
        self._prompt_token = {False: 0.0, True: 0.0}

    @property
    def known(self) -> bool:
        return len(self._sizes) > 1

    def observe(self, tokens: int, seconds: float, prompt_tokens: int = 0, scored: bool = False) -> None:
        """A step of so many tokens, `prompt_tokens` of them from prompts, took so long; their logits: `scored`."""
        if 0 < prompt_tokens < tokens and self.known:
            cost = max(seconds - self.seconds(tokens - prompt_tokens), 0.0) / prompt_tokens
            before = self._prompt_token[scored] or cost
            self._prompt_token[scored] = before + RECENT * (min(cost, OUTLIER * before) - before)
            return
        average = self._sizes.get(tokens.bit_length())
        if average is None:
            self._sizes[tokens.bit_length()] = Average(tokens, seconds)
        else:
            average.steps += 1
            average.tokens += WEIGHT * (tokens - average.tokens)
            if average.steps <= FIRST:
                average.seconds = min(average.seconds, seconds)
            else:
                average.seconds += WEIGHT * (min(seconds, OUTLIER * average.seconds) - average.seconds)
        self._stale = True

    def tokens_within(self, times: float, tokens: int, scored: bool = False) -> int:
        """How many prompt tokens make a step at most `times` as long as one of `tokens`; 0 while nothing is known."""
        if not self.known:
            return 0
        self._fit()
        most = REACH * self._largest - tokens
        each = self._prompt_token[False] or self._per_token
        if scored:
            each = self._prompt_token[True] or HEAD * each
        if each * most > (times - 1) * self.seconds(tokens):
            most = (times - 1) * self.seconds(tokens) / each
        return max(0, int(most))

    def price(self, tokens: int) -> float:
        """What one more token costs a step of `tokens` that yields them all: the share of a token lost by waiting.

        0 while nothing is known: trying is how it gets known.
        """
        if not self.known:
            return 0.0
        self._fit()
        return self._per_token * tokens / self.seconds(tokens)

    def seconds(self, tokens: int) -> float:
        self._fit()
        return self._fixed + self._per_token * tokens

    def _fit(self) -> None:
        if not self._stale:
            return
        self._stale = False
        n = x = y = xx = xy = 0.0
        for average in self._sizes.values():
            weight = 1 / max(average.seconds, 1e-9) ** 2
            n += weight
            x += weight * average.tokens
            y += weight * average.seconds
            xx += weight * average.tokens**2
            xy += weight * average.tokens * average.seconds
        slope = (n * xy - x * y) / spread if (spread := n * xx - x * x) > 0 else 0.0
        self._per_token = min(max(slope, 0.0), y / x)  # neither part of a step's time is negative
        self._fixed = max((y - self._per_token * x) / n, 1e-9)
        self._largest = max(average.tokens for average in self._sizes.values())
