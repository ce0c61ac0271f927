"""The gate on runners whose logits are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.gate import CHUNK, THRESHOLDS, judge, log_softmax, passes
from serve.plan import Output, Plan

VOCAB = 50
WINDOWS = np.random.default_rng(7).integers(0, VOCAB, (3, CHUNK + 60)).tolist()
GOOD = {"perplexity_ratio": 1.0, "kl": 0.0, "greedy_agreement": 1.0}


class TableRunner:
    """Logits depend on the token alone. Rows come in reverse, as a runner may order them as it likes."""

    num_slots = 1
    capacity = 1024
    kv_bytes = 0

    def __init__(self, noise: float = 0.0, *, scale: float = 1.0, bad_token: int | None = None) -> None:
        self.table = 3 * np.random.default_rng(8).normal(size=(VOCAB, VOCAB)).astype(np.float32)
        self.table += noise * np.random.default_rng(9).normal(size=self.table.shape).astype(np.float32)
        self.table *= scale
        if bad_token is not None:
            self.table[bad_token] = np.nan
        self.held = 0
        self.sizes: list[int] = []

    def run(self, plan: Plan) -> Output:
        (segment,) = plan.segments
        assert segment.past in (0, self.held), "chunks follow one another"
        self.held = segment.past + segment.count
        self.sizes.append(segment.count)
        logits = self.table[[plan.tokens[i] for i in plan.wanted]][::-1]
        return Output(logits, np.zeros((len(logits), 1), np.float32), list(range(len(logits)))[::-1])


class TableReference:
    """The same table, asked by window."""

    table = TableRunner().table

    def log_probabilities(self, window: int, start: int, end: int) -> NDArray[np.float32]:
        return log_softmax(self.table[WINDOWS[window][start:end]])


def test_an_identical_runner_passes_with_perfect_figures() -> None:
    report = judge(TableReference(), {"native": TableRunner()}, WINDOWS, forced=False)
    assert report.passed
    assert not report.forced
    assert report.tokens == sum(len(window) - 1 for window in WINDOWS)
    assert {name: report.metrics[name] for name in GOOD} == GOOD
    assert report.metrics["perplexity"] == report.metrics["perplexity_reference"]


def test_the_figures_are_what_their_names_say() -> None:
    reference, candidate = TableReference(), TableRunner(0.5)
    report = judge(reference, {"native": candidate}, WINDOWS, forced=False)
    expected, found = (log_softmax(runner.table.astype(np.float64)) for runner in (reference, candidate))
    pairs = [(a, b) for window in WINDOWS for a, b in itertools.pairwise(window)]
    rows, targets = np.array(pairs).T
    perplexity = [float(np.exp(-table[rows, targets].mean())) for table in (expected, found)]
    kl = (np.exp(expected) * (expected - found)).sum(-1)[rows].mean()
    agreement = (expected.argmax(-1) == found.argmax(-1))[rows].mean()
    assert report.metrics == {
        "perplexity": pytest.approx(perplexity[1], rel=1e-4),
        "perplexity_reference": pytest.approx(perplexity[0], rel=1e-4),
        "perplexity_ratio": pytest.approx(perplexity[1] / perplexity[0], rel=1e-4),
        "kl": pytest.approx(kl, rel=1e-3),
        "greedy_agreement": pytest.approx(agreement, abs=1e-4),
    }


def test_a_damaged_runner_fails() -> None:
    report = judge(TableReference(), {"native": TableRunner(1.5)}, WINDOWS, forced=False)
    assert not report.passed
    assert report.metrics["kl"] > THRESHOLDS["kl"]
    assert report.metrics["greedy_agreement"] < THRESHOLDS["greedy_agreement"]


def test_a_runner_that_only_looks_better_fails() -> None:
    """Sharper logits keep every greedy token; the divergence tells."""
    report = judge(TableReference(), {"native": TableRunner(scale=1.5)}, WINDOWS, forced=False)
    assert report.metrics["greedy_agreement"] == 1.0
    assert not report.passed


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_a_number_fails() -> None:
    assert not judge(TableReference(), {"native": TableRunner(bad_token=WINDOWS[0][5])}, WINDOWS, forced=False).passed


@pytest.mark.parametrize("name", THRESHOLDS)
def test_each_figure_can_fail_the_gate_alone(name: str) -> None:
    limit = THRESHOLDS[name]
    beyond = limit - 1e-4 if name == "greedy_agreement" else limit + 1e-4
    assert passes(GOOD)
    assert passes(GOOD | {name: limit})
    assert not passes(GOOD | {name: beyond})
    assert not passes(GOOD | {name: float("nan")})


def test_the_thresholds_and_the_force_are_recorded() -> None:
    report = judge(TableReference(), {"native": TableRunner(1.5)}, WINDOWS, forced=True)
    assert report.thresholds == THRESHOLDS
    assert report.forced
    assert not report.passed, "force publishes; it does not change the verdict"


def test_text_goes_through_in_the_chunks_of_serving() -> None:
    candidate = TableRunner()
    judge(TableReference(), {"native": candidate}, WINDOWS, forced=False)
    assert candidate.sizes == [CHUNK, 59] * len(WINDOWS)


def test_progress_is_told_once_a_window() -> None:
    calls: list[None] = []
    judge(TableReference(), {"native": TableRunner()}, WINDOWS, forced=False, progress=lambda: calls.append(None))
    assert len(calls) == len(WINDOWS)
