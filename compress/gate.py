"""The gate: is the artifact as good as the full-precision model, on text that calibration did not see?

Both are run through the runner that will serve them, prompt chunk by prompt chunk, with the same context. Thresholds
are fixed before the run and travel with the figures in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from proto.manifest import GateReport
from serve.plan import Floats, Plan, Runner

THRESHOLDS = {"perplexity_ratio": 1.01, "kl": 0.02, "greedy_agreement": 0.93}
CHUNK = 128  # tokens a run, as in serving


def log_softmax(logits: Floats) -> Floats:
    """Natural-log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    totals = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    result: Floats = shifted - np.log(totals).astype(np.float32)
    return result


def score(runner: Runner, plan: Plan) -> Floats:
    output = runner.run(plan)
    return log_softmax(output.logits[output.rows])


def judge(
    reference: Runner,
    candidate: Runner,
    windows: Sequence[Sequence[int]],
    *,
    forced: bool,
    progress: Callable[[], None] = lambda: None,
) -> GateReport:
    """Perplexity of both, mean KL(reference || candidate) in nats, and how often the arg-max is the same."""
    nll = np.zeros(2)
    kl = agree = 0.0
    positions = 0
    for window in windows:
        for start in range(0, len(window) - 1, CHUNK):
            end = min(start + CHUNK, len(window) - 1)
            plan = Plan()
            plan.add([0], start, list(window[start:end]), want="all")
            expected, found = score(reference, plan), score(candidate, plan)
            targets = np.asarray(window[start + 1 : end + 1])
            rows = np.arange(end - start)
            nll -= [expected[rows, targets].sum(dtype=np.float64), found[rows, targets].sum(dtype=np.float64)]
            kl += float((np.exp(expected) * (expected - found)).sum(dtype=np.float64))
            agree += float((expected.argmax(-1) == found.argmax(-1)).sum())
            positions += end - start
        progress()
    perplexity = np.exp(nll / positions)
    metrics = {
        "perplexity": round(float(perplexity[1]), 4),
        "perplexity_reference": round(float(perplexity[0]), 4),
        "perplexity_ratio": round(float(perplexity[1] / perplexity[0]), 5),
        "kl": round(kl / positions, 6),
        "greedy_agreement": round(agree / positions, 5),
    }
    passed = passes(metrics)
    return GateReport(
        passed=passed, forced=forced and not passed, tokens=positions, metrics=metrics, thresholds=dict(THRESHOLDS)
    )


def passes(metrics: dict[str, float]) -> bool:
    """Not a number is a failure: every comparison must hold."""
    return (
        metrics["perplexity_ratio"] <= THRESHOLDS["perplexity_ratio"]
        and metrics["kl"] <= THRESHOLDS["kl"]
        and metrics["greedy_agreement"] >= THRESHOLDS["greedy_agreement"]
    )
