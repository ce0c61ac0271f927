"""Scores of text, and the figures and intervals over them."""

from __future__ import annotations

import numpy as np
import pytest

from compress.scores import (
    CANDIDATE,
    FIGURES,
    KL,
    NLL,
    REFERENCE,
    TOKENS,
    Measured,
    log_softmax,
    measure,
    paired_sums,
    score_rows,
    shorten,
)


def test_log_softmax_is_exact_for_large_logits() -> None:
    found = log_softmax(np.array([[1000.0, 1000.0, -1000.0]], np.float32))
    assert found[0, :2] == pytest.approx(np.log(0.5))
    assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1)


def test_a_row_tells_surprise_divergence_agreement_and_success() -> None:
    expected = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], np.float32))
    found = np.log(np.array([[0.4, 0.5, 0.1], [0.2, 0.6, 0.2]], np.float32))
    rows = score_rows(expected, found, np.array([1, 0]))
    kl = (np.exp(expected) * (expected - found)).sum(-1)
    assert rows == pytest.approx(np.array([[-np.log(0.5), kl[0], 0, 1], [-np.log(0.2), kl[1], 1, 0]]), rel=1e-5)


def test_sums_are_laid_out_as_their_names_say() -> None:
    one, other = [np.full((3, 4), 1.0), np.full((5, 4), 2.0)], [np.full((3, 4), 10.0), np.full((5, 4), 20.0)]
    rows = paired_sums(one, other)
    assert rows[:, TOKENS].tolist() == [3, 5]
    assert rows[:, REFERENCE + NLL].tolist() == [3, 10]
    assert rows[:, CANDIDATE + KL].tolist() == [30, 100]


def test_pairing_takes_out_how_hard_the_text_is() -> None:
    """Windows differ a lot, the two models little: the perplexities are uncertain, their ratio is not."""
    random = np.random.default_rng(0)
    level = random.uniform(1, 4, 16)
    reference = [np.stack([np.full(100, nats), *np.zeros((3, 100))], axis=1) for nats in level]
    candidate = [table + np.array([0.01, 0.001, 1, 1]) for table in reference]
    found = measure(reference, candidate, FIGURES)
    assert found.metrics["perplexity_ratio"] == shorten(float(np.exp(0.01)))
    ratio, perplexity = found.intervals["perplexity_ratio"], found.intervals["perplexity"]
    assert ratio.high - ratio.low < 1e-5
    assert perplexity.high - perplexity.low > 0.2 * found.metrics["perplexity"]
    assert found.metrics["accuracy_change"] == 1


def test_the_interval_of_a_ratio_is_the_bootstraps_of_its_logarithm() -> None:
    """Equally long windows: the mean of the differences is nearly normal."""
    random = np.random.default_rng(1)
    change = random.normal(0.02, 0.01, 64)
    reference = [np.zeros((10, 4)) for _ in change]
    candidate = [np.full((10, 4), value) for value in change]
    found = measure(reference, candidate, {"perplexity_ratio": FIGURES["perplexity_ratio"]})
    bounds, spread = found.intervals["perplexity_ratio"], 1.96 * change.std() / np.sqrt(len(change))
    assert np.log(bounds.low) == pytest.approx(change.mean() - spread, abs=0.2 * spread)
    assert np.log(bounds.high) == pytest.approx(change.mean() + spread, abs=0.2 * spread)


def test_figures_of_another_form_are_named_after_it() -> None:
    first, second = Measured(), Measured()
    first.add("kl", 0.1234567, (0.1, 0.2))
    second.add_mean("kl", [1.0, 3.0])
    first.join(second, "stock_")
    assert first.metrics == {"kl": 0.123457, "stock_kl": 2}
    assert (first.intervals["stock_kl"].low, first.intervals["stock_kl"].high) == (1, 3)
