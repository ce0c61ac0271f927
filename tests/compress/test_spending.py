"""How much of a budget is used, and where the next build is aimed."""

from __future__ import annotations

import math

import pytest

from compress.measurements import Judged
from compress.spending import TARGET, next_limit, parse_budget, use_of
from proto.manifest import Interval


def judged(ratio: float, kl: float = 0.001, **intervals: Interval) -> Judged:
    return Judged({"perplexity_ratio": ratio, "kl": kl, "greedy_agreement": 0.95}, intervals)


@pytest.mark.parametrize(
    ("budget", "use"),
    [("ppl<=+1%", 0.5), ("ppl<=+1% kl<=0.001", 1.0), ("agreement>=90%", 0.5), ("agreement>=99%", 5.0)],
)
def test_the_figure_that_is_nearest_to_its_limit_counts(budget: str, use: float) -> None:
    assert use_of(parse_budget(budget), judged(1.005)) == pytest.approx(use)


def test_the_whole_interval_counts() -> None:
    found = judged(1.005, perplexity_ratio=Interval(low=1.002, high=1.012))
    assert use_of(parse_budget("ppl<=+1%"), found) == pytest.approx(1.2)


def test_what_is_no_number_is_beyond_every_budget() -> None:
    assert use_of(parse_budget("ppl<=+1%"), judged(math.nan)) == math.inf
    assert use_of(parse_budget("ppl<=+1%"), Judged({}, {})) == math.inf


@pytest.mark.parametrize("budget", ["accuracy>=-1%", "ppl<=+0%", "agreement>=100%", "kl<=0", "ppl<=-1%", "speed<=3"])
def test_what_cannot_be_spent_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=budget.partition(" ")[0][:4]):
        parse_budget(budget)


def test_one_build_is_scaled() -> None:
    assert next_limit([(0.01, 2.0)]) == pytest.approx(0.01 * TARGET / 2)
    assert next_limit([(0.01, 0.5)]) == pytest.approx(0.01 * TARGET / 0.5)


def test_between_two_builds_the_limit_lies_between_them() -> None:
    assert 0.01 < next_limit([(0.1, 8.0), (0.01, 0.4)]) < 0.1
    assert next_limit([(0.1, TARGET), (0.01, 0.4), (1.0, 9.0)]) == pytest.approx(0.1)


@pytest.mark.parametrize("use", [0.0, -0.5, math.inf])
def test_uses_without_a_logarithm_do_no_harm(use: float) -> None:
    assert 0 < next_limit([(0.01, use), (0.02, 1.5)]) < math.inf
