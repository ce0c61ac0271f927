"""Objectives on answers that people liked or did not: DPO on pairs, KTO on thumbs.

Both compare the model with a reference, which is where it began: the same model without its adapters, or a frozen copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from train.adapters import disabled
from train.batch import IGNORE, Batch
from train.flags import option
from train.head_loss import log_probabilities
from train.loss import Loss, Objective
from train.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoOptions:
    beta: float = option(0.1, "what a nat of difference to the reference counts; less goes further", least=1e-6)
    label_smoothing: float = option(0.0, "share of pairs that are taken to be the wrong way round", least=0, most=0.49)


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoOptions:
    """The paper keeps desirable : undesirable, counts times weights, from 1:1 to 4:3."""

    beta: float = option(0.1, "what a nat of difference to the reference counts; less goes further", least=1e-6)
    desirable_weight: float = option(1.0, "of the answers that were liked", least=0)
    undesirable_weight: float = option(1.0, "of the answers that were not", least=0)


def dpo(options: DpoOptions, reference: Model | None) -> Objective:
    """Direct preference optimization (Rafailov et al. 2023), smoothed as in its conservative form (Mitchell 2023)."""

    def objective(model: Model, batch: Batch) -> Loss:
        weight = batch.extras["weight"]
        base = reference_answers(model, reference, batch)
        rewards = options.beta * (answers(model, batch) - base)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margin = chosen - rejected
        wrong = options.label_smoothing
        losses = -(1 - wrong) * logsigmoid(margin) - wrong * logsigmoid(-margin)
        metrics = {
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
            "margin": margin.sum(),
            "accuracy": (margin > 0).float().sum(),
        }
        return Loss((losses * weight).sum(), {name: value.detach() for name, value in metrics.items()})

    return objective


def kto(options: KtoOptions, reference: Model | None) -> Objective:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024).

    How far the model has gone from the reference is estimated on the odd rows, where a prompt has another's answer: the
    mean over the batch of all processes, not below 0, without a gradient.
    """

    def objective(model: Model, batch: Batch) -> Loss:
        desirable, weight = batch.extras["desirable"], batch.extras["weight"]
        base = reference_answers(model, reference, batch)
        with torch.no_grad():
            drift = mean_of_all(answers(model, rows_of(batch, 1)) - base[1::2]).clamp(min=0)
        ratio = answers(model, rows_of(batch, 0)) - base[0::2]
        sign = torch.where(desirable, 1.0, -1.0)
        margin = options.beta * sign * (ratio - drift)
        scale = torch.where(desirable, options.desirable_weight, options.undesirable_weight) * weight
        metrics = {
            "reward": options.beta * (sign * ratio).sum(),  # of an undesirable answer: how much it was disfavoured
            "margin": margin.sum(),
            "accuracy": (margin > 0).float().sum(),
            "drift": drift * len(desirable),
        }
        losses = 1 - torch.sigmoid(margin)
        return Loss((losses * scale).sum(), {name: value.detach() for name, value in metrics.items()})

    return objective


def answers(model: Model, batch: Batch) -> Tensor:
    """log p(learnt tokens of the row), [rows] float32."""
    learnt = batch.labels != IGNORE

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        each = log_probabilities(hidden[learnt], weight, bias, batch.labels[learnt])
        return each.new_zeros(learnt.shape).masked_scatter(learnt, each).sum(1)

    found: Tensor = model(batch.tokens, batch.positions, read)
    return found


def reference_answers(model: Model, reference: Model | None, batch: Batch) -> Tensor:
    with torch.no_grad():
        if reference is not None:
            return answers(reference, batch)
        with disabled(model):
            return answers(model, batch)


def rows_of(batch: Batch, offset: int) -> Batch:
    """Every other row, from `offset`."""
    return Batch(batch.tokens[offset::2], batch.positions[offset::2], batch.labels[offset::2])


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over the processes too; each must call it."""
    sums = torch.stack([values.sum(), values.new_tensor(len(values))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0] / sums[1]
