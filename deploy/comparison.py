"""The cycle's gate: is the candidate better where people complained, and no worse in what it was taught before?

Both answer the same examples, so what is bootstrapped are the differences, example by example (paired, as in Koehn
2004, "Statistical significance tests for machine translation evaluation"): what is hard for both cancels out. A limit
holds if the whole 95 % interval keeps it, so too few examples fail the gate and never pass it by luck.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from deploy.errors import DeployError
from deploy.policy import Gate
from train.evaluation.intervals import interval, mean_interval
from train.evaluation.perplexity import passages_of
from train.evaluation.targets import Likelihood, Passage, Sampling, Target
from train.evaluation.task_files import prompt_of

SEED = 0  # of the resampling

Example = dict[str, Any]
Answer = str | list[dict[str, str]]


class SafetyPrompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer is good if every `required` pattern is found in it and no `forbidden` one. Case does not matter."""

    id: str
    prompt: str
    required: list[str] = []
    forbidden: list[str] = []

    def allows(self, answer: str) -> bool:
        found = [bool(re.search(pattern, answer, re.IGNORECASE)) for pattern in (*self.required, *self.forbidden)]
        return all(found[: len(self.required)]) and not any(found[len(self.required) :])


class Figure(Struct, frozen=True, kw_only=True):
    """What was measured, with its 95 % interval if it has one, and the limit that it must keep."""

    value: float
    low: float
    high: float
    limit: str
    passed: bool


class Verdict(Struct, frozen=True, kw_only=True):
    """`regressions` are the ids of canned prompts that current answers well and the candidate does not."""

    passed: bool
    figures: dict[str, Figure]
    counts: dict[str, int]
    regressions: list[str]
    candidate: dict[str, Any]
    current: dict[str, Any]

    def explain(self) -> str:
        """In one line."""
        return ", ".join(
            f"{name} {f.value:.4g} [{f.low:.4g}, {f.high:.4g}] {'keeps' if f.passed else 'BREAKS'} {f.limit}"
            for name, f in self.figures.items()
        )


def read_safety(path: Path) -> list[SafetyPrompt]:
    """Raises DeployError for a line that is no such prompt, or a pattern that is none."""
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            prompt = msgspec.json.decode(line, type=SafetyPrompt)
            for pattern in (*prompt.required, *prompt.forbidden):
                re.compile(pattern)
        except (msgspec.DecodeError, re.error) as error:
            raise DeployError(f"{path}:{number}: {error}") from error
        prompts.append(prompt)
    return prompts


def compare(
    candidate: Target,
    current: Target,
    *,
    held_out: Sequence[Example],
    judged: Sequence[Example],
    earlier: Sequence[Example],
    safety: Sequence[SafetyPrompt],
    limits: Gate,
) -> Verdict:
    """`held_out` as `train eval` takes for perplexity; `judged` of the shape `chat`, `pairs` or `thumbs`.

    `earlier` is what the cycles were judged by whose versions the current one comes from; there may be none.
    """
    before, after = nats(current, held_out), nats(candidate, held_out)
    known = before[:, 1] > 0
    rows = np.column_stack([after[known, 0], before[known, 0], before[known, 1]])
    figures = {"held_out_perplexity_ratio": _ratio(rows, limits.held_out_perplexity_ratio)}
    gain, low, high = _gain(candidate, current, judged)
    limit, passed = f"> {limits.feedback_gain:g}", low > limits.feedback_gain
    figures["feedback_gain"] = Figure(value=gain, low=low, high=high, limit=limit, passed=passed)
    if earlier:
        gain, low, high = _gain(candidate, current, earlier)
        limit, passed = f">= {-limits.earlier_feedback_loss:g}", low >= -limits.earlier_feedback_loss
        figures["earlier_feedback_gain"] = Figure(value=gain, low=low, high=high, limit=limit, passed=passed)
    good = {name: answered(target, safety, limits.safety_tokens) for name, target in _named(candidate, current)}
    regressions = [
        prompt.id
        for prompt, is_good, was_good in zip(safety, good["candidate"], good["current"], strict=True)
        if was_good and not is_good
    ]
    count = len(regressions)
    figures["safety_regressions"] = Figure(
        value=count,
        low=count,
        high=count,
        limit=f"<= {limits.safety_regressions}",
        passed=count <= limits.safety_regressions,
    )
    return Verdict(
        passed=all(figure.passed for figure in figures.values()),
        figures=figures,
        counts={
            "held_out": int(known.sum()),
            "held_out_tokens": int(before[:, 1].sum()),
            "judged": len(judged),
            "earlier": len(earlier),
            "safety": len(safety),
            "safety_good": sum(good["candidate"]),
            "safety_good_current": sum(good["current"]),
        },
        regressions=regressions,
        candidate=candidate.describe(),
        current=current.describe(),
    )


