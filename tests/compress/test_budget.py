"""The grammar of limits, and when one holds."""

from __future__ import annotations

import math
import re

import pytest

from compress.budget import KINDS, STRICT, WIDE, Budget, default_budget, parse
from compress.precisions import FLOAT, W4A8, W8A8_ROTATED
from proto.manifest import Interval, Recipe

GOOD = {"perplexity_ratio": 1.0, "kl": 0.0, "greedy_agreement": 1.0}


@pytest.mark.parametrize(
    ("text", "thresholds"),
    [
        ("ppl<=+1%", {"perplexity_ratio": 1.01}),
        ("ppl<=1.06", {"perplexity_ratio": 1.06}),
        ("ppl<=-.5%", {"perplexity_ratio": 0.995}),
        ("kl<=0.02", {"kl": 0.02}),
        ("agreement>=93%", {"greedy_agreement": 0.93}),
        ("agreement>=0.93", {"greedy_agreement": 0.93}),
        ("accuracy>=-1%", {"accuracy_change": -0.01}),
        ("identical>=40", {"identical_length": 40}),
        (" kl <= .5 ,ppl<=+1%\n", {"perplexity_ratio": 1.01, "kl": 0.5}),
        (STRICT, {"perplexity_ratio": 1.01, "kl": 0.02, "greedy_agreement": 0.93}),
        (STRICT.replace(",", ""), {"perplexity_ratio": 1.01, "kl": 0.02, "greedy_agreement": 0.93}),
    ],
)
def test_limits_are_understood(text: str, thresholds: dict[str, float]) -> None:
    assert parse(text).thresholds == thresholds


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_example_is_a_limit_of_its_figure(kind: object) -> None:
    example, metric = (getattr(kind, name) for name in ("example", "metric"))
    assert parse(example).thresholds.keys() == {metric}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no limit; write limits as ppl<=+1%, kl<=0.02"),
        ("size<=5", "'size<=5' is no limit"),
        ("kl", "'kl' is no limit"),
        ("kl<0.1", "'kl<0.1' is no limit"),
        ("kl<=0.02;ppl<=+1%", "'kl<=0.02;ppl<=+1%' is no limit of kl; write it as kl<=0.02"),
        ("ppl>=+1%", "'ppl>=+1%' is no limit of ppl; write it as ppl<=+1%"),
        ("ppl<=1%", "'ppl<=1%' is no limit of ppl"),
        ("kl<=2%", "'kl<=2%' is no limit of kl"),
        ("kl<=-1", "'kl<=-1' is no limit of kl"),
        ("agreement>=nan", "'agreement>=nan' is no limit of agreement"),
        ("accuracy>=1%", "'accuracy>=1%' is no limit of accuracy; write it as accuracy>=-1%"),
        ("kl<=1 kl<=2", "'kl<=2' limits kl for the second time"),
    ],
)
def test_what_is_not_understood_is_quoted_with_the_cure(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


@pytest.mark.parametrize("name", GOOD)
def test_each_figure_can_fail_alone(name: str) -> None:
    budget = parse(STRICT)
    limit = budget.thresholds[name]
    beyond = limit - 1e-4 if name == "greedy_agreement" else limit + 1e-4
    assert budget.failures(GOOD) == []
    assert budget.failures(GOOD | {name: limit}) == []
    assert budget.failures(GOOD | {name: beyond}) == [name]
    assert budget.failures(GOOD | {name: math.nan}) == [name]


def test_all_of_an_interval_must_be_within() -> None:
    budget = parse("kl<=0.02, agreement>=93%")
    metrics = {"kl": 0.015, "greedy_agreement": 0.95}
    inside = {"kl": Interval(low=0.01, high=0.02), "greedy_agreement": Interval(low=0.93, high=0.97)}
    assert budget.failures(metrics, inside) == []
    assert budget.failures(metrics, inside | {"kl": Interval(low=0.01, high=0.021)}) == ["kl"]
    assert budget.failures(metrics, {"greedy_agreement": Interval(low=0.92, high=0.97)}) == ["greedy_agreement"]
    assert budget.failures(metrics, {"kl": Interval(low=math.nan, high=math.nan)}) == ["kl"]


def test_a_limited_figure_that_was_not_measured_fails() -> None:
    assert Budget({"kl": 1.0}).failures({}) == ["kl"]


def test_recipes_with_4_bit_weights_may_lose_more() -> None:
    mixed = Recipe(name="mixed", default=W8A8_ROTATED, products={"layers.0.down": W4A8})
    assert default_budget(Recipe(name="a", default=W8A8_ROTATED)) == parse(STRICT)
    assert default_budget(Recipe(name="b", default=FLOAT)) == parse(STRICT)
    assert default_budget(mixed) == default_budget(Recipe(name="c", default=W4A8)) == parse(WIDE)
