"""How long a turn of the engine takes: a sum of a few terms of what the scheduler planned, fitted to measured turns.

A turn is from one schedule to the next. Its plan is known before it runs, so its time can be told from the plan alone:
the weights are read once whatever the batch, products cost by the token, attention by the tokens that are seen, each
answering row the head, the sampler and its event, each new request its parsing and its record.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from deploy.errors import DeployError
from serve.scheduler import Step

MANY = 32  # tokens, from which on the price of one more is another: products are no longer bound by memory
TERMS = (
    "turn",
    f"token, up to {MANY}",
    f"token, beyond {MANY}",
    "token seen by a row that decodes",
    "token seen by one of a prompt",
    "row that answers",
    "new request",
)
ROUNDS = 5  # of fitting: each weighs by the round before
MATTERS = 0.03  # of the time: groups with less say little
LEAST_TURNS = 10 * len(TERMS)
SPREAD = np.linspace(0, 1, 41)  # quantiles that are kept of what the terms do not tell

Floats = NDArray[np.float64]


def terms(step: Step) -> list[float]:
    """What a step has of each of TERMS."""
    plan, context, seen = step.plan, 0, 0.0
    for segment in plan.segments:
        if segment.count == 1:
            context += segment.past + 1
        else:
            seen += segment.count * (segment.past + (segment.count + 1) / 2)
    tokens = len(plan.tokens)
    by_price = min(tokens, MANY), max(tokens - MANY, 0)
    return [1, *by_price, context, seen, len(plan.wanted), len(step.admitted)]


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How well the terms tell the turns that they were fitted to: shares of the measured time."""

    turns: int
    total_seconds: float  # of those turns
    median_error: float  # half of the turns are nearer than this
    p90_error: float
    bias: dict[str, float]  # of groups of turns: their predicted over their measured time, less 1
    largest_bias: float  # of groups with a share of the time that matters


class StepModel(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds_each`: of one of each of TERMS. `spread`: quantiles of a turn's time over what the terms say, mean 1."""

    seconds_each: list[float]
    spread: list[float]

    def __post_init__(self) -> None:
        """Raises ValueError for what no fit gives."""
        if len(self.seconds_each) != len(TERMS) or min(self.seconds_each, default=-1) < 0:
            raise ValueError(f"seconds_each must have {len(TERMS)} numbers, none negative")
        if sum(self.seconds_each) <= 0:
            raise ValueError("seconds_each are all 0, so nothing would take time")
        if not self.spread or min(self.spread) < 0:
            raise ValueError("spread must have numbers, none negative")

    def scaled(self, times: float) -> StepModel:
        """Of a machine on which every turn takes so many times as long."""
        return msgspec.structs.replace(self, seconds_each=[times * each for each in self.seconds_each])

    def slower(self, amounts: Sequence[Sequence[float]], seconds: Sequence[float]) -> float:
        """How many times as long as expected measured turns took, [turns, terms] and [turns]."""
        return float(sum(seconds) / np.dot(amounts, self.seconds_each).sum())

    def seconds(self, step: Step, share: float = 0.5) -> float:
        """How long a turn with this step takes; `share`, 0 to 1, says how unlucky it is among those like it."""
        expected = sum(each * amount for each, amount in zip(self.seconds_each, terms(step), strict=True))
        place = share * (len(self.spread) - 1)
        low = min(int(place), max(len(self.spread) - 2, 0))
        high = min(low + 1, len(self.spread) - 1)
        return expected * (self.spread[low] + (place - low) * (self.spread[high] - self.spread[low]))


def fit(amounts: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[StepModel, Fit]:
    """The model of measured turns, [turns, terms] and [turns], and how good it is. Raises DeployError for too few.

    Non-negative least squares, weighed by 1 / expected: the sums of measured and expected times agree, and long turns
    do not drown the short ones. The longest 1 % of what the terms do not tell is cut: another process had the machine.
    """
    x, y = np.asarray(amounts, np.float64), np.asarray(seconds, np.float64)
    if len(y) < LEAST_TURNS:
        raise DeployError(f"{len(y)} turns were measured and {LEAST_TURNS} are needed; measure for longer")
    expected = y
    for _ in range(ROUNDS):
        weight = 1 / np.sqrt(expected)
        each, _ = nnls(x * weight[:, None], y * weight)
        expected = np.maximum(x @ each, 1e-9)
        y = np.minimum(y, expected * np.quantile(y / expected, 0.99))
    ratio = y / expected
    spread = np.quantile(ratio, SPREAD)
    spread /= np.interp((np.arange(1000) + 0.5) / 1000, SPREAD, spread).mean()
    error = np.abs(expected / y - 1)
    groups = [(name, expected[rows].sum(), y[rows].sum()) for name, rows in _groups(x) if rows.any()]
    quality = Fit(
        turns=len(y),
        total_seconds=float(y.sum()),
        median_error=float(np.median(error)),
        p90_error=float(np.quantile(error, 0.9)),
        bias={name: float(told / took - 1) for name, told, took in groups},
        largest_bias=float(max(abs(told / took - 1) for _, told, took in groups if took > MATTERS * y.sum())),
    )
    return StepModel(seconds_each=each.tolist(), spread=spread.tolist()), quality


def _groups(x: Floats) -> list[tuple[str, NDArray[np.bool_]]]:
    """Turns without prompts by their rows, and turns with prompts by their tokens."""
    tokens, rows, prompts = x[:, 1:3].sum(axis=1), x[:, 5], x[:, 4] > 0
    edges = itertools.pairwise((1, 2, 5, 9, 17, 33, 129, 10**9))
    return [
        group
        for low, high in edges
        for group in (
            (f"{low} to {high - 1} rows", ~prompts & (low <= rows) & (rows < high)),
            (f"{low} to {high - 1} tokens, some of prompts", prompts & (low <= tokens) & (tokens < high)),
        )
    ]
