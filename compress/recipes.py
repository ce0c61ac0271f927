"""Recipes: which precision each product has, by name."""

from __future__ import annotations

from compress.families import Decoder
from compress.precisions import FLOAT, W4, W4A8_ROTATED, W8, W8A8_ROTATED
from proto.manifest import Recipe

RECIPES = ("fp32", "w8a8", "w4a8", "w8", "w4")


def make_recipe(name: str, decoder: Decoder) -> Recipe:
    """The recipe called `name` for a decoder. Raises ValueError that lists the known ones.

    In `w8a8` and `w4a8` all products read rotated inputs. `w4a8` halves what a token reads: all weights but the head's
    have 4 bits.
    `w8` and `w4` are weight-only, for machines where the portable graph is all that runs; the head has 8 bits in both.
    """
    match name:
        case "fp32":
            return Recipe(name=name, default=FLOAT)
        case "w8a8":
            return Recipe(name=name, default=W8A8_ROTATED)
        case "w4a8":
            return Recipe(name=name, default=W4A8_ROTATED, products={"head": W8A8_ROTATED})
        case "w8":
            return Recipe(name=name, default=W8)
        case "w4":
            return Recipe(name=name, default=W4, products={"head": W8})
    raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
