"""The gate on runners whose logits are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.budget import STRICT, parse
from compress.gate import examine, judge
from compress.reading import CHUNK, RunnerReference
from compress.scores import log_softmax
from proto.manifest import GateReport
from tests.compress.table_runner import VOCAB, TableRunner, reference_of, streams

WINDOWS = np.random.default_rng(7).integers(0, VOCAB, (3, CHUNK + 60)).tolist()
BUDGET = parse(STRICT)


def judged(candidate: TableRunner, *, forced: bool = False, budget: str = STRICT) -> GateReport:
    evidence = examine(reference_of(), {"native": streams(candidate)}, WINDOWS)
    return judge(evidence, parse(budget), forced=forced)  # type: ignore[arg-type]


def test_an_identical_runner_passes_with_perfect_figures() -> None:
    report = judged(TableRunner())
    assert report.passed
    assert not report.forced
    assert (report.windows, report.tokens) == (3, sum(len(window) - 1 for window in WINDOWS))
    perfect = {"perplexity_ratio": 1, "kl": 0, "greedy_agreement": 1, "accuracy_change": 0, "identical_share": 1}
    assert {name: report.metrics[name] for name in perfect} == perfect
    assert {(report.intervals[name].low, report.intervals[name].high) == (perfect[name],) * 2 for name in perfect}
    assert report.metrics["perplexity"] == report.metrics["perplexity_reference"]
    assert report.metrics["accuracy"] == report.metrics["accuracy_reference"]


def test_the_figures_are_what_their_names_say() -> None:
    reference, candidate = TableRunner(), TableRunner(0.5)
    report = judged(candidate)
    expected, found = (log_softmax(runner.table.astype(np.float64)) for runner in (reference, candidate))
    pairs = [(a, b) for window in WINDOWS for a, b in itertools.pairwise(window)]
    rows, targets = np.array(pairs).T
    perplexity = [float(np.exp(-table[rows, targets].mean())) for table in (expected, found)]
    accuracy = [float((table.argmax(-1)[rows] == targets).mean()) for table in (expected, found)]
    kl = (np.exp(expected) * (expected - found)).sum(-1)[rows].mean()
    agreement = (expected.argmax(-1) == found.argmax(-1))[rows].mean()
    wanted = {
        "perplexity": perplexity[1],
        "perplexity_reference": perplexity[0],
        "perplexity_ratio": perplexity[1] / perplexity[0],
        "kl": kl,
        "greedy_agreement": agreement,
        "accuracy": accuracy[1],
        "accuracy_reference": accuracy[0],
        "accuracy_change": accuracy[1] - accuracy[0],
    }
    assert {name: report.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for name in wanted:
        bounds = report.intervals[name]
        assert bounds.low <= report.metrics[name] <= bounds.high, name


def test_forms_are_judged_each_by_its_own_figures() -> None:
    both = {"native": streams(TableRunner()), "stock": streams(TableRunner(1.5))}
    report = judge(examine(reference_of(), both, WINDOWS), BUDGET)  # type: ignore[arg-type]
    assert report.form == "native"
    assert not report.passed, "one that is not good enough is too many"
    assert report.metrics["kl"] == 0 < report.metrics["stock_kl"]
    assert report.metrics["identical_share"] == 1 > report.metrics["stock_identical_share"]
    assert report.intervals.keys() - report.metrics.keys() == set()
    assert "stock_perplexity_ratio" in report.intervals


def test_a_damaged_runner_fails() -> None:
    report = judged(TableRunner(1.5))
    assert not report.passed
    assert BUDGET.failures(report.metrics) == ["perplexity_ratio", "kl", "greedy_agreement"]


def test_a_runner_that_only_looks_better_fails() -> None:
    """Sharper logits keep every greedy token; the divergence tells."""
    report = judged(TableRunner(scale=1.5))
    assert report.metrics["greedy_agreement"] == report.metrics["identical_share"] == 1.0
    assert not report.passed


def test_a_limit_within_the_interval_fails() -> None:
    """The best guess is within it, and yet it is not sure."""
    report = judged(TableRunner(0.1))
    kl, bounds = report.metrics["kl"], report.intervals["kl"]
    assert bounds.low < kl < bounds.high
    assert judged(TableRunner(0.1), budget=f"kl<={bounds.high:.9f}").passed
    assert not judged(TableRunner(0.1), budget=f"kl<={(kl + bounds.high) / 2:.9f}").passed


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_a_number_fails() -> None:
    assert not judged(TableRunner(bad_token=WINDOWS[0][5])).passed


def test_the_limits_and_the_force_are_recorded() -> None:
    report = judged(TableRunner(1.5), forced=True)
    assert report.thresholds == BUDGET.thresholds
    assert report.forced
    assert not report.passed, "force publishes; it does not change the verdict"


def test_the_evidence_is_by_window_and_token() -> None:
    found = examine(reference_of(), {"native": streams(TableRunner(0.5))}, WINDOWS)
    assert [table.shape for table in found.scores["native"]] == [(len(window) - 1, 4) for window in WINDOWS]
    assert [table.shape for table in found.reference] == [(len(window) - 1, 4) for window in WINDOWS]
    assert len(found.identical["native"]) == len(WINDOWS)


def test_text_goes_through_in_the_chunks_of_serving() -> None:
    candidate = TableRunner()
    examine(reference_of(), {"native": streams(candidate)}, WINDOWS)
    chunks = [CHUNK, 59] * len(WINDOWS)
    assert candidate.sizes[: len(chunks)] == chunks


def test_a_runner_is_a_reference_wherever_it_is_asked() -> None:
    runner = TableRunner()
    expected = reference_of()(WINDOWS)
    found = RunnerReference(runner, WINDOWS)
    for window, start, end in ((0, 0, 40), (0, 40, 188), (1, 100, 180), (0, 40, 50)):
        exact = expected.log_probabilities(window, start, end)
        np.testing.assert_array_equal(found.log_probabilities(window, start, end), exact)
    assert runner.sizes == [40, 128, 20, 128, 52, 50]


def test_progress_is_told_once_a_window_and_once_an_answer() -> None:
    calls: list[None] = []
    examine(reference_of(), {"native": streams(TableRunner())}, WINDOWS, progress=lambda: calls.append(None))
    assert len(calls) == 2 * len(WINDOWS)
