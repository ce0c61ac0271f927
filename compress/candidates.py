"""What a search chooses from: for every product the precisions that it may have, with what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.families import Decoder
from compress.packing import DEPTH, TILE, pad
from compress.precisions import PRECISIONS, precision_of
from compress.speed import STREAMS as MANY
from proto.manifest import Precision, Recipe

Objective = Literal["latency", "throughput", "size"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "size")
STREAMS: Mapping[Objective, int] = {"latency": 1, "throughput": MANY}  # requests that decode at once

Doubles = NDArray[np.float64]


def native_precisions() -> list[Precision]:
    """Those that the native operators have: integers on both sides."""
    return [p for p in PRECISIONS if p.weight_bits < 32 and p.activation_bits == 8]


def offered(decoder: Decoder, product: str, precision: Precision) -> bool:
    """A head that is the embedding too has 8 bits."""
    return precision.weight_bits == 8 or product != "head" or not decoder.tied


def weight_bytes(decoder: Decoder, product: str, precision: Precision) -> int:
    """What a product's weight takes in the data file (docs/native.md), without the file's alignment."""
    role = product.rpartition(".")[2]
    num_outputs, num_inputs = decoder.shape(role)
    parts = decoder.parts(role)
    rows, inputs = parts * pad(num_outputs // parts, TILE), pad(num_inputs, DEPTH)
    if precision.weight_bits == 8:
        return rows * (inputs + 8)  # with float32 scales and int32 sums
    return rows * inputs // 2 + rows * inputs // precision.group + 4 * rows  # with a byte by group and float32 scales


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tables [products, precisions]; infinite where a product cannot have the precision."""

    products: Sequence[str]
    precisions: Sequence[Precision]
    kl: Doubles  # nats per token
    costs: Mapping[Objective, Doubles]  # seconds of a decode step at 1 and at many streams, and bytes
    fixed: Mapping[Objective, float]  # what all recipes cost besides

    def recipe(self, name: str, choice: Sequence[int]) -> Recipe:
        """The recipe of a precision's index for every product."""
        chosen = {product: self.precisions[i] for product, i in zip(self.products, choice, strict=True)}
        default = Counter(chosen.values()).most_common(1)[0][0]
        return Recipe(name=name, default=default, products={p: q for p, q in chosen.items() if q != default})

    def choice(self, recipe: Recipe) -> list[int]:
        """Undoes `recipe`. Raises ValueError for a precision that is not among the candidates."""
        return [self.precisions.index(precision_of(recipe, product)) for product in self.products]

    def kl_of(self, choice: Sequence[int]) -> float:
        return float(self.kl[range(len(choice)), choice].sum())

    def cost_of(self, choice: Sequence[int], objective: Objective) -> float:
        """Of the whole model."""
        return float(self.costs[objective][range(len(choice)), choice].sum()) + self.fixed[objective]
