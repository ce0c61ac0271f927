"""Learning from the probabilities that a larger model gives to every token (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from train.batch import IGNORE, Batch
from train.errors import TrainError
from train.flags import option
from train.head_loss import Score, log_softmax_, product_dtype, total_loss
from train.loss import Loss, Objective
from train.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    temperature: float = option(1.0, "both models' logits are divided by it", least=0.01)
    ce_weight: float = option(
        0.0, "share of the data's own tokens in the loss; the rest is the teacher's", least=0, most=0.99
    )


def distill(options: DistillOptions, teacher: Model) -> Objective:
    """(1 - w) T^2 KL(teacher || student) + w CE(data), at the positions that are learnt.

    T^2 keeps the gradient's size whatever the temperature. The teacher's rows beyond the student's vocabulary, which
    are padding, are left out.
    """

    def objective(model: Model, batch: Batch) -> Loss:
        learnt = batch.labels != IGNORE
        targets = batch.labels[learnt]

        def select(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return hidden[learnt], weight, bias

        with torch.no_grad():
            wise, head, offset = teacher(batch.tokens, batch.positions, select)
        sums = {name: torch.zeros((), device=wise.device) for name in ("kl", "cross_entropy")}

        def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            dtype, rows = product_dtype(hidden), len(weight)
            if len(head) < rows:
                raise TrainError(f"the teacher's vocabulary of {len(head)} is smaller than the student's {rows}")
            columns = head[:rows].to(dtype)
            wide = torch.promote_types(dtype, torch.float32)

            def teach(where: slice) -> Tensor:
                logits: Tensor = wise[where].to(dtype) @ columns.T
                return logits.to(wide) if offset is None else logits.to(wide) + offset[:rows]

            score = mixed(options, teach, targets, sums)
            return total_loss(hidden[learnt], weight, bias, score)

        return Loss(model(batch.tokens, batch.positions, read), sums)

    return objective


def mixed(
    options: DistillOptions, teach: Callable[[slice], Tensor], targets: Tensor, sums: Mapping[str, Tensor]
) -> Score:
    """`teach` gives the teacher's logits [n, vocab] at some of the positions; `sums` gets what is reported."""
    heat, share = options.temperature, options.ce_weight

    def score(logits: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[where, None]
        plain = log_softmax_(logits)
        student = plain if heat == 1.0 else log_softmax_(plain / heat)
        teacher = log_softmax_(teach(where) / heat)
        kl = kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        data = -plain.gather(1, wanted)[:, 0]
        sums["kl"].add_(kl.sum())
        sums["cross_entropy"].add_(data.sum())
        gradient = student.exp().sub_(teacher.exp_()).mul_((1 - share) * heat)
        if share:
            gradient.add_(plain.exp_(), alpha=share).scatter_add_(1, wanted, gradient.new_full(wanted.shape, -share))
        return (1 - share) * heat**2 * kl + share * data, gradient

    return score
