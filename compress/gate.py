"""The gate: is the artifact as good as the full-precision model, on text that calibration did not see?

The artifact is run through the runner that will serve it, prompt chunk by prompt chunk. Thresholds are fixed before the
run and travel with the figures in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from proto.manifest import Form, GateReport
from serve.block_cache import blocks_for
from serve.plan import Floats, Plan, Runner

Tokens = NDArray[np.int64]

THRESHOLDS = {"perplexity_ratio": 1.01, "kl": 0.02, "greedy_agreement": 0.93}
CHUNK = 128  # tokens a run, as in serving


class Scores(Protocol):
    """What is right: compress/reference.py."""

    def log_probabilities(self, window: int, start: int, end: int) -> Floats:
        """[end - start, vocab], in natural logarithms, behind the tokens `start` to `end` of window number `window`."""


def log_softmax(logits: Floats) -> Floats:
    """Natural-log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    totals = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    result: Floats = shifted - np.log(totals).astype(np.float32)
    return result


def score(runner: Runner, window: Sequence[int], start: int, end: int) -> Floats:
    """Log-probabilities behind each of the window's tokens from `start` to `end`; those before are in the cache."""
    plan = Plan()
    # Blocks of the native form; the first one is the stock form's slot.
    plan.add(range(blocks_for(len(window))), start, list(window[start:end]), want="all")
    output = runner.run(plan)
    return log_softmax(output.logits[output.rows])


class _Tally:
    """Sums over positions of one candidate's log-probabilities against the reference's."""

    def __init__(self) -> None:
        self.nll = self.kl = self.agree = 0.0

    def add(self, expected: Floats, found: Floats, targets: Tokens) -> None:
        self.nll -= float(found[np.arange(len(targets)), targets].sum(dtype=np.float64))
        self.kl += float((np.exp(expected) * (expected - found)).sum(dtype=np.float64))
        self.agree += float((expected.argmax(-1) == found.argmax(-1)).sum())

    def metrics(self, reference: _Tally, positions: int) -> dict[str, float]:
        perplexity = np.exp(self.nll / positions)
        return {
            "perplexity": round(float(perplexity), 4),
            "perplexity_ratio": round(float(perplexity / np.exp(reference.nll / positions)), 5),
            "kl": round(self.kl / positions, 6),
            "greedy_agreement": round(self.agree / positions, 5),
        }


def judge(
    reference: Scores,
    candidates: Mapping[Form, Runner],
    windows: Sequence[Sequence[int]],
    *,
    forced: bool,
    progress: Callable[[], None] = lambda: None,
) -> GateReport:
    """Judge an artifact's forms, the one that is served here first; each must pass.

    Perplexity of all, mean KL(reference || candidate) in nats, and how often the arg-max is the same. The figures of
    the second form and the following are named after it: `stock_kl`.
    """
    exact = _Tally()
    tallies = {form: _Tally() for form in candidates}
    positions = 0
    for number, window in enumerate(windows):
        for start in range(0, len(window) - 1, CHUNK):
            end = min(start + CHUNK, len(window) - 1)
            targets = np.asarray(window[start + 1 : end + 1])
            expected = reference.log_probabilities(number, start, end)
            exact.add(expected, expected, targets)
            for form, runner in candidates.items():
                tallies[form].add(expected, score(runner, window, start, end), targets)
            positions += end - start
        progress()
    found = {form: tally.metrics(exact, positions) for form, tally in tallies.items()}
    first = next(iter(found))
    metrics = {"perplexity_reference": exact.metrics(exact, positions)["perplexity"]}
    for form, figures in found.items():
        metrics |= {key if form == first else f"{form}_{key}": value for key, value in figures.items()}
    passed = all(map(passes, found.values()))
    return GateReport(
        form=first,
        passed=passed,
        forced=forced and not passed,
        tokens=positions,
        metrics=metrics,
        thresholds=dict(THRESHOLDS),
    )


def passes(metrics: dict[str, float]) -> bool:
    """Not a number is a failure: every comparison must hold."""
    return (
        metrics["perplexity_ratio"] <= THRESHOLDS["perplexity_ratio"]
        and metrics["kl"] <= THRESHOLDS["kl"]
        and metrics["greedy_agreement"] >= THRESHOLDS["greedy_agreement"]
    )
