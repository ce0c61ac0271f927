"""Limits on an artifact's figures: what the gate demands, and what a search may spend.

Written as `ppl<=+1%, kl<=0.02, agreement>=93%`, with commas or spaces between them. A limit holds if the figure's whole
95 % interval is within it, not its best guess alone: little text makes a gate hard to pass, never easy by luck. A
figure without an interval must be within the limit itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from proto.manifest import Interval, Recipe

STRICT = "ppl<=+1%, kl<=0.02, agreement>=93%"
WIDE = "ppl<=+6%, kl<=0.1, agreement>=85%"  # of recipes with 4-bit weights

NUMBER = r"(?:\d+\.?\d*|\.\d+)"


@dataclass(frozen=True, slots=True)
class Kind:
    """A figure that can be limited."""

    metric: str  # its name in the manifest
    sign: str  # the side that it is limited from
    value: str  # pattern of a limit
    example: str
    base: float = 0.0  # what a limit with a plus or minus is counted from


KINDS = {
    "ppl": Kind("perplexity_ratio", "<=", rf"[+-]{NUMBER}%|{NUMBER}", "ppl<=+1%", base=1.0),
    "kl": Kind("kl", "<=", NUMBER, "kl<=0.02"),
    "agreement": Kind("greedy_agreement", ">=", rf"{NUMBER}%?", "agreement>=93%"),
    "accuracy": Kind("accuracy_change", ">=", rf"[+-]{NUMBER}%", "accuracy>=-1%"),
    "identical": Kind("identical_length", ">=", NUMBER, "identical>=40"),
}
SIGNS = {kind.metric: kind.sign for kind in KINDS.values()}
GRAMMAR = ", ".join(kind.example for kind in KINDS.values())


@dataclass(frozen=True, slots=True)
class Budget:
    """`thresholds` are limits by the metric's name in the manifest."""

    thresholds: Mapping[str, float]

    def failures(self, metrics: Mapping[str, float], intervals: Mapping[str, Interval] | None = None) -> list[str]:
        """The metrics that are not, or not surely, within their limits. What is not a number or is missing fails."""
        return [name for name in self.thresholds if not self._holds(name, metrics, intervals or {})]

    def _holds(self, name: str, metrics: Mapping[str, float], intervals: Mapping[str, Interval]) -> bool:
        values = [metrics.get(name, math.nan)]
        if name in intervals:
            values += [intervals[name].low, intervals[name].high]
        limit, is_most = self.thresholds[name], SIGNS[name] == "<="
        return all(value <= limit if is_most else value >= limit for value in values)


def parse(text: str) -> Budget:
    """Raises ValueError that quotes what it does not understand, with an example of every limit."""
    thresholds: dict[str, float] = {}
    joined = re.sub(r"\s*([<>]=)\s*", r"\1", text)
    for part in re.findall(r"[^,\s]+", joined) or [text]:
        name, sign, value = next(([*part.partition(sign)] for sign in ("<=", ">=") if sign in part), (part, "", ""))
        kind = KINDS.get(name)
        if kind is None:
            raise ValueError(f"{part!r} is no limit; write limits as {GRAMMAR}, with commas or spaces between them")
        if sign != kind.sign or not re.fullmatch(kind.value, value):
            raise ValueError(f"{part!r} is no limit of {name}; write it as {kind.example}")
        if kind.metric in thresholds:
            raise ValueError(f"{part!r} limits {name} for the second time; give one limit of each")
        number = float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
        thresholds[kind.metric] = round(kind.base + number if value[0] in "+-" else number, 9)
    return Budget(thresholds)


def default_budget(recipe: Recipe) -> Budget:
    """`WIDE` if any weight has 4 bits, else `STRICT`."""
    precisions = [recipe.default, *recipe.products.values()]
    return parse(WIDE if any(precision.weight_bits == 4 for precision in precisions) else STRICT)
