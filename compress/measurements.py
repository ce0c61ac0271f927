"""What a search has measured, kept in a file so that the next one starts with it.

Each part says what it was measured with, and is measured anew where that is not the same: another checkpoint, other
text, another processor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from compress.candidates import Candidates, Doubles, Objective, offered, weight_bytes
from compress.families import Decoder
from compress.precisions import precision_of
from compress.speeds import Speeds
from proto.manifest import Interval, Precision, Recipe

Key = dict[str, str | int]


class Judged(Struct):
    """The gate's figures of a recipe that was really built, on the validation text."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]


class Quality(Struct):
    key: Key
    kl: dict[str, list[float]]  # by product, for each precision that it can have
    judged: dict[str, Judged] = {}  # by `name_of_recipe`


class Timing(Struct):
    key: Key
    speeds: Speeds


class Measurements(Struct):
    precisions: list[Precision]
    quality: Quality | None = None
    timing: Timing | None = None

    def write(self, path: Path) -> None:
        """As a whole or not at all."""
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        os.replace(new, path)


def read(path: Path, precisions: Sequence[Precision], quality: Key, timing: Key) -> Measurements:
    """Those parts of the file that were measured with the same keys and precisions; none if there is no file.

    Raises ValueError for a file that is something else.
    """
    fresh = Measurements(list(precisions))
    if not path.exists():
        return fresh
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Measurements)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no measurements: {error}. Remove it, or name another file") from error
    if found.precisions != fresh.precisions:
        return fresh
    if found.quality and found.quality.key == quality:
        fresh.quality = found.quality
    if found.timing and found.timing.key == timing:
        fresh.timing = found.timing
    return fresh


def name_of_recipe(recipe: Recipe, decoder: Decoder) -> str:
    """The same for recipes that give every product the same precision, whatever they are called."""
    chosen = [precision_of(recipe, product) for product in decoder.products]
    return msgspec.json.encode(chosen).decode()


def tables(
    decoder: Decoder, precisions: Sequence[Precision], kl: Mapping[str, list[float]], speeds: Speeds
) -> Candidates:
    """The measurements by product and precision."""
    products = decoder.products
    is_offered = np.array([[offered(decoder, product, p) for p in precisions] for product in products])
    losses = np.full(is_offered.shape, np.inf)
    for row, product in enumerate(products):
        losses[row, is_offered[row]] = kl[product]

    def by_role(seconds: list[dict[str, float]]) -> Doubles:
        roles = [product.rpartition(".")[2] for product in products]
        return np.array([[of_precision.get(role, np.inf) for of_precision in seconds] for role in roles])

    sizes = np.array([[weight_bytes(decoder, product, p) for p in precisions] for product in products], float)
    costs: dict[Objective, Doubles] = {objective: by_role(found) for objective, found in speeds.products.items()}
    costs["size"] = np.where(is_offered, sizes, np.inf)
    fixed: dict[Objective, float] = {**speeds.rest, "size": float(speeds.rest_bytes)}
    return Candidates(products, precisions, losses, costs, fixed)
