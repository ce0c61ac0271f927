"""What a trial has shown so far: each figure of one version against another's, and whether it keeps its limit.

Values are compared as they come: the versions' values since the last pair, averaged, are the next pair, whose
difference is one observation. So each pair compares answers of the same minutes, and what changes with the hour
changes for both. Whether a figure keeps its limit is open until the whole interval says so (deploy/sequential.py);
the intervals hold all together with probability 1 - alpha, at every look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from deploy.policy import Trial
from deploy.sequential import interval
from deploy.traffic import NAMES, Name, Streams, Value

MOST_TIMES = 10.0  # a pair of times further apart than this counts as this: the test needs bounds

Verdict = Literal["kept", "broken", "open"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Of a figure's differences: how far they reach, what the mean must keep, and whether they are logarithms."""

    reach: float
    limit: float
    least: bool = False  # the mean must be at least the limit, not at most
    is_ratio: bool = False

    def judge(self, low: float, high: float) -> Verdict:
        if self.least:
            return "kept" if low >= self.limit else "broken" if high < self.limit else "open"
        return "kept" if high <= self.limit else "broken" if low > self.limit else "open"

    def shown(self, value: float) -> float:
        return round(math.exp(value) if self.is_ratio else value, 6)

    def spell(self) -> str:
        return f"{'>=' if self.least else '<='} {self.shown(self.limit):g}"


class Figure(Struct, frozen=True, kw_only=True):
    """`value` with its interval is the difference of the new version from the old; of times it is their ratio.

    `new` and `old` are the means, of times the geometric means in seconds; None: there is no value yet.
    """

    new: float | None
    old: float | None
    value: float | None
    low: float
    high: float
    limit: str
    verdict: Verdict
    pairs: int


class Findings(Struct, frozen=True, kw_only=True):
    verdict: Verdict
    figures: dict[Name, Figure]
    counts: dict[str, dict[str, int]]  # "new" and "old": answers, and people whose time is over

    def explain(self) -> str:
        """In one line: what was broken, or else everything."""
        told = {name: f for name, f in self.figures.items() if f.verdict == "broken"} or self.figures
        words = {"kept": "keeps", "broken": "BREAKS", "open": "may keep"}
        return ", ".join(
            f"{name} {'-' if f.value is None else format(f.value, '.4g')} [{f.low:.4g}, {f.high:.4g}] "
            f"{words[f.verdict]} {f.limit}"
            for name, f in told.items()
        )


def rules(policy: Trial) -> dict[Name, Rule]:
    most = math.log(MOST_TIMES)
    return {
        "errors": Rule(1, policy.error_increase),
        "aborts": Rule(1, policy.abort_increase),
        "ttft": Rule(most, math.log(policy.ttft_ratio), is_ratio=True),
        "token_time": Rule(most, math.log(policy.token_time_ratio), is_ratio=True),
        "approval": Rule(2, 0.0 - policy.approval_loss, least=True),
    }


def judge(new: str, streams: Streams, policy: Trial) -> Findings:
    """The version `new` against the other one: broken if one limit is, kept if all are."""
    figures = {
        name: figure(new, streams[name], rule, policy.alpha / len(NAMES)) for name, rule in rules(policy).items()
    }
    verdicts = {found.verdict for found in figures.values()}
    counts = {
        side: {
            "answers": sum((value.version == new) is is_new for value in streams["errors"]),
            "people": sum((value.version == new) is is_new for value in streams["aborts"]),
        }
        for side, is_new in (("new", True), ("old", False))
    }
    verdict: Verdict = "broken" if "broken" in verdicts else "open" if "open" in verdicts else "kept"
    return Findings(verdict=verdict, figures=figures, counts=counts)


def figure(new: str, stream: Sequence[Value], rule: Rule, alpha: float) -> Figure:
    differences = pair(new, stream).clip(-rule.reach, rule.reach)
    low, high = interval(differences, rule.reach, alpha)
    means = []
    for is_new in (True, False):
        side = [value.value for value in stream if (value.version == new) is is_new]
        means.append(rule.shown(math.fsum(side) / len(side)) if side else None)
    return Figure(
        new=means[0],
        old=means[1],
        value=rule.shown(float(differences.mean())) if len(differences) else None,
        low=rule.shown(low),
        high=rule.shown(high),
        limit=rule.spell(),
        verdict=rule.judge(low, high),
        pairs=len(differences),
    )


def pair(new: str, stream: Sequence[Value]) -> NDArray[np.float64]:
    """[pairs]: mean of the values of `new` less that of the others, of each stretch that has just got both."""
    found = []
    sums, counts = [0.0, 0.0], [0, 0]
    for version, value in stream:
        side = version == new
        sums[side] += value
        counts[side] += 1
        if all(counts):
            found.append(sums[True] / counts[True] - sums[False] / counts[False])
            sums, counts = [0.0, 0.0], [0, 0]
    return np.array(found, np.float64)


def side_by_side(new: str, late: Streams, early: Streams) -> Streams:
    """Values of `new` from later on, each beside one that the other version had before, as far as both go."""
    return {
        name: [
            value
            for both in zip(
                [value for value in late[name] if value.version == new],
                [value for value in early[name] if value.version != new],
                strict=False,
            )
            for value in both
        ]
        for name in NAMES
    }
