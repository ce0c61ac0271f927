"""Is a window of traffic like the reference? By figure: how far apart, and whether chance alone could do it.

Distributions are compared by the population stability index, PSI = sum (q - p) ln(q / p) over bins that each hold a
tenth of the reference (Siddiqi, Credit Risk Scorecards, 2006): below 0.1 is calm, above 0.25 is another population.
Two samples of one population have a PSI too; what 95 % of them stay below is found by permutation. Rates are compared
by their difference, with Newcombe's interval from Wilson's (Statistics in Medicine 17, 1998, method 10).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from monitoring.window import Window

BINS = 10
FLOOR = 0.5  # counted in an empty bin: its logarithm would be infinite
PERMUTATIONS = 400
Z = 1.96  # 95 %
PSI_LIMIT = 0.25
RATE_LIMIT = 0.05  # of difference

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bin or a category, with the shares that it has in both windows."""

    label: str
    reference: float
    current: float


@dataclass(frozen=True, slots=True)
class Drift:
    """`distance` of a figure is a PSI, or a difference of rates from `low` to `high`.

    `drifted`: beyond the limit, and not by chance. `low` of a PSI is what chance stays below.
    """

    figure: str
    kind: Literal["psi", "rate"]
    reference: float  # its mean, its rate, or the share of the most frequent category
    current: float
    distance: float
    low: float
    high: float
    drifted: bool
    bars: tuple[Bar, ...] = ()


NUMBERS: dict[str, Callable[[Window], Sequence[float]]] = {
    "prompt_tokens": lambda window: window.prompt_tokens,
    "completion_tokens": lambda window: window.completion_tokens,
    "mean_logprob": lambda window: window.mean_logprobs,
}
RATES: dict[str, Callable[[Window], Sequence[bool]]] = {
    "refusals": lambda window: window.refusals,
    "empty_answers": lambda window: window.empty,
    "truncated_answers": lambda window: window.truncated,
    "broken_off": lambda window: window.broken_off,
    "feedback_coverage": lambda window: window.judged,
    "thumbs_up": lambda window: window.thumbs,
}


def compare(reference: Window, current: Window) -> list[Drift]:
    """Every figure that both windows have values of."""
    found = [
        numbers_drift(name, values(reference), values(current))
        for name, values in NUMBERS.items()
        if values(reference) and values(current)
    ]
    if reference.languages and current.languages:
        found.append(categories_drift("language", reference.languages, current.languages))
    return found + [
        rate_drift(name, values(reference), values(current))
        for name, values in RATES.items()
        if values(reference) and values(current)
    ]


def numbers_drift(figure: str, reference: Sequence[float], current: Sequence[float]) -> Drift:
    """The first bin is what no value of the reference was as low as."""
    least = min(reference)
    tenths = np.unique(np.quantile(reference, np.linspace(0, 1, BINS + 1)[1:-1]))
    edges = np.concatenate([[np.nextafter(least, -np.inf)], tenths])
    places = [np.searchsorted(edges, values, side="left") for values in (reference, current)]
    labels = [f"under {least:g}", *(f"to {edge:g}" for edge in tenths), f"over {tenths[-1]:g}"]
    return _psi_drift(figure, places[0], places[1], labels, float(np.mean(reference)), float(np.mean(current)))


def categories_drift(figure: str, reference: Sequence[str], current: Sequence[str]) -> Drift:
    """The most frequent ones, and all others as one."""
    labels = [name for name, _ in Counter([*reference, *current]).most_common(BINS - 1)]
    number = {label: place for place, label in enumerate(labels)}
    places = [np.array([number.get(value, len(labels)) for value in values]) for values in (reference, current)]
    shares = [float((found == 0).mean()) for found in places]
    return _psi_drift(figure, places[0], places[1], [*labels, "others"], *shares)


def psi(reference: Counts, current: Counts) -> float:
    p, q = (np.maximum(counts, FLOOR) / np.maximum(counts, FLOOR).sum() for counts in (reference, current))
    return float(((q - p) * np.log(q / p)).sum())


def _psi_drift(
    figure: str, first: NDArray[np.int64], second: NDArray[np.int64], labels: list[str], before: float, now: float
) -> Drift:
    def count(places: NDArray[np.int64]) -> Counts:
        return np.bincount(places, minlength=len(labels)).astype(np.float64)

    reference, current = count(first), count(second)
    distance = psi(reference, current)
    together, generator = np.concatenate([first, second]), np.random.default_rng(0)
    by_chance = []
    for _ in range(PERMUTATIONS):
        generator.shuffle(together)
        by_chance.append(psi(count(together[: len(first)]), count(together[len(first) :])))
    chance = float(np.quantile(by_chance, 0.95))
    bars = zip(labels, reference / reference.sum(), current / current.sum(), strict=True)
    return Drift(
        *(figure, "psi", before, now, distance, chance, distance),
        drifted=distance > max(PSI_LIMIT, chance),
        bars=tuple(Bar(label, float(p), float(q)) for label, p, q in bars if p or q),
    )


def rate_drift(figure: str, reference: Sequence[bool], current: Sequence[bool]) -> Drift:
    (p, p_low, p_high), (q, q_low, q_high) = (wilson(sum(values), len(values)) for values in (reference, current))
    difference = q - p
    low = difference - sqrt((q - q_low) ** 2 + (p_high - p) ** 2)
    high = difference + sqrt((q_high - q) ** 2 + (p - p_low) ** 2)
    drifted = abs(difference) > RATE_LIMIT and not low <= 0 <= high
    return Drift(figure, "rate", p, q, difference, low, high, drifted)


def wilson(hits: int, count: int) -> tuple[float, float, float]:
    """A rate with its 95 % interval (Wilson, JASA 22, 1927)."""
    rate = hits / count
    middle = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return rate, max(middle - half, 0.0), min(middle + half, 1.0)
