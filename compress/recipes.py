"""Recipes: which precision each product has, by name or from a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from compress.decoder import check_recipe
from compress.families import Decoder
from compress.precisions import FLOAT, W4, W4A8_ROTATED, W8, W8A8_ROTATED
from proto.manifest import Recipe

RECIPES = ("fp32", "w8a8", "w4a8", "w8", "w4")
SUFFIX = ".json"  # of recipe files


def make_recipe(name: str, decoder: Decoder) -> Recipe:
    """The recipe called `name` for a decoder, or of the file with that name.

    Raises ValueError that lists the known ones, or says what is wrong with the file.

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
    if name.endswith(SUFFIX):
        return read_recipe(Path(name), decoder)
    raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}, or give a {SUFFIX} file of `search`")


def read_recipe(path: Path, decoder: Decoder) -> Recipe:
    """The recipe in a file, for a decoder. Raises ValueError that names the file, what is wrong and the cure."""
    try:
        recipe = msgspec.json.decode(path.read_bytes(), type=Recipe)
        check_recipe(recipe, decoder)
    except FileNotFoundError as error:
        raise ValueError(f"there is no recipe file {path}; `search` writes one") from error
    except ValueError as error:  # msgspec's and Unicode's too
        raise ValueError(f"{path}: {error}. Correct the file, or let `search` write it for this checkpoint") from error
    return recipe


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a file that `read_recipe` reads."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(recipe), indent=2) + b"\n")