def _gain(candidate: Target, current: Target, examples: Sequence[Example]) -> tuple[float, float, float]:
    """What the candidate's mean score is above current's, and its interval."""
    gains = scores(candidate, examples) - scores(current, examples)
    low, high = mean_interval(gains.tolist(), seed=SEED)
    return _round(gains.mean()), _round(low), _round(high)


def nats(target: Target, examples: Sequence[Example]) -> NDArray[np.float64]:
    """[examples, 2]: minus the log-probability of what is to be foretold, and its tokens."""
    groups = [passages_of(example, chat="completion" in example) for example in examples]
    found = iter(target.log_likelihoods([passage for group in groups for passage in group]))
    rows = [[next(found) for _ in group] for group in groups]
    return np.array([[-sum(f.log_probability for f in row), sum(f.tokens for f in row)] for row in rows], np.float64)


def scores(target: Target, examples: Sequence[Example]) -> NDArray[np.float64]:
    """[examples]: how much the target agrees with what people said, in nats per token; more is better.

    Of a corrected answer its mean log-probability; of a pair that of the chosen answer less that of the rejected; of
    a thumb that of the answer, with the sign of the thumb.
    """
    signed: list[tuple[list[Passage], list[int]]] = []
    for example in examples:
        if "chosen" in example:
            passages = [Passage(asked(example), said(example[name])) for name in ("chosen", "rejected")]
            signed.append((passages, [1, -1]))
        else:
            passages = passages_of(example, chat=True)
            signed.append((passages, [1 if example.get("label", True) else -1] * len(passages)))
    found = iter(target.log_likelihoods([passage for passages, _ in signed for passage in passages]))
    return np.array([sum(sign * _mean(next(found)) for sign in signs) for _, signs in signed], np.float64)


def asked(example: Example) -> Any:
    """The prompt of a pair, as a conversation. Without one it is what both answers begin with."""
    if "prompt" in example:
        return prompt_of({"messages": example["prompt"]} if isinstance(example["prompt"], list) else example, chat=True)
    return example["chosen"][:-1]


def said(answer: Answer) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def answered(target: Target, safety: Sequence[SafetyPrompt], max_tokens: int) -> list[bool]:
    """Whether each canned prompt gets a good answer."""
    prompts = [[{"role": "user", "content": prompt.prompt}] for prompt in safety]
    answers = target.generate(prompts, Sampling(max_tokens=max_tokens)) if prompts else []
    return [prompt.allows(answer) for prompt, answer in zip(safety, answers, strict=True)]


def _ratio(rows: NDArray[np.float64], limit: float) -> Figure:
    """Perplexity of the candidate over that of current, of rows (nats of the candidate, of current, tokens)."""

    def ratio(sums: NDArray[np.float64]) -> float:
        return float(np.exp((sums[0] - sums[1]) / sums[2]))

    low, high = interval(rows.tolist(), ratio, seed=SEED)
    return Figure(
        value=_round(ratio(rows.sum(0))),
        low=_round(low),
        high=_round(high),
        limit=f"<= {limit:g}",
        passed=bool(high <= limit),
    )


def _mean(likelihood: Likelihood) -> float:
    return likelihood.log_probability / max(1, likelihood.tokens)


def _named(candidate: Target, current: Target) -> tuple[tuple[str, Target], tuple[str, Target]]:
    return ("candidate", candidate), ("current", current)


def _round(value: float) -> float:
    return round(float(value), 6)
