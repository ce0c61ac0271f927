"""What an objective gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from train.batch import Batch
from train.model import Model


class Loss(NamedTuple):
    """Sums over the batch, each a float32 scalar: the loop divides them by the count of all that it sums over."""

    total: Tensor
    metrics: Mapping[str, Tensor]  # without gradients


Objective = Callable[[Model, Batch], Loss]
