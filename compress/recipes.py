"""Recipes: which precision each product has, by name."""

from __future__ import annotations

from compress.linear import FLOAT
from proto.manifest import Precision, Recipe

W8A8 = Precision(weight_bits=8, activation_bits=8)
W8A16 = Precision(weight_bits=8, activation_bits=16)
RECIPES = ("fp32", "w8a8", "w8a16")


def make_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError that lists the known ones.

    In `w8a8` the head reads its input in two int8 planes (16 bits): nothing before it can take over its outliers, and
    it alone would cost as much quality as all layers together. Its weight is still read once.
    """
    recipes = {
        "fp32": Recipe(name="fp32", default=FLOAT),
        "w8a8": Recipe(name="w8a8", default=W8A8, products={"head": W8A16}),
        "w8a16": Recipe(name="w8a16", default=W8A16),
    }
    if name not in recipes:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(recipes)}")
    return recipes[name]
