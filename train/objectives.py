"""The objectives by name, with the data that each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from train.batch import IGNORE, Batch
from train.classification import classify
from train.distillation import DistillOptions, distill
from train.errors import TrainError
from train.head_loss import cross_entropy, total_loss
from train.loss import Loss, Objective
from train.model import Model
from train.preferences import DpoOptions, KtoOptions, dpo, kto

ObjectiveOptions = DpoOptions | KtoOptions | DistillOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a run must bring for an objective."""

    shapes: tuple[str, ...]  # of the data; the first is what is taken if none is named
    options: type[ObjectiveOptions] | None = None
    teacher: bool = False
    reference: bool = False  # a frozen copy of the model, unless it has adapters
    classes: bool = False  # the model is loaded with `classes`


OBJECTIVES: Mapping[str, Kind] = {
    "next-token": Kind(shapes=("text",)),
    "sft": Kind(shapes=("chat",)),
    "dpo": Kind(shapes=("pairs",), options=DpoOptions, reference=True),
    "kto": Kind(shapes=("thumbs",), options=KtoOptions, reference=True),
    "distill": Kind(shapes=("text", "chat"), options=DistillOptions, teacher=True),
    "classify": Kind(shapes=("classes",), classes=True),
}


def make_objective(
    name: str,
    options: ObjectiveOptions | None = None,
    *,
    reference: Model | None = None,
    teacher: Model | None = None,
) -> Objective:
    """The objective `name`, with its default options if none are given.

    Without a `reference`, DPO and KTO compare with the model without its adapters. Raises TrainError for an unknown
    name, and for a missing teacher.
    """
    if name not in OBJECTIVES:
        raise TrainError(f"objective {name!r} is unknown; give one of {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    chosen: Any = options or (kind.options and kind.options())
    if name == "dpo":
        return dpo(chosen, reference)
    if name == "kto":
        return kto(chosen, reference)
    if name == "distill":
        if teacher is None:
            raise TrainError("distillation needs a teacher; give its checkpoint")
        return distill(chosen, teacher)
    return classify if name == "classify" else next_token


def next_token(model: Model, batch: Batch) -> Loss:
    """Cross-entropy at the positions that are learnt, whether all of a text or the answers of a chat."""
    learnt = batch.labels != IGNORE

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return total_loss(hidden[learnt], weight, bias, cross_entropy(batch.labels[learnt]))

    return Loss(model(batch.tokens, batch.positions, read), {})
