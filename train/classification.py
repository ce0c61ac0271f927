"""One class for a text, read from the hidden state of its last token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from train.batch import Batch
from train.loss import Loss
from train.model import Model


def classify(model: Model, batch: Batch) -> Loss:
    """Cross-entropy of the classes, as of transformers' models for sequence classification."""
    target, last, weight = batch.extras["target"], batch.extras["last"], batch.extras["weight"]

    def read(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        return linear(hidden[torch.arange(len(hidden), device=hidden.device), last], head, bias)

    logits = model(batch.tokens, batch.positions, read).float()
    losses = cross_entropy(logits, target, reduction="none") * weight
    return Loss(losses.sum(), {"accuracy": (logits.argmax(-1) == target).float().sum()})
