"""Recipes: which precision each product has, by name or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from compress.decoder import check_recipe
from compress.families import Decoder
from compress.precisions import BFLOAT, FLOAT, HALF, W4, W4A8_ROTATED, W4A16, W8, W8A8_ROTATED, W8A16, float_type
from proto.manifest import KvCacheType, Recipe, Target

# The first is the default.
RECIPES_OF: Mapping[Target, tuple[str, ...]] = {
    "cpu": ("w8a8", "fp32", "w4a8", "w8", "w4"),
    "cuda": ("fp16", "bf16", "w8a16", "w4a16"),
}
RECIPES = tuple(name for names in RECIPES_OF.values() for name in names)
SUFFIX = ".json"  # of recipe files


def make_recipe(name: str, decoder: Decoder) -> Recipe:
    """The recipe called `name` for a decoder, or of the file with that name.

    Raises ValueError that lists the known ones, or says what is wrong with the file.

    In `w8a8` and `w4a8` all products read rotated inputs. `w4a8` halves what a token reads: all weights but the head's
    have 4 bits.
    `w8` and `w4` are weight-only, for machines where the portable graph is all that runs; the head has 8 bits in both.
    `fp16`, `bf16` and the weight-only `w8a16` and `w4a16`, whose activations are float16, are for CUDA.
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
        case "fp16":
            return Recipe(name=name, default=HALF)
        case "bf16":
            return Recipe(name=name, default=BFLOAT)
        case "w8a16":
            return Recipe(name=name, default=W8A16)
        case "w4a16":
            return Recipe(name=name, default=W4A16, products={"head": W8A16})
    if name.endswith(SUFFIX):
        return read_recipe(Path(name), decoder)
    raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}, or give a {SUFFIX} file of `search`")


def check_target(recipe: Recipe, target: Target) -> None:
    """Raises ValueError if the recipe's kernels are another target's: those of 16-bit floats are for CUDA alone."""
    if (found := "cpu" if float_type(recipe.default) == "fp32" else "cuda") != target:
        raise ValueError(
            f"recipe {recipe.name} is for {found} and --target is {target}; give --target {found}, or one of the "
            f"recipes {', '.join(RECIPES_OF[target])}"
        )


def cache_type(asked: KvCacheType | Literal[""], recipe: Recipe) -> KvCacheType:
    """That of `--kv`, or if it leaves that open int8 on CPUs and the activations' own type on CUDA.

    Raises ValueError for what the attention operator does not take beside the recipe's activations.
    """
    floats = float_type(recipe.default)
    chosen = asked or ("int8" if floats == "fp32" else floats)
    if chosen not in ("int8", floats):
        raise ValueError(
            f"--kv {chosen} does not go with recipe {recipe.name}: give {floats}, its activations', or int8"
        )
    return chosen


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
