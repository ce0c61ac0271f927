"""Recipes: which precision each product has, by name."""

from __future__ import annotations

from compress.families import Decoder
from compress.precisions import FLOAT, W4A8, W8A8, W8A16
from proto.manifest import Recipe

RECIPES = ("fp32", "w8a8", "w8a16", "w4a8")


def make_recipe(name: str, decoder: Decoder) -> Recipe:
    """The recipe called `name` for a decoder. Raises ValueError that lists the known ones.

    In `w8a8` the two kinds of products with the heaviest-tailed inputs read them in two int8 planes (16 bits): `down`,
    whose input is a product of activations, and `head`, before which no scale can be folded when its matrix is also the
    embedding. On SmolLM2 they cost more quality at 8 bits than all the rest. Their weights are still read once.
    `w4a8` halves what a token reads: all weights but the head's have 4 bits.
    """
    heavy = {product: W8A16 for product in decoder.products if product == "head" or product.endswith(".down")}
    match name:
        case "fp32":
            return Recipe(name=name, default=FLOAT)
        case "w8a8":
            return Recipe(name=name, default=W8A8, products=heavy)
        case "w8a16":
            return Recipe(name=name, default=W8A16)
        case "w4a8":
            return Recipe(name=name, default=W4A8, products={"head": W8A16})
    raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
