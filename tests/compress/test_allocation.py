"""The knapsack against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocation import allocate, front
from compress.candidates import Candidates
from compress.precisions import W4A8, W8A8, W8A8_ROTATED
from proto.manifest import Recipe

VALUES = st.integers(1, 40)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """KL and cost [products, precisions] with some holes, and a limit."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    kl, cost = (
        np.array(draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns)), float).reshape(rows, columns)
        for _ in range(2)
    )
    for row in range(rows):
        if draw(st.booleans()) and columns > 1:
            cost[row, draw(st.integers(0, columns - 1))] = np.inf
    return kl / 1000, cost, draw(st.integers(1, 160)) / 1000


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_choice_is_the_cheapest_of_all_within_the_limit(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    kl, cost, limit = problem
    rows = range(len(kl))
    every = [c for c in product(range(kl.shape[1]), repeat=len(kl)) if kl[rows, c].sum() <= limit + 1e-9]
    least = min((cost[rows, c].sum() for c in every), default=np.inf)
    found = allocate(kl, cost, limit)
    if not np.isfinite(least):
        assert found is None
    else:
        assert found is not None
        assert kl[rows, found].sum() <= limit + 1e-9
        assert cost[rows, found].sum() == pytest.approx(least, rel=1e-3)


def test_of_two_that_cost_the_same_the_better_is_taken() -> None:
    kl = np.array([[0.3, 0.1, 0.2]] * 4)
    assert allocate(kl, np.full(kl.shape, 7.0), 9.0) == [1, 1, 1, 1]


def candidates(num_products: int) -> Candidates:
    random = np.random.default_rng(0)
    kl = np.exp(random.normal(size=(num_products, 1))) * np.array([1e-4, 8e-5, 5e-3])
    size = random.integers(1, 5, (num_products, 1)) * np.array([100.0, 101.0, 56.0])
    products = [f"layers.{i}.o" for i in range(num_products)]
    return Candidates(products, [W8A8, W8A8_ROTATED, W4A8], kl, {"size": size}, {"size": 10.0})


def test_the_front_goes_from_the_most_exact_to_the_cheapest() -> None:
    found = candidates(20)
    choices = front(found, "size")
    kl, cost = [found.kl_of(c) for c in choices], [found.cost_of(c, "size") for c in choices]
    assert choices[0] == [1] * 20
    assert choices[-1] == [2] * 20
    assert kl == sorted(kl)
    assert cost == sorted(cost, reverse=True)
    assert len(choices) > 6


def test_a_product_that_suffers_keeps_its_precision() -> None:
    found = candidates(20)
    found.kl[7, 2] = 10.0
    choices = front(found, "size")
    assert all(choice[7] != 2 for choice in choices[:-1])


def test_a_recipe_names_what_differs_from_the_most_common() -> None:
    found = candidates(4)
    recipe = found.recipe("mine", [2, 0, 2, 2])
    assert recipe == Recipe(name="mine", default=W4A8, products={"layers.1.o": W8A8})
    assert found.choice(recipe) == [2, 0, 2, 2]
