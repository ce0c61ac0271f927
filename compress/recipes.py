"""Recipes: which precision each product has, by name."""

from __future__ import annotations

from compress.families import Decoder
from compress.linear import FLOAT
from proto.manifest import Precision, Recipe

W8A8 = Precision(weight_bits=8, activation_bits=8)
W8A16 = Precision(weight_bits=8, activation_bits=16)
RECIPES = ("fp32", "w8a8", "w8a16")


def make_recipe(name: str, decoder: Decoder) -> Recipe:
    """The recipe called `name`. Raises ValueError that lists the known ones.

    In `w8a8` the products whose input cannot be smoothed well read it in two int8 planes (16 bits): the weights,
    which decide the time of a decode step, stay 8-bit and are read once.
    """
    if name == "fp32":
        return Recipe(name=name, default=FLOAT)
    if name == "w8a16":
        return Recipe(name=name, default=W8A16)
    if name == "w8a8":
        return Recipe(name=name, default=W8A8)
    raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
