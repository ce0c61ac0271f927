"""What a model and its reference say of the same text, token by token, and the figures over it.

Intervals are the paired bootstrap's over windows: both models are resampled alike, so that how hard the text is does
not widen them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from proto.manifest import Interval
from serve.plan import Floats
from train.evaluation.intervals import Figure, interval, mean_interval

Tokens = NDArray[np.int64]
Table = NDArray[np.float64]

NLL, KL, AGREES, CORRECT = range(4)  # columns of the scores of a window [positions, 4]
WIDTH = 4
TOKENS, REFERENCE, CANDIDATE = 0, 1, 1 + WIDTH  # where they begin in the sums that figures are made of
SEED = 0
DIGITS = 6  # of a figure, significant


def log_softmax(logits: Floats) -> Floats:
    """Natural-log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    totals = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    result: Floats = shifted - np.log(totals).astype(np.float32)
    return result


def score_rows(expected: Floats, found: Floats, targets: Tokens) -> Table:
    """[positions, 4] of a model's log-probabilities `found`, each [positions, vocabulary].

    Minus the log-probability of the token that follows; KL(expected || found); whether both have the same most
    probable token; and whether that is the one that follows.
    """
    best = found.argmax(-1)
    columns = (
        -found[np.arange(len(targets)), targets],
        (np.exp(expected) * (expected - found)).sum(-1, dtype=np.float64),
        expected.argmax(-1) == best,
        best == targets,
    )
    return np.stack(columns, axis=-1, dtype=np.float64)


def _perplexity(at: int) -> Figure:
    return lambda s: float(np.exp(s[at + NLL] / s[TOKENS]))


def _mean(at: int) -> Figure:
    return lambda s: float(s[at] / s[TOKENS])


FIGURES: Mapping[str, Figure] = {
    "perplexity": _perplexity(CANDIDATE),
    "perplexity_ratio": lambda s: float(np.exp((s[CANDIDATE + NLL] - s[REFERENCE + NLL]) / s[TOKENS])),
    "kl": _mean(CANDIDATE + KL),
    "greedy_agreement": _mean(CANDIDATE + AGREES),
    "accuracy": _mean(CANDIDATE + CORRECT),
    "accuracy_change": lambda s: float((s[CANDIDATE + CORRECT] - s[REFERENCE + CORRECT]) / s[TOKENS]),
}
REFERENCE_FIGURES: Mapping[str, Figure] = {
    "perplexity_reference": _perplexity(REFERENCE),
    "accuracy_reference": _mean(REFERENCE + CORRECT),
}


class Measured:
    """Figures by name, with the intervals of those that are means over text."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.intervals: dict[str, Interval] = {}

    def add(self, name: str, value: float, bounds: tuple[float, float] | None = None) -> None:
        self.metrics[name] = shorten(value)
        if bounds is not None:
            self.intervals[name] = Interval(low=shorten(bounds[0]), high=shorten(bounds[1]))

    def add_mean(self, name: str, values: Sequence[float]) -> None:
        self.add(name, float(np.mean(values)), mean_interval(values, seed=SEED))

    def join(self, other: Measured, prefix: str = "") -> None:
        self.metrics |= {prefix + name: value for name, value in other.metrics.items()}
        self.intervals |= {prefix + name: bounds for name, bounds in other.intervals.items()}


def measure(reference: Sequence[Table], candidate: Sequence[Table], figures: Mapping[str, Figure]) -> Measured:
    """`figures` of a model's scores by window beside those of its reference."""
    rows = paired_sums(reference, candidate)
    found = Measured()
    for name, figure in figures.items():
        found.add(name, figure(rows.sum(0)), interval(rows.tolist(), figure, seed=SEED))
    return found


def paired_sums(*models: Sequence[Table]) -> Table:
    """[windows, 1 + 4 models]: how many tokens a window has, and each model's sums over them."""
    counts = np.array([[len(table)] for table in models[0]], np.float64)
    return np.concatenate([counts, *(np.stack([table.sum(0) for table in model]) for model in models)], axis=1)


def shorten(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
